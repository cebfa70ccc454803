"""What `python -m agents.compare` is asked to do: read, checked and composed before torch loads."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from sources import ROOT

from agents.comparison.plan import Cell, Setting, check_distinct, labels_of, make_cells, settings_of
from agents.comparison.protocol import KEYS, Protocol, read_request
from agents.comparison.record import PROTOCOL, write_protocol
from agents.comparison.run import compare
from agents.comparison.table import read_runs
from agents.runs.defaults import complete_agents
from agents.runs.help_page import compare_help_page
from agents.runs.trust import read_config
from lmgym.errors import InvalidArgumentError, LmGymError

complete_agents()
BOTH = ["agents=rloo,a2c", "tasks=echo-2,anchor"]


def test_a_command_is_agents_times_tasks_times_seeds_times_what_varies(tmp_path: Path) -> None:
    request = read_request([*BOTH, "seeds=2", "agent.lr=1e-3,3e-3", "total_timesteps=2e3", f"out={tmp_path}"])
    protocol = request.protocol
    assert protocol.tasks == ("echo-2", "anchor-0.1")
    cells = make_cells(protocol, settings_of(protocol), protocol.seeds, request.out)
    assert len(cells) == 2 * 2 * 2 * 2
    assert [cell.seed for cell in cells] == [0] * 8 + [1] * 8  # all of a seed, then all of the next
    assert cells[0].directory == tmp_path / "rloo-lr0.001-echo-2-0"
    assert (labels_of(cells)[0], cells[0].values["agent"]["lr"]) == ("rloo lr=1e-3", 1e-3)
    assert all(cell.values["total_timesteps"] == 2000 for cell in cells)
    assert {cell.values["seed"] for cell in cells} == {0, 1}
    assert cells[0].arguments == ("agent=rloo", "task=echo-2", "seed=0", "total_timesteps=2000", "agent.lr=0.001")


def test_without_anything_varied_directories_are_called_agent_task_seed(tmp_path: Path) -> None:
    protocol = Protocol(("sb3_ppo",), ("echo-2",), (3,))
    (cell,) = make_cells(protocol, settings_of(protocol), protocol.seeds, tmp_path)
    assert cell.directory.name == "sb3_ppo-echo-2-3"


def test_the_directory_is_the_same_for_the_same_command_and_for_more_seeds() -> None:
    outs = [read_request([*BOTH, *more]).out for more in (["seeds=2"], ["seeds=2"], ["seeds=9"], ["agent.lr=1"])]
    assert outs[0] == outs[1] == outs[2] != outs[3]
    assert outs[0].parent == Path("runs")


def test_seeds_are_a_number_or_named() -> None:
    assert read_request([*BOTH, "seeds=3"]).protocol.seeds == (0, 1, 2)
    assert read_request([*BOTH, "seeds=7,3"]).protocol.seeds == (7, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["agents=ppo,rlo", "tasks=echo-2"], "`agents` must be one of .* got 'rlo'. Did you mean 'rloo'?"),
        (["agents=ppo", "tasks=ecco-4"], "`tasks` .* Did you mean 'echo-4'?"),
        (["agents=ppo"], "`agents` and `tasks` must be given together"),
        ([], "`agents` must be names of agents"),
        (["ppo"], "`ppo` must be KEY=VALUE"),
        ([*BOTH, "agent=ppo"], "`agent` is called `agents` here"),
        ([*BOTH, "seeds=0"], "`seeds` must be an int >= 1"),
        ([*BOTH, "seeds=1,x"], "`seeds` must be a number of seeds, or seeds such as 10,11,12"),
        ([*BOTH, "resume=x"], "`resume` must not be given"),
        ([*BOTH, "workers=none"], "`workers` must be an int"),
        ([*BOTH, "tune=agent.lr:normal(1,2)"], "`tune: agent.lr` must be one of"),
        ([*BOTH, "tune=agent.lr"], "`tune` must be such as agent.lr:loguniform"),
        ([*BOTH, "protocol=x.yaml"], "`protocol` must be all that is asked for"),
        ([*BOTH, "agents=ppo"], "`agents` must be given once: agents=VALUE,VALUE"),
        ([*BOTH, "agent.lr=1", "+agent.lr=2,3"], "`agent.lr` must be given once"),
        ([*BOTH, "worker=1"], "`worker` must be one of .* Did you mean 'workers'?"),
        ([*BOTH, "max_seed=1"], "`max_seed` must be one of .* Did you mean 'max_seeds'?"),
        (["agnts=ppo", "tasks=echo-2"], "`agnts` must be one of .* Did you mean 'agents'?"),
        ([*BOTH, "seeds.a=1"], "`seeds` must be a value or several"),
        ([*BOTH, "hydra/launcher=joblib"], "`hydra/launcher` must not be given here"),
        ([*BOTH, "--config-dir", "/nowhere"], "`--config-dir` must be a directory, got '/nowhere'"),
        ([*BOTH, f"--config-dir={__file__}"], "`--config-dir` must be a directory"),
    ],
)
def test_a_command_that_cannot_be_is_answered_in_a_line(arguments: list[str], message: str) -> None:
    with pytest.raises(LmGymError, match=message):
        read_request(arguments)


def test_every_wrong_override_of_every_agent_is_named_at_once(tmp_path: Path) -> None:
    protocol = read_request([*BOTH, "agent.gae_lambda=0.9", "agent.lr=-1", "env.kl_coef=x"]).protocol
    with pytest.raises(InvalidArgumentError) as caught:
        make_cells(protocol, settings_of(protocol), protocol.seeds, tmp_path)
    text = str(caught.value)
    assert "agents=rloo: `agent.gae_lambda`" in text
    for task in ("echo-2", "anchor-0.1"):
        assert f"a2c on {task}: " in text


def test_a_directory_of_another_run_is_refused(tmp_path: Path) -> None:
    protocol = Protocol(("rloo",), ("echo-2",), (0,))
    (cell,) = make_cells(protocol, [Setting("rloo")], (0,), tmp_path)
    cell.directory.mkdir()
    younger = {key: value for key, value in cell.values.items() if key != "budget"}  # an older run lacks new keys
    (cell.directory / "config.yaml").write_text(yaml.safe_dump(younger))
    assert len(make_cells(protocol, [Setting("rloo")], (0,), tmp_path)) == 1
    other = Protocol(("rloo",), ("echo-2",), (0,), overrides=("agent.lr=0.5",))
    with pytest.raises(InvalidArgumentError, match=r"`out` must be .* has agent.lr=.*, not 0.5: choose another"):
        make_cells(other, [Setting("rloo")], (0,), tmp_path)


def test_a_protocol_in_a_file_is_the_same_as_on_the_command_line(tmp_path: Path) -> None:
    path = tmp_path / "study.yaml"
    path.write_text(
        "agents: [rloo, a2c]\ntasks: echo-2,anchor\nseeds: 2\nagent.lr: [1e-3, 3e-3]\nenv: {kl_coef: 0.1}\n"
    )
    of_file = read_request([f"protocol={path}", f"out={tmp_path / 'a'}"])
    typed_as = [*BOTH, "seeds=2", "agent.lr=0.001,0.003", "env.kl_coef=0.1"]
    typed = read_request(typed_as)
    assert of_file.protocol == typed.protocol
    assert of_file.out == tmp_path / "a"
    of_file.out.mkdir()
    write_protocol(of_file, "one")
    write_protocol(of_file, "one")
    noted = read_config(of_file.out / PROTOCOL)
    assert len(noted["file"]["sha256"]) == 64
    assert [call["command"] for call in noted["calls"]] == ["one"]
    assert {"time", "commit", "machine", "packages"} <= noted["calls"][0].keys()
    write_protocol(read_request([*typed_as, f"out={tmp_path / 'a'}"]), "the same without the file")
    with pytest.raises(InvalidArgumentError, match="`protocol` must be given, for"):
        write_protocol(read_request([*BOTH, f"out={tmp_path / 'a'}"]), "another")
    (tmp_path / "b").mkdir()
    write_protocol(read_request([*BOTH, f"out={tmp_path / 'b'}"]), "one")
    with pytest.raises(InvalidArgumentError, match="`protocol` must be there before the first run"):
        write_protocol(read_request([f"protocol={path}", f"out={tmp_path / 'b'}"]), "two")
    path.write_text(path.read_text() + "trials: 3\n")
    with pytest.raises(InvalidArgumentError, match="`protocol` must be as it was when"):
        write_protocol(read_request([f"protocol={path}", f"out={tmp_path / 'a'}"]), "two")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("protocol: other.yaml", "`protocol` must not stand in"),
        ("tasks: [[echo-2], reviews]", "`tasks` must be a value or a list of values"),
        ("seeds: {from: 3}", "`seeds` must be a value or several"),
        ("- agents", "must hold names with values"),
        ("", "must hold names with values"),
    ],
)
def test_a_file_that_is_no_protocol_is_answered_in_a_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "study.yaml").write_text(text)
    with pytest.raises(LmGymError, match=message):
        read_request([f"protocol={tmp_path / 'study.yaml'}"])


@pytest.mark.parametrize("text", ["protocol: 3", "file: x.yaml", "calls: [1]", "calls: {a: 1}", "- 1", "a: ["])
def test_notes_that_this_command_did_not_write_are_not_written_over(tmp_path: Path, text: str) -> None:
    (tmp_path / PROTOCOL).write_text(text)
    with pytest.raises(LmGymError, match=PROTOCOL):
        write_protocol(read_request([*BOTH, f"out={tmp_path}"]), "one")
    assert (tmp_path / PROTOCOL).read_text() == text


def cells_of(arguments: list[str], out: Path) -> list[Cell]:
    protocol = read_request([*arguments, f"out={out}"]).protocol
    return make_cells(protocol, settings_of(protocol), protocol.seeds, out)


@pytest.mark.parametrize("varied", ["agent.lr=1,1.0", "evaluation.samples=2,4", "device=cpu,auto"])
def test_what_makes_no_other_run_is_not_varied(tmp_path: Path, varied: str) -> None:
    cells = cells_of(["agents=rloo", "tasks=echo-2", varied], tmp_path)
    with pytest.raises(InvalidArgumentError, match="must be different runs, and are one and the same"):
        check_distinct(cells)


def test_runs_are_called_as_the_report_calls_them(tmp_path: Path) -> None:
    cells = cells_of([*BOTH, "seeds=1", "agent.lr=1e-3,5e-3", "env.kl_coef=0.1,0.2"], tmp_path)
    check_distinct(cells)
    for cell in cells:
        cell.directory.mkdir()
        (cell.directory / "config.yaml").write_text(yaml.safe_dump(cell.values))
    runs = read_runs([tmp_path]).runs
    reported = {run.directory: (run.label, run.task) for run in runs}
    assert reported == {
        cell.directory: (label, cell.problem) for cell, label in zip(cells, labels_of(cells), strict=True)
    }
    assert ("rloo lr=5e-3", "anchor-0.1 kl_coef=0.2") in reported.values()


@pytest.mark.parametrize("kind", ["file", "run", "proc"])
def test_results_that_can_go_nowhere_are_answered_in_a_line(tmp_path: Path, kind: str) -> None:
    out = tmp_path / "out"
    if kind == "file":
        out.write_text("")
    elif kind == "run":
        out.mkdir()
        (out / "config.yaml").write_text("task: echo-2\n")
    else:
        out = Path("/proc/nowhere")
    with pytest.raises(InvalidArgumentError, match="`out` must be "):
        compare(["agents=reference", "tasks=echo-2", "seeds=1", f"out={out}"])


def test_the_help_page_has_every_key() -> None:
    page = compare_help_page()
    assert all(f"  {key}:" in page for key in KEYS)


@pytest.mark.slow
def test_what_cannot_be_is_found_without_torch() -> None:
    code = (
        "import sys; from agents.compare import main;"
        "code = main(['agents=ppo', 'tasks=echo-2', 'agent.lrr=1']); print(code, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "1 False"
    assert "Did you mean 'lr'?" in done.stderr
