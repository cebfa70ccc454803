"""Reward models learn from records of feedback: through Trainer, from any start, under every objective."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from reward_texts import VALENCE, generator, make_gpt2, make_llama, make_tokenizer, toy_records
from torch import Tensor

from lmgym.errors import InvalidArgumentError, NotFiniteError
from lmgym.feedback.records import Choice, Record, Skip
from lmgym.reward_models.batches import ForwardSampler, bucketed_batches, warm_up_cosine
from lmgym.reward_models.config import RewardConfig
from lmgym.reward_models.examples import Batch, split_by_prompt
from lmgym.reward_models.scorer import Scorer, objective_loss, score_texts
from lmgym.reward_models.starting import reward_model_from
from lmgym.reward_models.trainer import Checkpoints
from lmgym.reward_models.training import RewardResult, finish, prepare_lesson, train_member, train_reward
from lmgym.rewards import sequence

TOKENIZER = make_tokenizer()


def train(records: Any = None, model: Any = None, seed: int = 0, progress: Any = None, **changes: Any) -> RewardResult:
    config = RewardConfig(**{"lr": 1e-2, "held_out": 0, **changes})
    records = toy_records(64) if records is None else records
    return train_reward(records, model or make_gpt2(), TOKENIZER, config, seed=seed, progress=progress)


def weights_of(result: RewardResult) -> Tensor:
    return torch.cat([weight.detach().flatten() for weight in result.models[0].parameters()])


def preference(result: RewardResult) -> float:
    """How much better the model likes a good film than a bad one."""
    good, bad = score_texts(
        result.models[0], TOKENIZER, ["the film was good . <eos>", "the film was bad . <eos>"]
    ).tolist()
    return good - bad


# --- what is learned


@pytest.mark.slow
@pytest.mark.parametrize(
    ("objective", "sign"), [("kwise", 1), ("pairwise", -1), ("plackett_luce", 1), ("regression", -1)]
)
def test_every_objective_learns_the_preference_or_its_reverse(objective: str, sign: int) -> None:
    records = toy_records(96, sign=sign, rated=objective == "regression")
    result = train(records, objective=objective, lr=5e-3, epochs=4, held_out=0.1)
    assert sign * preference(result) > 0.4
    assert result.measures is not None
    assert result.measures.accuracy.mean > 0.7


def test_ties_are_learned_to_be_ties() -> None:
    records = [
        Record("the film was", (" good . <eos>", " bad . <eos>"), Choice(i % 2, 1 - i % 2, 0.0)) for i in range(64)
    ]
    for ties in ("half", "davidson"):
        assert abs(preference(train(records, ties=ties, epochs=2))) < 0.2


def test_from_a_model_that_has_a_head_already_learning_goes_on() -> None:
    first = train(toy_records(96), epochs=3, lr=5e-3)
    again = train(toy_records(16), first.models[0], lr=1e-6)
    assert preference(again) == pytest.approx(preference(first), abs=0.05)
    assert preference(first) > 0.5


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`")  # which peft 0.21 reads
@pytest.mark.parametrize("make", [make_gpt2, make_llama])
def test_an_adapter_learns_and_is_merged(make: Any) -> None:
    model = make()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    result = train(toy_records(96), model, lora_rank=4, epochs=4)
    assert preference(result) > 0.3
    assert not [name for name, _ in result.models[0].named_parameters() if "lora" in name]
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


# --- how


def test_one_forward_reads_all_completions_of_its_prompts_once(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = []
    read = sequence._read_last_tokens

    def counted(model: Any, sequences: Sequence[Any]) -> Tensor:
        if model.score.weight.requires_grad and torch.is_grad_enabled():
            rows.append(len(sequences))
        return read(model, sequences)

    monkeypatch.setattr(sequence, "_read_last_tokens", counted)
    train(toy_records(10, k=5), epochs=2, batch_size=4)
    assert sorted(rows) == [10, 10, 20, 20, 20, 20]


def test_accumulation_gives_the_same_model() -> None:
    records = [*toy_records(10, k=2), *toy_records(9, k=4, seed=1)]
    for objective in ("kwise", "pairwise"):
        whole, parts, single = (
            weights_of(train(records, objective=objective, batch_size=4, micro_batch_size=size))
            for size in (None, 3, 1)
        )
        for split in (parts, single):  # AdamW divides a gradient of round-off by its own size
            torch.testing.assert_close(split, whole, rtol=0, atol=5e-3)
            assert (split - whole).abs().mean() < 2e-5


def test_equal_seeds_train_equal_models_and_leave_the_global_generators_alone() -> None:
    state = torch.get_rng_state()
    numpy_state = np.random.get_state()[1].tolist()  # noqa: NPY002 - it is what Trainer would seed
    first, again, other = (weights_of(train(seed=seed)) for seed in (5, 5, 6))
    assert torch.equal(torch.get_rng_state(), state)
    assert np.random.get_state()[1].tolist() == numpy_state  # noqa: NPY002
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_dropout_is_off_while_training() -> None:
    model = make_gpt2(dropout=0.5)
    losses: list[float] = []
    train(toy_records(8), model, batch_size=8, progress=lambda _, metrics: losses.append(metrics["train/loss"]))
    assert len(losses) == 1
    lesson = prepare_lesson(toy_records(8), model, TOKENIZER, RewardConfig(held_out=0))
    from lmgym.reward_models.starting import starting_model
    from lmgym.reward_models.training import _MEMBERS, generator_of

    scorer = Scorer(starting_model(model, TOKENIZER, generator_of(0, _MEMBERS, 0)))
    batch = Batch(lesson.train)
    with torch.no_grad():
        expected = objective_loss(scorer(batch.sequences), batch, lesson.config)
    assert losses[0] == pytest.approx(float(expected), rel=1e-5)


def test_metrics_of_an_update_are_those_of_its_prompts() -> None:
    rows: list[dict[str, float]] = []
    train(toy_records(20), batch_size=8, held_out=0.2, eval_every=1, progress=lambda _, m: rows.append(m))
    assert len(rows) == 2
    assert set(rows[0]) == {"train/loss", "train/accuracy", "train/lr", "eval/loss", "eval/accuracy"}
    assert rows[0]["train/lr"] > rows[1]["train/lr"] > 0


def test_training_that_diverges_says_so() -> None:
    with pytest.raises(NotFiniteError, match="lower learning rate"):
        train(lr=1e30, epochs=3)


# --- what is held out


def test_no_prompt_is_on_both_sides_and_judgements_of_one_prompt_stay_together() -> None:
    records = toy_records(12)
    twice = [*records, *records]
    lesson = prepare_lesson(twice, make_gpt2(), TOKENIZER, RewardConfig(held_out=0.25))
    kept = {example.prompt for example in lesson.train}
    held = {example.prompt for example in lesson.held_out}
    assert not kept & held
    assert len(lesson.train) + len(lesson.held_out) == 24
    assert len(held) == round(0.25 * len(kept | held))
    assert lesson.held_out
    other = prepare_lesson(twice, make_gpt2(), TOKENIZER, RewardConfig(held_out=0.25), seed=1)
    assert {example.prompt for example in other.held_out} != held


def test_of_one_prompt_nothing_can_be_held_out() -> None:
    lesson = prepare_lesson(toy_records(2)[:1], make_gpt2(), TOKENIZER, RewardConfig(held_out=0))
    with pytest.raises(InvalidArgumentError, match="`held_out` must be 0 where the feedback is on 1 prompt, got 0.1"):
        split_by_prompt(lesson.train, 0.1, generator())


def test_training_stops_early_and_takes_the_best_weights() -> None:
    rng = np.random.default_rng(0)
    noise = [
        Record(record.prompt, record.completions, Choice(int(a), 1 - int(a)))
        for record, a in zip(toy_records(60, k=2), rng.integers(2, size=60), strict=True)
    ]
    looks: list[float] = []

    def progress(_: int, metrics: dict[str, float]) -> None:
        looks.extend(value for name, value in metrics.items() if name == "eval/loss")

    result = train(noise, epochs=20, lr=3e-2, held_out=0.3, eval_every=1, patience=3, progress=progress)
    watch = result.members[0].watch
    assert watch.stopped_early
    assert len(looks) == watch.best_update + 3
    assert watch.best_loss == min(looks) == looks[watch.best_update - 1]
    batch = Batch(result.lesson.held_out)
    scores = score_texts(
        result.models[0], TOKENIZER, [f"{e.prompt}{c.text}" for e in batch.examples for c in e.record.completions]
    )
    assert float(objective_loss(scores, batch, result.lesson.config)) == pytest.approx(watch.best_loss, rel=1e-4)


# --- stopping and going on


def test_a_run_that_is_stopped_goes_on_to_the_same_model(tmp_path: Path) -> None:
    import shutil

    config = RewardConfig(lr=1e-2, epochs=2, batch_size=8, micro_batch_size=4, held_out=0.2, eval_every=2)
    lesson = prepare_lesson(toy_records(40), make_gpt2(), TOKENIZER, config)
    whole_rows: list[Any] = []
    whole = train_member(lesson, 0, lambda *row: whole_rows.append(row))
    rows: list[Any] = []

    def save(path: Path, update: int) -> None:
        shutil.copytree(path, tmp_path / str(update))

    def stop(update: int, metrics: dict[str, float]) -> bool:
        rows.append((update, metrics))
        return update < 5

    stopped = train_member(lesson, 0, stop, Checkpoints(save))
    assert stopped.stopped
    assert [path.name for path in tmp_path.iterdir()] == ["5"]
    resumed = train_member(lesson, 0, lambda *row: rows.append(row), Checkpoints(save, resume=tmp_path / "5"))
    assert not resumed.stopped
    assert rows == whole_rows
    assert all(torch.equal(a, b) for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True))
    assert resumed.watch.best_update == whole.watch.best_update


# --- centring


@pytest.mark.parametrize("make", [make_gpt2, make_llama])
@pytest.mark.parametrize("scale", [False, True])
def test_reference_samples_score_zero_on_average_here_and_when_loaded_again(
    make: Any, scale: bool, tmp_path: Path
) -> None:
    from lmgym.reward_models.saving import save_result
    from lmgym.rewards.classifier import load_reward_model

    config = RewardConfig(lr=1e-2, held_out=0, scale=scale)
    reference = [f"{record.prompt}{text.text}" for record in toy_records(30, seed=9) for text in record.completions]
    result = train_reward(toy_records(40), make(), TOKENIZER, config, reference_texts=reference)
    save_result(result, tmp_path / "reward", "a card")
    loaded = load_reward_model(str(tmp_path / "reward"), "cpu")
    scores = torch.tensor(loaded([""] * len(reference), reference))
    assert scores.mean().item() == pytest.approx(0, abs=1e-4)
    expected = 1.0 if scale else result.stds[0]
    assert scores.std().item() == pytest.approx(expected, rel=1e-3)
    torch.testing.assert_close(scores, score_texts(result.models[0], TOKENIZER, reference), rtol=0, atol=1e-5)
    assert (tmp_path / "reward" / "README.md").read_text() == "a card"


def test_without_centring_scores_stay_as_they_are() -> None:
    config = RewardConfig(lr=1e-2, held_out=0, centre=False)
    lesson = prepare_lesson(toy_records(20), make_gpt2(), TOKENIZER, config)
    member = train_member(lesson)
    before = score_texts(member.model, TOKENIZER, ["the film was good"])
    finish(lesson, [member])
    assert torch.equal(score_texts(member.model, TOKENIZER, ["the film was good"]), before)


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


@pytest.mark.parametrize("world", [1, 2])
def test_the_forwards_of_an_update_add_up_to_the_mean_over_its_prompts(world: int) -> None:
    weights = [1.0, 3.0, 6.0, 1.0, 3.0, 1.0, 10.0]
    numbers = np.random.default_rng(0).normal(size=7)
    samplers = [
        ForwardSampler([1] * 7, weights, batch_size=3, forwards=2, epochs=2, generator=generator(), rank=r, world=world)
        for r in range(world)
    ]
    assert all(len(sampler) == 3 * 2 // world for sampler in samplers)
    forwards = [list(sampler) for sampler in samplers]
    whole = list(bucketed_batches([1] * 7, 3, generator()))
    for update, batch in enumerate(whole):
        own = [f for forward in forwards for f in forward[update * 2 // world : (update + 1) * 2 // world]]
        total = 0.0
        for keys in own:
            rows = [index for index, _ in keys]
            mean = sum(weights[i] * numbers[i] for i in rows) / sum(weights[i] for i in rows)
            total += keys[0][1] * mean / 2
        expected = sum(weights[i] * numbers[i] for i in batch) / sum(weights[i] for i in batch)
        assert total == pytest.approx(expected)


def test_the_learning_rate_rises_then_falls_to_zero() -> None:
    factors = [warm_up_cosine(step, 100, 0.1) for step in range(101)]
    assert 0 < factors[0] < factors[5] < factors[9] < factors[10] == 1
    assert factors[10:] == sorted(factors[10:], reverse=True)
    assert factors[100] == pytest.approx(0)
    assert warm_up_cosine(0, 1, 0.0) == 1


# --- what cannot be


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": 0}, "`epochs` must be an int >= 1, got 0."),
        ({"batch_size": 1.5}, "`batch_size` must be an int >= 1, got 1.5."),
        ({"lr": 0.0}, "`lr` must be a finite number > 0, got 0.0."),
        ({"objective": "kwize"}, "Did you mean 'kwise'"),
        ({"objective": "plackett_luce", "ties": "davidson"}, "`ties` must be 'half' where `objective` is"),
        ({"objective": "regression", "margin": 1.0}, "`margin` must be 0 where `objective` is"),
        ({"held_out": 1.0}, "`held_out` must be below 1"),
        ({"scale": True, "centre": False}, "`scale` must be false"),
    ],
)
def test_numbers_that_cannot_train_are_rejected(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RewardConfig(**change)


def test_feedback_without_anything_to_learn_is_rejected() -> None:
    nothing = [Record("the film was", (" good", " bad"), Skip())]
    with pytest.raises(InvalidArgumentError, match="at least one judgement that compares.* got none in 1 records"):
        train(nothing)
    with pytest.raises(InvalidArgumentError, match="at least one judgement that rates"):
        train(toy_records(4), objective="regression")
    with pytest.raises(InvalidArgumentError, match="1 to 16 tokens together, .* got 19 in"):
        train([Record("the film was", (" good" * 16, " bad"), Choice(0, 1))])


def test_a_model_of_another_kind_is_rejected() -> None:
    with pytest.raises(InvalidArgumentError, match="`model` must be a causal LM or a sequence-classification model"):
        train(model=make_gpt2().transformer)


def test_the_reward_model_keeps_the_trunk_and_nothing_of_the_head() -> None:
    causal_lm = make_gpt2()
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
def test_a_pad_token_that_hides_the_end_is_replaced_or_rejected(pad: int | None) -> None:
    causal_lm = make_gpt2()
    causal_lm.config.pad_token_id = pad
    with pytest.raises(InvalidArgumentError, match=f"`pad_token_id` must be set and differ from EOS.*got {pad}, EOS 1"):
        reward_model_from(causal_lm, generator())
    result = train(model=causal_lm)
    assert result.models[0].config.pad_token_id == TOKENIZER.pad_token_id == 0


def test_valence_is_what_the_toy_annotator_goes_by() -> None:
    (record,) = toy_records(1, k=2)
    scores = [sum(VALENCE.get(word, 0) for word in str(c.text).split()) for c in record.completions]
    assert scores[record.judgement.tiers[0][0]] == max(scores)  # type: ignore[union-attr]
    assert not math.isnan(scores[0])
