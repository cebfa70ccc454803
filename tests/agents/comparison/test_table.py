"""Run directories as one table, on runs whose numbers are written by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from finished_runs import batch, grading, write_run

from agents.comparison.table import COLUMNS, read_runs
from agents.runs.trust import config_text, read_config
from lmgym.errors import InvalidArgumentError
from lmgym.optimum import find_known
from lmgym.tasks import make_task

parquet = pytest.importorskip("pyarrow.parquet", reason="needs pyarrow")


def test_every_metric_of_every_row_is_in_the_table(tmp_path: Path) -> None:
    rows = [batch(500, 0.2, collect=1.0, update=2.0), batch(1000, 0.4, collect=3.0, update=2.0)]
    write_run(tmp_path / "a", rows=rows)
    read_runs([tmp_path]).write(tmp_path)
    table = parquet.read_table(tmp_path / "results.parquet")
    assert tuple(table.column_names) == COLUMNS
    lines = [line for line in table.to_pylist() if line["metric"] == "rollout/return"]
    # 3 s of 8 s that the rows know of; the run took 10 s
    assert lines == [
        {"run": "a", "agent": "ppo", "label": "ppo", "task": "keyword-8", "seed": 0, "step": 500, "seconds": 3.75}
        | {"tokens": 2000.0, "metric": "rollout/return", "value": 0.2},
        {"run": "a", "agent": "ppo", "label": "ppo", "task": "keyword-8", "seed": 0, "step": 1000, "seconds": 10.0}
        | {"tokens": 4000.0, "metric": "rollout/return", "value": 0.4},
    ]


def test_gradings_are_at_step_0_along_the_way_and_at_the_last_step(tmp_path: Path) -> None:
    rows = [batch(500, 0.2), grading(500, 0.3, seconds=4.0), batch(1000, 0.4), grading(1000, 0.9, seconds=9.0)]
    write_run(tmp_path / "a", rows=rows, returned=0.5)
    run = read_runs([tmp_path]).runs[0]
    series = run.series["eval/return"]
    assert series.step.tolist() == [0, 500, 1000]
    assert series.seconds.tolist() == [0.0, 4.0, 10.0]
    assert series.tokens.tolist() == [0.0, 2000.0, 4000.0]
    assert series.value.tolist() == [0.02, 0.3, 0.5]  # the last is the summary's
    assert run.is_graded_along
    assert run.series["rollout/return"].step.tolist() == [500, 1000]


def test_shares_of_the_gain_are_on_the_scale_known_now(tmp_path: Path) -> None:
    known = find_known(make_task("keyword-8"), "test")
    assert known is not None
    write_run(tmp_path / "a", rows=[grading(500, 0.3, 4.0)], returned=0.5)
    write_run(tmp_path / "other", env={"kl_coef": 0.05}, returned=0.5)
    own, other = read_runs([tmp_path]).runs
    share = own.graded("normalised")
    assert share is not None
    assert share.mean == pytest.approx((0.5 - known.reference) / (known.value - known.reference))
    along = (0.3 - known.reference) / (known.value - known.reference)
    assert own.series["eval/normalised"].value[1:] == pytest.approx([along, share.mean])
    assert other.task == "keyword-8 kl_coef=0.05"
    found = other.graded("normalised")  # nobody stored that problem's optimum: the number of the run
    assert found is not None
    assert found.mean == 0.123


def test_a_label_has_what_differs_between_the_runs_of_an_agent(tmp_path: Path) -> None:
    for lr in (5e-4, 1e-3):
        write_run(tmp_path / f"ppo-{lr}", settings={"lr": lr})
    write_run(tmp_path / "rloo", agent="rloo", settings={"lr": 1e-2})
    write_run(tmp_path / "ppo-echo", task="echo-4", settings={"lr": 1e-3, "batch_size": 64})
    labels = {run.name: run.label for run in read_runs([tmp_path]).runs}
    assert labels == {
        "ppo-0.0005": "ppo lr=5e-4",
        "ppo-0.001": "ppo lr=1e-3",
        "rloo": "rloo",
        "ppo-echo": "ppo lr=1e-3",
    }


def test_what_has_not_finished_is_a_row_with_its_state(tmp_path: Path) -> None:
    write_run(tmp_path / "a", seed=0)
    write_run(tmp_path / "b", seed=1, finished=False, rows=[batch(500, 0.2)])
    failed = write_run(tmp_path / "c", seed=2, finished=False)
    (failed / "error.txt").write_text(
        "Traceback (most recent call last):\nValueError: no <b>way</b>\n", encoding="utf-8"
    )
    write_run(tmp_path / "d", seed=0)  # a copy of the first
    damaged = write_run(tmp_path / "e", seed=4)
    (damaged / "summary.json").write_text("{", encoding="utf-8")
    unreadable = write_run(tmp_path / "f", seed=5)
    (unreadable / "config.yaml").write_text("{", encoding="utf-8")
    table = read_runs([tmp_path / "*"])
    states = ["finished", "unfinished", "failed", "repeated", "failed", "failed"]
    assert [run.state for run in table.runs] == states
    assert table.runs[2].error == "ValueError: no <b>way</b>"
    assert "summary.json" in table.runs[4].error
    assert "config.yaml" in table.runs[5].error
    assert [run.name for run in table.finished] == ["a"]
    table.write(tmp_path)
    rows = parquet.read_table(tmp_path / "runs.parquet").to_pylist()
    assert [row["state"] for row in rows] == states
    assert json.loads(rows[0]["config"])["agent"]["lr"] == 5e-4
    assert json.loads(rows[0]["packages"])["torch"] == "2.13.0"


def test_a_run_of_many_seeds_stands_for_its_seeds(tmp_path: Path) -> None:
    whole = write_run(tmp_path / "many", finished=False)
    for seed in (10, 9):
        write_run(whole / f"seed{seed}", seed=seed)
    for named in (whole, tmp_path, tmp_path / "**"):
        assert [run.seed for run in read_runs([named]).runs] == [9, 10]


def test_runs_are_found_once(tmp_path: Path) -> None:
    run = write_run(tmp_path / "deep" / "a")
    assert len(read_runs([run, tmp_path, tmp_path / "**"]).runs) == 1
    with pytest.raises(InvalidArgumentError, match="holds none"):
        read_runs([run / "checkpoint"])


def test_an_older_config_is_read(tmp_path: Path) -> None:
    """Before `env` had its own key, it was a part of `task`."""
    run = write_run(tmp_path / "a")
    text = (run / "config.yaml").read_text(encoding="utf-8")
    text = text.replace("task: keyword-8\n", "").replace("env:\n", "task:\n  task: keyword-8\n")
    (run / "config.yaml").write_text(text.replace("agents.algorithms.ppo.PPO", "agents.ppo.PPO"), encoding="utf-8")
    found = read_runs([run]).runs[0]
    assert (found.task, found.agent, found.state) == ("keyword-8", "ppo", "finished")


def test_an_agent_from_elsewhere_is_called_by_its_path(tmp_path: Path) -> None:
    write_run(tmp_path / "a", settings={"_target_": "my_code.PPO"})
    assert read_runs([tmp_path]).runs[0].agent == "my_code.PPO"


def test_a_value_that_was_not_finite_is_left_out(tmp_path: Path) -> None:
    write_run(tmp_path / "a", rows=[batch(500, 0.2), batch(1000, 0.4) | {"rollout/return": None}])
    series = read_runs([tmp_path]).runs[0].series["rollout/return"]
    assert series.value.tolist() == [0.2]
    assert np.isfinite(series.seconds).all()


def test_a_key_that_is_younger_than_some_runs_makes_no_other_label(tmp_path: Path) -> None:
    write_run(tmp_path / "old")
    write_run(tmp_path / "new", seed=1, settings={"younger": None})
    write_run(tmp_path / "other", seed=1, settings={"younger": 3})
    assert [run.label for run in read_runs([tmp_path / name for name in ("old", "new")]).runs] == ["ppo", "ppo"]
    labels = [run.label for run in read_runs([tmp_path / name for name in ("old", "new", "other")]).runs]
    assert labels == ["ppo", "ppo younger=null", "ppo younger=3"]


DAMAGE = [
    ("config.yaml", ["env"], 3),
    ("config.yaml", ["evaluation"], [1]),
    ("config.yaml", ["seed"], True),
    ("summary.json", ["after"], 1),
    ("summary.json", ["after", "return"], "x"),
    ("summary.json", ["after", "return", "mean"], "x"),
    ("summary.json", ["after", "kl"], [1]),
    ("summary.json", ["optimum"], "x"),
    ("summary.json", ["optimum", "reference"], 3),
    ("summary.json", ["optimum", "value"], {}),
    ("summary.json", ["train_seconds"], "x"),
    ("summary.json", ["total_timesteps"], None),
    ("summary.json", ["forward_tokens"], []),
    ("summary.json", ["peak_memory_bytes"], "1 GB"),
]


@pytest.mark.parametrize(("name", "keys", "value"), DAMAGE, ids=[f"{'.'.join(keys)}={x}" for _, keys, x in DAMAGE])
def test_a_run_that_somebody_has_written_by_hand_is_read_or_named(
    tmp_path: Path, name: str, keys: list[str], value: Any
) -> None:
    run = write_run(tmp_path / "run", rows=[batch(500, 0.2), batch(1000, 0.4)])
    whole = read_config(run / name) if name == "config.yaml" else json.loads((run / name).read_text())
    part = whole
    for key in keys[:-1]:
        part = part[key]
    part[keys[-1]] = value
    (run / name).write_text(config_text(whole) if name == "config.yaml" else json.dumps(whole))
    table = read_runs([tmp_path])
    (found,) = table.runs
    assert found.state == "failed"
    assert str(run / name) in found.error
    table.write(tmp_path)
