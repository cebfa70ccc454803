"""Curves of scores: the aggregate at each point, and when runs are there."""

from __future__ import annotations

import math

import numpy as np
import pytest

from lmgym.errors import InvalidArgumentError
from lmgym.scores import ScoreCurves, SolveTime, aggregate, efficiency_curves, solve_times, solved_at

CLOCK = np.array([0.0, 10.0, 20.0, 40.0])


def curves_of(scores: np.ndarray) -> ScoreCurves:
    """Of (labels, tasks, seeds, k), from rows in no order."""
    cells = list(np.ndindex(scores.shape))
    rows = [cells[i] for i in np.random.default_rng(0).permutation(len(cells))]
    return ScoreCurves.from_columns(
        label=["ab"[row[0]] for row in rows],
        task=["tuv"[row[1]] for row in rows],
        seed=[row[2] for row in rows],
        clock=[CLOCK[row[3]] for row in rows],
        score=[scores[row] for row in rows],
    )


SCORES = np.cumsum(np.random.default_rng(0).uniform(0, 0.3, (2, 3, 5, 4)), axis=-1)


def test_a_score_between_gradings_is_on_the_line_between_them() -> None:
    matrix = curves_of(SCORES).at(15.0)
    assert matrix.cell("b", "u")[3] == pytest.approx(SCORES[1, 1, 3, 1:3].mean())


@pytest.mark.parametrize("statistic", ["iqm", "mean"])
def test_each_point_is_the_aggregate_of_the_scores_at_that_time(statistic: str) -> None:
    curves = curves_of(SCORES)
    grid = [0.0, 15.0, 40.0]
    bands = efficiency_curves(curves, statistic, grid=grid, rng=np.random.default_rng(0), resamples=4_000)
    for i, when in enumerate(grid):
        single = aggregate(curves.at(when), statistic, rng=np.random.default_rng(1), resamples=4_000)
        for label, band in bands.items():
            width = single[label].high - single[label].low
            assert band.value[i] == pytest.approx(single[label].mean)
            assert (band.low[i], band.high[i]) == pytest.approx(
                (single[label].low, single[label].high), abs=0.1 * width
            )


def test_the_grid_ends_where_runs_do() -> None:
    curves = curves_of(SCORES)
    band = efficiency_curves(curves, rng=np.random.default_rng(0), resamples=10)["a"]
    assert (len(band.at), band.at[0], band.at[-1]) == (50, 0.0, 40.0)
    with pytest.raises(InvalidArgumentError, match="`grid` must end where a run of .* has its last score, at 40"):
        efficiency_curves(curves, grid=[0.0, 41.0], rng=np.random.default_rng(0), resamples=10)
    with pytest.raises(InvalidArgumentError, match="`when` must not be before the first grading"):
        curves.at(-1.0)
    later = efficiency_curves(curves, grid=[41.0], failures_as=0.0, rng=np.random.default_rng(0), resamples=10)
    assert later["a"].value.tolist() == [0.0]
    assert curves.at(41.0).failed.all()


def test_solved_is_the_first_grading_that_has_the_share() -> None:
    found = solved_at([20, 0, 30, 10], [0.9, 0.0, 0.7, 0.5])
    assert found == {0.5: 10, 0.8: 20, 0.9: 20, 0.95: math.inf}
    with pytest.raises(InvalidArgumentError, match="`scores` must have the shape of `clock`"):
        solved_at([1, 2], [1])


def test_the_time_of_a_label_is_the_median_over_its_runs() -> None:
    scores = np.zeros((1, 2, 3, 4))
    scores[0, 0, 0, 1:] = 0.9  # from 10
    scores[0, 0, 1, 3:] = 0.9  # from 40
    scores[0, 1, 0, 2:] = 0.9
    found = solve_times(curves_of(scores), 0.9)["a"]
    assert found == {"t": SolveTime(40.0, 2, 3), "u": SolveTime(math.inf, 1, 3)}


def test_two_gradings_at_one_time_are_an_error() -> None:
    with pytest.raises(InvalidArgumentError, match="`clock` must differ"):
        ScoreCurves.from_columns(label="aa", task="tt", seed=[0, 0], clock=[1, 1], score=[0, 1])
