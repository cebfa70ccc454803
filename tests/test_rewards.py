"""Reward functions: their contract, where they come from, and classifiers against raw Hugging Face logits."""

from __future__ import annotations

import copy
import gc
import math
import shutil
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import WORDS, byte_tokenizer, gpt2, word_count, word_tokenizer
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    GPT2ForSequenceClassification,
)

from lmgym.errors import InvalidArgumentError, LmGymError, RewardError
from lmgym.rewards.base import check_reward_name, import_function, score
from lmgym.rewards.classifier import ClassifierReward, load_reward_model
from lmgym.tasks import Task

# --- the contract --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "returned",
    [
        [1, 2.5],
        (1.0, 2.5),
        np.array([1.0, 2.5]),
        torch.tensor([1.0, 2.5]),
        np.array([1, 2.5], dtype=np.float32),
        [np.float32(1.0), np.float64(2.5)],
    ],
    ids=["list", "tuple", "numpy", "torch", "float32", "list of numpy"],
)
def test_scores_of_any_sequence_become_floats(returned: Any) -> None:
    found = score(lambda **_: returned, ["p", "q"], ["a", "b"])
    assert found == [1.0, 2.5]
    assert all(type(x) is float for x in found)


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ([1.0], "The reward function must return 2 scores, one a completion, and returned 1."),
        ([1.0, 2.0, 3.0], "must return 2 scores, one a completion, and returned 3."),
        ([], "and returned 0."),
        ([1.0, math.nan], "must return finite numbers, and returned nan for completion 'b'."),
        ([math.inf, 1.0], "must return finite numbers, and returned inf for completion 'a'."),
        ([1.0, None], "must return finite numbers, and returned None for completion 'b'."),
        (["1.0", 1.0], "must return finite numbers, and returned '1.0' for completion 'a'."),
        (torch.tensor([1.0, -torch.inf]), "returned -inf for completion 'b'."),
        ([[1.0], [2.0]], r"returned \[1.0\] for completion 'a'."),
    ],
)
def test_a_broken_contract_is_an_error_that_says_how(returned: Any, message: str) -> None:
    with pytest.raises(RewardError, match=message):
        score(lambda **_: returned, ["p", "q"], ["a", "b"])


@pytest.mark.parametrize("returned", [None, 1.0, np.array(1.0), torch.tensor(1.0)], ids=repr)
def test_what_is_no_sequence_is_an_error_too(returned: Any) -> None:
    with pytest.raises(RewardError, match="The reward function must return 1 scores"):
        score(lambda **_: returned, ["p"], ["a"])


def test_arguments_come_by_name_with_the_columns() -> None:
    """What TRL hands to its reward functions."""
    seen: dict[str, Any] = {}

    def reward(
        completions: list[str], prompts: list[str], completion_ids: list[list[int]], **kwargs: Any
    ) -> list[float]:
        seen.update(kwargs, completions=completions, prompts=prompts, completion_ids=completion_ids)
        return [float(len(c)) for c in completions]

    assert score(reward, ["p"], ["ab"], prompt_ids=[[3]], completion_ids=[[4, 1]]) == [2.0]
    assert seen == {"prompts": ["p"], "completions": ["ab"], "prompt_ids": [[3]], "completion_ids": [[4, 1]]}


# --- names -----------------------------------------------------------------------------------------------------------


def test_an_import_path_is_the_function() -> None:
    assert import_function("conftest:word_count") is word_count
    task = Task(
        name="t", model="m", reward="conftest:word_count", prompts={"train": ["a"]}, kl_coef=0.1, max_new_tokens=2
    )
    assert task.reward_function() is word_count


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("no_such_module:f", "got 'no_such_module:f': No module named 'no_such_module'."),
        ("conftest:no_such_function", "has no attribute 'no_such_function'"),
        ("conftest:WORDS", "`reward` must name a callable, and 'conftest:WORDS' is a list."),
    ],
)
def test_an_import_path_that_leads_nowhere(path: str, message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        import_function(path)


@pytest.mark.parametrize("name", ["module:", ":function", "/no/such/directory", "", 3, None])
def test_names_that_cannot_be(name: Any) -> None:
    with pytest.raises(InvalidArgumentError, match="`reward` must be"):
        check_reward_name(name)


def test_names_that_can_be(reward_dir: str) -> None:
    for name in (word_count, reward_dir, Path(reward_dir), "org/model", "package.module:function"):
        check_reward_name(name)


# --- classifiers -----------------------------------------------------------------------------------------------------


def raw_score(model: Any, ids: Sequence[int]) -> float:
    """One sequence on its own through Hugging Face: nothing to pad."""
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([list(ids)])).logits[0]
    return float(logits[0]) if len(logits) == 1 else float(logits.log_softmax(-1)[1] - logits.log_softmax(-1)[0])


