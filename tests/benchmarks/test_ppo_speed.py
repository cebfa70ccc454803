"""What `benchmarks.ppo_speed` prints, what its processes tell each other, and that ours does the work it says."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.pages import fill, markers
from benchmarks.peers import lmgym_worker, sb3_worker
from benchmarks.peers.inputs import write_inputs
from benchmarks.peers.venvs import TORCH, TRL, install_commands
from benchmarks.peers.worker import (
    READY,
    RESULT,
    Meter,
    Spec,
    argument_of,
    check_lap,
    count_until,
    even_share,
    read_report,
    spec_of,
)
from benchmarks.ppo_speed import (
    OURS,
    Process,
    Row,
    about,
    add_run,
    command_of,
    main,
    main_table,
    measure,
    parts_table,
    read_runs,
)

SMALL: dict[str, Any] = {"batch": 8, "epochs": 2, "minibatches": 2, "iterations": 1}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return write_inputs(tmp_path_factory.mktemp("inputs"), "tiny", 4)


def run_of(row: str, side: str, seconds: float, **parts: float) -> dict[str, Any]:
    lap = {"seconds": seconds, "cpu": 2 * seconds, **parts}
    versions = {"torch": "2", "trl": side}
    return {"row": row, "side": side, "laps": [lap, lap], "peak_mb": 100.0, "date": "2026-01-01", "threads": 2} | {
        "versions": versions
    }


def test_ratios_are_of_the_peers_time_over_ours() -> None:
    runs = [run_of("ppo", OURS, 0.5, collect=0.1, update=0.4), run_of("ppo", "TRL", 2.0, generate=0.5)]
    head, rule, line = main_table(runs)
    assert head.count("|") == rule.count("|") == line.count("|")
    assert [cell.strip() for cell in line.split("|")][1:7] == ["PPO, 2 x 128", "0.5", "TRL", "2", "4.00", "4.00"]
    assert parts_table(runs)[-1] == "| PPO, 2 x 128 | 0.1 | 0.4 | 0.5 | 1.5 |"


def test_the_head_of_the_tables_names_every_thread_count_version_and_day() -> None:
    runs = [run_of("ppo", OURS, 0.5), {**run_of("ppo", "TRL", 0.5), "threads": 1, "date": "2026-01-03"}]
    head = about(runs)
    assert head.startswith("1 and 2 threads; torch 2, trl TRL and lmgym;")
    assert head.endswith("2026-01-01 to 2026-01-03.")


def test_a_side_that_was_not_measured_is_left_out() -> None:
    assert "| TRL |  |  |" in main_table([run_of("rloo", OURS, 0.5)])[-1]
    assert len(main_table([])) == 2


def test_runs_are_added_to_those_that_are_there(tmp_path: Path) -> None:
    path = tmp_path / "new" / "runs.jsonl"
    assert read_runs(path) == []
    for seconds in (1.0, 2.0):
        add_run(path, run_of("ppo", OURS, seconds))
    assert [run["laps"][0]["seconds"] for run in read_runs(path)] == [1.0, 2.0]
    page = tmp_path / "page.md"
    page.write_text("\n".join(markers("peers")))
    fill(page, "peers", main_table(read_runs(path)))
    assert "| 1.5 |" in page.read_text()


def test_a_spec_goes_over_a_command_line_and_a_result_comes_back(capfd: pytest.CaptureFixture[str]) -> None:
    spec = Spec("ppo", "m", "r", "p", "t", iterations=2)
    assert spec_of(argument_of(spec)) == spec
    assert spec.steps == 16
    assert read_report(RESULT + json.dumps({"peak_mb": 1.5})) == {"peak_mb": 1.5}
    assert read_report("anything else") is None


def test_torch_is_installed_alone_and_first() -> None:
    first, second = install_commands(Path("python"), TRL["ppo"])
    assert first[-1] == TORCH
    assert TORCH not in second
    assert TRL["ppo"] in second


def test_tokens_count_up_to_the_first_end() -> None:
    assert count_until(torch.tensor([[5, 1, 1, 1], [5, 6, 7, 1], [5, 6, 7, 8]]), 1) == 2 + 4 + 4


@pytest.mark.parametrize(
    ("algorithm", "lap", "message"),
    [
        ("ppo", {"steps": 15, "sampled": 2048}, "16 optimiser steps, got 15"),
        ("ppo", {"steps": 16, "sampled": 2047}, "2048 tokens, got 2047"),
        ("sft", {"steps": 4, "sampled": 0}, "16 optimiser steps, got 4"),
    ],
)
def test_an_iteration_of_other_work_is_refused(algorithm: str, lap: dict[str, float], message: str) -> None:
    spec = Spec(algorithm, "m", "r", "p", "t")
    with pytest.raises(RuntimeError, match=message):
        check_lap(spec, lap)


def test_where_responses_may_end_fewer_tokens_are_right() -> None:
    check_lap(Spec("ppo", "m", "r", "p", "t", is_fixed=False), {"steps": 16, "sampled": 1000})
    with pytest.raises(RuntimeError, match="got 0"):
        check_lap(Spec("ppo", "m", "r", "p", "t", is_fixed=False), {"steps": 16, "sampled": 0})


def test_a_process_that_has_not_learned_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.peers.worker.wait_for_turn", lambda: None)
    weight = torch.nn.Parameter(torch.ones(2))
    meter = Meter(Spec("ppo", "m", "r", "p", "t", batch=1, horizon=1, epochs=1, minibatches=1, iterations=0), [weight])
    optimizer = torch.optim.SGD([weight], lr=1.0)
    weight.grad = torch.zeros(2)
    meter.start()
    optimizer.step()
    meter.lap(1, 1)
    with pytest.raises(RuntimeError, match="0 of 1 have changed"):
        meter.result()
    weight.data += 1
    assert meter.result()["laps"] == []


def test_the_reward_is_a_share() -> None:
    assert even_share(["a", "a"], ["b", "b"], [[2, 3], [2, 4, 5, 7]], trainer_state=None) == [0.5, 0.5]


@pytest.mark.parametrize(
    ("algorithm", "critic"),
    [("ppo", "shared"), ("ppo", "reference"), ("rloo", "shared"), ("grpo", "shared"), ("sft", "shared")],
)
def test_our_side_does_the_work_of_its_spec(
    algorithm: str, critic: str, inputs: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("benchmarks.peers.worker.wait_for_turn", lambda: None)
    result = lmgym_worker.run(Spec(algorithm, critic=critic, **inputs, **SMALL))
    (lap,) = result["laps"]
    assert lap["steps"] == 4
    assert lap["sampled"] == 8 * 4 * (2 if algorithm == "sft" else 1)
    assert lap["learned"] == 8 * 16 * 2
    assert result["peak_mb"] >= result["loaded_mb"] > 0


def test_the_plain_env_of_sb3_can_be_trained_on(inputs: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.peers.worker.wait_for_turn", lambda: None)
    result = sb3_worker.run(Spec("ppo", **inputs, **SMALL | {"batch": 16}))
    assert result["laps"][0]["sampled"] == 64


WORKER = f"""
import sys
for _ in range(int(sys.argv[1])):
    print("noise")
    print({READY!r}, flush=True)
    input()
    open(sys.argv[2], "a").write(sys.argv[3])
