"""The verdict in words, and the frontier that policies are drawn under."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from finished_runs import write_run

from agents.comparison.frontier import find_frontier
from agents.comparison.study import study_of
from agents.comparison.table import read_runs
from agents.comparison.verdict import Findings, find_verdict
from lmgym.optimum import solve
from lmgym.optimum.exact import exact_metrics
from lmgym.tasks import make_task


def verdict_of(directory: Path, **returns: list[float]) -> Findings:
    """Of agents with these returns, one a seed, on a task."""
    for agent, several in returns.items():
        for seed, returned in enumerate(several):
            write_run(directory / f"{agent}-{seed}", agent=agent, seed=seed, returned=returned)
    return find_verdict(study_of(read_runs([directory])))


def test_what_is_better_is_said_with_its_gap(tmp_path: Path) -> None:
    found = verdict_of(tmp_path, ppo=[0.50, 0.51, 0.52, 0.53, 0.51], rloo=[0.40, 0.41, 0.42, 0.43, 0.41])
    assert len(found.sentences) == 1
    assert found.sentences[0].startswith("ppo is better than rloo by 0.170 [")
    assert found.sentences[0].endswith("] of the gain on keyword-8 with 5 seeds.")
    assert any("5 seeds are few" in line for line in found.limits)


def test_what_cannot_be_told_apart_is_said_with_more_seeds(tmp_path: Path) -> None:
    found = verdict_of(tmp_path, ppo=[0.40, 0.44, 0.38, 0.46, 0.42], rloo=[0.39, 0.43, 0.37, 0.45, 0.41])
    assert found.sentences[0].startswith("ppo cannot be told apart from rloo (gap 0.017 [")
    assert "more seeds" in found.sentences[0]
    assert found.sentences[0].endswith("on keyword-8 with 5 seeds.")


def test_one_agent_is_compared_with_nothing(tmp_path: Path) -> None:
    found = verdict_of(tmp_path, ppo=[0.5])
    assert "nothing to compare it with" in found.sentences[0]


def test_runs_that_did_not_end_are_told(tmp_path: Path) -> None:
    failed = write_run(tmp_path / "failed", agent="rloo", seed=7, finished=False)
    (failed / "error.txt").write_text("ValueError: no\n", encoding="utf-8")
    write_run(tmp_path / "unfinished", agent="sft", seed=7, finished=False)
    found = verdict_of(tmp_path, ppo=[0.5, 0.5, 0.5], rloo=[0.5, 0.5, 0.5])
    assert "3 finished" not in found.rests_on[0]
    assert any(line.startswith("Failed runs") and "1 of rloo" in line for line in found.limits)
    assert any(line.startswith("Unfinished runs") and "1 of sft" in line for line in found.limits)


def test_a_task_without_an_optimum_is_in_no_share(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", env={"kl_coef": 0.05})
    text = (run / "summary.json").read_text(encoding="utf-8").replace('"value": 1.0', '"value": null')
    (run / "summary.json").write_text(text.replace("0.123", "null"), encoding="utf-8")
    found = find_verdict(study_of(read_runs([tmp_path])))
    assert found.sentences == ["Nothing can be compared: no finished run has a known share of the gain."]
    assert any("keyword-8 kl_coef=0.05 is not known" in line for line in found.limits)


@pytest.mark.parametrize("price", [0.05, 0.1, 0.27])
def test_the_frontier_is_that_of_the_best_policies(price: float) -> None:
    """pi* of a price, on a grid of prices or between them, lies on it, and a policy that is no pi* below."""
    frontier = find_frontier("keyword-8")
    assert frontier is not None
    assert frontier.exact
    task = make_task("keyword-8")
    best = solve("keyword-8", kl_coef=price).policy
    assert best is not None
    earned = exact_metrics(best, task, "test")
    on_it = frontier.score(np.array([earned["kl"]]))[0]
    assert on_it == pytest.approx(earned["score"], abs=1e-3)
    assert frontier.score(np.array([0.0]))[0] == pytest.approx(solve("keyword-8").reference, abs=5e-3)


def test_a_bound_of_the_optimum_gives_one_line() -> None:
    frontier = find_frontier("reviews")
    assert frontier is not None
    assert not frontier.exact
    known = make_task("reviews").optima["test"]
    line = frontier.score(np.array([0.0, 2.0]))
    assert line.tolist() == pytest.approx([known.upper, known.upper + 2 * make_task("reviews").kl_coef])


def test_nothing_bounds_a_discounted_task() -> None:
    assert find_frontier("discount-0.95") is None
    assert find_frontier("no-such-task") is None