def episodes(rows: int = 70, seed: int = 0) -> tuple[list[str], list[str], dict[str, list[list[int]]]]:
    """Ragged prompts and responses of words, some with an EOS; more than one batch of them."""
    rng = np.random.default_rng(seed)
    tokenizer = word_tokenizer()
    words = range(3, len(tokenizer))
    prompt_ids = [rng.choice(words, rng.integers(1, 6)).tolist() for _ in range(rows)]
    completion_ids = [rng.choice(words, rng.integers(0, 12)).tolist() for _ in range(rows)]
    completion_ids = [[*ids, 1] if rng.random() < 0.5 or not ids else ids for ids in completion_ids]
    prompts = [tokenizer.decode(p) for p in prompt_ids]
    both = [
        tokenizer.decode([*p, *c], skip_special_tokens=True) for p, c in zip(prompt_ids, completion_ids, strict=True)
    ]
    completions = [text[len(p) :] for text, p in zip(both, prompts, strict=True)]
    return prompts, completions, {"prompt_ids": prompt_ids, "completion_ids": completion_ids}


def test_on_the_policys_own_tokenizer_scores_are_those_of_the_ids(reward_dir: str) -> None:
    reward = load_reward_model(reward_dir, "cpu").for_tokenizer(word_tokenizer())
    raw = AutoModelForSequenceClassification.from_pretrained(reward_dir)
    prompts, completions, columns = episodes()
    found = score(reward, prompts, completions, **columns)
    slow = [raw_score(raw, [*p, *c]) for p, c in zip(columns["prompt_ids"], columns["completion_ids"], strict=True)]
    np.testing.assert_allclose(found, slow, rtol=0, atol=1e-5)
    assert np.std(slow) > 0.1
    # The model sees the EOS: without it, the same words are worth something else.
    cut = {**columns, "completion_ids": [[i for i in ids if i != 1] for ids in columns["completion_ids"]]}
    without = np.array(score(reward, prompts, completions, **cut))
    ended = np.array([1 in ids for ids in columns["completion_ids"]])
    assert (np.abs(without - found)[ended] > 1e-3).all()
    np.testing.assert_allclose(without[~ended], np.array(found)[~ended], rtol=0, atol=1e-5)


def test_with_another_tokenizer_scores_are_those_of_the_text(byte_reward_dir: str) -> None:
    reward = load_reward_model(byte_reward_dir, "cpu").for_tokenizer(word_tokenizer())
    raw = AutoModelForSequenceClassification.from_pretrained(byte_reward_dir)
    tokenizer = AutoTokenizer.from_pretrained(byte_reward_dir)
    assert tokenizer.pad_token is None
    assert raw.config.pad_token_id is None
    prompts, completions, columns = episodes()
    found = score(reward, prompts, completions, **columns)
    slow = [raw_score(raw, tokenizer(p + c)["input_ids"]) for p, c in zip(prompts, completions, strict=True)]
    np.testing.assert_allclose(found, slow, rtol=0, atol=1e-5)
    assert np.std(slow) > 0.1


@pytest.mark.parametrize("fixture", ["reward_dir", "byte_reward_dir"])
def test_a_score_does_not_depend_on_batch_mates(fixture: str, request: pytest.FixtureRequest) -> None:
    reward = load_reward_model(request.getfixturevalue(fixture), "cpu").for_tokenizer(word_tokenizer())
    prompts, completions, columns = episodes(80)
    together = np.array(score(reward, prompts, completions, **columns))
    order = np.random.default_rng(1).permutation(80)
    for rows in (order, order[:5], order[:1], [79]):
        part = score(
            reward, [prompts[i] for i in rows], [completions[i] for i in rows],
            **{name: [column[i] for i in rows] for name, column in columns.items()},
        )  # fmt: skip
        np.testing.assert_allclose(part, together[list(rows)], rtol=0, atol=1e-5)


@pytest.mark.parametrize("pad", [None, 0, 1])
def test_the_score_is_read_where_hugging_face_reads_it(pad: int | None) -> None:
    """At the last token that is not the pad token; without one at the last token, whatever fills up the batch."""
    tokenizer = word_tokenizer()
    model = gpt2(len(tokenizer), seed=1, cls=GPT2ForSequenceClassification, num_labels=1)
    model.config.pad_token_id = pad
    # Every token of the vocabulary is the last of some sequence: none is left over to fill up with.
    sequences = [[5, 6, i] for i in range(len(tokenizer))] + [[5, 0, 0], [7, 8, 9, 10, 11], [0], [4, 1, 1]]
    reward = ClassifierReward(model, tokenizer).for_tokenizer(word_tokenizer())
    rows = len(sequences)
    columns = {"prompt_ids": [s[:1] for s in sequences], "completion_ids": [s[1:] for s in sequences]}
    found = score(reward, ["p"] * rows, ["c"] * rows, **columns)
    np.testing.assert_allclose(found, [raw_score(model, s) for s in sequences], rtol=0, atol=1e-5)
    assert model.config.pad_token_id == pad  # what is the caller's stays as it was
    ended, open_ended = raw_score(model, [4, 5, 1]), raw_score(model, [4, 5])
    assert (abs(ended - open_ended) > 1e-3) == (pad != 1)  # with pad and EOS one, the end is invisible


