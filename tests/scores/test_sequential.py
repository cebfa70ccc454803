"""The sequential comparison: its verdicts, its promises in simulation, and that looks agree with one another."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from conftest import shifted

from lmgym.errors import InvalidArgumentError, UnknownNameError
from lmgym.scores import ScoreMatrix, SequentialPlan, Verdict, sequential_test
from lmgym.scores.permutations import first_crossing
from lmgym.scores.sequential import _look_through, _Paths

LABELS = ("a", "b", "c", "d")


def matrix_of(scores: np.ndarray) -> ScoreMatrix:
    """Of (labels, tasks, seeds)."""
    tasks = tuple(f"task-{i}" for i in range(scores.shape[1]))
    return ScoreMatrix.from_array(scores, axes=("labels", "tasks", "seeds"), labels=LABELS[: len(scores)], tasks=tasks)


def verdicts_of(scores: np.ndarray, plan: SequentialPlan) -> dict[tuple[str, str], str]:
    """The verdicts alone, without the intervals, which take longer."""
    matrix = matrix_of(scores)
    paths = _Paths(matrix, plan, list(itertools.combinations(matrix.labels, 2)))
    decided: dict[tuple[str, str], tuple[str, int]] = {}
    _look_through(paths, decided)
    return {pair: verdict for pair, (verdict, _) in decided.items()}


SCORES = np.random.default_rng(1).normal(size=(4, 2, 30)) + np.array([0.0, 0.0, 4.0, 0.8])[:, None, None]
PLAN = SequentialPlan(deals=1_000)


def test_verdicts_say_who_is_better() -> None:
    found = sequential_test(matrix_of(SCORES), PLAN).verdicts
    assert found["a", "c"].verdict == "worse"
    assert found["c", "d"].verdict == "better"
    assert found["a", "b"].verdict == "undecided"
    assert (found["a", "c"].more_seeds, found["a", "b"].seeds) == (0, 30)
    assert found["a", "b"].more_seeds >= 30
    gap = found["a", "c"]
    assert gap.gap.mean == pytest.approx((SCORES[0] - SCORES[2])[:, : gap.seeds].mean())
    assert gap.gap.low < -4 < gap.gap.high < 0


@pytest.mark.parametrize(("tasks", "group"), [(2, 5), (1, 3)])  # all deals at random; the first two groups in all ways
def test_looking_again_decides_the_same(tasks: int, group: int) -> None:
    """Group by group, and only for the labels that are wanted: what was decided stays, and the end is the same."""
    plan = SequentialPlan(group=group, deals=1_000)
    final = sequential_test(matrix_of(SCORES[:, :tasks, : 6 * group]), plan)
    seeds = dict.fromkeys(LABELS, group)
    seen: dict[tuple[str, str], Verdict] = {}
    for _ in range(plan.max_groups):
        rows = [(i, task, seed) for i in range(4) for task in range(tasks) for seed in range(seeds[LABELS[i]])]
        matrix = ScoreMatrix.from_columns(
            label=[LABELS[row[0]] for row in rows],
            task=[f"task-{row[1]}" for row in rows],
            seed=[row[2] for row in rows],
            score=[SCORES[row] for row in rows],
        )
        found = sequential_test(matrix, plan)
        assert all(found.verdicts[pair] == verdict for pair, verdict in seen.items())
        seen = {pair: verdict for pair, verdict in found.verdicts.items() if verdict.verdict != "open"}
        seeds |= found.wanted
    assert found.finished
    assert found == final
    assert seeds["a"] == 6 * group > seeds["c"]  # a and b are told apart from c long before the end


@pytest.mark.parametrize(("tasks", "group"), [(2, 5), (1, 3)])
def test_the_deals_of_a_look_do_not_depend_on_how_many_seeds_there_are(tasks: int, group: int) -> None:
    plan = SequentialPlan(group=group, deals=1_000)
    early = _Paths(matrix_of(SCORES[:, :tasks, :group]), plan, [("a", "b")]).deals
    late = _Paths(matrix_of(SCORES[:, :tasks]), plan, [("a", "b")]).deals
    assert (len(early), len(late)) == (1, 6)
    assert np.array_equal(early[0].signs, late[0].signs)


def test_a_pair_is_tested_as_the_group_sequential_test_says() -> None:
    for seed in range(10):
        scores = np.random.default_rng(seed).normal(size=(2, 1, 20))
        scores[0] += 1
        plan = SequentialPlan(max_groups=4, deals=500)
        paths = _Paths(matrix_of(scores), plan, [("a", "b")]).shifted(("a", "b"), 0.0, 4)
        look = first_crossing(np.abs(paths)[None], 0.05, 4)[0]
        found = sequential_test(matrix_of(scores), plan).verdicts["a", "b"]
        assert (found.verdict in ("better", "worse"), found.seeds) == (look > 0, 5 * look if look else 20)


def test_step_down_makes_the_others_easier() -> None:
    """Beside pairs that differ plainly a pair is tested as if alone; with a margin it keeps its share of the level."""
    rng = np.random.default_rng(0)
    gained = 0
    for _ in range(40):
        scores = rng.normal(size=(3, 1, 10))
        scores[1] += 1.6
        scores[2] += 9
        alone = verdicts_of(scores[:2], SequentialPlan(max_groups=2, deals=500))
        beside = verdicts_of(scores, SequentialPlan(max_groups=2, deals=500))
        margin = verdicts_of(scores, SequentialPlan(max_groups=2, deals=500, margin=0.01))
        assert beside.get(("a", "b")) == alone.get(("a", "b"))
        gained += ("a", "b") in beside
        gained -= ("a", "b") in margin
    assert gained > 0


def test_labels_nearer_than_the_margin_are_found_the_same() -> None:
    scores = np.random.default_rng(0).normal(size=(2, 3, 30))
    found = sequential_test(matrix_of(scores), SequentialPlan(margin=1.0, deals=2_000)).verdicts["a", "b"]
    assert found.verdict == "same"
    assert found.seeds < 30
    assert -1.2 < found.gap.low < found.gap.high < 1.2
    equal = sequential_test(matrix_of(np.full((2, 1, 10), 0.9)), SequentialPlan(margin=0.01, deals=2_000))
    assert equal.verdicts["a", "b"].verdict == "same"
    assert sequential_test(matrix_of(np.full((2, 1, 10), 0.9)), PLAN).verdicts["a", "b"].more_seeds == math.inf


def test_the_worst_it_can_say_of_labels_at_the_margin_is_rare() -> None:
    """A gap of exactly the margin: "same" is wrong, and comes in at most 5 of 100 cases."""
    rng = np.random.default_rng(shifted())
    plan = SequentialPlan(max_groups=4, group=4, margin=1.0, deals=300)
    wrong = 0
    for _ in range(300):
        scores = rng.normal(size=(2, 2, 16))
        scores[0] += 1.0
        wrong += "same" in verdicts_of(scores, plan).values()
    assert wrong <= 300 * 0.05 + 3 * math.sqrt(300 * 0.05 * 0.95)


@pytest.mark.slow
@pytest.mark.seeds
@pytest.mark.parametrize(("margin", "comparisons"), [(None, 1_000), (0.3, 400)])
def test_verdicts_on_three_labels_are_wrong_in_at_most_5_of_100_cases(margin: float | None, comparisons: int) -> None:
    """Two labels of one algorithm, and a third that is better by a little."""
    rng = np.random.default_rng(shifted())
    plan = SequentialPlan(max_groups=3, group=4, margin=margin, deals=250)
    wrong = 0
    for _ in range(comparisons):
        scores = rng.normal(size=(3, 2, 12))
        scores[2] += 0.8
        found = verdicts_of(scores, plan)
        alarm = found.get(("a", "b"), "same") != "same"
        wrong += alarm or any(found.get((label, "c"), "worse") != "worse" for label in "ab")
    assert wrong <= comparisons * 0.05 + 3 * math.sqrt(comparisons * 0.05 * 0.95)


@pytest.mark.seeds
def test_the_interval_holds_the_gap_at_every_look() -> None:
    rng = np.random.default_rng(shifted())
    plan = SequentialPlan(max_groups=3, group=4, deals=300)
    missed = 0
    for _ in range(30):
        scores = rng.normal(size=(2, 2, 12))
        scores[0] += 0.2
        for seeds in (4, 8, 12):
            gap = sequential_test(matrix_of(scores[:, :, :seeds]), plan).verdicts["a", "b"].gap
            if not gap.low <= 0.2 <= gap.high:
                missed += 1
                break
    assert missed <= 30 * 0.05 + 3 * math.sqrt(30 * 0.05 * 0.95)


def test_what_does_not_fit_is_an_error() -> None:
    matrix = matrix_of(SCORES[:, :, :4])
    with pytest.raises(InvalidArgumentError, match="`matrix` must have at least 5 seeds"):
        sequential_test(matrix, PLAN)
    with pytest.raises(InvalidArgumentError, match="`pairs` must be pairs of labels"):
        sequential_test(matrix, PLAN, [("a", "b"), ("b", "a")])
    with pytest.raises(UnknownNameError):
        sequential_test(matrix, PLAN, [("a", "e")])
    with pytest.raises(InvalidArgumentError, match="`group` must be an int >= 2"):
        SequentialPlan(group=1)
    with pytest.raises(InvalidArgumentError, match="`margin` must be a finite number > 0"):
        SequentialPlan(margin=0.0)


def test_only_the_pairs_that_are_asked_for_are_tested() -> None:
    found = sequential_test(matrix_of(SCORES), PLAN, [("c", "a"), ("c", "b")])
    assert {pair: verdict.verdict for pair, verdict in found.verdicts.items()} == {
        ("c", "a"): "better",
        ("c", "b"): "better",
    }
    assert found.finished
