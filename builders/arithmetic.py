"""The artefacts of `arithmetic`: supervised training on all sums, stopped early, for each size of numbers."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from builders.completions import sample_responses
from builders.language_model import negative_log_likelihood, train_sft
from builders.model_card import join_columns
from builders.models import Built, make_gpt2
from builders.seeds import derive_seeds
from lmgym.models.causal import CausalLM
from lmgym.models.tables import symbol_tokenizer
from lmgym.tasks import arithmetic


def build_arithmetic(settings: dict[str, Any]) -> Built:
    """For each size of numbers, a language model that has begun to learn all of their sums."""
    shape = settings["reference"]
    tokenizer = symbol_tokenizer(arithmetic.SYMBOLS, chars=True)
    models = {}
    measured = []
    for digits, epochs, batch_size in zip(shape["digits"], shape["epochs"], shape["batch_size"], strict=True):
        torch_seed, order_seed, sample_seed = derive_seeds(settings["seed"], f"arithmetic-{digits}")
        model = make_gpt2(shape, tokenizer, torch_seed)
        trained = train_sft(
            model,
            [encode_sum(prompt) for prompt in arithmetic.all_prompts(digits)],
            epochs=epochs,
            learning_rate=shape["learning_rate"],
            batch_size=batch_size,
            generator=torch.Generator().manual_seed(order_seed),
            progress=settings["progress"],
        )
        models[f"reference-{digits}"] = (model, tokenizer)
        generator = torch.Generator().manual_seed(sample_seed)
        facts = {
            "sums": len(arithmetic.all_prompts(digits)),
            "parameters": model.num_parameters(),
            "perplexity": trained["perplexity"],
        }
        measured.append(facts | measure_sums(CausalLM(model, tokenizer), digits, shape["samples"], generator))
    return models, join_columns(list(models), measured)


def encode_sum(prompt: str) -> list[int]:
    """Token ids of a prompt, its sum and the EOS."""
    return [*arithmetic.token_ids(prompt + arithmetic.answer(prompt)), arithmetic.EOS_TOKEN_ID]


def answer_probability(model: Any, prompt: str) -> float:
    """Probability that the model answers a sum correctly, by teacher forcing."""
    with torch.no_grad():
        whole, _ = negative_log_likelihood(model, [encode_sum(prompt)])
        before, _ = negative_log_likelihood(model, [arithmetic.token_ids(prompt)])
    return math.exp(float(before - whole))


def measure_sums(lm: CausalLM, digits: int, samples: int, generator: torch.Generator) -> dict[str, float]:
    """The accuracy of a reference, exactly and by sampling, on the test prompts of a task."""
    prompts = list(arithmetic.prompts(digits, "test"))
    ids = [list(arithmetic.token_ids(prompt)) for prompt in prompts]
    responses = sample_responses(lm, ids, samples, arithmetic.max_new_tokens(digits), generator)
    reward = arithmetic.SumReward()
    scores = [
        reward([prompt] * samples, [""] * samples, completion_ids=several)
        for prompt, several in zip(prompts, responses, strict=True)
    ]
    exact = np.array([answer_probability(lm.model, prompt) for prompt in prompts])
    train = [answer_probability(lm.model, prompt) for prompt in arithmetic.prompts(digits, "train")]
    return {
        "sampled": float(np.mean(scores)),
        "exact": exact.mean(),
        "least": exact.min(),
        "greatest": exact.max(),
        "train": float(np.mean(train)),
        "length": float(np.mean([len(response) for several in responses for response in several])),
    }
