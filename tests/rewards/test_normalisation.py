"""Scores of reward models with mean 0 and standard deviation 1, in the weights or in the config."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from reward_texts import WORDS, generator, make_gpt2, make_llama, make_tokenizer

from lmgym.errors import InvalidArgumentError
from lmgym.reward_models.scorer import score_texts
from lmgym.reward_models.starting import reward_model_from
from lmgym.rewards.normalisation import CONFIG_KEY, normalise, read_normalisation

TOKENIZER = make_tokenizer()


def random_texts(size: int, seed: int = 0) -> list[str]:
    rng = np.random.default_rng(seed)
    return [" ".join([*rng.choice(WORDS, size=rng.integers(1, 12)), "<eos>"]) for _ in range(size)]


def gpt2_reward() -> Any:
    model = reward_model_from(make_gpt2(), generator())
    model.score.weight.data *= 3
    model.transformer.ln_f.bias.data += 0.5
    return model


def gpt2_reward_with_a_bias() -> Any:
    model = gpt2_reward()
    weight = model.score.weight.data
    model.score = torch.nn.Linear(16, 1)
    model.score.weight.data = weight
    return model


def llama_reward() -> Any:
    return reward_model_from(make_llama(), generator(), pad_token_id=0)


@pytest.mark.parametrize("make", [gpt2_reward, gpt2_reward_with_a_bias, llama_reward])
def test_normalised_scores_have_mean_zero_and_standard_deviation_one(make: Any) -> None:
    model = make()
    texts = random_texts(60)
    before = score_texts(model, TOKENIZER, texts)
    normalise(model, before.mean().item(), before.std().item())
    after = score_texts(model, TOKENIZER, texts)
    assert after.mean().item() == pytest.approx(0, abs=1e-5)
    assert after.std().item() == pytest.approx(1, abs=1e-5)
    torch.testing.assert_close(after, (before - before.mean()) / before.std(), rtol=0, atol=1e-5)
    normalise(model, 0.5, 2.0)  # once more, on top of it
    torch.testing.assert_close(score_texts(model, TOKENIZER, texts), (after - 0.5) / 2, rtol=0, atol=1e-5)


def test_only_a_model_without_any_bias_has_the_numbers_in_its_config() -> None:
    for make in (gpt2_reward, gpt2_reward_with_a_bias):
        model = make()
        normalise(model, 0.5, 2.0)
        assert read_normalisation(model.config) == (0.0, 1.0)
    model = llama_reward()
    before = model.score.weight.clone()
    normalise(model, 0.5, 2.0)
    assert torch.equal(model.score.weight, before)
    assert getattr(model.config, CONFIG_KEY) == {"mean": 0.5, "std": 2.0}


def test_the_bias_of_the_head_comes_first() -> None:
    model = gpt2_reward_with_a_bias()
    norm = model.transformer.ln_f.bias.clone()
    normalise(model, 4.0, 0.5)
    assert torch.equal(model.transformer.ln_f.bias, norm)


@pytest.mark.parametrize(("mean", "std"), [(math.nan, 1.0), (0.0, 0.0), (0.0, -1.0), (0.0, math.inf)])
def test_statistics_that_cannot_be_are_rejected(mean: float, std: float) -> None:
    with pytest.raises(InvalidArgumentError, match=r"`(mean|std)` must be a finite number"):
        normalise(gpt2_reward(), mean, std)


@pytest.mark.parametrize("numbers", [3, {"mean": 0.0}, {"mean": 0.0, "std": 0.0}, {"mean": "0", "std": 1.0}])
def test_numbers_in_a_config_that_cannot_be_are_rejected(numbers: object) -> None:
    model = llama_reward()
    setattr(model.config, CONFIG_KEY, numbers)
    with pytest.raises(InvalidArgumentError, match=CONFIG_KEY):
        read_normalisation(model.config)


def test_a_score_does_not_feel_its_batch_mates() -> None:
    model = gpt2_reward()
    texts = random_texts(40)
    together = score_texts(model, TOKENIZER, texts, batch_size=16)
    alone = torch.cat([score_texts(model, TOKENIZER, [text]) for text in texts])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)
    without_end = score_texts(model, TOKENIZER, [text.removesuffix(" <eos>") for text in texts])
    assert (without_end - alone).abs().min() > 1e-6  # the model sees whether a response ended


def test_texts_that_do_not_fit_are_rejected() -> None:
    with pytest.raises(InvalidArgumentError, match="`texts` must have 1 to 16 tokens each, got 17 in 'the the"):
        score_texts(gpt2_reward(), TOKENIZER, ["the " * 17])
    with pytest.raises(InvalidArgumentError, match="`texts` must have 1 to 16 tokens each, got 0 in ''"):
        score_texts(gpt2_reward(), TOKENIZER, [""])
