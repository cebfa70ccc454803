"""Adding seeds until it is known which label is better: what may be looked at after every group of seeds.

The tests are those of `lmgym.scores.permutations`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from lmgym.errors import InvalidArgumentError, check_choice, check_int, check_number
from lmgym.intervals import Interval
from lmgym.scores.matrix import ScoreMatrix
from lmgym.scores.permutations import boundaries, dealt_gaps, draw_deals, first_crossing

Pair = tuple[str, str]
POWER = 0.8
_LOOKING = 1.3  # so many times the seeds of a test with one look, by `power_table`


@dataclass(frozen=True)
class SequentialPlan:
    """What is fixed before the first run of a sequential comparison, for what it promises to hold.

    Args:
        group: seeds that every label still in question gets at a time, on every task.
        max_groups: after so many groups a pair that is open is undecided.
        margin: a gap of mean scores that does not matter; labels nearer than that can be found the same. None: never.
        alpha: the probability that any verdict on any pair is wrong.
        deals: random ways to deal the runs, from which the tests take their boundaries.
        seed: of these ways. The same seed at every look: what has been decided stays so.
    """

    group: int = 5
    max_groups: int = 6
    margin: float | None = None
    alpha: float = 0.05
    deals: int = 10_000
    seed: int = 0

    def __post_init__(self) -> None:
        check_int("group", self.group, 2)
        check_int("max_groups", self.max_groups, 1)
        check_int("deals", self.deals, 2)
        check_number("alpha", self.alpha, 0, 1, open_low=True, open_high=True)
        if self.margin is not None:
            check_number("margin", self.margin, 0, open_low=True)


@dataclass(frozen=True)
class Verdict:
    """What is known of the first label of a pair beside the second.

    Args:
        verdict: "better", "worse", "same" (nearer than the margin), "open" (more seeds to come), or "undecided" (the
            last group has come).
        seeds: of each of the two labels, on each task, that it rests on.
        gap: of the mean scores, with an interval that holds at every look and for all pairs together (95 % at
            alpha = 0.05) where the labels' distributions differ by a shift.
        more_seeds: about how many more seeds would decide it in 80 of 100 cases if the gap is what it seems; 0 where it
            is decided, infinite where no number would.
    """

    verdict: str
    seeds: int
    gap: Interval
    more_seeds: float


@dataclass(frozen=True)
class SequentialResult:
    """Where a sequential comparison stands.

    Args:
        verdicts: by pair.
        wanted: by label, how many seeds it must have on every task before the next look. Labels that are in no open
            pair are not in it: they need no more.
    """

    verdicts: dict[Pair, Verdict]
    wanted: dict[str, int]

    @property
    def finished(self) -> bool:
        """Whether every pair is decided, or undecided at the last group."""
        return not self.wanted


def sequential_test(matrix: ScoreMatrix, plan: SequentialPlan, pairs: Sequence[Pair] | None = None) -> SequentialResult:
    """Decides what the seeds so far decide. Run what it wants, and call it again with the whole matrix.

    A label's first group is its `group` lowest seeds, and so on; a group that is not complete is not looked at. What it
    promises, for any number of pairs and looks: with probability 1 - alpha no verdict is wrong. A verdict is wrong if

    - it is "better" or "worse", and both labels have the same distribution of scores on every task (exact, for any
      distribution and any number of seeds; where distributions differ but not their means, approximately so, because
      both labels have as many seeds: Chung & Romano 2013);
    - it is "same", and the mean gap is at least the margin (exact where the distributions differ by a shift alone).

    Without a margin, pairs are tested by Holm's step-down: m open pairs at alpha / m, then at the level of those left.
    With one, all m pairs are tested at alpha / m to the end: a pair that was found to differ could have been found the
    same by mistake, so it leaves nothing to the others. Both questions about a pair have the whole of its level, since
    no gap makes both answers wrong.

    Args:
        matrix: the scores of all runs so far, on every task at least one group of every label.
        plan: as it was when the first run began.
        pairs: which labels to compare; None takes every pair. They too are fixed before the first run.

    Raises:
        InvalidArgumentError: if a label has no complete group, or a failed run (`matrix.with_failures_as`).
    """
    pairs = list(itertools.combinations(matrix.labels, 2)) if pairs is None else list(pairs)
    paths = _Paths(matrix, plan, pairs)
    decided: dict[Pair, tuple[str, int]] = {}
    look = _look_through(paths, decided)
    wanted = {}
    if look < plan.max_groups:
        still = {label for pair in pairs if pair not in decided for label in pair}
        wanted = {label: (look + 1) * plan.group for label in matrix.labels if label in still}
    return SequentialResult(_verdicts(paths, decided, look), wanted)


class _Paths:
    """The paths of every pair, as far as its labels have complete groups."""

    def __init__(self, matrix: ScoreMatrix, plan: SequentialPlan, pairs: Sequence[Pair]) -> None:
        self.plan = plan
        self.pairs = pairs
        for label in itertools.chain.from_iterable(pairs):
            check_choice("pairs", label, matrix.labels)
        if len({frozenset(pair) for pair in pairs if pair[0] != pair[1]}) < len(pairs) or not pairs:
            raise InvalidArgumentError(f"`pairs` must be pairs of labels, at least one and each once, got {pairs}.")
        self.runs = {label: matrix.strata(label) for pair in pairs for label in pair}
        self.groups = {label: min(len(runs) for runs in strata) // plan.group for label, strata in self.runs.items()}
        short = [label for label, groups in self.groups.items() if not groups]
        if short:
            raise InvalidArgumentError(
                f"`matrix` must have at least {plan.group} seeds of every label on every task, got fewer of {short}."
            )
        looks = min(max(self.groups.values()), plan.max_groups)
        rng = np.random.default_rng(plan.seed)
        all_deals = draw_deals(plan.deals, plan.max_groups, len(matrix.tasks), plan.group, rng)
        self.deals = list(itertools.islice(all_deals, looks))
        self._gaps: dict[Pair, NDArray[np.float64]] = {}

    def shifted(self, pair: Pair, shift: float, look: int) -> NDArray[np.float64]:
        """The paths (R, k) of the sum of gaps up to a look, where the first label's scores are lower by a shift."""
        if pair not in self._gaps:
            self._gaps[pair] = self._deal(pair)
        moved = np.stack([deals.shift for deals in self.deals[:look]], axis=1)
        return np.cumsum(self._gaps[pair][:, :look] - shift * moved, axis=1)

    def differs(self, pair: Pair, level: float, look: int) -> bool:
        """Whether the two-sided test of no gap has rejected by a look."""
        return self._rejects(np.abs(self.shifted(pair, 0.0, look)), level)

    def is_within(self, pair: Pair, margin: float, level: float, look: int) -> bool:
        """Whether both one-sided tests, of a gap of at least the margin in either direction, have rejected."""
        above = self._rejects(-self.shifted(pair, margin, look), level)
        return above and self._rejects(self.shifted(pair, -margin, look), level)

    def scores(self, label: str, look: int) -> NDArray[np.float64]:
        """(M, n) the scores of a label up to a look."""
        return np.stack([runs[: look * self.plan.group] for runs in self.runs[label]])

    def _rejects(self, paths: NDArray[np.float64], level: float) -> bool:
        return bool(first_crossing(paths[None], level, self.plan.max_groups)[0])

    def _deal(self, pair: Pair) -> NDArray[np.float64]:
        """(R, k) the gap of every group."""
        looks = min(*(self.groups[label] for label in pair), len(self.deals))
        blocks = []
        for label in pair:
            blocks.append(self.scores(label, looks).reshape(len(self.runs[label]), looks, self.plan.group))
        gaps = [dealt_gaps(blocks[0][None, :, k], blocks[1][None, :, k], self.deals[k])[0] for k in range(looks)]
        return np.stack(gaps, axis=1)


