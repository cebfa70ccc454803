"""The policy with an adapter: against merged weights, the reference it must leave alone, and peft's own format."""

from __future__ import annotations

import importlib.util
import json
import math
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import WORDS, learn, shifted, tiny_lm
from extras import needs_peft
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig
from transformers.pytorch_utils import Conv1D

from agents.algorithms.dpo import DPO, DPOConfig
from agents.algorithms.nlpo import NLPO, NLPOConfig
from agents.algorithms.ppo import PPO, PPOConfig
from agents.algorithms.rloo import RLOO, RLOOConfig
from agents.algorithms.trpo import TRPO, TRPOConfig
from agents.policies.actor_critic import ActorCritic, read_logits
from agents.policies.lora import LoRAPolicy
from agents.sb3.agent import SB3Agent
from agents.sb3.config import SB3Config
from lmgym.envs.vector import RLHFVectorEnv
from lmgym.episodes import Episodes
from lmgym.errors import InvalidArgumentError, UnknownNameError
from lmgym.kl import episode_kl
from lmgym.models.causal import CausalLM
from lmgym.models.decoding import make_decoder
from lmgym.models.policy import CausalPolicy
from lmgym.models.ring import RingDecoder
from lmgym.models.sharing import load_causal_lm
from lmgym.models.tables import dirichlet_rows, markov_lm
from lmgym.rollout import collect
from lmgym.tasks.base import Task

