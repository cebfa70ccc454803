"""Tuning: as many trials for every agent, on seeds that no reported run has, and never the search's own score."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from finished_runs import write_run

from agents.comparison.plan import Cell
from agents.comparison.protocol import Protocol
from agents.comparison.scales import known_optimum
from agents.comparison.sensitivity import Sensitivity, draw_sensitivity, sensitivity_tables, sensitivity_text
from agents.comparison.spaces import read_spaces
from agents.comparison.study import study_of
from agents.comparison.table import read_runs
from agents.comparison.tuning import begin_search, best_trial, draw_trials, mean_shares, tuning_seeds
from agents.comparison.verdict import find_verdict
from agents.runs.defaults import complete_agents
from agents.runs.trust import config_text
from lmgym.errors import InvalidArgumentError

complete_agents()
SPACES = read_spaces("agent.lr:loguniform(1e-4,1e-2),agent.epochs:choice(1,2,4)")
PROTOCOL = Protocol(("ppo", "rloo"), ("echo-2", "anchor-0.1"), (0, 1), tune=SPACES, trials=5)


def test_values_come_from_their_distributions() -> None:
    rng = np.random.default_rng(0)
    texts = "a:loguniform(1e-4,1e-2),b:uniform(2,4),c:randint(1,3),d:choice(x, y)"
    drawn = {space.key: [space.draw(rng) for _ in range(2000)] for space in read_spaces(texts)}
    logs = np.log10([float(x) for x in drawn["a"]])
    assert (logs.min() > -4.001, logs.max() < -1.999) == (True, True)
    assert logs.mean() == pytest.approx(-3, abs=0.07)  # 5 standard errors of a uniform of width 2
    assert np.mean([float(x) for x in drawn["b"]]) == pytest.approx(3, abs=0.07)
    assert set(drawn["c"]) == {"1", "2", "3"}
    assert set(drawn["d"]) == {"x", "y"}


@pytest.mark.parametrize(
    "text", ["a:loguniform(0,1)", "a:uniform(2,1)", "a:randint(1,2.5)", "a:choice()", "a:uniform(x,1)"]
)
def test_a_distribution_that_cannot_be_is_refused(text: str) -> None:
    with pytest.raises(InvalidArgumentError, match="tune: a"):
        read_spaces(text)


def test_every_agent_gets_as_many_trials_the_first_its_defaults() -> None:
    trials = draw_trials(PROTOCOL)
    by_agent = {agent: [trial for trial in trials if trial.agent == agent] for agent in PROTOCOL.agents}
    assert [len(several) for several in by_agent.values()] == [5, 5]
    assert all(several[0].values == () for several in by_agent.values())
    assert [trial.values for trial in by_agent["ppo"]] == [trial.values for trial in by_agent["rloo"]]
    assert draw_trials(PROTOCOL) == trials


def test_a_key_is_left_out_of_an_agent_that_has_none_and_refused_where_nobody_has_it() -> None:
    protocol = Protocol(("ppo", "rloo"), ("echo-2",), (0,), tune=read_spaces("agent.gae_lambda:uniform(0,1)"), trials=2)
    assert [bool(trial.values) for trial in draw_trials(protocol)] == [False, True, False, False]
    nobody = Protocol(("ppo", "rloo"), ("echo-2",), (0,), tune=read_spaces("agent.lrr:uniform(0,1)"))
    with pytest.raises(InvalidArgumentError, match="Did you mean 'lr'?"):
        draw_trials(nobody)


def test_tuning_seeds_are_no_reported_seeds() -> None:
    assert not set(tuning_seeds(PROTOCOL)) & set(PROTOCOL.seeds)
    with pytest.raises(InvalidArgumentError, match="`seeds` must be below"):
        tuning_seeds(Protocol(seeds=(1_000_000,)))


def finish(cell: Cell, share: float) -> None:
    cell.directory.mkdir(parents=True)
    known = known_optimum(cell.task)
    assert known is not None
    returned = known.reference + share * (known.value - known.reference)
    graded = {"return": {"mean": returned}, "normalised": {"mean": 0.123}}  # on a scale that is tighter by now
    summary = {"before": graded, "after": graded, "train_seconds": 1.0, "total_timesteps": 100}
    (cell.directory / "config.yaml").write_text(config_text(cell.values))
    (cell.directory / "summary.json").write_text(json.dumps(summary))


def test_the_winners_run_again_on_the_reported_seeds_and_these_runs_are_what_is_reported(tmp_path: Path) -> None:
    protocol = Protocol(("rloo",), ("echo-2", "anchor-0.1"), (0, 1), tune=SPACES, trials=3)
    search = begin_search(protocol, tmp_path / ".tuning")
    assert len(search.cells) == 3 * 2
    assert {cell.seed for cell in search.cells} == set(tuning_seeds(protocol))
    _, second, third = [trial.values for trial in search.trials]
    scores = {((), "echo-2"): 0.1, ((), "anchor-0.1"): 0.1, (second, "echo-2"): 0.9, (second, "anchor-0.1"): 0.2}
    scores |= {(third, "echo-2"): 0.8, (third, "anchor-0.1"): 0.6}
    for cell in search.cells:
        finish(cell, scores[cell.setting.values, cell.task])
    search.choose(protocol, tmp_path)
    assert best_trial(search.trials, "rloo").values == third
    assert {cell.setting.values for cell in search.tuned} == {third}
    assert {(cell.task, cell.setting.values) for cell in search.tuned_by_task} == {
        ("echo-2", second),
        ("anchor-0.1", third),
    }
    assert {cell.seed for cell in search.tuned} == {0, 1}
    shares = {second: 0.5, third: 0.4}
    for cell in {cell.directory: cell for cell in (*search.tuned, *search.tuned_by_task)}.values():
        finish(cell, shares[cell.setting.values])
    defaults = begin_search(Protocol(("rloo",), protocol.tasks, (0,), trials=1), tmp_path / "d").cells
    for cell in defaults:
        finish(cell, 0.3)
    (found,) = search.found(defaults)
    table = sensitivity_text([found])
    line = table.splitlines()[1].split()
    assert line[:2] == ["rloo", "0.300"]
    assert "0.400 ± 0.000" in table  # of the fresh runs; the search had seen 0.7
    assert "0.450 ± 0.000" in table
    assert "0.050" in table  # the sensitivity
    search.write([found], tmp_path)
    noted = json.loads((tmp_path / "tuning.json").read_text())
    assert noted["reported"][0]["sensitivity"] == pytest.approx(0.05)
    assert noted["reported"][0]["best_by_task"] == {"echo-2": list(second), "anchor-0.1": list(third)}
    assert len(noted["trials"]) == 3


def test_a_trial_that_failed_does_not_win(tmp_path: Path) -> None:
    protocol = Protocol(("rloo",), ("echo-2",), (0,), tune=SPACES, trials=2)
    search = begin_search(protocol, tmp_path / ".tuning")
    finish(search.cells[0], -5.0)
    search.choose(protocol, tmp_path)
    assert search.trials[1].score == -math.inf
    assert best_trial(search.trials, "rloo").values == ()


def test_sensitivity_is_of_the_same_seeds_and_a_failed_run_is_the_reference() -> None:
    found = Sensitivity("rloo", 3, (0.1, 0.2), (0.4, 0.6), (0.5, 0.7), ("agent.lr=1",), {"a": ("agent.lr=1",), "b": ()})
    assert found.sensitivity.mean == pytest.approx(0.1)
    assert found.sensitivity.high == pytest.approx(0.1)  # every seed loses as much, however far seeds are apart
    assert found.difference("tuned", "defaults").mean == pytest.approx(0.35)
    panel = draw_sensitivity([found])
    assert "rloo defaults 0.150, tuned for all tasks 0.500, tuned for each task 0.600" in panel.alt
    page = sensitivity_tables([found], ["b", "a"])
    assert ">0.100 <span" in page
    assert page.index("the defaults") < page.rindex("agent.lr=1")  # of b, then of a


def test_the_report_of_agents_that_were_tuned_says_so(tmp_path: Path) -> None:
    write_run(tmp_path / "a")
    write_run(tmp_path / "b", settings={"lr": 1e-3})
    table = read_runs([tmp_path])
    tuned = Sensitivity("ppo", 16, (0.1,), (0.4,), (0.5,), (), {})
    assert any("flattered" in limit for limit in find_verdict(study_of(table)).limits)
    limits = find_verdict(study_of(table, [tuned])).limits
    assert not any("flattered" in limit for limit in limits)
    assert any("tuned by 16 settings, on seeds of their own" in limit for limit in limits)


def test_a_reported_run_that_failed_counts_as_the_reference(tmp_path: Path) -> None:
    protocol = Protocol(("rloo",), ("echo-2", "anchor-0.1"), (0, 1), tune=SPACES, trials=1)
    cells = begin_search(protocol, tmp_path).cells
    finish(cells[0], 0.5)
    assert mean_shares(cells) == [0.25]