def test_a_bidirectional_model_does_not_see_the_filling() -> None:
    """Causal models cannot look to the right of the last token; encoders could."""
    tokenizer = word_tokenizer()
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
        max_position_embeddings=40, num_labels=1, initializer_range=0.3, pad_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = BertForSequenceClassification(config).eval()
    reward = ClassifierReward(model, tokenizer).for_tokenizer(word_tokenizer())
    prompts, completions, columns = episodes(30)
    found = score(reward, prompts, completions, **columns)
    both = [[*p, *c] for p, c in zip(columns["prompt_ids"], columns["completion_ids"], strict=True)]
    np.testing.assert_allclose(found, [raw_score(model, ids) for ids in both], rtol=0, atol=1e-5)
    assert np.std(found) > 0.1


def test_two_labels_are_the_log_odds_of_the_second() -> None:
    tokenizer = word_tokenizer()
    model = gpt2(len(tokenizer), seed=3, cls=GPT2ForSequenceClassification, num_labels=2)
    reward = ClassifierReward(model, tokenizer).for_tokenizer(word_tokenizer())
    prompts, completions, columns = episodes(20)
    found = score(reward, prompts, completions, **columns)
    both = [[*p, *c] for p, c in zip(columns["prompt_ids"], columns["completion_ids"], strict=True)]
    np.testing.assert_allclose(found, [raw_score(model, ids) for ids in both], rtol=0, atol=1e-5)
    with torch.inference_mode():
        probability = model(input_ids=torch.tensor([both[0]])).logits[0].softmax(-1)
    assert found[0] == pytest.approx(math.log(probability[1] / probability[0]), abs=1e-5)


def test_three_labels_are_refused() -> None:
    model = gpt2(len(WORDS) + 3, cls=GPT2ForSequenceClassification, num_labels=3)
    with pytest.raises(InvalidArgumentError, match="`reward` must be a model with 1 or 2 labels, got 3."):
        ClassifierReward(model, word_tokenizer())


def test_a_text_longer_than_the_model_is_cut_not_refused() -> None:
    tokenizer = byte_tokenizer()
    model = gpt2(len(tokenizer), seed=2, cls=GPT2ForSequenceClassification, num_labels=1, n_positions=16)
    reward = ClassifierReward(model, tokenizer)
    found = reward(["a film", "a"], [" that is much longer than that", " b"])
    assert found[0] == pytest.approx(raw_score(model, tokenizer("a film that is much")["input_ids"][:16]), abs=1e-5)
    assert found[1] == pytest.approx(raw_score(model, tokenizer("a b")["input_ids"]), abs=1e-5)


def test_an_empty_text_has_a_score_or_a_clear_error() -> None:
    tokenizer = byte_tokenizer()
    model = gpt2(len(tokenizer), seed=2, cls=GPT2ForSequenceClassification, num_labels=1, n_positions=32)
    reward = ClassifierReward(model, tokenizer)
    alone = reward(["", ""], ["", "abc"])
    assert all(math.isfinite(x) for x in alone)
    assert alone[1] == pytest.approx(raw_score(model, tokenizer("abc")["input_ids"]), abs=1e-5)
    assert alone[0] == pytest.approx(reward([""], [""])[0], abs=1e-5)


# --- loading ---------------------------------------------------------------------------------------------------------


def test_two_loads_are_one_object_freed_when_dropped(reward_dir: str, tmp_path: Path) -> None:
    own = shutil.copytree(reward_dir, tmp_path / "reward")
    first = load_reward_model(str(own), "cpu")
    assert load_reward_model(str(own), "cpu") is first
    assert copy.deepcopy([first])[0] is first
    assert not first.model.training
    assert not any(p.requires_grad for p in first.model.parameters())
    bound = first.for_tokenizer(word_tokenizer())
    gone = weakref.ref(first)
    del first
    gc.collect()
    assert load_reward_model(str(own), "cpu").model is bound.model  # who scores with it keeps it
    del bound
    gc.collect()
    assert gone() is None


def test_the_policys_tokenizer_decides_what_is_handed_over(reward_dir: str) -> None:
    reward = load_reward_model(reward_dir, "cpu")
    same, other = reward.for_tokenizer(word_tokenizer()), reward.for_tokenizer(word_tokenizer(WORDS[:-1]))
    same(["nothing"], ["of this is read"], prompt_ids=[[3]], completion_ids=[[4]])
    with pytest.raises(KeyError):
        same(["a"], [" film"])
    assert other(["a"], [" film"])  # needs no ids


def test_a_directory_that_is_no_classifier(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(LmGymError, match="could not be loaded with AutoModelForSequenceClassification"):
        load_reward_model(str(tmp_path), "cpu")
