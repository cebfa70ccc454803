"""Simulated evaluations hold the truth as often as they say, and 1.96 standard errors do not."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import scipy.stats

from benchmarks import coverage as module
from benchmarks.coverage import POLICIES, coverage, exact_tasks, paid_at_the_end, populations
from benchmarks.pages import table
from lmgym.automata import Automaton
from lmgym.tasks import make_task

ONE_OF_EACH = list({name.partition("-")[0]: name for name in exact_tasks([])}.values())  # the last of a family


@pytest.mark.parametrize("name", ["rare-4", "brackets-1", "anchor-0.3", "echo-2", "arithmetic-1", "stop-8-0.5"])
def test_a_population_is_that_of_the_policy(name: str) -> None:
    task = make_task(name)
    found = dict(zip(POLICIES, populations(task), strict=True))
    for population in found.values():
        np.testing.assert_allclose(population.probs.sum(1), 1, atol=1e-6)
    assert found["reference"].mean("return") == pytest.approx(task.optima["test"].reference, abs=1e-5)
    assert found["reference"].mean("kl") == pytest.approx(0, abs=1e-12)
    assert found["pi*"].mean("return") == pytest.approx(task.optima["test"].value, abs=1e-5)
    assert found["reference"].mean("score") < found["between"].mean("score") < found["pi*"].mean("score")


def test_a_population_below_gamma_1_is_sampled_from_the_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_POOL", 2048)
    task = make_task("discount-0.9")
    found = dict(zip(POLICIES, populations(task), strict=True))
    assert found["reference"].mean("return") == pytest.approx(task.optima["test"].reference, abs=0.01)
    assert found["pi*"].mean("return") == pytest.approx(task.optima["test"].value, abs=0.01)


def test_payments_moved_to_the_end_are_the_same() -> None:
    rng = np.random.default_rng(0)
    automaton = Automaton(
        rng.integers(0, 3, (3, 2)), rng.normal(size=3).round(2), np.array([0, 1, 1]), rng.normal(size=(3, 2)).round(2)
    )
    moved = paid_at_the_end(automaton, 4)
    responses = rng.integers(0, 3, (50, 4)).tolist()
    np.testing.assert_allclose(moved.score(responses), automaton.score(responses), atol=1e-6)
    assert moved.token_payments is None


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "policy", "samples"),
    [
        ("rare-4", "between", 293),
        ("brackets-1", "reference", 2),
        ("brackets-1", "pi*", 4096),
        ("discount-0.9", "between", 2),
    ],
)
def test_intervals_cover_where_1_96_standard_errors_do_not(
    name: str, policy: str, samples: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_POOL", 2048)
    task = make_task(name)
    population = dict(zip(POLICIES, populations(task), strict=True))[policy]
    found = coverage(task, population, samples, 300, np.random.default_rng(0))
    assert min(found.found.values()) > 0.92
    assert min(found.normal.values()) < 0.9


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_intervals_of_the_default_size_cover(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What 60 simulations can tell from 0.93 on a task of each family; docs/trust.md has 1,000 of every task."""
    monkeypatch.setattr(module, "_POOL", 1024)
    task = make_task(name)
    replicates = 60
    for policy, population in zip(POLICIES, populations(task), strict=True):
        samples = math.ceil(module.EPISODES / len(task.prompts["test"]))
        found = coverage(task, population, samples, replicates, np.random.default_rng(1)).found
        for number, share in found.items():
            assert scipy.stats.binom.cdf(round(share * replicates), replicates, 0.93) > 1e-4, (policy, number)


def test_the_page_has_every_solved_task_at_0_93() -> None:
    lines = table(Path(__file__).parents[2] / "docs" / "trust.md", module.MARKER)
    rows = [line.strip("| ").split(" | ") for line in lines[2:]]
    assert [row[0].strip("`") for row in rows] == exact_tasks([])
    for row in rows:
        assert min(map(float, row[2:5])) >= 0.93, row[0]  # of the reference, pi*, and one between
        assert min(float(row[7]), float(row[9])) >= 0.93, row[0]  # of 8 and of 2 samples a prompt


def test_an_interval_of_the_optimum_is_narrow() -> None:
    """pi* returns V* in every episode: at 4,096 of them the interval is well below 1 % of the gain."""
    for name, samples in (("rare-4", 293), ("anchor-0.1", 256), ("echo-8", 64)):
        task = make_task(name)
        population = dict(zip(POLICIES, populations(task), strict=True))["pi*"]
        width = coverage(task, population, samples, 5, np.random.default_rng(0)).width
        assert 0 < width < 0.005 * (task.optima["test"].value - task.optima["test"].reference)


def test_every_solved_task_has_a_line() -> None:
    names = exact_tasks([])
    assert "rare-4" in names
    assert not [name for name in names if name.startswith(("reviews", "proxy"))]
    assert exact_tasks(["rare", "echo-4"]) == ["echo-4", "rare-2", "rare-3", "rare-4", "rare-5"]


def test_a_line_of_the_table() -> None:
    header, rule, line = module.table(["rare-2"], 3, 2)
    assert header.count("|") == rule.count("|") == line.count("|")
    assert line.startswith("| `rare-2` | 14 x 293 | ")
