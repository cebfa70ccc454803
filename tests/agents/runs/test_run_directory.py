"""What a run directory is held by, what is refused, what is taken back, and what is noticed when a run goes on."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import hydra
import pytest
from kills import survives
from omegaconf import OmegaConf

import agents.evaluate
import agents.runs.regrade
import agents.runs.run
import agents.train
from agents.agent import TokenCount
from agents.checkpoint import MANIFEST, newest, replacing, verify
from agents.distributed import Processes
from agents.runs import directory as directories
from agents.runs import trackers
from agents.runs.directory import CHECKPOINT, CONFIG_FILE, RUN_FILES, empty_again, new_run, read_values, resumed_run
from agents.runs.inputs import changes, notes_of
from agents.runs.lock import LOCK, Lock
from agents.runs.recorder import Recorder, read_rows
from agents.runs.saving import Saver
from agents.runs.signals import Interrupt, Stoppable
from lmgym.envs.vector import RLHFVectorEnv
from lmgym.errors import InvalidArgumentError, LmGymError, NotFiniteError, RewardError
from lmgym.files import RunFileError

ROOT = Path(__file__).parents[3]
VALUES = {"task": "stop-8", "env": {"prompts": None}, "agent": {"lr": 1e-3}, "sampler": {}, "seed": 0}


# -- one writer ------------------------------------------------------------------------------------------------------


def test_a_second_writer_is_refused_by_name(tmp_path: Path) -> None:
    with (
        Lock(tmp_path),
        pytest.raises(RunFileError, match=rf"process {os.getpid()} on .* is writing it"),
        Lock(tmp_path),
    ):
        pass
    assert not os.listdir(tmp_path)
    with Lock(tmp_path):
        pass


def test_a_lock_dies_with_its_process(tmp_path: Path) -> None:
    child = os.fork()
    if child == 0:
        Lock(tmp_path).__enter__()
        os._exit(0)
    os.waitpid(child, 0)
    assert os.listdir(tmp_path) == [LOCK]
    with Lock(tmp_path):
        pass
    assert not os.listdir(tmp_path)


def test_a_lock_that_was_removed_in_between_is_no_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its owner let it go and another process took one of that name, after this process had opened the first."""
    flock = fcntl.flock
    calls = []

    def late(descriptor: int, operation: int) -> None:
        if not calls:
            (tmp_path / LOCK).unlink()
        calls.append(descriptor)
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    with Lock(tmp_path):
        assert len(calls) == 2
        assert (tmp_path / LOCK).exists()


def test_a_file_system_without_locks_is_warned_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def unsupported(*_: object) -> None:
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with Lock(tmp_path):
        assert "without locks: nothing keeps a second process from" in capsys.readouterr().err
    assert not os.listdir(tmp_path)


def test_a_planted_lock_is_named(tmp_path: Path) -> None:
    (tmp_path / LOCK).symlink_to(tmp_path / "outside")
    with pytest.raises(RunFileError, match="must be no link"), Lock(tmp_path):
        pass
    (tmp_path / LOCK).unlink()
    (tmp_path / LOCK).mkdir()
    with pytest.raises(RunFileError, match="must be a file that can be written"), Lock(tmp_path):
        pass
    assert os.listdir(tmp_path) == [LOCK]


# -- beginning, and taking back --------------------------------------------------------------------------------------


