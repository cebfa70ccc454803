"""Several processes train as one: the same curve and weights on one and on two, and a wrong share is seen.

Most tests run two agents in two threads that exchange as processes do; one has two real processes, with gloo.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from reward_texts import make_gpt2, make_tokenizer, toy_records
from shipped import AGENTS, ON_POLICY, SUPERVISED, class_of, fields_of
from torch import Tensor

from agents.algorithms.ppo import PPO, PPOConfig
from agents.algorithms.sft import SFT, SFTConfig
from agents.algorithms.uniform import Uniform
from agents.distributed import Processes, ProcessLostError
from agents.faults.config import FaultConfig
from agents.faults.make import add_faults
from agents.runs.launch import check_one_run, joined_processes, launched_rank
from agents.runs.sharing import share
from lmgym.envs.vector import RLHFVectorEnv
from lmgym.errors import InvalidArgumentError
from lmgym.feedback.files import write_records
from lmgym.feedback.records import Choice, Ranking, Record
from lmgym.reward_models.config import RewardConfig
from lmgym.reward_models.trainer import Checkpoints
from lmgym.reward_models.training import prepare_lesson, train_member
from lmgym.rewards.noise import NoisyReward

TASK = "keyword-8"
NOWHERE = Path(os.devnull)  # no file can be written there
Curve = list[dict[str, float]]


@dataclass
class Board:
    """Where two threads lay down what they exchange."""

    values: list[Any] = field(default_factory=lambda: [None, None])
    barrier: threading.Barrier = field(default_factory=lambda: threading.Barrier(2, timeout=60))


@dataclass(frozen=True)
class Threads(Processes):
    """Two threads that exchange as two processes do."""

    board: Board = field(default_factory=Board)

    def gather(self, value: Any) -> list[Any]:
        self.board.values[self.rank] = value
        self.board.barrier.wait()
        values = list(self.board.values)
        self.board.barrier.wait()
        return values

    def add_up(self, tensors: Sequence[Tensor]) -> None:
        parts = self.gather([tensor.clone() for tensor in tensors])
        for i, tensor in enumerate(tensors):
            tensor.copy_(parts[0][i] + parts[1][i])


class Averaging(Threads):
    """The mean of the gradients, as of losses that are means over the rows of each process."""

    def add_up(self, tensors: Sequence[Tensor]) -> None:
        super().add_up(tensors)
        for tensor in tensors:
            tensor.div_(2)


class ReadingTheSame(Threads):
    """Both play and read the same half of a batch."""

    @property
    def rows(self) -> slice:
        return slice(0, None, 2)


class Alone(Threads):
    """Each takes the gradient of its rows, and nothing is summed."""

    def add_up(self, tensors: Sequence[Tensor]) -> None:
        self.gather(None)


@pytest.fixture(autouse=True)
def one_thread_each() -> Iterator[None]:
    """Threads that wait for each other, and spin in OpenMP meanwhile, take ten times as long."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


SETTINGS: dict[str, dict[str, Any]] = {  # PPO's minibatches are ragged, and so is the last batch of a file: of one row
    "ppo": {"batch_size": 9, "epochs": 2, "minibatches": 2, "micro_batch_size": 3, "whiten_advantages": "minibatch"},
    "sft": {"batch_size": 5, "n": 3, "lr": 3e-4},
    "sft_optimal": {"batch_size": 5, "demonstrations": "optimal", "lr": 3e-4},
    "sft_file": {"batch_size": 3, "epochs": 9, "demonstrations": "file"},
    "dpo": {"batch_size": 5},
    "dpo_file": {"batch_size": 3, "epochs": 9, "mode": "offline"},
}
OTHERS = {"batch_size": 8, "micro_batch_size": 3, "minibatches": 2, "group_size": 4, "rollouts": 1, "lr": 1e-3}


