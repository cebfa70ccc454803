"""Teacher-forced passes hand attention no mask, so that the fastest kernels of a GPU apply, and lose nothing by it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from conftest import WORDS, gpt2, tiny_lm, word_tokenizer
from torch import Tensor
from transformers import GPT2ForSequenceClassification, LlamaConfig, Qwen2Config

from agents.policies.actor_critic import ActorCritic
from lmgym.models.causal import CausalLM, freeze
from lmgym.rewards.sequence import Reading, find_reading, sequence_logits

V = len(WORDS) + 3
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
SIZES |= {"vocab_size": V, "intermediate_size": 24, "max_position_embeddings": 40}


def lm_of(family: str) -> CausalLM:
    if family == "GPT-2":
        return CausalLM(freeze(gpt2(V)), word_tokenizer())
    return tiny_lm(LlamaConfig(**SIZES) if family == "Llama" else Qwen2Config(**SIZES))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict[str, Any]]]:
    """The keywords of every call of attention but those of a single token."""
    seen: list[dict[str, Any]] = []
    plain = torch.nn.functional.scaled_dot_product_attention

    def note(*args: Tensor, **kwargs: Any) -> Tensor:
        if args[0].shape[2] > 1:
            seen.append(kwargs)
        return plain(*args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", note)
    yield seen
    assert seen
    assert all(call.get("attn_mask") is None and call["is_causal"] for call in seen)


def ragged() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Prompts (3, 4) and responses (3, 5) of unequal lengths."""
    ids = torch.randint(2, V, (3, 9), generator=torch.Generator().manual_seed(0))
    prompt_mask = torch.arange(4) >= torch.tensor([[0], [2], [3]])
    response_mask = torch.arange(5) < torch.tensor([[2], [5], [1]])
    return ids[:, :4], prompt_mask, ids[:, 4:], response_mask


@pytest.mark.parametrize("family", ["GPT-2", "Llama", "Qwen2"])
def test_the_reference_reads_whole_responses_without_a_mask(family: str, calls: list[dict[str, Any]]) -> None:
    lm = lm_of(family)
    prompt_ids, prompt_mask, response_ids, response_mask = ragged()
    found = lm.response_log_probs(prompt_ids, prompt_mask, response_ids, response_mask)
    for row in range(3):  # alone and without padding
        ids = torch.cat([prompt_ids[row][prompt_mask[row]], response_ids[row][response_mask[row]]])
        start = int(prompt_mask[row].sum())
        log_probs = lm.model(input_ids=ids[None]).logits[0, start - 1 : -1, :V].log_softmax(-1)
        expected = log_probs.gather(1, ids[start:, None])[:, 0]
        torch.testing.assert_close(found[row][response_mask[row]], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("critic", ["shared", "reference"])
def test_an_update_reads_without_a_mask(critic: Any, calls: list[dict[str, Any]]) -> None:
    policy = ActorCritic(lm_of("Llama"), critic)
    rows = torch.arange(3)
    read = policy.read_at(ragged()[0], rows, rows)
    (read.logits.sum() + read.values.sum()).backward()


def test_a_reward_model_reads_without_a_mask(calls: list[dict[str, Any]]) -> None:
    model = gpt2(V, cls=GPT2ForSequenceClassification, num_labels=1)
    assert find_reading(model) is Reading.LAST_TOKEN
    sequences = [[5, 3, 7, 2], [4], [9, 9]]
    together = sequence_logits(model, sequences)
    alone = torch.cat([sequence_logits(model, [sequence]) for sequence in sequences])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)
