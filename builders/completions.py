"""Completions that a language model samples, and their gold scores on `reviews`.

Shapes: B prompts, K completions of each, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from lmgym.ending import EndRule
from lmgym.models.causal import CausalLM
from lmgym.models.policy import CausalPolicy
from lmgym.models.sampling import Sampler, check_finite_log_probs
from lmgym.tasks import reviews


def sample_completions(
    lm: CausalLM, prompts: Sequence[str], num: int, generator: torch.Generator, batch_size: int = 512
) -> list[list[str]]:
    """Samples `num` completions a prompt of `reviews` at temperature 1, from the whole vocabulary.

    Returns:
        (B, num) texts with a leading space, EOS included where the model chose it.
    """
    ids = lm.tokenizer(list(prompts))["input_ids"]
    responses = sample_responses(lm, ids, num, reviews.MAX_NEW_TOKENS, generator, batch_size)
    return [[f" {text}" for text in lm.tokenizer.batch_decode(several)] for several in responses]


def sample_responses(
    lm: CausalLM,
    prompts: Sequence[list[int]],
    num: int,
    max_new_tokens: int,
    generator: torch.Generator,
    batch_size: int = 512,
) -> list[list[list[int]]]:
    """Samples `num` responses a prompt, token ids in and out: (B, num) responses, EOS included where chosen."""
    rows = [row for row in range(len(prompts)) for _ in range(num)]
    responses: list[list[list[int]]] = [[] for _ in prompts]
    for length in sorted({len(prompt) for prompt in prompts}):  # prompts of one length need no padding
        rows_of_length = [row for row in rows if len(prompts[row]) == length]
        for start in range(0, len(rows_of_length), batch_size):
            batch = rows_of_length[start : start + batch_size]
            sampled = sample_tokens(lm, [prompts[row] for row in batch], max_new_tokens, generator)
            for row, response in zip(batch, sampled, strict=True):
                responses[row].append(response)
    return responses


def sample_tokens(
    lm: CausalLM, prompts: Sequence[list[int]], max_new_tokens: int, generator: torch.Generator
) -> list[list[int]]:
    """Samples one response for each of B prompts of equal length; a response ends with EOS or at `max_new_tokens`."""
    prompt_ids = torch.tensor(prompts)
    state = CausalPolicy(lm).begin(prompt_ids, torch.ones_like(prompt_ids, dtype=torch.bool), max_new_tokens)
    sampler = Sampler()
    columns = []
    for t in range(max_new_tokens):
        uniforms = torch.rand(len(prompts), generator=generator, dtype=torch.float64)
        tokens, log_probs = sampler.sample(state.logits, t, uniforms)
        check_finite_log_probs(log_probs)
        columns.append(tokens)
        if t + 1 < max_new_tokens:
            state.step(tokens)
    responses = torch.stack(columns, dim=1).numpy()
    lengths, _ = EndRule(lm.eos_table.numpy(), 0, max_new_tokens).find_ends(responses)
    return [response[:length].tolist() for response, length in zip(responses, lengths, strict=True)]


def gold_scores(prompts: Sequence[str], completions: Sequence[Sequence[str]]) -> npt.NDArray[np.float64]:
    """(B, K) gold scores of the completions."""
    return np.array(
        [reviews.gold([prompt] * len(texts), list(texts)) for prompt, texts in zip(prompts, completions, strict=True)]
    )


def join_texts(prompts: Sequence[str], completions: Sequence[Sequence[str]]) -> list[str]:
    """All B * K texts, prompt by prompt."""
    return [prompt + text for prompt, texts in zip(prompts, completions, strict=True) for text in texts]