def make(kind: str, files: Path = NOWHERE) -> Any:
    """A small agent, a wrong one where its name says so; what it reads is written into `files`."""
    name = kind.removeprefix("wrong_")
    agent_class = class_of(name if name in AGENTS else name.partition("_")[0])
    settings = SETTINGS.get(kind) or fields_of(agent_class, OTHERS)
    if kind == "sft_file":
        settings = {**settings, "path": write_demonstrations(files)}
    elif kind == "dpo_file":
        settings = {**settings, "preferences": write_preferences(files)}
    config = agent_class.Config(**settings)
    envs = RLHFVectorEnv(config.num_envs, group_size=config.responses, task=TASK, device="cpu")
    agent = agent_class(envs, config, seed=3)
    if kind != name:
        faults = FaultConfig(
            staleness=1, sampler_mismatch="temperature:1.1", reward_noise=0.1, reference_drift="ema:0.9"
        )
        add_faults(agent, faults, seed=3)
    return agent


def write_demonstrations(directory: Path) -> str:
    """A file of 7 demonstrations of unequal lengths; one that is there stays."""
    path = directory / "demonstrations.jsonl"
    if path.exists():
        return str(path)
    rows = [{"prompt": "cde"[i % 3], "completion": " a" * (i + 1)} for i in range(7)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def write_preferences(directory: Path) -> str:
    """A file of 7 pairs, one of them a tie; one that is there stays."""
    path = directory / "preferences.jsonl"
    if path.exists():
        return str(path)
    tied = (Ranking(((0, 1),)),)
    judgements = (*tied, *(Choice(i % 2, 1 - i % 2) for i in range(6)))
    write_records(path, [Record("cde"[i % 3], (" a" * (i + 1), " b b"), judge) for i, judge in enumerate(judgements)])
    return str(path)


def train(agent: Any, batches: int) -> Curve:
    """The curve of some more batches, without its times, and without what magnifies rounding by its nature."""
    curve: Curve = []

    def note(step: int, metrics: dict[str, float]) -> bool:
        kept = {name: x for name, x in metrics.items() if not name.startswith(("time/", "train/cg_residual"))}
        curve.append({"step": step} | kept)
        return len(curve) < batches

    agent.learn(10_000, note)
    return curve


def train_two(
    kind: str,
    batches: int,
    shared: Callable[..., Threads] = Threads,
    start: Path | None = None,
    files: Path = NOWHERE,
) -> list[tuple[Any, Curve]]:
    """Two agents in two threads that share every batch."""
    board = Board()

    def one(rank: int) -> tuple[Any, Curve]:
        torch.set_num_threads(1)
        agent = agents[rank]
        try:
            return agent, train(agent, batches)
        except BaseException:
            board.barrier.abort()
            raise

    agents = [make(kind, files) for _ in range(2)]
    for rank, agent in enumerate(agents):
        share(agent, shared(rank, 2, board=board))
        if start is not None:
            agent.load(start)
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(one, range(2)))


def gap(found: Curve, expected: Curve) -> float:
    """The largest difference of a metric of two curves, relative where the metric is above 1."""
    assert [row.keys() for row in found] == [row.keys() for row in expected]
    return max(
        abs(a[name] - b[name]) / max(1.0, abs(b[name])) for a, b in zip(found, expected, strict=True) for name in b
    )


def weight_gap(a: Any, b: Any) -> float:
    """The largest difference of a weight."""
    pairs = zip(a.policy.parameters(), b.policy.parameters(), strict=True)
    return max(float((x - y).detach().abs().max()) for x, y in pairs)


@pytest.mark.parametrize("kind", ["ppo", "rloo", "wrong_rloo", "sft", "sft_file", "dpo", "dpo_file"])
def test_two_train_as_one(kind: str, tmp_path: Path) -> None:
    alone = make(kind, tmp_path)
    expected = train(alone, 3)
    (first, curve), (second, other) = train_two(kind, 3, files=tmp_path)
    assert curve == other
    assert weight_gap(first, second) == 0
    assert gap(curve, expected) < 1e-4
    assert weight_gap(first, alone) < 1e-5
    assert first.tokens == second.tokens == alone.tokens
    assert torch.equal(first.generator.get_state(), alone.generator.get_state())


