"""Several runs of one command: every launcher, the directories, and the table at the end."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import hydra
import numpy as np
import pytest
from commands import run_command_here
from omegaconf import OmegaConf

from agents.runs.defaults import complete_agents
from agents.runs.plan import plain
from agents.runs.sweeps import MAX_NAME, Multirun, file_name, multirun_table, register, run_name, show_multirun
from agents.runs.tasks import USUAL_SETTINGS
from lmgym.errors import LmGymError
from lmgym.tasks import registered_tasks

ROOT = Path(__file__).parents[3]
TINY = ["total_timesteps=40", "agent.batch_size=8", "agent.minibatches=1", "agent.epochs=1", "device=cpu"]
GRADED = ["evaluation.samples=2", "evaluation.prompts=2"]


def summary_of(run: Path) -> dict[str, Any]:
    return json.loads((run / "summary.json").read_text())  # type: ignore[no-any-return]


# -- names -----------------------------------------------------------------------------------------------------------


def composed(*overrides: str, **kwargs: Any) -> Any:
    register()
    complete_agents()
    with hydra.initialize_config_dir(config_dir=str(ROOT / "conf"), version_base="1.3"):
        return hydra.compose("train", overrides=list(overrides), **kwargs)


def test_every_task_of_the_suite_can_be_chosen() -> None:
    config = composed()
    for name in registered_tasks():
        config.task = name
        assert plain(config)["task"] == name


def test_a_family_stands_for_its_usual_setting() -> None:
    families = {name.partition("-")[0] for name in registered_tasks() if "-" in name}
    assert set(USUAL_SETTINGS) <= families
    config = composed()
    with_hydra = composed(return_hydra_config=True)
    for family, usual in USUAL_SETTINGS.items():
        config.task = family
        with_hydra.task = family
        assert plain(config)["task"] == usual
        assert run_name(with_hydra) == f"ppo-{usual}-seed0"
    assert set(USUAL_SETTINGS.values()) <= set(registered_tasks())


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], "ppo-reviews-seed0"),
        (["agent=rloo", "task=keyword-8", "seed=7"], "rloo-keyword-8-seed7"),
        (["task=anchor-0.1", "agent.lr=1e-3", "agent.critic=reference"], "ppo-anchor-0.1-seed0-lr1e-3-criticreference"),
        (["experiment=trl", "sampler=greedy"], "ppo-reviews-seed0-trl-greedy"),
        (["env.prompts=['a b, c','d=e']"], "ppo-reviews-seed0-prompts_a_b_c_d_e"),
        (["env.reward=my.module:f", "+agent.x='ü ${seed}'"], "ppo-reviews-seed0-rewardmy.module_f-x_seed"),
    ],
)
def test_a_run_is_named_after_what_it_is(overrides: list[str], expected: str) -> None:
    assert run_name(composed(*overrides, return_hydra_config=True)) == expected


def test_a_name_is_short_however_much_is_varied() -> None:
    name = run_name(composed(*(f"env.prompts=['{'x' * 500}']", "agent.lr=1e-3"), return_hydra_config=True))
    assert len(name) <= MAX_NAME
    assert name.startswith("ppo-reviews-seed0-prompts_xxx")


@pytest.mark.parametrize("text", ["a=b,c d", "ä/ö\\ü", "$(rm -r x)", "'\"`", "..", "", "\n", "😀", "a;b|c&d<e>"])
def test_a_file_name_has_nothing_that_anybody_reads_otherwise(text: str) -> None:
    assert re.fullmatch(r"[A-Za-z0-9._+-]*", file_name(text))


# -- real ones -------------------------------------------------------------------------------------------------------


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`python -m agents.train ...` in this process."""

    def run(*arguments: str) -> None:
        run_command_here("agents.train", *arguments)
        show_multirun()

    monkeypatch.setattr(Multirun, "directory", None)
    return run


@pytest.mark.slow
def test_a_sweep_over_settings_of_the_suite(command: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command("-m", *TINY, *GRADED, "task=keyword-8,echo-2", f"hydra.sweep.dir={tmp_path / 'all'}")
    runs = [tmp_path / "all" / "ppo-keyword-8-seed0-0", tmp_path / "all" / "ppo-echo-2-seed0-1"]
    assert sorted(path for path in (tmp_path / "all").iterdir() if path.is_dir()) == sorted(runs)
    assert [summary_of(run)["task"] for run in runs] == ["keyword-8", "echo-2"]
    table = multirun_table(tmp_path / "all")
    assert table in capsys.readouterr().out
    assert f"2 of 2 runs in {tmp_path / 'all'} ended" in table
    for run in runs:
        (line,) = [line for line in table.splitlines() if line.endswith(run.name)]
        assert line.startswith(summary_of(run)["task"])
        assert f"{summary_of(run)['after']['return']['mean']:.3f}" in line


@pytest.mark.slow
@pytest.mark.parametrize(
    ("names", "refused"),
    [
        (["task=echo-2", "seed=-1,0"], "uniform-echo-2-seed-1-0: `seed` must be an int >= 0, got -1."),
        (["task=ech-2,echo-2", "seed=0"], "uniform-ech-2-seed0-0: `task` must be one of "),
    ],
)
def test_a_run_that_is_refused_does_not_stop_the_others(
    command: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], names: list[str], refused: str
) -> None:
    with pytest.raises(LmGymError, match=re.escape(refused.partition(": ")[2])):
        command("-m", "agent=uniform", *names, *GRADED, "device=cpu", f"hydra.sweep.dir={tmp_path}")
    assert [path.parent.name for path in tmp_path.glob("*/summary.json")] == ["uniform-echo-2-seed0-1"]
    assert refused in capsys.readouterr().err
    show_multirun()
    assert "1 of 1 runs" in capsys.readouterr().out


