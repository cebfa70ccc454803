"""The parts of the report that are tables and texts."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from agents.comparison.markup import escape, listed, paragraphs, section, shortened, table
from agents.comparison.sensitivity import sensitivity_tables
from agents.comparison.study import Study
from agents.comparison.table import Run
from agents.comparison.verdict import Findings
from lmgym.files import RunFileError, read_text
from lmgym.intervals import Interval
from lmgym.scores import Curve, ScoreCurves, SolveTime, solve_times

MAX_PROMPTS = 3  # of a task
NOTHING = "-"
SOLVED = 0.9  # of the gain
_MEMORY = "peak_memory_bytes"
_MEANS = (
    ("total_timesteps", "env steps"),
    ("forward_tokens", "forward tokens"),
    ("backward_tokens", "backward tokens"),
    ("train_seconds", "seconds"),
)


def verdict_section(findings: Findings) -> str:
    """The verdict, what it rests on, and what it does not show."""
    evidence = f"<div><h3>What it rests on</h3>{listed(findings.rests_on)}</div>"
    limits = f"<div><h3>What it does not show</h3>{listed(findings.limits)}</div>"
    return section(
        "verdict",
        "Verdict",
        f'<div class="verdict">{paragraphs(findings.sentences)}<div class="pairs">{evidence}{limits}</div></div>\n',
    )


def results_table(study: Study) -> str:
    """A row a label: the aggregate and the mean over seeds on each task."""
    heads = ["agent", "mean", "IQM", *study.tasks, "worst run", "failed or below 0"]
    rows = []
    numbers: list[list[float]] = []
    for label in study.labels:
        cells = [_aggregate(study, "mean", label), _aggregate(study, "iqm", label)]
        cells += [study.cell(label, task) for task in study.tasks]
        shares = [run.graded("normalised") for run in study.table.finished if run.label == label]
        worst = min((share.mean for share in shares if share is not None), default=math.nan)
        failed = study.failures.get(label)
        numbers.append([math.nan if cell is None else cell.mean for cell in cells])
        lost = NOTHING if failed is None else f"{failed.mean:.0%}"
        rows.append([escape(label), *map(_cell, cells), _number(worst), lost])
    best = frozenset((_best(numbers, j), j + 1) for j in range(2 + len(study.tasks)) if _best(numbers, j) >= 0)
    caption = "Share of the gain on held-out prompts, with 95 % intervals over seeds. The best of a column stands out."
    return table(caption, heads, rows, best)


def pairs_table(study: Study) -> str:
    """A row a pair of labels: by how much, how likely, how sure."""
    if not study.pairs:
        return ""
    rows = [
        [
            f"{escape(first)}, {escape(second)}",
            _cell(pair.gap),
            _cell(pair.improvement),
            f"{pair.p_value:.4f}",
            f"{pair.adjusted:.4f}",
        ]
        for (first, second), pair in study.pairs.items()
    ]
    heads = ["pair", "gap of means", "P(first better)", "p", "p after Holm"]
    shown = table("Pairs of agents", heads, rows)
    return f"<details><summary>All {len(rows)} pairs as a table</summary>{shown}</details>"


def tuning_tables(study: Study) -> str:
    """What tuning has made of each agent, and the settings."""
    return sensitivity_tables(study.tuning, list(study.tasks))


def solve_table(study: Study) -> str:
    """When the runs of a label first had most of the gain, where all of a label's runs on a task were graded along."""
    curves = {}
    for run in study.table.finished:
        known = run.series.get("eval/normalised")
        if known is not None and run.is_graded_along and run.seed is not None:
            curves[run.label, run.task, run.seed] = Curve(known.seconds, known.value)
    if not curves:
        return ""
    found = solve_times(ScoreCurves(curves), SOLVED)
    tasks = [task for task in study.tasks if any(task in times for times in found.values())]
    rows = []
    for label in study.labels:
        times = found.get(label, {})
        rows.append([escape(label), *(_solved(times[task]) if task in times else NOTHING for task in tasks)])
    caption = f"Seconds of training to {SOLVED:g} of the gain, by gradings on held-out prompts: median over seeds"
    return table(caption, ["agent", *tasks], rows)


def _solved(time: SolveTime) -> str:
    """The median, and how many of the runs were there at all."""
    median = _seconds(time.median) if math.isfinite(time.median) else NOTHING
    return f'{median} <span class="range">{time.reached} of {time.runs}</span>'


def cost_section(study: Study) -> str:
    """What training cost, as a mean over the runs of a label."""
    heads = ["agent", "runs", *(words for _, words in _MEANS), "tokens a second"]
    has_memory = any(run.summary.get(_MEMORY) for run in study.table.finished)
    rows = []
    for label in study.labels:
        runs = [run for run in study.table.finished if run.label == label]
        means = [_mean(runs, key) for key, _ in _MEANS]
        speed = (means[1] + means[2]) / means[3] if means[2] and means[3] else math.nan
        shown = [_count(mean) for mean in means[:3]] + [_seconds(means[3]), _count(speed)]
        if has_memory:
            shown.append(_count(_mean(runs, _MEMORY) / 2**20))
        rows.append([escape(label), str(len(runs)), *shown])
    if has_memory:
        heads.append("peak memory, MiB")
    note = (
        "Means over all finished runs of an agent. Tokens are those that the networks read, forward and backward. "
        "Seconds are of training, without grading, and are not to be compared closely where runs shared a machine."
    )
    if has_memory:
        note += " Memory is the most at a time: on a GPU what torch allocated, on a CPU all that the process held."
    return section("cost", "Cost", paragraphs([note]), table("What a run cost on average", heads, rows))