@pytest.mark.parametrize("shared", [Averaging, ReadingTheSame])
def test_a_wrong_share_is_seen(shared: type[Threads]) -> None:
    expected = train(make("rloo"), 2)
    (_, curve), _ = train_two("rloo", 2, shared)
    assert gap(curve, expected) > 1e-2


def test_weights_that_part_are_seen() -> None:
    with pytest.raises(RuntimeError, match="must have ratio 1"):
        train_two("rloo", 2, Alone)


def test_a_run_goes_on_with_another_number_of_processes(tmp_path: Path) -> None:
    whole = make("rloo")
    expected = train(whole, 4)
    (first, _), _ = train_two("rloo", 2)
    first.save(tmp_path / "two")
    alone = make("rloo")
    alone.load(tmp_path / "two")
    assert gap(train(alone, 2), expected[2:]) < 1e-4
    half = make("rloo")
    train(half, 2)
    half.save(tmp_path / "one")
    (_, curve), _ = train_two("rloo", 2, start=tmp_path / "one")
    assert gap(curve, expected[2:]) < 1e-4


def test_one_that_stops_stops_all() -> None:
    board = Board()
    agents = [make("rloo") for _ in range(2)]
    batches = [0, 0]

    def one(rank: int) -> None:
        torch.set_num_threads(1)

        def stop(step: int, metrics: dict[str, float]) -> bool:
            batches[rank] += 1
            return not (rank == 1 and batches[rank] == 2)

        agents[rank].learn(10_000, stop)

    for rank, agent in enumerate(agents):
        share(agent, Threads(rank, 2, board=board))
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(one, range(2)))
    assert batches == [2, 2]


def test_one_process_exchanges_nothing() -> None:
    one = Processes()
    values = torch.tensor([1.0])
    one.add_up([values])
    assert values == 1
    assert one.gather("x") == ["x"]
    assert not one.all_agree(False)
    assert list(range(5))[one.rows] == list(range(5))


def test_what_cannot_be_shared_is_refused() -> None:
    three = Processes(0, 3)
    agent = make("ppo")
    with pytest.raises(InvalidArgumentError, match=r"`agent.minibatches` must leave every process an episode: 9 in 2"):
        share(agent, Processes(0, 5))
    envs = agent.envs
    envs.engine.reward = NoisyReward(envs.engine.reward, 0.1)
    with pytest.raises(InvalidArgumentError, match=r"`env.reward` must score a response by itself"):
        share(agent, three)
    with pytest.raises(InvalidArgumentError, match=r"must learn in a loop of lmgym .* got Uniform"):
        share(Uniform(RLHFVectorEnv(1, task=TASK, device="cpu")), three)
    with pytest.raises(InvalidArgumentError, match=r"`agent.batch_size` must leave every process an example: 2 for 3"):
        share(SFT(RLHFVectorEnv(1, task=TASK, device="cpu"), SFTConfig(batch_size=2)), three)
    config = PPOConfig(batch_size=4, minibatches=1, collect="steps")
    stepping = PPO(RLHFVectorEnv(4, autoreset_mode="SameStep", task=TASK, device="cpu"), config)
    with pytest.raises(InvalidArgumentError, match=r"`agent.collect` must be 'episodes'"):
        share(stepping, three)


def test_several_processes_train_one_run(monkeypatch: pytest.MonkeyPatch) -> None:
    check_one_run(2, is_multirun=True)
    assert launched_rank() == 0
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    for seeds, is_multirun in ((2, False), (1, True)):
        with pytest.raises(InvalidArgumentError, match="`seeds` must be 1, and -m left out, where 2 processes"):
            check_one_run(seeds, is_multirun=is_multirun)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(InvalidArgumentError, match="without sharding, and ACCELERATE_USE_FSDP is set"):
        check_one_run(1, is_multirun=False)
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit) as ended:  # without a word
        check_one_run(2, is_multirun=False)
    assert ended.value.code == launched_rank() == 1


