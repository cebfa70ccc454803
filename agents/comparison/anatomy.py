"""Where the gaps come from, of the runs that were taken apart: `anatomy.json` beside their `summary.json`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agents.comparison.figures import Look, Panel, file_name, label_axes, new_axes
from agents.comparison.markup import escape, paragraphs, shortened
from agents.comparison.scales import optimum_of
from agents.comparison.study import Study
from agents.comparison.table import Run
from agents.runs.anatomy import ANATOMY_FILE
from lmgym.files import RunFileError, read_json

EXAMPLES = 2  # responses of a label on a task
_LEVELS = 4  # of colour
_MOST = 0.2  # of the gain: a token with that share or more has the strongest colour


@dataclass(frozen=True)
class Token:
    """A token of a response, with its share of the gap as a share of the gain, and its probabilities."""

    text: str
    share: float
    probability: float
    optimal: float


@dataclass(frozen=True, eq=False)
class Anatomy:
    """What a run's gap is made of, in shares of the gain: (T,) by step; and responses, each with its prompt."""

    by_step: NDArray[np.float64]
    examples: Sequence[tuple[str, Sequence[Token]]]


def read_anatomy(run: Run) -> Anatomy | None:
    """The anatomy of a run; None where it has none, one that is damaged, or one of an earlier checkpoint."""
    scale = optimum_of(run.summary)
    path = run.directory / ANATOMY_FILE
    if scale is None or not path.is_file():
        return None
    gain = scale[1].value - scale[0].mean
    try:
        found = read_json(path)
        if found["step"] != run.summary["total_timesteps"]:
            return None
        by_step = np.array([part["mean"] for part in found["gap"]["by_step"]], dtype=float) / gain
        examples = [_read_example(example, gain) for example in found["examples"]]
    except (RunFileError, KeyError, TypeError, ValueError):
        return None
    return Anatomy(by_step, examples) if np.isfinite(by_step).all() else None


def _read_example(example: Mapping[str, Any], gain: float) -> tuple[str, list[Token]]:
    tokens = [
        Token(str(x["token"]), float(x["share"]) / gain, float(x["probability"]), float(x["optimal"]))
        for x in example["tokens"]
    ]
    return str(example["prompt"]), tokens


def draw_anatomy(study: Study, looks: Mapping[str, Look]) -> list[Panel]:
    """A panel a task: the share of every step in the gap, as a mean over the runs of a label that were taken apart."""
    panels = []
    for number, task in enumerate(study.tasks):
        lines = {label: _mean_by_step(study, label, task) for label in study.labels}
        known = {label: line for label, line in lines.items() if line is not None}
        if not known:
            continue
        figure, axes = new_axes(task)
        for label, line in known.items():
            look = looks[label]
            steps = np.arange(len(line))
            axes.plot(steps, line, look.marker, color=look.color, linestyle=look.dash, markersize=4.5, gid=look.gid)
        axes.set_ylim(bottom=min(0.0, *(float(line.min()) for line in known.values())))
        label_axes(axes, "step of the response", "missing share of the gain")
        sums = "; ".join(f"{label} {line.sum():.3f}" for label, line in known.items())
        alt = f"What is missing to the optimum on {task}, by step of the response; in all: {sums}."
        shown = {label: looks[label] for label in known}
        panels.append(Panel(file_name("anatomy", number, task), figure, alt, legend=shown))
    return panels


def _mean_by_step(study: Study, label: str, task: str) -> NDArray[np.float64] | None:
    found = [read_anatomy(run) for run in study.table.of(label, task)]
    lines = [anatomy.by_step for anatomy in found if anatomy is not None]
    if not lines or len({len(line) for line in lines}) > 1:
        return None
    return np.mean(lines, axis=0)


def coloured_examples(study: Study) -> str:
    """Responses whose tokens are coloured by their shares of the gap; those of a task in one fold."""
    parts = []
    for task in study.tasks:
        cards = [card for label in study.labels for card in _cards(study, label, task)]
        if cards:
            parts.append(f"<details><summary>Tokens of {escape(task)}</summary>{''.join(cards)}</details>\n")
    if not parts:
        return ""
    note = (
        "The stronger its colour, the more of the gap lies in the choice of a token: kl_coef KL(pi || pi*) at the "
        f"state where it was chosen. The strongest stands for {_MOST:g} of the gain or more. Point at a token for its "
        "numbers."
    )
    return paragraphs([note]) + "".join(parts)


def _cards(study: Study, label: str, task: str) -> list[str]:
    """Of the run of a label with the lowest seed that was taken apart."""
    for run in study.table.of(label, task):
        anatomy = read_anatomy(run)
        if anatomy is not None:
            return [_card(label, prompt, tokens) for prompt, tokens in anatomy.examples[:EXAMPLES]]
    return []


def _card(label: str, prompt: str, tokens: Sequence[Token]) -> str:
    words = "".join(map(_coloured, tokens[:200]))
    return (
        f'<div class="example"><p>{escape(label)}: <bdi class="prompt">{escape(shortened(prompt))}</bdi></p>'
        f'<p class="tokens"><bdi>{words}</bdi></p></div>\n'
    )


def _coloured(token: Token) -> str:
    level = 0
    if token.share > 0:
        level = min(_LEVELS, math.ceil(_LEVELS * token.share / _MOST - 0.1))
    kind = f' class="gap-{level}"' if level > 0 else ""
    told = f"{token.share:.3f} of the gain; probability {token.probability:.3f}, under pi* {token.optimal:.3f}"
    return f'<span{kind} title="{told}">{escape(token.text)}</span>'