def examples_section(study: Study) -> str:
    """Responses of all agents to the same prompts, beside those of the reference."""
    parts: list[str] = []
    for task in study.tasks:
        cards = _examples(study, task)
        if cards:
            opened = "" if parts else " open"
            parts.append(f"<details{opened}><summary>{escape(task)}</summary>{''.join(cards)}</details>\n")
    if not parts:
        return ""
    note = "A response to each prompt, of the run with the lowest seed, with its score: examples, and no evidence."
    return section("examples", "Responses side by side", paragraphs([note]), *parts)


def _examples(study: Study, task: str) -> list[str]:
    answers: dict[str, dict[str, tuple[float | None, str]]] = defaultdict(dict)
    reference: dict[str, tuple[float | None, str]] = {}
    for label in study.labels:
        runs = study.table.of(label, task)
        for row in _samples(runs[0]) if runs else []:
            prompt = str(row.get("prompt", ""))
            reference.setdefault(prompt, (row.get("before_score"), str(row.get("before", ""))))
            answers[prompt][label] = (row.get("after_score"), str(row.get("after", "")))
    chosen = sorted(answers, key=lambda prompt: -len(answers[prompt]))[:MAX_PROMPTS]
    return [_example(prompt, {"reference": reference[prompt], **answers[prompt]}) for prompt in chosen]


def _samples(run: Run) -> list[Mapping[str, Any]]:
    try:
        rows = json.loads(read_text(run.directory / "samples.json"))
    except (RunFileError, ValueError, RecursionError):
        return []
    return [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []


def _example(prompt: str, answers: Mapping[str, tuple[float | None, str]]) -> str:
    lines = [f'<div class="example"><bdi class="prompt">{escape(shortened(prompt))}</bdi><dl>']
    for label, (score, text) in answers.items():
        number = f"{score:+.2f}" if isinstance(score, int | float) else NOTHING
        words = escape(shortened(text)) if text.strip() else '<span class="soft">(empty)</span>'
        lines.append(f'<dt>{escape(label)}</dt><dd class="score">{number}</dd>')
        lines.append(f'<dd class="words"><bdi>{words}</bdi></dd>')
    return "\n".join([*lines, "</dl></div>\n"])


def runs_section(study: Study, command: str) -> str:
    """Every run with its state, and where the numbers come from."""
    rows = []
    for run in study.table.runs:
        share = run.graded("normalised")
        state = run.state if not run.error else f"{run.state}: {shortened(run.error, 200)}"
        seconds = run.summary.get("train_seconds")
        cells = [_number(math.nan if share is None else share.mean), _seconds(math.nan if seconds is None else seconds)]
        seed = NOTHING if run.seed is None else str(run.seed)
        rows.append([escape(run.name), escape(run.label), escape(run.task), seed, *cells, escape(state)])
    heads = ["run", "agent", "task", "seed", "share of the gain", "seconds", "state"]
    runs = f"<details><summary>All {len(rows)} runs</summary>{table('Runs', heads, rows)}</details>\n"
    made = f"<p>This report was made by</p><pre>{escape(command)}</pre>\n"
    files = (
        "Beside it lie results.parquet (a row a run, step and metric: pandas.read_parquet reads it), runs.parquet (a "
        "row a run, with its config, packages, command, commit and machine), the figures as PNG and SVG, and exports/ "
        "for rliable, marl-eval, spreadsheets and LaTeX."
    )
    return section("runs", "Runs and origin", made, paragraphs([files]), _origins(study), runs)


def _origins(study: Study) -> str:
    """The distinct packages, commits and machines of the runs, with how many have them."""
    lines = []
    for name, words in (("packages", "Packages"), ("commit", "Commit"), ("machine", "Machine")):
        counts: dict[str, int] = defaultdict(int)
        for run in study.table.runs:
            value = run.origin.get(name)
            if value is not None:
                counts[_plain(value)] += 1
        for text, count in counts.items():
            lines.append(f"{words} of {count} {'run' if count == 1 else 'runs'}: {text}")
    return listed(lines) if lines else ""


def _plain(value: Any) -> str:
    if not isinstance(value, Mapping):
        return str(value)
    return ", ".join(f"{key} {x if isinstance(x, str | int) else json.dumps(x)}" for key, x in value.items() if x)


# -- numbers ---------------------------------------------------------------------------------------------------------


def _aggregate(study: Study, name: str, label: str) -> Interval | None:
    return study.aggregates.get(name, {}).get(label)


def _best(numbers: Sequence[Sequence[float]], column: int) -> int:
    """The row of the largest number of a column; -1 where there is none, or a single row."""
    known = [(row[column], i) for i, row in enumerate(numbers) if not math.isnan(row[column])]
    return max(known)[1] if len(known) > 1 else -1


def _mean(runs: Sequence[Run], key: str) -> float:
    numbers = [run.summary.get(key) for run in runs]
    known = [number for number in numbers if isinstance(number, int | float)]
    return sum(known) / len(known) if known else math.nan


def _cell(interval: Interval | None) -> str:
    if interval is None:
        return NOTHING
    if not (math.isfinite(interval.low) and math.isfinite(interval.high)):
        return _number(interval.mean)
    return f'{_number(interval.mean)} <span class="range">[{interval.low:.3f}, {interval.high:.3f}]</span>'


def _number(number: float) -> str:
    return NOTHING if math.isnan(number) else f"{round(number, 3) + 0.0:.3f}"


def _count(number: float) -> str:
    return NOTHING if math.isnan(number) else f"{number:,.0f}"


def _seconds(number: float) -> str:
    return NOTHING if math.isnan(number) else f"{number:,.1f}"
