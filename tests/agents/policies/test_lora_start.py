"""A policy that goes on with the adapter of its reference, and adapters as whole models on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import learn, shifted
from extras import needs_peft
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from agents.algorithms.ppo import PPO, PPOConfig
from agents.policies.lora import LoRAPolicy
from lmgym.envs.vector import RLHFVectorEnv
from lmgym.errors import InvalidArgumentError
from lmgym.models.merging import save_merged
from lmgym.models.sharing import load_causal_lm

pytestmark = needs_peft
IDS = torch.arange(1, 13).view(2, 6)


def move(policy: LoRAPolicy, seed: int, scale: float = 0.1) -> LoRAPolicy:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.adapter:
            parameter += scale * torch.randn(parameter.shape, generator=generator)
    return policy


@pytest.fixture(scope="module")
def sft(model_dir: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter that has learned something, with scaling and layers of its own."""
    directory = tmp_path_factory.mktemp("sft")
    lm = load_causal_lm(model_dir, "cpu")
    move(LoRAPolicy(lm, rank=3, alpha=5.0, modules="c_attn,c_fc"), 1).save(directory)
    return directory


@torch.no_grad()
def logits(model: Any) -> Tensor:
    found: Tensor = model.eval()(input_ids=IDS).logits
    return found


def plain(directory: str | Path) -> Tensor:
    """What transformers itself makes of a directory, an adapter put onto its base or a whole model."""
    return logits(AutoModelForCausalLM.from_pretrained(directory))


def agent_on(sft: Path, parts: dict[str, Any], **config: Any) -> PPO:
    envs = RLHFVectorEnv(1, autoreset_mode="SameStep", device="cpu", **parts | {"model": str(sft)})
    numbers: dict[str, Any] = {"batch_size": 8, "minibatches": 2, "epochs": 1, "lr": 1e-2, "policy": "lora"}
    return PPO(envs, PPOConfig(**numbers | config), seed=shifted(0))


def test_reference_and_policy_are_the_base_with_adapters_of_their_own(
    sft: Path, model_dir: str, parts: dict[str, Any], tmp_path: Path
) -> None:
    agent = agent_on(sft, parts, lora_start="reference")
    policy = agent.policy
    assert isinstance(policy, LoRAPolicy)
    reference = agent.envs.engine.lm.model
    expected = plain(sft)
    torch.testing.assert_close(logits(reference), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(logits(policy.actor), expected, rtol=0, atol=1e-5)

    history = learn(agent, 2)
    assert abs(history[0]["rollout/kl"]) < 1e-4
    assert history[1]["rollout/exact_kl"] > 1e-5
    torch.testing.assert_close(logits(reference), expected, rtol=0, atol=1e-5)
    policy.save(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], set(config["target_modules"])) == (3, 5.0, {"c_attn", "c_fc"})
    assert config["base_model_name_or_path"] == model_dir  # on the base itself, not on the adapter
    learned = logits(policy.actor)
    assert (learned - expected).abs().max() > 1e-3
    torch.testing.assert_close(plain(tmp_path), learned, rtol=0, atol=1e-5)

    again = LoRAPolicy(agent.envs.engine.lm, start="reference")
    again.load(tmp_path)
    assert torch.equal(logits(again.actor), learned)


@pytest.mark.parametrize("start", ["new", "reference"])
def test_the_base_is_held_once(start: str, sft: Path, parts: dict[str, Any]) -> None:
    """Bytes of all tensors that env and agent hold, the optimiser's included."""
    agent = agent_on(sft, parts, lora_start=start)
    learn(agent, 1)
    policy = agent.policy
    assert isinstance(policy, LoRAPolicy)
    reference = agent.envs.engine.lm.model
    held = [*reference.parameters(), *policy.parameters(), *policy.actor.parameters()]
    bytes_held = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in held}
    base = sum(x.nbytes for x in reference.parameters())
    adapter = sum(x.nbytes for x in policy.adapter)
    head = sum(x.nbytes for x in policy.value_head.parameters())
    assert sum(bytes_held.values()) == base + (1 if start == "new" else 2) * adapter + head
    moments = sum(x.nbytes for state in agent.updater.optimizer.state.values() for x in state.values() if x.dim())
    assert moments == 2 * (adapter + head)


def test_an_adapter_in_half_precision_starts_near_its_reference(sft: Path, parts: dict[str, Any]) -> None:
    agent = agent_on(sft, parts | {"dtype": "bfloat16"}, lora_start="reference")
    assert {p.dtype for p in agent.policy.parameters()} == {torch.float32}
    assert abs(learn(agent, 1)[0]["rollout/kl"]) < 1e-2


def test_only_an_adapter_of_lora_alone_can_be_gone_on_with(sft: Path, parts: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(InvalidArgumentError, match="`lora_start` must be 'new' where the reference is no adapter"):
        agent_on(Path(parts["model"]), parts, lora_start="reference")
    for path in sft.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((sft / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"use_dora": True}))
    lm = load_causal_lm(str(sft), "cpu")
    lm.model.name_or_path = str(tmp_path)
    try:
        with pytest.raises(InvalidArgumentError, match="is not LoRA alone, got one with DoRA"):
            LoRAPolicy(lm, start="reference")
    finally:
        lm.model.name_or_path = str(sft)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_merged_adapter_loads_without_peft(dtype: str, sft: Path, tmp_path: Path) -> None:
    out = tmp_path / "merged"
    save_merged(sft, out, dtype)
    assert not (out / "adapter_config.json").exists()
    model = AutoModelForCausalLM.from_pretrained(out)
    assert str(model.dtype) == f"torch.{dtype}"
    tolerance = {"float32": 1e-5, "bfloat16": 0.02}[dtype]
    expected = plain(sft)
    assert (logits(model).float() - expected).norm() <= tolerance * expected.norm()
    assert AutoTokenizer.from_pretrained(out).get_vocab() == AutoTokenizer.from_pretrained(sft).get_vocab()
    found, own = (json.loads((path / "generation_config.json").read_text()) for path in (out, sft))
    assert {name: found[name] for name in own} == own


def test_an_adapter_on_an_adapter_is_merged_with_it(sft: Path, tmp_path: Path) -> None:
    (tmp_path / "second").mkdir()
    policy = move(LoRAPolicy(load_causal_lm(str(sft), "cpu"), rank=2), 2)
    policy.save(tmp_path / "second")
    save_merged(tmp_path / "second", tmp_path / "merged")
    torch.testing.assert_close(plain(tmp_path / "merged"), logits(policy.actor), rtol=0, atol=1e-4)


def test_what_cannot_be_merged_is_refused(sft: Path, model_dir: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidArgumentError, match="`model` must hold an adapter"):
        save_merged(model_dir, tmp_path / "merged")
    with pytest.raises(InvalidArgumentError, match="`model` must be a local directory or a hub name, and there is no"):
        save_merged(tmp_path / "nowhere", tmp_path / "merged")
    with pytest.raises(InvalidArgumentError, match="`out` must be a directory that is not there yet"):
        save_merged(sft, tmp_path)
