"""Reward models learned from rankings: the loss, the training, the normalisation."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from conftest import shifted
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lmgym.errors import InvalidArgumentError
from lmgym.feedback.annotators import true_ranking
from lmgym.rewards import ranking as module
from lmgym.rewards.ranking import (
    RankedTexts,
    bucketed_batches,
    kwise_loss,
    normalise,
    ranking_accuracy,
    reward_model_from,
    score_texts,
    train_reward_model,
    warm_up_cosine,
)

WORDS = ["the", "film", "soup", "was", "good", "fine", "dull", "bad", "."]
VALENCE = {"good": 2, "fine": 1, "dull": -1, "bad": -2}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(shifted(seed))


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<eos>", "<unk>", *WORDS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


@pytest.fixture
def causal_lm() -> GPT2LMHeadModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return GPT2LMHeadModel(
            GPT2Config(
                vocab_size=12,
                n_embd=16,
                n_layer=1,
                n_head=2,
                n_positions=16,
                pad_token_id=0,
                eos_token_id=1,
                bos_token_id=1,
            )
        )


def random_texts(size: int, seed: int = 0) -> list[str]:
    rng = np.random.default_rng(seed)
    return [" ".join([*rng.choice(WORDS, size=rng.integers(1, 12)), "<eos>"]) for _ in range(size)]


def random_rankings(batch: int, k: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    scores = torch.randn(batch, k, generator=generator(seed), dtype=torch.float64)
    return scores, torch.stack([torch.randperm(k, generator=generator(seed + 1 + b)) for b in range(batch)])


# --- the loss


def slow_kwise_loss(scores: Tensor, ranking: Tensor) -> float:
    """Equation 1 of Ouyang et al. 2022, pair by pair."""
    losses = []
    for row, order in zip(scores.tolist(), ranking.tolist(), strict=True):
        for better, worse in itertools.combinations(order, 2):
            losses.append(-math.log(1 / (1 + math.exp(-(row[better] - row[worse])))))
    return sum(losses) / len(losses)


@pytest.mark.parametrize("k", [2, 3, 4, 9])
def test_the_loss_is_the_mean_over_all_pairs(k: int) -> None:
    scores, ranking = random_rankings(5, k)
    assert kwise_loss(scores, ranking).item() == pytest.approx(slow_kwise_loss(scores, ranking), rel=1e-12)
    assert kwise_loss(scores, ranking.flip(1)).item() != pytest.approx(slow_kwise_loss(scores, ranking), rel=1e-3)


def test_the_loss_of_equal_scores_is_log_two() -> None:
    _, ranking = random_rankings(3, 5)
    assert kwise_loss(torch.full((3, 5), 7.0), ranking).item() == pytest.approx(math.log(2))


def test_the_loss_rewards_the_ranking_and_not_its_reverse() -> None:
    ranking = torch.tensor([[2, 0, 1]])
    right = torch.tensor([[0.0, -3.0, 3.0]])
    assert kwise_loss(right, ranking) < math.log(2) < kwise_loss(-right, ranking)
    scores = torch.zeros(1, 3, requires_grad=True)
    kwise_loss(scores, ranking).backward()
    assert scores.grad is not None
    best, middle, worst = scores.grad[0, ranking[0]]
    assert best < 0 < worst
    assert middle == pytest.approx(0, abs=1e-7)


def test_the_loss_does_not_feel_a_shift_of_a_prompt_or_the_order_of_completions() -> None:
    scores, ranking = random_rankings(4, 5)
    loss = kwise_loss(scores, ranking)
    assert kwise_loss(scores + torch.tensor([[1.0], [-2.0], [30.0], [0.0]]), ranking).item() == pytest.approx(
        loss.item()
    )
    shuffle = torch.tensor([3, 0, 4, 1, 2])
    assert kwise_loss(scores[:, shuffle], shuffle.argsort()[ranking]).item() == pytest.approx(loss.item())


def test_the_loss_is_finite_for_absurd_scores() -> None:
    scores = torch.tensor([[1e8, -1e8]], requires_grad=True)
    loss = kwise_loss(scores, torch.tensor([[1, 0]]))
    loss.backward()
    assert loss.item() == pytest.approx(2e8)
    assert scores.grad is not None
    assert scores.grad.tolist() == [[1.0, -1.0]]


@pytest.mark.parametrize(("shape", "other"), [((2, 3), (2, 2)), ((2, 1), (2, 1)), ((3,), (3,))])
def test_shapes_that_do_not_fit_are_rejected(shape: tuple[int, ...], other: tuple[int, ...]) -> None:
    with pytest.raises(
        InvalidArgumentError, match=r"`scores` and `ranking` must both have shape \(B, K\) with K >= 2, got"
    ):
        kwise_loss(torch.zeros(shape), torch.zeros(other, dtype=torch.int64))


def test_accuracy_counts_pairs() -> None:
    scores = torch.tensor([[3.0, 2.0, 1.0]])
    assert ranking_accuracy(scores, torch.tensor([[0, 1, 2]])) == 1
    assert ranking_accuracy(scores, torch.tensor([[2, 1, 0]])) == 0
    assert ranking_accuracy(scores, torch.tensor([[1, 0, 2]])) == pytest.approx(2 / 3)
    assert ranking_accuracy(torch.zeros(1, 3), torch.tensor([[1, 0, 2]])) == 0.5


# --- the model


def test_the_reward_model_keeps_the_trunk_and_nothing_of_the_head(causal_lm: GPT2LMHeadModel) -> None:
    state = torch.get_rng_state()
    model = reward_model_from(causal_lm, generator())
    assert torch.equal(torch.get_rng_state(), state)
    assert type(model).__name__ == "GPT2ForSequenceClassification"
    assert (model.config.num_labels, model.config.pad_token_id) == (1, 0)
    trunk = causal_lm.transformer.state_dict()
    assert all(torch.equal(weight, trunk[name]) for name, weight in model.transformer.state_dict().items())
    assert not {weight.data_ptr() for weight in model.parameters()} & {
        weight.data_ptr() for weight in causal_lm.parameters()
    }
    assert torch.equal(model.score.weight, reward_model_from(causal_lm, generator()).score.weight)
    assert not torch.equal(model.score.weight, reward_model_from(causal_lm, generator(1)).score.weight)
    assert causal_lm.config.num_labels == 2  # Hugging Face's default: the config given is not written to


@pytest.mark.parametrize("pad", [None, 1])
def test_a_pad_token_that_hides_the_end_is_rejected(causal_lm: GPT2LMHeadModel, pad: int | None) -> None:
    causal_lm.config.pad_token_id = pad
    with pytest.raises(InvalidArgumentError, match=f"`pad_token_id` must be set and differ from EOS.*got {pad}, EOS 1"):
        reward_model_from(causal_lm, generator())


def test_a_score_does_not_feel_its_batch_mates(causal_lm: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast) -> None:
    model = reward_model_from(causal_lm, generator())
    texts = random_texts(40)
    together = score_texts(model, tokenizer, texts, batch_size=16)
    alone = torch.cat([score_texts(model, tokenizer, [text]) for text in texts])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)
    without_end = score_texts(model, tokenizer, [text.removesuffix(" <eos>") for text in texts])
    assert (without_end - alone).abs().min() > 1e-6  # the model sees whether a response ended


def test_texts_that_do_not_fit_are_rejected(causal_lm: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast) -> None:
    model = reward_model_from(causal_lm, generator())
    with pytest.raises(InvalidArgumentError, match="`texts` must have 1 to 16 tokens each, got 17 in 'the the"):
        score_texts(model, tokenizer, ["the " * 17])
    with pytest.raises(InvalidArgumentError, match="`texts` must have 1 to 16 tokens each, got 0 in ''"):
        score_texts(model, tokenizer, [""])


# --- normalisation


def test_normalised_scores_have_mean_zero_and_standard_deviation_one(
    causal_lm: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    model = reward_model_from(causal_lm, generator())
    model.score.weight.data *= 3
    model.transformer.ln_f.bias.data += 0.5
    before = score_texts(model, tokenizer, random_texts(60))
    normalise(model, before.mean().item(), before.std().item())
    after = score_texts(model, tokenizer, random_texts(60))
    assert after.mean().item() == pytest.approx(0, abs=1e-5)
    assert after.std().item() == pytest.approx(1, abs=1e-5)
    torch.testing.assert_close(after, (before - before.mean()) / before.std(), rtol=0, atol=1e-5)


def test_normalisation_uses_the_bias_of_the_head_where_there_is_one(
    causal_lm: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    model = reward_model_from(causal_lm, generator())
    weight = model.score.weight.data
    model.score = torch.nn.Linear(16, 1)
    model.score.weight.data = weight
    before = score_texts(model, tokenizer, random_texts(20))
    norm = model.transformer.ln_f.bias.clone()
    normalise(model, 4.0, 0.5)
    torch.testing.assert_close(score_texts(model, tokenizer, random_texts(20)), (before - 4) / 0.5, rtol=0, atol=1e-4)
    assert torch.equal(model.transformer.ln_f.bias, norm)


def test_a_model_without_any_bias_cannot_be_normalised() -> None:
    config = LlamaConfig(
        vocab_size=12,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        pad_token_id=0,
        eos_token_id=1,
    )
    with torch.random.fork_rng(devices=[]):
        model = reward_model_from(LlamaForCausalLM(config), generator())
    before = model.score.weight.clone()
    with pytest.raises(InvalidArgumentError, match="`model` must have a bias in its score head or its final norm"):
        normalise(model, 0.5, 2.0)
    assert torch.equal(model.score.weight, before)


@pytest.mark.parametrize(("mean", "std"), [(math.nan, 1.0), (0.0, 0.0), (0.0, -1.0), (0.0, math.inf)])
def test_statistics_that_cannot_be_are_rejected(causal_lm: GPT2LMHeadModel, mean: float, std: float) -> None:
    with pytest.raises(InvalidArgumentError, match=r"`(mean|std)` must be a finite number"):
        normalise(reward_model_from(causal_lm, generator()), mean, std)


# --- training


def toy_rankings(size: int, k: int = 4, *, sign: int = 1) -> RankedTexts:
    """Completions ranked by the valence of their words."""
    rng = np.random.default_rng(3)
    prompts = [f"the {rng.choice(['film', 'soup'])} was" for _ in range(size)]
    completions = [
        [f" {' '.join(rng.choice(list(VALENCE), rng.integers(1, 4)))} . <eos>" for _ in range(k)] for _ in prompts
    ]
    scores = [[sign * sum(VALENCE.get(word, 0) for word in text.split()) for text in texts] for texts in completions]
    return RankedTexts(prompts, completions, true_ranking(scores).tolist())


def train(
    causal_lm: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, rankings: RankedTexts, **changes: object
) -> tuple[torch.nn.Module, dict[str, float]]:
    model = reward_model_from(causal_lm, generator())
    settings = {"epochs": 4, "learning_rate": 1e-2, "batch_size": 16, "generator": generator()} | changes
    return model, train_reward_model(model, tokenizer, rankings, **settings)


def test_training_learns_the_ranking_and_its_reverse(
    causal_lm: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    for sign in (1, -1):
        model, metrics = train(causal_lm, tokenizer, toy_rankings(200, sign=sign))
        good, bad = score_texts(model, tokenizer, ["the film was good . <eos>", "the film was bad . <eos>"])
        assert sign * (good - bad) > 1
        assert metrics["accuracy"] > 0.8
        assert metrics["loss"] < 0.5 < math.log(2)


def test_one_forward_reads_all_completions_of_its_prompts_once(
    causal_lm: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = []
    steps = []
    forward = module._forward
    monkeypatch.setattr(
        module, "_forward", lambda model, sequences: (rows.append(len(sequences)), forward(model, sequences))[1]
    )
    train(causal_lm, tokenizer, toy_rankings(10, k=5), epochs=2, batch_size=4, progress=steps.append)
    assert sorted(rows) == [10, 10, 20, 20, 20, 20]
    assert len(steps) == 6
    assert set(steps[0]) == {"loss", "accuracy"}


def test_equal_seeds_train_equal_models_and_leave_the_global_generator_alone(
    causal_lm: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    state = torch.get_rng_state()
    first, again, other = (
        train(causal_lm, tokenizer, toy_rankings(30), epochs=1, generator=generator(seed))[0] for seed in (5, 5, 6)
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.score.weight, again.score.weight)
    assert not torch.equal(first.score.weight, other.score.weight)


def test_dropout_is_off_while_training(causal_lm: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast) -> None:
    assert causal_lm.config.resid_pdrop > 0
    losses: list[float] = []
    train(
        causal_lm,
        tokenizer,
        toy_rankings(8),
        epochs=1,
        batch_size=8,
        progress=lambda metrics: losses.append(metrics["loss"]),
    )
    model = reward_model_from(causal_lm, generator())
    rankings = toy_rankings(8)
    texts = [p + c for p, cs in zip(rankings.prompts, rankings.completions, strict=True) for c in cs]
    scores = score_texts(model, tokenizer, texts).view(8, 4)
    assert losses == [pytest.approx(slow_kwise_loss(scores, torch.tensor(rankings.ranking)), rel=1e-5)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": 0}, "`epochs` must be an int >= 1, got 0."),
        ({"batch_size": 1.5}, "`batch_size` must be an int >= 1, got 1.5."),
        ({"learning_rate": 0.0}, "`learning_rate` must be a finite number > 0, got 0.0."),
        ({"rankings": RankedTexts([], [], [])}, "`rankings` must hold at least one prompt, got none."),
    ],
)
def test_settings_that_cannot_train_are_rejected(
    causal_lm: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, change: dict[str, object], message: str
) -> None:
    rankings = change.get("rankings", toy_rankings(4))
    change = {name: value for name, value in change.items() if name != "rankings"}
    with pytest.raises(InvalidArgumentError, match=message):
        train(causal_lm, tokenizer, rankings, **change)


# --- batches


def test_batches_hold_every_index_once_and_like_lengths_together() -> None:
    lengths = np.random.default_rng(0).integers(1, 40, size=1003).tolist()
    batches = list(bucketed_batches(lengths, 8, generator()))
    assert sorted(i for batch in batches for i in batch) == list(range(1003))
    assert max(map(len, batches)) == 8
    assert len(batches) == 126  # as many updates as without buckets: the schedule counts on it
    spread = np.mean([max(lengths[i] for i in batch) - min(lengths[i] for i in batch) for batch in batches])
    assert spread < 6
    assert batches != list(bucketed_batches(lengths, 8, generator(1)))
    assert batches == list(bucketed_batches(lengths, 8, generator()))


def test_the_learning_rate_rises_then_falls_to_zero() -> None:
    factors = [warm_up_cosine(step, 100, 0.1) for step in range(101)]
    assert 0 < factors[0] < factors[5] < factors[9] < factors[10] == 1
    assert factors[10:] == sorted(factors[10:], reverse=True)
    assert factors[100] == pytest.approx(0)
    assert warm_up_cosine(0, 1, 0.0) == 1