# -- real processes --------------------------------------------------------------------------------------------------


LONG = dict.fromkeys(("ppo", "rloo", "sft", "sft_optimal", "sft_file", "dpo", "dpo_file"), 20)
BATCHES = dict.fromkeys(("wrong_ppo", *ON_POLICY, *SUPERVISED), 3) | LONG
FEW = {"wrong_ppo": 2, "ppo": 6, "rloo": 6, "sft": 4, "dpo": 4}


def teach(save: Path, resume: Path | None = None) -> tuple[Curve, list[Tensor]]:
    """The curve and the weights of a reward model after 20 updates, which the first process saves after 10 of them."""
    config = RewardConfig(ties="davidson", objective="pairwise", batch_size=5, epochs=2, eval_every=4)
    lesson = prepare_lesson(toy_records(56), make_gpt2(), make_tokenizer(), config)
    curve: Curve = []
    checkpoints = Checkpoints(lambda source, _: shutil.copytree(source, save), every=10, resume=resume)
    member = train_member(lesson, 0, lambda step, metrics: curve.append({"step": step} | metrics), checkpoints)
    return curve, [weight.detach() for weight in member.model.parameters()]


def work(rank: int, port: int, directory: Path, batches_of: dict[str, int]) -> None:
    """What each of two processes does: a reward model, one that goes on from another run's checkpoint, and batches of
    agents; then the second is gone, and the first misses it.
    """
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with joined_processes("cpu") as processes:
        torch.save(teach(directory / "by-two"), directory / f"taught-{rank}.pt")
        torch.save(teach(directory / "again", directory / "by-one"), directory / f"resumed-{rank}.pt")
        for kind, batches in batches_of.items():
            agent = make(kind, directory)
            share(agent, processes)
            curve = train(agent, batches)
            weights = [weight.detach() for weight in agent.policy.parameters()]
            torch.save((curve, weights), directory / f"{kind}-{rank}.pt")
        if rank == 1:
            os._exit(0)
        try:
            train(agent, 1)
        except ProcessLostError as error:
            (directory / "lost").write_text(str(error), encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize(
    "batches_of", [FEW, pytest.param(BATCHES, marks=pytest.mark.minutes)], ids=["few", "every agent"]
)
def test_two_processes_train_as_one(batches_of: dict[str, int], tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    make("sft_file", tmp_path)  # the files are there before both read them
    make("dpo_file", tmp_path)
    expected, _ = teach(tmp_path / "by-one")
    torch.multiprocessing.spawn(work, (port, tmp_path, batches_of), nprocs=2)
    assert [row["step"] for row in expected] == list(range(1, 21))
    names = ("taught-0", "taught-1", "resumed-0", "resumed-1")
    found = {name: torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in names}
    found["resumed"] = teach(tmp_path / "again-by-one", tmp_path / "by-two")
    for name, (curve, _) in found.items():
        assert len(curve) == (20 if name.startswith("taught") else 10)
        assert gap(curve, expected[-len(curve) :]) < 1e-4, name
    assert all(map(torch.equal, found["taught-0"][1], found["taught-1"][1]))
    for kind, batches in batches_of.items():
        curve, weights = torch.load(tmp_path / f"{kind}-0.pt", weights_only=True)
        other, other_weights = torch.load(tmp_path / f"{kind}-1.pt", weights_only=True)
        assert curve == other, kind
        assert all(map(torch.equal, weights, other_weights)), kind
        alone = make(kind, tmp_path)
        assert gap(curve, train(alone, batches)) < 1e-4, kind
        pairs = zip(weights, alone.policy.parameters(), strict=True)
        assert all(torch.allclose(x, y, atol=1e-4) for x, y in pairs), kind
    assert "Process 0 of 2 cannot reach the others" in (tmp_path / "lost").read_text(encoding="utf-8")
