"""Agents whose batches an engine samples: with the right weights nothing changes, and what is wrong shows."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium as gym
import hydra
import pytest
import torch
from conftest import gpt2, learn, shifted, weights, word_count, word_tokenizer
from shipped import CONF
from sources import ROOT

from agents.algorithms.ppo import PPO
from agents.algorithms.rloo import RLOO
from agents.distributed import Processes
from agents.importance import sampler_kl
from agents.on_policy import OnPolicyAgent
from agents.remote.config import EngineConfig
from agents.remote.connect import connect
from agents.runs.defaults import complete_agents
from agents.runs.plan import build, check
from agents.runs.recorder import read_rows
from agents.runs.run import begin
from lmgym.errors import InvalidArgumentError, LmGymError
from lmgym.models.sampling import Sampler
from lmgym.remote.client import Client
from lmgym.remote.protocol import EngineError
from lmgym.remote.served import ServedModel, Wrong
from lmgym.remote.server import Server

RIGHT = Wrong()
SMALL = {"batch_size": 16, "minibatches": 1, "epochs": 1, "recompute_log_probs": True}


@contextlib.contextmanager
def serving(model: str, wrong: Wrong = RIGHT) -> Iterator[Server]:
    with Server(ServedModel(model, wrong)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture(scope="module")
def engine(model_dir: str) -> Iterator[Server]:
    with serving(model_dir) as server:
        yield server


def make_agent(kind: type[OnPolicyAgent], model: str, sampler: Sampler | None = None, **config: Any) -> Any:
    settings = kind.Config(**{**SMALL, **config})
    envs: Any = gym.make_vec(
        "lmgym/RLHF-v0",
        num_envs=settings.responses,
        group_size=settings.responses,
        autoreset_mode="SameStep",
        model=model,
        reward=word_count,
        prompts=["the film was", "a book", "it", "we liked the meal and"],
        max_new_tokens=6,
        kl_coef=0.2,
    )
    return kind(envs.unwrapped, settings, seed=shifted(), sampler=sampler)


@pytest.mark.parametrize("kind", [PPO, RLOO])
def test_the_curve_is_that_of_sampling_here(kind: type[OnPolicyAgent], model_dir: str, engine: Server) -> None:
    here = make_agent(kind, model_dir)
    there = make_agent(kind, model_dir)
    connect(there, EngineConfig(url=engine.url))
    expected = learn(here, 3)
    found = learn(there, 3)
    for row, other in zip(found, expected, strict=True):
        assert row == pytest.approx(other, abs=1e-4)
        assert row["train/sampler_gap"] < 1e-5
        assert row["train/sampler_gap_max"] < 1e-4
        assert abs(row["train/sampler_kl"]) < 1e-5
    assert torch.allclose(weights(here), weights(there), atol=1e-4)


def test_an_engine_that_is_lost_ends_the_run_where_it_can_go_on(model_dir: str, tmp_path: Path) -> None:
    with serving(model_dir) as server:
        agent = make_agent(RLOO, model_dir)
        connect(agent, EngineConfig(url=server.url, weights=str(tmp_path / "weights")))
        first = learn(agent, 1)
    with pytest.raises(EngineError, match=r"No engine answers at .*/collective_rpc"):
        learn(agent, 1)
    assert agent.at_rest
    agent.save(tmp_path / "checkpoint")
    other = make_agent(RLOO, model_dir)
    other.load(tmp_path / "checkpoint")
    with serving(model_dir) as server:
        connect(other, EngineConfig(url=server.url, check=False))
        rest = learn(other, 2)
    expected = learn(make_agent(RLOO, model_dir), 3)
    for row, unbroken in zip(first + rest, expected, strict=True):
        assert row["rollout/return"] == pytest.approx(unbroken["rollout/return"], abs=1e-4)
        assert row["cost/forward_tokens"] == unbroken["cost/forward_tokens"]


def test_stale_weights_are_refused_or_measured(model_dir: str) -> None:
    with serving(model_dir, Wrong(stale=1)) as server:
        agent = make_agent(RLOO, model_dir)
        with pytest.raises(EngineError, match="must sample from the weights that it is sent"):
            connect(agent, EngineConfig(url=server.url))
    with serving(model_dir, Wrong(stale=1)) as server:
        agent = make_agent(RLOO, model_dir, lr=0.01, importance="truncated")
        connect(agent, EngineConfig(url=server.url, check=False))
        history = learn(agent, 3)
    assert history[0]["train/sampler_gap"] < 1e-5
    for row in history[1:]:
        assert row["train/sampler_gap"] > 1e-3
        assert row["train/sampler_gap_max"] > row["train/sampler_gap"]
        assert row["train/sampler_kl"] > 1e-6
        assert row["train/importance"] != 1


def test_another_temperature_is_measured(model_dir: str) -> None:
    agent = make_agent(PPO, model_dir, batch_size=256)
    with serving(model_dir, Wrong(temperature=1.5)) as server:
        connect(agent, EngineConfig(url=server.url))  # the weights are the right ones
        episodes = agent.collect()
    log_ratios = (episodes.ref_log_probs - episodes.log_probs)[episodes.response_mask]
    logits = agent.policy.read(episodes).logits.detach()
    sampler = (logits / 1.5).log_softmax(-1)
    exact = (sampler.exp() * (sampler - logits.log_softmax(-1)).nan_to_num()).sum(-1).mean().item()
    assert exact > 0.02
    assert sampler_kl(log_ratios) == pytest.approx(exact, rel=0.3)


def test_an_engine_of_another_model_is_refused(model_dir: str, engine: Server, tmp_path: Path) -> None:
    tokenizer = word_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    gpt2(len(tokenizer) + 3, n_embd=16).save_pretrained(tmp_path)
    agent = make_agent(RLOO, str(tmp_path))
    with pytest.raises(InvalidArgumentError, match="of the policy's shape, with n_embd=16, and http.* n_embd=32"):
        connect(agent, EngineConfig(url=engine.url))


def test_what_only_the_engine_can_tell_is_asked(
    model_dir: str, engine: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    agent = make_agent(RLOO, model_dir)
    served = engine.served
    monkeypatch.setattr(served, "max_tokens", 8)
    with pytest.raises(InvalidArgumentError, match="must take sequences of 11 tokens, .* takes 8"):
        connect(agent, EngineConfig(url=engine.url))
    monkeypatch.setattr(served, "max_tokens", 48)
    monkeypatch.setattr(agent.envs.engine.lm, "embedded", 10)
    with pytest.raises(InvalidArgumentError, match="must serve a model of 10 tokens"):
        connect(agent, EngineConfig(url=engine.url))


def test_log_probs_of_another_distribution_are_refused(
    model_dir: str, engine: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Raw(Client):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            self.logprobs_mode = "raw_logprobs"

    monkeypatch.setattr("agents.remote.connect.Client", Raw)
    connect(make_agent(RLOO, model_dir), EngineConfig(url=engine.url))
    with pytest.raises(InvalidArgumentError, match="start vLLM with --logprobs-mode processed_logprobs"):
        connect(make_agent(RLOO, model_dir, Sampler(top_p=0.9)), EngineConfig(url=engine.url))


def test_a_table_has_no_engine(engine: Server) -> None:
    envs = gym.make_vec("lmgym/RLHF-v0", num_envs=4, group_size=4, autoreset_mode="SameStep", task="echo-4")
    agent = RLOO(envs.unwrapped, RLOO.Config(**SMALL))
    with pytest.raises(InvalidArgumentError, match="`agent.policy` must be 'finetune' .*, got a ResidualPolicy"):
        connect(agent, EngineConfig(url=engine.url))


ENGINE = ["engine.url=http://127.0.0.1:9", "agent.recompute_log_probs=true"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (ENGINE[:1], "`agent.recompute_log_probs` must be true where an engine samples"),
        ([*ENGINE, "agent.collect=steps"], "`agent.collect` must be 'episodes' where an engine samples"),
        ([*ENGINE, "sampler=greedy_then_sample"], "`sampler` must draw every token"),
        ([*ENGINE, "sampler_mismatch=bfloat16"], "`sampler_mismatch` must be null where an engine samples"),
        ([ENGINE[0], "agent=sft"], "`engine.url` must be null for an agent that does not learn from its own"),
        ([*ENGINE, "seeds=2"], "`engine.url` must be null where `seeds` is above 1"),
        (["engine.url=localhost:8000"], "`engine.url` must be an address such as"),
        (["engine.url=http://"], "`engine.url` must be an address such as"),
        (["engine.timeout=0"], "`engine.timeout` must be"),
    ],
)
def test_a_run_that_cannot_have_an_engine_is_refused_before_anything_loads(overrides: list[str], message: str) -> None:
    with pytest.raises(LmGymError, match=message):
        check(composed("task=reviews", *overrides))


def composed(*overrides: str) -> Any:
    complete_agents()
    with hydra.initialize_config_dir(str(CONF.parent), version_base="1.3"):
        return hydra.compose("train", overrides=list(overrides))


def test_several_processes_have_no_engine() -> None:
    plan = check(composed("task=reviews", *ENGINE))
    with pytest.raises(InvalidArgumentError, match="`engine.url` must be null where several processes"):
        build(plan, Processes(1, 2))


@pytest.mark.minutes
def test_a_run_and_an_engine_are_two_processes(tmp_path: Path) -> None:
    words = ["task=arithmetic-1", "agent=rloo", "agent.batch_size=128", "evaluation.samples=2", "total_timesteps=1500"]
    words += ["agent.recompute_log_probs=true"]
    assert begin(composed(*words), tmp_path / "here") == 0
    command = [sys.executable, "-m", "lmgym.remote", "arithmetic-1", "port=0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as server:
        assert server.stdout is not None
        try:
            url = server.stdout.readline().split(" at ")[1].split()[0]
            assert begin(composed(*words, f"engine.url={url}"), tmp_path / "there") == 0
            server.kill()
            with pytest.raises(EngineError, match="No engine answers"):
                begin(composed(*words, f"engine.url={url}"), tmp_path / "lost")
        finally:
            server.kill()
    here, there = (read_rows(tmp_path / name / "metrics.jsonl") for name in ("here", "there"))
    for row, other in zip(here, there, strict=True):
        assert row["rollout/return"] == pytest.approx(other["rollout/return"], abs=1e-4)
