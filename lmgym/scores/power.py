"""How many seeds tell apart which gap: the sequential test, simulated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lmgym.errors import check_int, check_number
from lmgym.scores.permutations import dealt_gaps, draw_deals, first_crossing
from lmgym.scores.sequential import POWER, SequentialPlan

_DEALS = 1_000
_TOGETHER = 250  # simulations that share their random deals


@dataclass(frozen=True, eq=False)
class PowerTable:
    """How often a sequential test has told two labels apart.

    Args:
        gaps: (N,) between the mean scores, in standard deviations over seeds.
        seeds: (K,) of each label on each task, after each group.
        power: (N, K) the share of comparisons that were decided by then, and rightly.
        standard_error: at most, of these shares.
    """

    gaps: NDArray[np.float64]
    seeds: NDArray[np.int64]
    power: NDArray[np.float64]
    standard_error: float

    def seeds_needed(self, power: float = POWER) -> dict[float, int | None]:
        """By gap the first number of seeds by which so many comparisons are decided; None where the last is too few."""
        enough = self.power >= power
        found: dict[float, int | None] = {}
        for i in range(len(self.gaps)):
            found[float(self.gaps[i])] = int(self.seeds[enough[i].argmax()]) if enough[i].any() else None
        return found


def power_table(
    gaps: Sequence[float],
    plan: SequentialPlan | None = None,
    *,
    tasks: int = 1,
    pairs: int = 1,
    simulations: int = 1_000,
    rng: np.random.Generator,
) -> PowerTable:
    """Simulates the sequential test of two labels whose scores are normal, with the same gap on every task.

    Args:
        gaps: between the mean scores, in standard deviations over seeds of one task. A gap of 0.05 in the normalised
            return where seeds spread by 0.1 is 0.5.
        plan: of the test; its margin is not looked at. None takes `SequentialPlan()`.
        tasks: M. pairs: how many pairs are tested together, of which this is one, tested at alpha / pairs.
        simulations: comparisons for each gap.
        rng: draws the scores, and the deals of the tests.
    """
    plan = SequentialPlan() if plan is None else plan
    for gap in gaps:
        check_number("gaps", gap, 0, open_low=True)
    check_int("tasks", tasks, 1)
    check_int("pairs", pairs, 1)
    check_int("simulations", simulations, 1)
    power = np.zeros((len(gaps), plan.max_groups))
    for start in range(0, simulations, _TOGETHER):
        count = min(_TOGETHER, simulations - start)
        shape = (2, plan.max_groups, count, tasks, plan.group)
        noise = rng.standard_normal(shape)
        deals = list(draw_deals(_DEALS, plan.max_groups, tasks, plan.group, rng))
        for i in range(len(gaps)):
            groups = [dealt_gaps(noise[0, k] + gaps[i], noise[1, k], deals[k]) for k in range(plan.max_groups)]
            paths = np.cumsum(np.stack(groups, axis=2), axis=2)
            looks = first_crossing(np.abs(paths), plan.alpha / pairs, plan.max_groups)
            right = looks[paths[np.arange(count), 0, looks - 1] > 0]
            power[i] += np.bincount(right[right > 0], minlength=plan.max_groups + 1)[1:] / simulations
    seeds = plan.group * np.arange(1, plan.max_groups + 1)
    return PowerTable(np.asarray(gaps, dtype=np.float64), seeds, power.cumsum(1), 0.5 / simulations**0.5)