def listing(directory: Path) -> dict[str, str]:
    return {str(p.relative_to(directory)): p.read_text() for p in sorted(directory.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("name", RUN_FILES)
def test_a_file_that_is_not_a_runs_is_neither_overwritten_nor_removed(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("mine")
    with pytest.raises(InvalidArgumentError, match="must be a directory without a run"), new_run(tmp_path, VALUES):
        pass
    assert listing(tmp_path) == {name: "mine"}


def leave(directory: Path, *, row: bool = False, checkpoint: bool = False) -> None:
    """Writes what a run leaves, then fails."""
    (directory / "versions.json").write_text("{}")
    (directory / "metrics.jsonl").write_text('{"step": 1}\n' if row else "")
    (directory / "tensorboard").mkdir()
    if checkpoint:
        with replacing(directory / CHECKPOINT) as scratch:
            (scratch / "weights").write_text("1")
    raise OSError("the power went")


def test_what_came_to_nothing_is_taken_back_and_nothing_else(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "notes.txt").write_text("mine")
    with pytest.raises(OSError, match="the power went"), empty_again(run), new_run(run, VALUES):
        leave(run)
    assert listing(tmp_path) == {"run/notes.txt": "mine"}


def test_a_directory_made_for_the_run_goes_away_and_an_older_one_stays(tmp_path: Path) -> None:
    fresh = tmp_path / "fresh"
    older = tmp_path / "older"
    older.mkdir()
    os.utime(older, (1e9, 1e9))
    for run in (fresh, older):
        with pytest.raises(KeyboardInterrupt), empty_again(run):
            run.mkdir(exist_ok=True)
            raise KeyboardInterrupt
    assert os.listdir(tmp_path) == ["older"]


@pytest.mark.parametrize("reached", ["row", "checkpoint"])
def test_a_run_that_has_rows_or_a_checkpoint_stays(tmp_path: Path, reached: str) -> None:
    with (
        pytest.raises(OSError, match="the power went"),
        empty_again(tmp_path / "run"),
        new_run(tmp_path / "run", VALUES),
    ):
        leave(tmp_path / "run", **{reached: True})
    assert {"config.yaml", "metrics.jsonl", "versions.json"} <= set(os.listdir(tmp_path / "run"))
    assert not (tmp_path / "run" / LOCK).exists()


def killed(directory: Path, **left: bool) -> None:
    """A new run that is killed: nothing is taken back."""
    child = os.fork()
    if child == 0:
        try:
            with new_run(directory, VALUES):
                try:
                    leave(directory, **left)
                finally:
                    os._exit(0)
        finally:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == 0


def test_a_run_without_a_checkpoint_begins_anew(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    killed(tmp_path, row=True)
    (tmp_path / ".metrics.jsonl.123.tmp").write_text("half")
    (tmp_path / "notes.txt").write_text("mine")
    with new_run(tmp_path, {**VALUES, "seed": 1}):
        assert sorted(os.listdir(tmp_path)) == [LOCK, CONFIG_FILE, "notes.txt"]
        assert "seed: 1" in (tmp_path / CONFIG_FILE).read_text()
    assert "it begins anew" in capsys.readouterr().err


@pytest.mark.parametrize("orphan", [False, True])
def test_a_run_with_a_checkpoint_does_not(tmp_path: Path, orphan: bool) -> None:
    killed(tmp_path, checkpoint=True)
    if orphan:
        os.replace(tmp_path / CHECKPOINT, tmp_path / f".{CHECKPOINT}.7.old")
    before = listing(tmp_path)
    refusal = pytest.raises(InvalidArgumentError, match=f"holds one: go on with that by resume={tmp_path}")
    with refusal, new_run(tmp_path, VALUES):
        pass
    assert {**listing(tmp_path), LOCK: before[LOCK]} == before
    with resumed_run(tmp_path):
        assert verify(tmp_path / CHECKPOINT).serial == 1


# -- what is noticed when a run goes on ------------------------------------------------------------------------------


def test_an_edited_config_is_noticed_by_key(tmp_path: Path) -> None:
    config = {"env": {"kl_coef": 0.2, "prompts": ["a", "b"]}, "agent": {"lr": 1e-3}, "seed": 0, "total_timesteps": 9}
    then = notes_of(config)
    assert not changes(then, notes_of({**config, "total_timesteps": 10, "device": "cuda"}))
    for key, changed in (
        ("agent.lr` in config.yaml is 0.01, and was 0.001", {"agent": {"lr": 1e-2}}),
        ("agent.lr` in config.yaml is missing, and was 0.001", {"agent": {"lambda": 1}}),
        ("env.prompts.1` in config.yaml is 'c', and was 'b'", {"env": {"kl_coef": 0.2, "prompts": ["a", "c"]}}),
        ("seed` in config.yaml is 0.0, and was 0 ", {"seed": 0.0}),
    ):
        assert any(key in line for line in changes(then, notes_of({**config, **changed}))), key


def test_a_config_of_the_old_layout_is_refused_in_a_line(tmp_path: Path) -> None:
    (tmp_path / CONFIG_FILE).write_text("task:\n  task: reviews\n  kl_coef: null\nagent: {}\n")
    with pytest.raises(
        RunFileError, match=r"`task` in .* must be a name, .* of an older lmgym.* Train it again"
    ) as error:
        read_values(tmp_path)
    assert "\n" not in str(error.value)


def test_an_edited_file_of_a_data_set_or_of_one_of_several_rewards_is_noticed(tmp_path: Path) -> None:
    rows = tmp_path / "data" / "main" / "train.jsonl"
    weights = tmp_path / "helpful" / "model.safetensors"
    for path in (rows, weights):
        path.parent.mkdir(parents=True)
        path.write_text("a")
    config = {"env": {"prompts": str(tmp_path / "data"), "reward": [str(tmp_path / "helpful"), "my_rewards:polite"]}}
    then = notes_of(config)
    assert then["inputs"].keys() == {"env.prompts", "env.reward.0"}
    assert not changes(then, notes_of(config))
    for path, key in ((rows, "env.prompts"), (weights, "env.reward.0")):
        path.write_text("b")
        assert any(key in line for line in changes(then, notes_of(config)))
        path.write_text("a")


def test_an_edited_input_file_is_noticed(tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    model = tmp_path / "model"
    prompts.write_text("a\nb\n")
    model.mkdir()
    (model / "model.safetensors").write_text("1")
    other = tmp_path / "lr"
    other.write_text("no input")
    config = {"env": {"prompts": str(prompts), "model": str(model), "name": "\0" * 9}, "agent": {"path": str(prompts)}}
    then = notes_of(config)
    assert then["inputs"].keys() == {"env.prompts", "env.model", "agent.path"}
    assert not changes(then, notes_of(config))
    prompts.write_text("b\na\n")
    (model / "model.safetensors").write_text("2")
    found = changes(then, notes_of(config))
    assert len(found) == 3
    assert f"`env.prompts`: the content of {prompts} is no longer that of when the run began." in found
    shutil.rmtree(model)
    assert any("env.model" in line for line in changes(then, notes_of(config)))


# -- when a run saves ------------------------------------------------------------------------------------------------


class Counter:
    """An agent that counts; a checkpoint is the number it has come to."""

    name = "Counter"
    at_rest = True
    processes = Processes()

    def __init__(self, fails_at: int = -1, error: Exception | None = None, stride: int = 10) -> None:
        self.num_timesteps = 0
        self.tokens = TokenCount()
        self.fails_at = fails_at
        self.error = error
        self.stride = stride

    def learn(self, total: int, callback: Callable[[int, dict[str, float]], bool]) -> None:
        while self.num_timesteps < total:
            if self.num_timesteps == self.fails_at and self.error is not None:
                raise self.error
            self.num_timesteps += self.stride
            if callback(self.num_timesteps, {"train/loss": 1.0}) is False:
                return

    def write(self, directory: Path) -> None:
        (directory / "count").write_text(str(self.num_timesteps))

    def load(self, directory: Path) -> None:
        self.num_timesteps = int((directory / "count").read_text())


def learn(run: Path, agent: Counter, total: int = 100, every: int = 30, *, resume: bool = False) -> Saver:
    saver = Saver(agent, run, every, {"config": {}, "inputs": {}}, "GO ON")
    if resume:
        saver.load()
    with Recorder(run, total, agent.num_timesteps if resume else None, progress=False) as recorder, Interrupt() as stop:
        saver.learn(total, recorder, stop)
    return saver


def saved(run: Path) -> int:
    assert verify(run / CHECKPOINT).notes["num_timesteps"] == int((run / CHECKPOINT / "count").read_text())
    return int((run / CHECKPOINT / "count").read_text())


def test_checkpoints_come_as_often_as_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = []
    write = Counter.write
    monkeypatch.setattr(Counter, "write", lambda self, path: (steps.append(self.num_timesteps), write(self, path)))
    learn(tmp_path, Counter(), 100, 30)
    assert steps == [30, 60, 90, 100]
    steps.clear()
    learn(tmp_path, Counter(), 200, 31, resume=True)  # 31 from the last checkpoint on
    assert steps == [140, 180, 200]


def test_what_was_reached_is_saved_where_training_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RewardError, match="judge"):
        learn(tmp_path, Counter(50, RewardError("the judge is ill")))
    assert saved(tmp_path) == 50
    said = capsys.readouterr().err
    assert "Training failed after 50 tokens." in said
    assert "The checkpoint is of 50 tokens. Go on with: GO ON" in said
    learn(tmp_path, Counter(), resume=True)
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == [*range(10, 101, 10)]


def test_where_nothing_was_reached_nothing_is_saved(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RewardError):
        learn(tmp_path, Counter(0, RewardError("the judge is ill")))
    assert not (tmp_path / CHECKPOINT).exists()
    assert "Nothing was saved" in capsys.readouterr().err


def test_where_training_diverges_the_last_checkpoint_stays(tmp_path: Path) -> None:
    with pytest.raises(NotFiniteError, match=r"nan. The checkpoint of 30 tokens stays as it was\."):
        learn(tmp_path, Counter(50, NotFiniteError("the log-probs are nan.")))
    assert saved(tmp_path) == 30
    with pytest.raises(NotFiniteError, match=r"nan\.$"):
        learn(tmp_path / "other", Counter(10, NotFiniteError("the log-probs are nan.")))


@pytest.mark.parametrize(("error", "expected"), [(LmGymError("not finite"), 30), (RuntimeError("out of memory"), 50)])
def test_within_an_update_the_last_checkpoint_stays_where_the_weights_are_wrong(
    tmp_path: Path, error: Exception, expected: int, capsys: pytest.CaptureFixture[str]
) -> None:
    agent = Counter(50, error)
    agent.at_rest = False
    with pytest.raises(type(error)):
        learn(tmp_path, agent)
    assert saved(tmp_path) == expected
    assert ("within an update" in capsys.readouterr().err) == (expected == 50)


def test_a_batch_without_its_row_is_not_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = Recorder.record

    def full(self: Recorder, step: int, metrics: Mapping[str, float]) -> None:
        if step == 50:
            raise OSError("no space left")
        record(self, step, metrics)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="no space left"):
        patch.setattr(Recorder, "record", full)
        learn(tmp_path, Counter())
    assert saved(tmp_path) == 30
    learn(tmp_path, Counter(), resume=True)
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == [*range(10, 101, 10)]


def test_where_saving_fails_too_the_first_error_is_raised_and_the_last_checkpoint_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write = Counter.write

    def full(self: Counter, path: Path) -> None:
        write(self, path)
        if self.num_timesteps > 30:
            raise OSError("no space left")

    monkeypatch.setattr(Counter, "write", full)
    with pytest.raises(RewardError):
        learn(tmp_path, Counter(50, RewardError("the judge is ill")))
    assert "could not be saved: OSError: no space left" in capsys.readouterr().err
    assert saved(tmp_path) == 30


# -- kills -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_kill_before_any_file_operation_of_a_run_costs_no_more_than_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twice in a row, in the run and in what goes on from it; then it goes on to the same curve."""
    monkeypatch.setitem(trackers._STARTERS, "tensorboard", lambda *_: MagicMock())

    def command() -> None:
        if run.exists() and newest(run / CHECKPOINT) is not None:
            with resumed_run(run):
                learn(run, Counter(), 20, resume=True)
        else:
            with new_run(run, VALUES):
                learn(run, Counter(), 20)

    operation = 0
    reached = 0
    while operation == reached:  # until no process gets that far
        operation += 1
        run = tmp_path / str(operation)
        for _ in range(2):
            if not survives(command, operation, monkeypatch):
                reached = operation
        command()
        assert [row["step"] for row in read_rows(run / "metrics.jsonl")] == [10, 20]
        assert saved(run) == 20
        assert sorted(os.listdir(run)) == [CHECKPOINT, CONFIG_FILE, "metrics.jsonl"]
        shutil.rmtree(run)
    assert operation > 30  # so many at least, or the operations were not seen


# -- signals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_asks_and_the_second_stops(first: int, second: int) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(KeyboardInterrupt), Stoppable(), Interrupt() as stop:
        os.kill(os.getpid(), first)
        assert stop.asked
        os.kill(os.getpid(), second)
        time.sleep(10)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


# -- the commands, on a task that is solved in no time ----------------------------------------------------------------

TINY = ["task=stop", "agent.batch_size=8", "agent.minibatches=1", "agent.epochs=1", "agent.width=8", "agent.layers=1"]
TINY += ["total_timesteps=400", "evaluation.samples=1", "evaluation.prompts=1", "device=cpu"]


def begin(directory: Path, *overrides: str) -> int:
    with hydra.initialize_config_dir(config_dir=str(ROOT / "conf"), version_base="1.3"):
        cfg = hydra.compose("train", overrides=[*TINY, *overrides])
    return agents.runs.run.begin(cfg, directory)


def go_on(directory: Path, *overrides: str) -> int:
    return agents.runs.run.go_on(directory, list(overrides), ())


def evaluate(directory: Path) -> None:
    agents.runs.regrade.regrade(directory, {}, ())


def curve(directory: Path) -> list[dict[str, Any]]:
    rows = read_rows(directory / "metrics.jsonl")
    return [{name: x for name, x in row.items() if not name.startswith("time/")} for row in rows]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("runs") / "run"
    assert begin(directory) == 0
    return directory


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of a finished run, to be damaged."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """No picture, which takes the longest."""
    monkeypatch.setattr(agents.runs.run, "curves", lambda *_: None)


def put(content: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(content)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 1
    path.write_bytes(content)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "empty": put(b""),
    "a list": put(b"[]"),
    "null": put(b"null\n"),
    "not text": put(b"\xff\xfe\x00\n"),
    "deep": put(b"[" * 5_000 + b"\n"),
    "another key": put(b'{"another": "key"}\n'),
    "texts": put(b'{"step": "x", "agent": "x", "task": 1, "evaluation": [], "after": {"return": {"mean": "x"}}}\n'),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-20]),
    "flipped": flip,
    "missing": lambda path: path.unlink(),
    "a directory": lambda path: (path.unlink(), path.mkdir()),
}
UNREAD = ["versions.json", "samples.json", "curves.png"]  # by the commands
UNREAD_DAMAGES = ["not text", "missing"]
FILES = [CONFIG_FILE, "metrics.jsonl", "summary.json", *UNREAD]
FILES += [f"{CHECKPOINT}/{name}" for name in ("state.json", "training.pt", "residual.json", "residual.safetensors")]
FILES += [f"{CHECKPOINT}/{MANIFEST}"]


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_named_or_does_no_harm(name: str, finished: Path, tmp_path: Path) -> None:
    for label in UNREAD_DAMAGES if name in UNREAD else DAMAGES:
        run = Path(shutil.copytree(finished, tmp_path / "run"))
        DAMAGES[label](run / name)
        for command in (evaluate, go_on):
            said = None
            try:
                command(run)
            except LmGymError as error:
                said = str(error)
            if said is None:
                assert not name.startswith(CHECKPOINT), (label, command)
            else:
                assert str(run) in said, (label, command)
                assert name in said, (label, command)
        shutil.rmtree(run)


@pytest.mark.parametrize("section", [*directories._SECTIONS, *directories._SCALARS])
def test_a_missing_key_of_the_config_is_named(run: Path, section: str) -> None:
    values = OmegaConf.to_container(OmegaConf.load(run / CONFIG_FILE))
    del values[section]  # type: ignore[arg-type, union-attr]
    OmegaConf.save(OmegaConf.create(values), run / CONFIG_FILE)
    for command in (evaluate, go_on):
        with pytest.raises(RunFileError, match=f"config.yaml` must have a key '{section}'"):
            command(run)


def test_an_edited_rate_is_refused_by_resume_and_said_by_evaluate(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (run / CONFIG_FILE).read_text()
    (run / CONFIG_FILE).write_text(text.replace("lr: 0.0005", "lr: 0.005"))
    message = "`agent.lr` in config.yaml is 0.005, and was 0.0005 when the checkpoint was saved."
    with pytest.raises(RunFileError) as caught:
        go_on(run)
    assert message in str(caught.value)
    evaluate(run)
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_a_checkpoint_of_another_run_of_equal_shape_is_noticed(run: Path, tmp_path: Path) -> None:
    begin(tmp_path / "other", "seed=1")
    shutil.rmtree(run / CHECKPOINT)
    shutil.copytree(tmp_path / "other" / CHECKPOINT, run / CHECKPOINT)
    with pytest.raises(RunFileError, match="`seed` in config.yaml is 0, and was 1"):
        go_on(run)


@pytest.mark.slow
def test_what_a_kill_left_is_taken_up_by_both_commands(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of two that lie beside each other the newest; `evaluate` reads it where it lies."""
    first = run / f".{CHECKPOINT}.2.old"
    last = run / f".{CHECKPOINT}.1.old"
    shutil.copytree(run / CHECKPOINT, first)
    go_on(run, "total_timesteps=500")
    os.replace(run / CHECKPOINT, last)
    shutil.copytree(first, run / f".{CHECKPOINT}.9.tmp") if first.exists() else None
    reached = verify(last).notes["num_timesteps"]
    (run / ".config.yaml.1.tmp").write_text("half")
    before = sorted(os.listdir(run))
    evaluate(run)
    assert sorted(os.listdir(run)) == sorted({*before, "evaluation.json"})
    assert f"{reached:,} tokens" in capsys.readouterr().out
    go_on(run, "total_timesteps=500")
    assert verify(run / CHECKPOINT).notes["num_timesteps"] == reached
    assert not [name for name in os.listdir(run) if name.startswith(".")]


def test_a_refused_resume_changes_nothing(run: Path) -> None:
    (run / CHECKPOINT / "state.json").write_text("{}")
    before = listing_bytes(run)
    with pytest.raises(LmGymError, match=r"state\.json"):
        go_on(run, "total_timesteps=900")
    with pytest.raises(LmGymError, match=r"`agent.lr` must be as it was"):
        go_on(run, "agent.lr=1")
    assert listing_bytes(run) == before


def listing_bytes(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("error", [RewardError("no judge"), ValueError("no judge"), KeyboardInterrupt()])
def test_a_start_that_fails_leaves_nothing(
    tmp_path: Path, error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    for part in ("build", "grade"):
        with monkeypatch.context() as patch, pytest.raises(type(error)):
            patch.setattr(agents.runs.run, part, lambda *_, **__: raise_(error))
            begin(tmp_path / "run")
        assert not (tmp_path / "run").exists()


def raise_(error: BaseException) -> None:
    raise error


def test_the_picture_is_not_written_through_a_link(run: Path, tmp_path: Path) -> None:
    for name in ("curves.png", "summary.json", "evaluation.json"):
        (run / name).unlink(missing_ok=True)
        (run / name).symlink_to(tmp_path / name)
    (tmp_path / "summary.json").write_text("{}")
    go_on(run)
    evaluate(run)
    assert (tmp_path / "summary.json").read_text() == "{}"
    assert {path.name for path in tmp_path.iterdir()} == {"run", "summary.json"}
    assert (run / "curves.png").read_bytes().startswith(b"\x89PNG")


# -- bit for bit -----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("quick")
def test_a_reward_that_raises_costs_no_more_than_its_batch(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever it had drawn before it failed, the run goes on to the curve of one that did not fail."""
    with monkeypatch.context() as patch:
        calls = 0
        replay = RLHFVectorEnv.replay

        def failing(self: Any, *args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == 4:
                raise ZeroDivisionError("the judge divides by zero")
            return replay(self, *args, **kwargs)

        patch.setattr(RLHFVectorEnv, "replay", failing)
        with pytest.raises(ZeroDivisionError):
            begin(tmp_path / "run")
    rows = curve(tmp_path / "run")
    assert 0 < len(rows) < len(curve(finished))
    assert verify(tmp_path / "run" / CHECKPOINT).notes["num_timesteps"] == rows[-1]["step"]
    assert go_on(tmp_path / "run") == 0
    assert curve(tmp_path / "run") == curve(finished)
