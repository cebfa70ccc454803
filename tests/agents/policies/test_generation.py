"""A checkpoint generated from with plain transformers, as it lies there: the distribution is the policy's own."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import WORDS, gpt2, word_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from agents.policies.actor_critic import ActorCritic
from agents.policies.lora import LoRAPolicy
from lmgym.models.causal import CausalLM, freeze
from lmgym.models.sharing import load_causal_lm, temper

V = len(WORDS) + 3
PROMPTS = ["the film was", "a", "we liked the meal and"]
T = 5


@pytest.fixture
def reference() -> CausalLM:
    """With three embeddings that are no tokens, two ends, and a generation config made for another purpose."""
    model: Any = freeze(gpt2(V + 3, scale=0.1))
    model.generation_config = GenerationConfig(
        eos_token_id=[1, 7], temperature=0.6, top_k=3, top_p=0.8, repetition_penalty=1.3, do_sample=True
    )
    return temper(CausalLM(model, word_tokenizer()), 0.7)


def test_generate_draws_from_the_policys_distribution(reference: CausalLM, tmp_path: Path) -> None:
    policy = ActorCritic(reference)
    with torch.no_grad():
        policy.actor.transformer.ln_f.weight.mul_(3)
    policy.save(tmp_path)
    before = reference.model.generation_config.to_dict()
    model = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    batch = tokenizer(PROMPTS, padding=True, return_tensors="pt")
    assert batch["attention_mask"][1].tolist() == [0, 0, 0, 0, 1]  # on the left
    with torch.random.fork_rng():
        torch.manual_seed(0)
        out = model.generate(**batch, max_new_tokens=T, output_scores=True, return_dict_in_generate=True)
    state = policy.begin(batch["input_ids"], batch["attention_mask"].bool(), T)
    running = torch.ones(len(PROMPTS), dtype=torch.bool)
    for scores, tokens in zip(out.scores, out.sequences[:, batch["input_ids"].shape[1] :].T, strict=True):
        distribution = scores.softmax(-1)
        assert (distribution[:, V:] == 0).all()
        torch.testing.assert_close(distribution[running, :V], state.logits.softmax(-1)[running], rtol=0, atol=1e-5)
        assert (distribution[running, :V] > 0).all()
        running &= ~torch.isin(tokens, torch.tensor([1, 7]))
        state.step(tokens)
    assert reference.model.generation_config.to_dict() == before
    assert reference.tokenizer.padding_side == "right"


def test_the_policy_as_a_reference_ends_where_it_ended(reference: CausalLM, tmp_path: Path) -> None:
    ActorCritic(reference).save(tmp_path)
    assert load_causal_lm(str(tmp_path), "cpu").eos_token_ids == {1, 7}


@pytest.mark.skipif(not importlib.util.find_spec("peft"), reason="needs peft")
def test_an_adapter_brings_its_generation_config(
    model_dir: str, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    LoRAPolicy(temper(load_causal_lm(model_dir, "cpu"), 0.5), rank=2).save(tmp_path)
    config = load_causal_lm(str(tmp_path), "cpu").model.generation_config
    assert (config.do_sample, config.temperature, config.top_k, config.top_p) == (True, 0.5, 0, 1.0)
    assert not [warning for warning in recwarn if warning.category is FutureWarning]