def _look_through(paths: _Paths, decided: dict[Pair, tuple[str, int]]) -> int:
    """Takes the looks that the seeds allow, until all pairs are decided; returns the last."""
    look = 0
    while look < paths.plan.max_groups:
        still = {label for pair in paths.pairs if pair not in decided for label in pair}
        if not still or any(paths.groups[label] <= look for label in still):
            break
        look += 1
        _decide(paths, decided, look)
    return look


def _decide(paths: _Paths, decided: dict[Pair, tuple[str, int]], look: int) -> None:
    """Adds to `decided` the pairs that a look decides, with the look."""
    plan = paths.plan
    changed = True
    while changed:
        level = plan.alpha / (len(paths.pairs) - (len(decided) if plan.margin is None else 0))
        changed = False
        for pair in paths.pairs:
            if pair in decided:
                continue
            if paths.differs(pair, level, look):
                above = paths.shifted(pair, 0.0, look)[0, -1] > 0
                decided[pair] = ("better" if above else "worse", look)
                changed = plan.margin is None and len(decided) < len(paths.pairs)
            elif plan.margin is not None and paths.is_within(pair, plan.margin, level, look):
                decided[pair] = ("same", look)


def _verdicts(paths: _Paths, decided: dict[Pair, tuple[str, int]], look: int) -> dict[Pair, Verdict]:
    found = {}
    waiting = "undecided" if look == paths.plan.max_groups else "open"
    for pair in paths.pairs:
        verdict, at = decided.get(pair, (waiting, look))
        more = 0.0 if pair in decided else _more_seeds(paths, pair, at, len(paths.pairs) - len(decided))
        found[pair] = Verdict(verdict, at * paths.plan.group, _gap(paths, pair, at), more)
    return found