LAUNCHERS = [  # torch is loaded in each process, so one run where a second shows nothing new
    ("joblib", "0", ["hydra.launcher.n_jobs=2"]),
    ("submitit_local", "0", ["hydra.launcher.timeout_min=5"]),
    ("ray", "0,1", ["+hydra.launcher.ray.init.num_cpus=2"]),
]


@pytest.mark.slow
@pytest.mark.parametrize(("launcher", "seeds", "more"), LAUNCHERS, ids=[launcher for launcher, _, _ in LAUNCHERS])
def test_other_launchers_run_them_elsewhere(
    command: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], launcher: str, seeds: str, more: list[str]
) -> None:
    """In processes of their own, which get the run handed over and hand its result back."""
    plugin = launcher.partition("_")[0]
    pytest.importorskip(f"hydra_plugins.hydra_{plugin}_launcher", reason=f"needs hydra-{plugin}-launcher")
    names = ["agent=uniform", "task=echo-2", *GRADED, "device=cpu", f"seed={seeds}", f"hydra.sweep.dir={tmp_path}"]
    command("-m", *names, f"hydra/launcher={launcher}", *more)
    runs = [f"uniform-echo-2-seed{seed}-{i}" for i, seed in enumerate(seeds.split(","))]
    assert sorted(path.parent.name for path in tmp_path.glob("*/summary.json")) == runs
    assert multirun_table(tmp_path) in capsys.readouterr().out


# -- the table -------------------------------------------------------------------------------------------------------


def write_run(directory: Path, number: int, settings: dict[str, Any], mean: float | None) -> None:
    run = directory / f"run-{number}"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(settings)))
    if mean is not None:
        after = {"return": {"mean": mean, "low": mean - 0.2, "high": mean + 0.1}, "normalised": None}
        (run / "summary.json").write_text(json.dumps({"after": after}))


def settings(
    task: str = "reviews", agent: str = "agents.algorithms.ppo.PPO", seed: int = 0, **numbers: Any
) -> dict[str, Any]:
    return {"task": task, "env": {"kl_coef": None}, "agent": {"_target_": agent, **numbers}, "seed": seed}


def test_the_table_shows_what_tells_runs_apart_and_means_over_seeds(tmp_path: Path) -> None:
    returns = {(1e-3, 0): 1.0, (1e-3, 1): 1.5, (1e-3, 2): 1.1, (3e-4, 0): 0.2, (3e-4, 1): None, (3e-4, 2): 0.4}
    for number, ((lr, seed), mean) in enumerate(returns.items()):
        write_run(tmp_path, number, settings(seed=seed, lr=lr), mean)
    heading, runs, means = multirun_table(tmp_path).split("\n\n")
    assert heading.startswith("5 of 6 runs")
    assert [line.split() for line in runs.splitlines()[:3]] == [
        ["agent.lr", "seed", "return", "share", "of", "the", "gain", "directory"],
        ["0.001", "0", "1.000", "±", "0.200", "-", "run-0"],
        ["0.001", "1", "1.500", "±", "0.200", "-", "run-1"],
    ]
    assert runs.splitlines()[5].split() == ["0.0003", "1", "not", "finished", "run-4"]
    rows = [line.split() for line in means.splitlines()]
    assert rows[1][:3] == ["0.001", "3", "1.200"]
    half = 4.302653 * np.std([1.0, 1.5, 1.1], ddof=1) / np.sqrt(3)  # Student's at 2 degrees of freedom
    assert float(rows[1][4]) == pytest.approx(half, abs=6e-4)
    assert rows[2][:3] == ["0.0003", "2", "0.300"]


def test_what_differs_with_the_agent_alone_is_not_a_column(tmp_path: Path) -> None:
    for number, (agent, lr) in enumerate([("agents.algorithms.ppo.PPO", 1e-3), ("agents.algorithms.rloo.RLOO", 2e-3)]):
        write_run(tmp_path, number, settings(agent=agent, lr=lr), 1.0)
    table = multirun_table(tmp_path)
    assert "lr" not in table
    assert [line.split()[0] for line in table.split("\n\n")[1].splitlines()] == ["agent", "PPO", "RLOO"]


def test_a_multirun_without_a_run_has_no_table(tmp_path: Path) -> None:
    assert multirun_table(tmp_path).startswith("0 of 0 runs")