pytestmark = needs_peft
V = len(WORDS) + 3
IDS = {"bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0, "initializer_range": 0.2}
SHAPES = {
    "GPT-2": GPT2Config(vocab_size=V + 2, n_embd=16, n_layer=2, n_head=2, n_positions=24, **IDS),
    "Llama": LlamaConfig(
        vocab_size=V,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=24,
        max_position_embeddings=24,
        **IDS,
    ),
}
PROMPTS = ["the film", "a", "it was not the"]


def count_good(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    return [float(completion.split().count("good")) for completion in completions]


def envs_of(lm: CausalLM | str, num_envs: int = 1, group_size: int = 1, **task: Any) -> RLHFVectorEnv:
    fields: dict[str, Any] = {"reward": count_good, "kl_coef": 0.1, "max_new_tokens": 5} | task
    made = Task(name="tiny", model=lm, prompts={"train": PROMPTS}, **fields)
    return RLHFVectorEnv(
        num_envs,
        autoreset_mode="SameStep",
        task=made,
        device="cpu",
        prompt_order="sequential",
        group_size=group_size,
    )


@pytest.fixture(params=SHAPES)
def lm(request: pytest.FixtureRequest) -> CausalLM:
    return tiny_lm(SHAPES[request.param])


def moved(policy: LoRAPolicy, seed: int = 3, scale: float = 0.1) -> LoRAPolicy:
    """The policy with everything moved that learns, as in the midst of training."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter += scale * torch.randn(parameter.shape, generator=generator)
    return policy


def sampled(envs: RLHFVectorEnv, policy: Any) -> Episodes:
    envs.reset(seed=0)
    return collect(envs, policy, 24, generator=torch.Generator().manual_seed(1))


def layers(model: nn.Module) -> dict[str, tuple[int, int]]:
    """(in, out) of every linear layer but the LM head, by its path."""
    sizes: dict[str, tuple[int, int]] = {}
    for path, module in model.named_modules():
        if isinstance(module, (nn.Linear, Conv1D)) and path != "lm_head":
            shape = module.weight.shape
            sizes[path] = (shape[0], shape[1]) if isinstance(module, Conv1D) else (shape[1], shape[0])
    return sizes


def snapshot(lm: CausalLM) -> list[Tensor]:
    """Copies of all of a model's numbers."""
    return [x.detach().clone() for x in (*lm.model.parameters(), *lm.model.buffers())]


def untouched(lm: CausalLM, before: list[Tensor]) -> bool:
    now = [*lm.model.parameters(), *lm.model.buffers()]
    return all(torch.equal(a, b) for a, b in zip(now, before, strict=True))


CONFIG: dict[str, Any] = {"batch_size": 24, "micro_batch_size": 24, "epochs": 2, "minibatches": 2, "lr": 1e-2}
LORA: dict[str, Any] = {"policy": "lora", "lora_rank": 3, "lora_alpha": 6.0}


def ppo(envs: RLHFVectorEnv, *, seed: int = 0, **config: Any) -> PPO:
    return PPO(envs, PPOConfig(**(CONFIG | LORA | config)), seed=shifted(seed))


# -- the weights -----------------------------------------------------------------------------------------------------


def test_the_weights_are_the_references_own_and_only_the_adapter_is_new(lm: CausalLM) -> None:
    policy = LoRAPolicy(lm, rank=3)
    reference = dict(lm.model.named_parameters()) | dict(lm.model.named_buffers())
    own = dict(policy.actor.named_parameters()) | dict(policy.actor.named_buffers())
    base = {name.replace(".base_layer", ""): x for name, x in own.items() if "lora_" not in name}
    assert base.keys() == reference.keys()
    assert all(base[name].data_ptr() == reference[name].data_ptr() for name in base)
    assert policy.actor is not lm.model
    sizes = layers(lm.model)
    assert len(sizes) == {"gpt2": 2 * 4, "llama": 2 * 7}[lm.model.config.model_type]
    width = policy.value_head.in_features
    assert sum(p.numel() for p in policy.parameters()) == sum(3 * (i + o) for i, o in sizes.values()) + width + 1
    assert len(list(policy.parameters())) == 2 * len(sizes) + 2
    assert all(p.requires_grad for p in policy.parameters())
    assert sum(x.numel() for x in policy.state_dict().values()) == sum(p.numel() for p in policy.parameters())
    assert not any(p.requires_grad for name, p in own.items() if name.replace(".base_layer", "") in reference)
    assert not any(module.training for module in policy.actor.modules())


def test_the_policy_starts_as_the_reference_with_value_zero(lm: CausalLM) -> None:
    policy = LoRAPolicy(lm)
    envs = envs_of(lm, max_new_tokens=16)
    episodes = sampled(envs, policy)
    assert len(set(episodes.lengths.tolist())) > 1  # ragged, or it would test little
    torch.testing.assert_close(policy.read(episodes).logits, read_logits(lm, episodes))
    assert torch.equal(policy.values(episodes), torch.zeros_like(episodes.log_probs))
    assert torch.equal(sampled(envs, CausalPolicy(lm)).response_ids, episodes.response_ids)
    assert episode_kl(episodes).abs().max() < 1e-4


@pytest.mark.parametrize("modules", ["all-linear", "q_proj, down_proj", "c_attn,lm_head"])
def test_the_logits_are_those_of_merged_weights(modules: str) -> None:
    """W + alpha / r B A, which is (in, out) in GPT-2's layers and (out, in) in others."""
    lm = tiny_lm(SHAPES["Llama" if "proj" in modules else "GPT-2"])
    policy = moved(LoRAPolicy(lm, rank=3, alpha=7.0, modules=modules))
    episodes = sampled(envs_of(lm), policy)
    factors = {name.replace(".default", ""): p for name, p in policy.actor.named_parameters() if "lora_" in name}
    merged = {name: x.clone() for name, x in lm.model.state_dict().items()}
    changed = 0
    for path, module in lm.model.named_modules():
        if f"{path}.lora_A.weight" in factors:
            change = 7.0 / 3 * factors[f"{path}.lora_B.weight"] @ factors[f"{path}.lora_A.weight"]
            merged[f"{path}.weight"] += change.detach().T if isinstance(module, Conv1D) else change.detach()
            changed += 1
    names = layers(lm.model)
    expected = {"all-linear": len(names), "q_proj, down_proj": 2 * 2, "c_attn,lm_head": 2 + 1}[modules]
    assert changed == expected
    plain = tiny_lm(SHAPES["Llama" if "proj" in modules else "GPT-2"])
    plain.model.config.tie_word_embeddings = False
    plain.model.lm_head.weight = nn.Parameter(plain.model.lm_head.weight.clone())
    plain.model.load_state_dict(merged)
    torch.testing.assert_close(policy.read(episodes).logits, read_logits(plain, episodes), rtol=0, atol=1e-5)
    assert (policy.read(episodes).logits - read_logits(lm, episodes)).abs().max() > 0.05
    torch.testing.assert_close(  # as it decoded, head included
        episodes.log_probs, sampled(envs_of(lm), CausalPolicy(plain)).log_probs, rtol=0, atol=1e-5
    )


def test_the_factors_are_drawn_from_the_seed_and_from_no_global_generator(lm: CausalLM, tmp_path: Path) -> None:
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002
    first, again, other = (LoRAPolicy(lm, seed=seed) for seed in (5, 5, 6))
    torch.rand(1)
    late = LoRAPolicy(lm, seed=5)
    same = [[torch.equal(a, b) for a, b in zip(first.adapter, p.adapter, strict=True)] for p in (again, late, other)]
    assert all(same[0])
    assert all(same[1])
    assert same[2] == [False, True] * (len(first.adapter) // 2)  # B is 0
    assert all(a.std() > 0.01 for a in first.adapter[::2])
    torch.set_rng_state(before[0])
    first.read(sampled(envs_of(lm), first))
    first.save(tmp_path)
    first.load(tmp_path)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert (np.random.get_state()[1] == before[2]).all()  # noqa: NPY002


def test_a_critic_with_a_trunk_of_its_own_is_a_copy(parts: dict[str, Any]) -> None:
    envs = RLHFVectorEnv(1, **parts)
    lm = envs.engine.lm
    before = snapshot(envs.engine.lm)
    agent = ppo(envs, critic="reward_model")
    shared = {p.data_ptr() for p in agent.policy.parameters()} & {p.data_ptr() for p in lm.model.parameters()}
    assert not shared
    assert all(metrics["train/ratio_error"] < 1e-5 for metrics in learn(agent, 2))
    assert untouched(lm, before)


# -- learning --------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("error::UserWarning:agents")
def test_ppo_learns_and_moves_nothing_but_adapter_and_head(lm: CausalLM) -> None:
    envs = envs_of(lm)
    before = snapshot(lm)
    agent = ppo(envs, batch_size=96, micro_batch_size=96, epochs=4)
    first = sampled(envs, CausalPolicy(lm))
    logits = read_logits(lm, first)
    start = [p.detach().clone() for p in agent.policy.parameters()]
    history = learn(agent, 8)
    assert max(metrics["train/ratio_error"] for metrics in history) < 1e-5  # decoding sees every update
    assert abs(history[0]["rollout/kl"]) < 1e-4
    assert history[-1]["rollout/exact_kl"] > 0.2
    assert np.mean([m["rollout/return"] for m in history[-2:]]) > history[0]["rollout/return"] + 0.3
    assert not any(torch.equal(a, b) for a, b in zip(agent.policy.parameters(), start, strict=True))
    assert untouched(lm, before)
    assert torch.equal(read_logits(lm, first), logits)
    assert not any(p.requires_grad for p in lm.model.parameters())


def test_the_policy_decodes_on_the_ring_and_follows_its_weights(lm: CausalLM) -> None:
    policy = LoRAPolicy(lm)
    envs = envs_of(lm)
    assert isinstance(make_decoder(policy.lm, 2, 9), RingDecoder)
    for seed in (3, 4):  # the step has been recorded by then
        episodes = sampled(envs, moved(policy, seed))
        read = policy.read(episodes)
        chosen = episodes.response_ids[episodes.response_mask]
        log_probs = read.logits.log_softmax(-1).gather(1, chosen.unsqueeze(1)).squeeze(1)
        torch.testing.assert_close(episodes.log_probs[episodes.response_mask], log_probs, rtol=0, atol=1e-5)
        assert episodes.values is not None
        torch.testing.assert_close(episodes.values, policy.values(episodes), rtol=0, atol=1e-5)
        assert episode_kl(episodes).abs().max() > 0.1


def agents_of(name: str, lm: CausalLM) -> Any:
    """An agent of each kind that does something of its own with a policy's parameters."""
    if name.startswith("sb3_"):
        fields: dict[str, Any] = {"n_envs": 8, "n_steps": 8, "learning_rate": 1e-2, **LORA}
        off_policy = {"buffer_size": 500, "learning_starts": 16, "target_update_interval": 16, "train_freq": 1}
        kwargs = {"sb3_DQN": off_policy, "sb3_TRPO": {"cg_max_steps": 2}}.get(name, {})
        return SB3Agent(envs_of(lm, 8), SB3Config(algorithm=name[4:], kwargs=kwargs, **fields))
    if name == "dpo":
        return DPO(envs_of(lm), DPOConfig(batch_size=12, lr=1e-2, **LORA))
    if name == "rloo":
        return RLOO(envs_of(lm, 4, group_size=4), RLOOConfig(**(CONFIG | LORA)))
    if name == "trpo":
        return TRPO(envs_of(lm), TRPOConfig(**(CONFIG | LORA)))
    return NLPO(envs_of(lm), NLPOConfig(**(CONFIG | LORA), mask_update_every=2))


@pytest.mark.parametrize("name", ["rloo", "dpo", "trpo", "nlpo", "sb3_PPO", "sb3_DQN", "sb3_TRPO"])
def test_no_agent_moves_the_reference(name: str) -> None:
    if name == "sb3_TRPO":
        pytest.importorskip("sb3_contrib")
    lm = tiny_lm(SHAPES["GPT-2"])
    before = snapshot(lm)
    agent = agents_of(name, lm)
    networks = agent.model.policy if name.startswith("sb3_") else agent.policy
    start = {name: p.detach().clone() for name, p in networks.named_parameters()}
    for metrics in learn(agent, 3, total=300):
        assert all(math.isfinite(x) for x in metrics.values())
    assert untouched(lm, before)
    held = {p.data_ptr() for p in networks.parameters()} & {p.data_ptr() for p in lm.model.parameters()}
    assert not held
    adapters = [name for name in start if "adapter" in name]
    assert sum(not torch.equal(start[name], networks.get_parameter(name)) for name in adapters) >= len(adapters) / 2
    if name == "trpo":
        assert [id(p) for p in agent.policy.policy_parameters()] == [id(p) for p in agent.policy.adapter]
    if name == "nlpo":  # the copy of the second batch, which the policy has left since
        assert not torch.equal(agent.policy.mask.adapter[1], torch.zeros_like(agent.policy.mask.adapter[1]))
        assert not torch.equal(agent.policy.mask.adapter[1], agent.policy.policy.adapter[1])


def test_a_reference_in_half_precision_has_an_adapter_in_float32() -> None:
    lm = tiny_lm(SHAPES["Llama"])
    lm = CausalLM(lm.model.to(torch.bfloat16), lm.tokenizer)
    agent = ppo(envs_of(lm))
    assert agent.policy.dtype == torch.bfloat16
    assert {p.dtype for p in agent.policy.parameters()} == {torch.float32}
    shared = {p.data_ptr() for p in lm.model.parameters()} & {p.data_ptr() for p in agent.policy.actor.parameters()}
    assert len(shared) == len(list(lm.model.parameters()))
    start = [p.detach().clone() for p in agent.policy.parameters()]
    assert learn(agent, 2)[1]["train/ratio_error"] < 0.1
    assert not any(torch.equal(a, b) for a, b in zip(agent.policy.parameters(), start, strict=True))


# -- disk ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("modules", ["all-linear", "c_attn", "wte,c_proj"])
def test_what_is_saved_loads_as_a_hugging_face_model_and_back(
    model_dir: str, modules: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(model_dir, tmp_path / "reference")
    monkeypatch.chdir(tmp_path)
    lm = load_causal_lm("reference", "cpu")
    policy = moved(LoRAPolicy(lm, rank=3, modules=modules))
    tmp_path = tmp_path / "checkpoint"
    tmp_path.mkdir()
    monkeypatch.chdir(tmp_path)  # where the relative name is none
    episodes = sampled(envs_of(lm), policy)
    policy.save(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} >= {
        "adapter_config.json", "adapter_model.safetensors", "critic.safetensors", "tokenizer.json",
    }  # fmt: skip
    assert not [path for path in tmp_path.iterdir() if path.suffix in (".bin", ".pt", ".pkl")]
    assert sum(path.stat().st_size for path in tmp_path.glob("*.safetensors")) < 60_000

    plain = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        own = policy.actor(input_ids=episodes.prompt_ids).logits
        assert (own - lm.model(input_ids=episodes.prompt_ids).logits).abs().max() > 0.05
        torch.testing.assert_close(plain(input_ids=episodes.prompt_ids).logits, own, rtol=0, atol=1e-5)

    other = LoRAPolicy(lm, rank=3, modules=modules, seed=9)
    other.load(tmp_path)
    state = other.state_dict()
    saved = policy.state_dict()
    assert state.keys() == saved.keys()
    assert all(torch.equal(state[name], saved[name]) for name in saved)
    for now, before in zip(other.read(episodes), policy.read(episodes), strict=True):
        assert torch.equal(now, before)
    torch.testing.assert_close(sampled(envs_of(lm), other).log_probs, episodes.log_probs)


def test_a_reference_without_a_name_is_none_on_disk(tmp_path: Path) -> None:
    policy = moved(LoRAPolicy(tiny_lm(SHAPES["GPT-2"]), rank=2))
    policy.save(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] is None
    assert (config["r"], config["lora_alpha"], config["fan_in_fan_out"]) == (2, 32.0, True)
    other = LoRAPolicy(tiny_lm(SHAPES["GPT-2"]), rank=2, seed=9)
    other.load(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(other.parameters(), policy.parameters(), strict=True))


def test_checkpoints_of_another_kind_are_refused(model_dir: str, tmp_path: Path) -> None:
    lm = load_causal_lm(model_dir, "cpu")
    with pytest.raises(InvalidArgumentError, match="must hold an adapter with .*'r': 16.*, got None"):
        LoRAPolicy(lm).load(tmp_path)
    LoRAPolicy(lm, rank=3).save(tmp_path)
    others: tuple[dict[str, Any], ...] = ({"rank": 4}, {"rank": 3, "alpha": 16.0})
    for other in others:
        with pytest.raises(InvalidArgumentError, match="must hold an adapter with .*, got .*'r': 3"):
            LoRAPolicy(lm, **other).load(tmp_path)
    with pytest.raises(InvalidArgumentError, match="must hold an adapter of the same layers, got .*c_proj"):
        LoRAPolicy(lm, rank=3, modules="c_attn").load(tmp_path)
    with pytest.raises(InvalidArgumentError, match="`critic` in .* is of another kind"):
        LoRAPolicy(lm, rank=3, critic="reference").load(tmp_path)
    with pytest.raises(InvalidArgumentError, match="must hold a whole model, got an adapter"):
        ActorCritic(lm).load(tmp_path)
    whole = tmp_path / "whole"
    whole.mkdir()
    ActorCritic(lm).save(whole)
    with pytest.raises(InvalidArgumentError, match="must hold an adapter with .*, got None"):
        LoRAPolicy(lm).load(whole)
    adapted = CausalLM(AutoModelForCausalLM.from_pretrained(tmp_path), lm.tokenizer)
    for kind in (ActorCritic, LoRAPolicy):
        with pytest.raises(InvalidArgumentError, match="`model` must be a whole model, got one with an adapter"):
            kind(adapted)


@pytest.mark.slow
def test_a_resumed_run_is_the_run(tmp_path: Path) -> None:
    lm = tiny_lm(SHAPES["Llama"])
    whole = learn(ppo(envs_of(lm)), 4, total=400)
    first = ppo(envs_of(lm))
    second = ppo(envs_of(lm), seed=7)
    second.generator.manual_seed(0)
    curve = learn(first, 2, total=400)
    first.save(tmp_path / "checkpoint")
    learn(first, 1, total=400)  # what comes after the checkpoint is lost with the process
    learn(second, 1, total=400)  # and a loaded agent forgets what it was
    second.load(tmp_path / "checkpoint")
    assert curve + learn(second, 2, total=400) == whole


def test_predict_is_of_the_adapted_model(lm: CausalLM) -> None:
    envs = envs_of(lm)
    agent = ppo(envs)
    assert isinstance(agent.policy, LoRAPolicy)
    moved(agent.policy, scale=0.4)
    best: list[int] = []
    of_reference: list[int] = []
    for i, prompt in enumerate(envs.engine.prompts[j].ids for j in range(3)):
        ids = np.zeros(envs.engine.width + 5, np.int64)
        mask = np.zeros(envs.engine.width + 5, np.int8)
        ids[: len(prompt)] = prompt
        mask[: len(prompt)] = 1
        with torch.no_grad():
            for model, chosen in ((agent.policy.actor, best), (lm.model, of_reference)):
                chosen.append(int(model(input_ids=torch.tensor([prompt])).logits[0, -1, :V].argmax()))
        assert int(agent.predict({"input_ids": ids, "attention_mask": mask}, deterministic=True)[0]) == best[i]
    assert best != of_reference


# -- what is asked for -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("lora_rank", 0, "`lora_rank` must be an int >= 1"),
        ("lora_rank", 2.0, "`lora_rank` must be an int >= 1"),
        ("lora_alpha", 0.0, "`lora_alpha` must be a finite number > 0"),
        ("lora_alpha", math.inf, "`lora_alpha` must be a finite number > 0"),
        ("lora_modules", "", "`lora_modules` must be 'all-linear' or names of modules separated by commas, got ''"),
        ("lora_modules", "c_attn,,c_proj", "`lora_modules` must be .* separated by commas"),
        ("lora_modules", "all-linear,c_proj", "`lora_modules` must be .* separated by commas"),
        ("lora_modules", ["c_attn"], "`lora_modules` must be a text"),
    ],
)
def test_bad_numbers_are_told_before_a_model_is_loaded(field: str, value: Any, message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        PPOConfig(**{field: value})


def test_what_cannot_be_is_refused() -> None:
    lm = tiny_lm(SHAPES["GPT-2"])
    with pytest.raises(InvalidArgumentError, match=r"`lora_modules` must be .*'c_attn'.*, got \['attn_c'\]"):
        LoRAPolicy(lm, modules="c_attn,attn_c")
    with pytest.raises(InvalidArgumentError, match="`lora_modules` must be layers that peft can adapt: .*LayerNorm"):
        LoRAPolicy(lm, modules="ln_1")
    table = markov_lm(dirichlet_rows(np.random.default_rng(1), 5, 5, 1.0), ["the", "film", "a", "it"])
    with pytest.raises(InvalidArgumentError, match="`policy` must be 'auto' or .*'gru'.*, got 'lora': .*an adapter in"):
        ppo(RLHFVectorEnv(1, model=table, reward=count_good, prompts=["a"], max_new_tokens=3, kl_coef=0.1))
    with pytest.raises(UnknownNameError, match="`policy` must be one of .*'lora'.*got 'lara'"):
        PPOConfig(policy="lara")  # type: ignore[arg-type]


def test_without_peft_the_config_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "peft" else find(name, *a))
    for config in (PPOConfig, DPOConfig, SB3Config):
        with pytest.raises(InvalidArgumentError, match=r"got 'lora': it needs the package peft \(pip install peft\)"):
            config(policy="lora")
        config()
