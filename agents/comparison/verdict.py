"""The verdict of a comparison in a few sentences, what it rests on, and what it does not show."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from agents.comparison.scales import optimum_of
from agents.comparison.study import FAILURE_COUNTS_AS, Study
from agents.comparison.table import FAILED, REPEATED, UNFINISHED
from lmgym.intervals import Interval
from lmgym.scores import PairComparison, SequentialPlan, sequential_test

LEVEL = 0.05
FEW_SEEDS = 10
MANY_SEEDS = 200  # more than that is "many"
_WIDE = 0.002  # of the gain: bounds of V* that are said
_FAR = 2.0  # times: a budget that is another one
_OUT_OF_SCALE = 3.0  # times the median KL
_STATES = {
    FAILED: f"Failed runs, each of which counts as the reference, {FAILURE_COUNTS_AS:g} of the gain",
    UNFINISHED: "Unfinished runs, which are left out",
    REPEATED: "Runs with the config and seed of another, which are left out",
}
_NAMED = 4  # labels in a sentence; of more their number


@dataclass(frozen=True)
class Findings:
    """What a report says in words.

    Attributes:
        sentences: the verdict; the first says which label is best. rests_on: the evidence. limits: what is not shown.
    """

    sentences: Sequence[str]
    rests_on: Sequence[str]
    limits: Sequence[str]


@dataclass(frozen=True)
class Rule:
    """What was found where seeds were added until it was known.

    Attributes:
        sentences: the verdict. evidence: the test, in a sentence.
    """

    sentences: Sequence[str]
    evidence: str


def find_verdict(study: Study, rule: Rule | None = None) -> Findings:
    """The verdict of a study.

    Args:
        study: of the runs. rule: by which seeds were added until it was decided; its findings are the verdict then.
    """
    if rule is None:
        return Findings(_sentences(study), _rests_on(study), _limits(study))
    return Findings(rule.sentences, [*_rests_on(study, tested=False), rule.evidence], _limits(study))


# -- the verdict -----------------------------------------------------------------------------------------------------


def _sentences(study: Study) -> list[str]:
    matrix = study.matrix
    if matrix is None:
        return ["Nothing can be compared: no finished run has a known share of the gain."]
    labels = list(matrix.labels)
    best = labels[0]
    where = f"on {matrix.tasks[0]}" if len(matrix.tasks) == 1 else f"over {len(matrix.tasks)} tasks"
    if len(labels) == 1:
        share = shown(study.aggregates["mean"][best])
        return [f"{best} has {share} of the gain {where} on average; there is nothing to compare it with."]
    found = [_of_label(study, best, labels[1:], f" {where} with {_seeds(study)}")]
    if len(labels) <= 1 + _NAMED:
        found += [_of_label(study, label, labels[i:], "") for i, label in enumerate(labels[1:-1], start=2)]
    return found


def _differs(pair: PairComparison) -> bool:
    return pair.adjusted <= LEVEL


def _of_label(study: Study, label: str, others: Sequence[str], where: str) -> str:
    """What is known of a label beside those that have a lower mean."""
    beaten = [other for other in others if _differs(study.pair(label, other))]
    equal = [other for other in others if other not in beaten]
    found = []
    if beaten:
        found.append(f"is better than {_beaten(study, label, beaten, len(others))}")
    if equal:
        found.append(f"cannot be told apart from {_equal(study, label, equal)}")
    return f"{label} {', and '.join(found)}{where}."


def _beaten(study: Study, label: str, beaten: Sequence[str], others: int) -> str:
    """Those that a label is better than, the nearest first, with the gaps."""
    gaps = {other: study.pair(label, other).gap for other in beaten}
    ordered = sorted(beaten, key=lambda other: gaps[other].mean)
    told = [f"{other} by {shown(gaps[other])}" for other in ordered]
    if len(told) <= _NAMED:
        return f"{_listed(told)} of the gain"
    farthest = f"{ordered[-1]} by {gaps[ordered[-1]].mean:.3f}"
    return f"{len(beaten)} of {others} others, from {told[0]} to {farthest} of the gain"


def _equal(study: Study, label: str, equal: Sequence[str]) -> str:
    """Those that a label cannot be told apart from, the nearest first, with the gaps and what would tell."""
    nearest = sorted(equal, key=lambda other: study.pair(label, other).gap.mean)[:_NAMED]
    told = []
    for other in nearest:
        more = _told_more(_more_seeds(study, label, other))
        told.append(f"{other} (gap {shown(study.pair(label, other).gap)}{more})")
    if len(equal) > len(nearest):
        told.append(f"{len(equal) - len(nearest)} others")
    return _listed(told, "or")


def _more_seeds(study: Study, label: str, other: str) -> float:
    """About how many more seeds would tell two labels apart, by the plan of a sequential test; nan if it cannot say."""
    matrix = study.matrix
    assert matrix is not None
    plan = SequentialPlan(group=2, max_groups=100, deals=200)
    part = matrix.select(labels=[label, other])
    if min(len(part.cell(name, task)) for name in (label, other) for task in part.tasks) < plan.group:
        return math.nan
    return sequential_test(part, plan).verdicts[label, other].more_seeds


def _told_more(seeds: float) -> str:
    if math.isnan(seeds) or seeds == 0:
        return ""
    if seeds > MANY_SEEDS:
        return f"; it would take more than {MANY_SEEDS} more seeds"
    return f"; about {seeds:.0f} more seeds would tell"


# -- what it rests on ------------------------------------------------------------------------------------------------


def _rests_on(study: Study, tested: bool = True) -> list[str]:
    states = Counter(run.state for run in study.table.runs)
    counts = ", ".join(f"{count} {state}" for state, count in states.items())
    found = [f"{len(study.table.runs)} runs ({counts})."]
    matrix = study.matrix
    if matrix is None:
        return found
    runs = sum(len(matrix.cell(label, task)) for label in matrix.labels for task in matrix.tasks)
    block = f"{len(matrix.labels)} agents on {_listed(matrix.tasks)}, {_seeds(study)}"
    found.append(f"Compared are {runs} runs: {block}; every agent has run on every one of these tasks.")
    left = [label for label in study.labels if label not in matrix.labels]
    tasks = [task for task in study.tasks if task not in matrix.tasks]
    if left or tasks:
        names = _listed([*left, *tasks])
        found.append(f"Shown, and not in the comparison, for want of a run on every task: {names}.")
    found.append(
        "Agents are ordered by the mean over tasks of their share of the gain, (J - J_ref) / (V* - J_ref) on held-out "
        "prompts: 0 is the reference, 1 the optimum. Intervals are 95 %, of a bootstrap over seeds."
    )
    if tested and len(matrix.labels) > 1:
        found.append(
            f"Two agents differ where a permutation test of their mean gap says so at {LEVEL:g}, after Holm's "
            f"correction for {len(study.pairs)} {'pair' if len(study.pairs) == 1 else 'pairs'}."
        )
    return found


# -- what it does not show -------------------------------------------------------------------------------------------


def _limits(study: Study) -> list[str]:
    found = [*_of_runs(study), *_of_seeds(study), *_of_bounds(study), *_of_budgets(study), *_of_kl(study)]
    found.append(_of_settings(study))
    found.append("Intervals are about other seeds on these tasks, and say nothing of other tasks or models.")
    return found


def _of_settings(study: Study) -> str:
    if study.tuning:
        trials = max(x.trials for x in study.tuning)
        return (
            f"Every agent was tuned by {trials} settings, on seeds of their own. More trials, or wider ranges of "
            "values, may find better ones."
        )
    if {run.label for run in study.table.finished} != {run.agent for run in study.table.finished}:
        return (
            "Settings of an agent that were tried are agents of their own here: the best of them was chosen on these "
            "very runs, and is flattered by it."
        )
    return "Every agent ran with the settings of its config; the runs do not say that any was tuned for these tasks."


def _of_runs(study: Study) -> list[str]:
    found = []
    by_state: dict[str, Counter[str]] = {}
    for run in study.table.runs:
        by_state.setdefault(run.state, Counter())[run.label] += 1
    for state, words in _STATES.items():
        if state in by_state:
            names = _listed([f"{count} of {label}" for label, count in by_state[state].items()])
            found.append(f"{words}: {names}.")
    return found


def _of_seeds(study: Study) -> list[str]:
    matrix = study.matrix
    if matrix is None:
        return []
    counts = [len(matrix.cell(label, task)) for label in matrix.labels for task in matrix.tasks]
    if min(counts) >= FEW_SEEDS:
        return []
    spread = "a run that fails once in ten may not have been seen"
    return [f"{_seeds(study).capitalize()} are few: {spread}, and gaps of the size of the intervals are noise."]


def _of_bounds(study: Study) -> list[str]:
    found = []
    for task in study.tasks:
        scales = [optimum_of(run.summary) for run in study.table.finished if run.task == task]
        optima = [scale[1] for scale in scales if scale is not None]
        if not optima:
            found.append(f"The optimum of {task} is not known: its returns are in no share and no aggregate.")
        elif optima[0].upper is None:
            found.append(f"Of {task} only a lower bound of V* is known: its shares are at most what is shown.")
        elif optima[0].width > _WIDE:
            ends = f"{optima[0].lower:.3f} and {optima[0].upper:.3f}"
            width = f"{100 * optima[0].width:.1f} % of the gain"
            found.append(f"V* of {task} is known to lie within {ends}, {width}; shares use {optima[0].value:.3f}.")
    return found


def _of_budgets(study: Study) -> list[str]:
    found = []
    for name, words in (("total_timesteps", "env steps"), ("train_seconds", "seconds")):
        means: dict[str, float] = {}
        for label in study.labels:
            numbers = [run.summary[name] for run in study.table.finished if run.label == label]
            means[label] = sum(numbers) / len(numbers) if numbers else 0.0
        learned = {label: mean for label, mean in means.items() if mean > 0 and _learns(study, label)}
        if len(learned) > 1 and max(learned.values()) > _FAR * min(learned.values()):
            most = max(learned, key=lambda label: learned[label])
            least = min(learned, key=lambda label: learned[label])
            times = learned[most] / learned[least]
            found.append(f"Budgets differ: {most} took {times:.1f} times the {words} of {least}.")
    return found


def _learns(study: Study, label: str) -> bool:
    return any(run.summary.get("backward_tokens") for run in study.table.finished if run.label == label)


def _of_kl(study: Study) -> list[str]:
    """Policies so far from the reference that their score is hardly of the same text."""
    far: dict[str, list[str]] = {}
    for task in study.tasks:
        cells = {label: study.cell(label, task, "kl") for label in study.labels}
        known = {label: kl.mean for label, kl in cells.items() if kl is not None}
        middle = sorted(known.values())[len(known) // 2] if known else 0.0
        for label, kl in known.items():
            if kl > _OUT_OF_SCALE * max(middle, 0.5):
                far.setdefault(task, []).append(f"{label} ({kl:.1f} nats)")
    return [f"KL out of scale on {task}: {_listed(names)}." for task, names in far.items()]


# -- words -----------------------------------------------------------------------------------------------------------


def _seeds(study: Study) -> str:
    matrix = study.matrix
    assert matrix is not None
    counts = {len(matrix.cell(label, task)) for label in matrix.labels for task in matrix.tasks}
    if len(counts) > 1:
        return f"{min(counts)} to {max(counts)} seeds"
    return "1 seed" if counts == {1} else f"{min(counts)} seeds"


def shown(interval: Interval) -> str:
    """A number with its interval; without it where few seeds leave that infinite."""
    if not (math.isfinite(interval.low) and math.isfinite(interval.high)):
        return f"{interval.mean:.3f}"
    return f"{interval.mean:.3f} [{interval.low:.3f}, {interval.high:.3f}]"


def _listed(names: Sequence[str] | Mapping[str, object], word: str = "and") -> str:
    names = list(names)
    if len(names) < 2:
        return "".join(names)
    return f"{', '.join(names[:-1])} {word} {names[-1]}"
