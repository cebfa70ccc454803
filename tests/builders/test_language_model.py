"""Supervised training against plain forwards."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from builders.language_model import IGNORED, negative_log_likelihood, perplexity, train_sft
from lmgym.errors import LmGymError


@pytest.fixture
def model() -> GPT2LMHeadModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return GPT2LMHeadModel(
            GPT2Config(vocab_size=7, n_embd=16, n_layer=1, n_head=2, n_positions=16, initializer_range=0.5)
        )


SEQUENCES = [[1, 2, 3, 4, 5], [2, 2], [0, 3, 1], [5, 1, 0, 0, 0, 6, 2]]


def test_the_loss_is_that_of_every_sequence_alone(model: GPT2LMHeadModel) -> None:
    model.eval()
    nats = 0.0
    for sequence in SEQUENCES:
        with torch.no_grad():
            log_probs = model(torch.tensor([sequence])).logits[0].log_softmax(-1)
        nats -= sum(log_probs[t, token].item() for t, token in enumerate(sequence[1:]))
    total, count = negative_log_likelihood(model, SEQUENCES)
    assert count == 4 + 1 + 2 + 6
    assert total.item() == pytest.approx(nats, rel=1e-5)
    assert perplexity(model, SEQUENCES, batch_size=3) == pytest.approx(math.exp(nats / count), rel=1e-5)
    assert IGNORED < 0


@pytest.mark.slow
def test_training_memorises_a_few_sequences(model: GPT2LMHeadModel) -> None:
    before = perplexity(model, SEQUENCES)
    state = torch.get_rng_state()
    metrics = train_sft(
        model,
        SEQUENCES,
        epochs=150,
        learning_rate=1e-2,
        batch_size=2,
        generator=torch.Generator().manual_seed(0),
        progress=False,
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert perplexity(model, SEQUENCES) < 1.1 < before
    assert metrics["perplexity"] == pytest.approx(math.exp(metrics["loss"]))


def test_gradients_are_clipped(model: GPT2LMHeadModel) -> None:
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    train_sft(
        model,
        SEQUENCES,
        epochs=1,
        learning_rate=1e-2,
        batch_size=4,
        generator=torch.Generator().manual_seed(0),
        weight_decay=0.0,
        max_grad_norm=1e-30,  # AdamW adds 1e-8 to the norm that it divides by
        progress=False,
    )
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(weight, before[name], atol=1e-12, rtol=0)


@pytest.mark.parametrize("sequences", [[], [[1, 2], [3]]])
def test_sequences_without_anything_to_predict_are_rejected(model: GPT2LMHeadModel, sequences: list[list[int]]) -> None:
    with pytest.raises(
        LmGymError, match="`sequences` must hold at least one sequence and two tokens in each, got lengths"
    ):
        perplexity(model, sequences)