def _gap(paths: _Paths, pair: Pair, look: int) -> Interval:
    """The gap of mean scores, with the shifts that the test at this look does not reject at alpha over all pairs."""
    plan = paths.plan
    level = plan.alpha / len(paths.pairs)
    scores = [paths.scores(label, look) for label in pair]
    gap = float(scores[0].mean() - scores[1].mean())
    reach = 4 * float(np.ptp(scores)) + 1e-9

    def is_held(shift: float) -> bool:
        statistic = np.abs(paths.shifted(pair, shift, look))[None]
        return bool(statistic[0, 0, -1] <= boundaries(statistic, level, plan.max_groups)[0, -1])

    ends = []
    for direction in (-1, 1):
        inside = gap
        outside = gap + direction * reach
        if is_held(outside):
            ends.append(direction * math.inf)
            continue
        for _ in range(25):
            middle = (inside + outside) / 2
            if is_held(middle):
                inside = middle
            else:
                outside = middle
        ends.append(outside)
    return Interval(gap, ends[0], ends[1])


def _more_seeds(paths: _Paths, pair: Pair, look: int, open_pairs: int) -> float:
    """From the normal approximation: n = v ((z_level + z_power) / distance)^2, v the variance of the gap at n = 1."""
    plan = paths.plan
    scores = [paths.scores(label, look) for label in pair]
    variance = sum(float(x.var(axis=1, ddof=1).sum()) / len(x) ** 2 for x in scores)
    gap = abs(float(scores[0].mean() - scores[1].mean()))
    level = plan.alpha / (open_pairs if plan.margin is None else len(paths.pairs))
    quantile = NormalDist().inv_cdf
    needed = math.inf
    if gap > 0:
        needed = variance * ((quantile(1 - level / 2) + quantile(POWER)) / gap) ** 2
    if plan.margin is not None and gap < plan.margin:  # two tests, each of which may fail in half of the rest
        distance = plan.margin - gap
        needed = min(needed, variance * ((quantile(1 - level) + quantile((1 + POWER) / 2)) / distance) ** 2)
    more = _LOOKING * needed - look * plan.group
    return more if math.isinf(more) else plan.group * max(1, math.ceil(more / plan.group))