print({RESULT!r} + '{{"name": "' + sys.argv[3] + '"}}')
"""


def test_the_iterations_of_processes_alternate(tmp_path: Path) -> None:
    log = tmp_path / "log"
    commands = [[sys.executable, "-c", WORKER, count, str(log), name] for count, name in (("3", "a"), ("2", "b"))]
    assert measure(commands, 1) == [{"name": "a"}, {"name": "b"}]
    assert log.read_text() == "ababa"


def test_a_process_that_fails_says_why() -> None:
    with pytest.raises(RuntimeError, match="no such thing"):
        Process([sys.executable, "-c", "raise SystemExit('no such thing')"], 1)


@pytest.mark.network
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("algorithm", ["ppo", "rloo", "grpo", "sft"])
def test_trl_does_the_work_of_its_spec(algorithm: str, inputs: dict[str, Any], tmp_path: Path) -> None:
    command = command_of(Row("tiny", algorithm), "TRL", tmp_path)
    (result,) = measure([[*command, argument_of(Spec(algorithm, **inputs, **SMALL))]], 1)
    (lap,) = result["laps"]
    assert lap["steps"] == 4
    assert lap["learned"] == 8 * 16 * 2


def test_it_prints_what_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    add_run(tmp_path / "runs.jsonl", run_of("ppo", OURS, 0.5))
    monkeypatch.setattr(sys, "argv", ["ppo_speed", "--rounds", "0", "--out", str(tmp_path)])
    main()
    assert "| PPO, 2 x 128 | 0.5 |" in capsys.readouterr().out
