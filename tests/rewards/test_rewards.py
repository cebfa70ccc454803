"""Reward functions: their contract, where they come from, and classifiers against raw Hugging Face logits."""

from __future__ import annotations

import copy
import gc
import math
import shutil
import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import WORDS, byte_tokenizer, gpt2, word_count, word_tokenizer
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BloomConfig,
    CTRLConfig,
    DistilBertConfig,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    OPTConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    RobertaConfig,
    XLNetConfig,
)

from lmgym.errors import InvalidArgumentError, LmGymError, RewardError
from lmgym.models import segmentation
from lmgym.models.causal import CausalLM, freeze
from lmgym.models.positions import max_positions
from lmgym.models.segmentation import reads_ids_of
from lmgym.rewards.base import check_reward_name, import_function, score, score_range
from lmgym.rewards.classifier import ClassifierReward, load_reward_model
from lmgym.rewards.sequence import Reading, find_reading
from lmgym.tasks import Task, make_task

# --- the range of scores ---------------------------------------------------------------------------------------------


class Ranged:
    """As far as a prompt's first token goes, up or down."""

    def score_range(self, prompt_ids: Sequence[int], max_new_tokens: int) -> tuple[float, float]:
        return -float(prompt_ids[0]), float(max_new_tokens)


def test_the_range_of_scores_is_that_over_prompts_and_none_where_a_reward_does_not_say() -> None:
    assert score_range(Ranged(), [[1], [3]], 7) == (-3.0, 7.0)
    assert score_range(word_count, [[1]], 7) is None
    with pytest.raises(RewardError, match="`score_range` must give two finite numbers, the lower one first"):
        score_range(Ranged(), [[1]], -2)


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


def hand_score(model: Any, ids: Sequence[int]) -> float:
    """The trunk over one sequence on its own, and the score head at the last token of it."""
    with torch.inference_mode():
        hidden = model.base_model(input_ids=torch.tensor([list(ids)]))[0]
        return float(hidden[0, -1] @ model.score.weight[0])


@pytest.mark.parametrize("pad", [None, 0, 1])
def test_the_score_is_read_at_the_last_token_whatever_the_pad_token(pad: int | None) -> None:
    tokenizer = word_tokenizer()
    model = gpt2(len(tokenizer), seed=1, cls=GPT2ForSequenceClassification, num_labels=1)
    model.config.pad_token_id = pad
    config = model.config.to_dict()
    # Every token of the vocabulary is the last of some sequence: none is left over to fill up with.
    sequences = [[5, 6, i] for i in range(len(tokenizer))] + [[5, 0, 0], [7, 8, 9, 10, 11], [0], [4, 1, 1], [4, 5, 1]]
    reward = ClassifierReward(model, tokenizer).for_tokenizer(word_tokenizer())
    rows = len(sequences)
    columns = {"prompt_ids": [s[:1] for s in sequences], "completion_ids": [s[1:] for s in sequences]}
    found = score(reward, ["p"] * rows, ["c"] * rows, **columns)
    np.testing.assert_allclose(found, [hand_score(model, s) for s in sequences], rtol=0, atol=1e-5)
    assert model.config.to_dict() == config  # what is the caller's stays as it was
    assert abs(found[-1] - hand_score(model, [4, 5])) > 1e-3  # the end is seen
    if pad == 1:  # ... which transformers, that takes it for padding, does not
        assert raw_score(model, [4, 5, 1]) == pytest.approx(hand_score(model, [4, 5]), abs=1e-5)


def test_threads_may_share_a_reward_model() -> None:
    tokenizer = word_tokenizer()
    model = gpt2(len(tokenizer), seed=1, cls=GPT2ForSequenceClassification, num_labels=1)
    model.config.pad_token_id = None
    reward = ClassifierReward(model, tokenizer).for_tokenizer(word_tokenizer())
    calls = [episodes(9, seed) for seed in range(16)]
    alone = [score(reward, prompts, completions, **columns) for prompts, completions, columns in calls]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda call: score(reward, call[0], call[1], **call[2]), calls))
    np.testing.assert_allclose(np.concatenate(together), np.concatenate(alone), rtol=0, atol=1e-5)


_SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
_GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 40}
ARCHITECTURES: dict[str, tuple[PretrainedConfig, Reading]] = {
    "GPT-2": (GPT2Config(**_GPT), Reading.LAST_TOKEN),
    "Llama": (LlamaConfig(**_SMALL, max_position_embeddings=40), Reading.LAST_TOKEN),
    "OPT": (OPTConfig(ffn_dim=48, word_embed_proj_dim=32, max_position_embeddings=40, **_SMALL), Reading.LAST_TOKEN),
    "Bloom": (BloomConfig(hidden_size=32, n_layer=2, n_head=4), Reading.LAST_TOKEN),
    "BERT": (BertConfig(**_SMALL, max_position_embeddings=40), Reading.PADDED),
    "DistilBERT": (
        DistilBertConfig(dim=32, n_layers=2, n_heads=4, hidden_dim=48, max_position_embeddings=40), Reading.PADDED
    ),
    "RoBERTa": (RobertaConfig(**_SMALL, max_position_embeddings=40), Reading.PADDED),
    "CTRL": (CTRLConfig(n_embd=32, dff=48, n_layer=2, n_head=4, n_positions=40), Reading.EQUAL_LENGTHS),
    "XLNet": (XLNetConfig(d_model=32, n_layer=2, n_head=4, d_inner=48), Reading.EQUAL_LENGTHS),
}  # fmt: skip


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_scores_a_sequence_as_on_its_own(name: str) -> None:
    """Ragged batches, the pad token in them as a token like any other, and the EOS as pad token."""
    config, reading = ARCHITECTURES[name]
    tokenizer = word_tokenizer()
    tokens = {"vocab_size": len(tokenizer), "num_labels": 1, "pad_token_id": 1, "bos_token_id": 1, "eos_token_id": 1}
    config = type(config).from_dict(config.to_dict() | tokens | {"initializer_range": 0.3, "init_std": 0.3})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForSequenceClassification.from_config(config).eval()
    for module in model.modules():
        if isinstance(module, torch.nn.Linear) and module.bias is not None:
            torch.nn.init.normal_(module.bias, std=0.3, generator=torch.Generator().manual_seed(1))
    assert find_reading(model) is reading
    reward = ClassifierReward(model, tokenizer).for_tokenizer(word_tokenizer())
    prompts, completions, columns = episodes(30)
    found = score(reward, prompts, completions, **columns)
    model.config.pad_token_id = None  # then transformers, too, reads the last token of a sequence on its own
    slow = []
    for prompt, completion in zip(columns["prompt_ids"], columns["completion_ids"], strict=True):
        ids = torch.tensor([[*prompt, *completion]])
        extra = {}
        if name == "RoBERTa":
            extra["position_ids"] = torch.arange(2, 2 + ids.shape[1])[None]  # after the pad token's, which is 1
        with torch.inference_mode():
            slow.append(float(model(input_ids=ids, attention_mask=torch.ones_like(ids), **extra).logits))
    np.testing.assert_allclose(found, slow, rtol=0, atol=2e-5)
    assert np.std(found) > 0.05


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
    with pytest.raises(InvalidArgumentError, match="`reward`.* must be a model with 1 or 2 labels, got 3."):
        ClassifierReward(model, word_tokenizer())


# --- tokenizers ------------------------------------------------------------------------------------------------------


def special_tokenizer(before: str = "", after: str = "", **steps: Any) -> Any:
    """The word tokenizer, which here adds special tokens around a text, or has other steps."""
    tokenizer = word_tokenizer()
    backend = tokenizer.backend_tokenizer
    template = " ".join(part for part in (before, "$A", after) if part)
    ids = [(token, backend.token_to_id(token)) for token in {before, after} - {""}]
    backend.post_processor = processors.TemplateProcessing(single=template, special_tokens=ids)
    for name, step in steps.items():
        setattr(backend, name, step)
    return tokenizer


@pytest.mark.parametrize(
    ("own", "policys", "expected"),
    [
        (("<pad>",), (), [0, 5, 6, 7, 1]),  # its own BOS, which the policy does not know
        (("<pad>",), ("<pad>",), [0, 5, 6, 7, 1]),  # the BOS of both, once
        ((), ("<pad>",), [5, 6, 7, 1]),  # a BOS of the policy alone
        (("<pad>", "<unk>"), ("<unk>",), [0, 5, 6, 7, 1, 2]),  # as BERT's [CLS] and [SEP]
        (("", "<eos>"), (), [5, 6, 7, 1]),  # an EOS is not added to one that is there
    ],
)
def test_a_model_gets_the_special_tokens_of_its_own_tokenizer(
    own: tuple[str, ...], policys: tuple[str, ...], expected: list[int]
) -> None:
    policy = special_tokenizer(*policys)
    model = gpt2(len(policy), seed=1, cls=GPT2ForSequenceClassification, num_labels=1)
    reward = ClassifierReward(model, special_tokenizer(*own)).for_tokenizer(policy)
    assert reward.reads_ids
    prompt = CausalLM(gpt2(len(policy)), policy).encode(policy.decode([5, 6]))
    found = reward(["p"], ["c"], prompt_ids=[prompt], completion_ids=[[7, 1]])
    assert found == [pytest.approx(hand_score(model, expected), abs=1e-5)]
    whole = reward.tokenizer(policy.decode([5, 6, 7, 1]))["input_ids"]  # what it was trained on
    assert whole[: len(expected)] == expected


def test_an_end_that_its_tokenizer_always_adds_is_added() -> None:
    policy = word_tokenizer()
    model = gpt2(len(policy), seed=1, cls=GPT2ForSequenceClassification, num_labels=1)
    reward = ClassifierReward(model, special_tokenizer("", "<eos>")).for_tokenizer(policy)
    found = reward(["p"], ["c"], prompt_ids=[[5, 6]], completion_ids=[[7]])
    assert found == [pytest.approx(hand_score(model, [5, 6, 7, 1]), abs=1e-5)]


@pytest.mark.parametrize(
    "steps", [{"normalizer": normalizers.Lowercase()}, {"pre_tokenizer": pre_tokenizers.BertPreTokenizer()}]
)
def test_an_equal_vocabulary_is_not_an_equal_tokenizer(steps: dict[str, Any]) -> None:
    policy = word_tokenizer()
    other = special_tokenizer(**steps)
    assert other.get_vocab() == policy.get_vocab()
    model = gpt2(len(policy), seed=1, cls=GPT2ForSequenceClassification, num_labels=1)
    reward = ClassifierReward(model, other).for_tokenizer(policy)
    assert not reward.reads_ids
    expected = hand_score(model, other("the film")["input_ids"])
    assert reward(["the"], [" film"]) == [pytest.approx(expected, abs=1e-5)]


def test_equal_vocabularies_of_other_merges_are_not_equal() -> None:
    """Both know a, b, c, ab, bc, and cut "abc" into "ab c" and "a bc"."""
    made = []
    for merges in ([("a", "b"), ("b", "c")], [("b", "c"), ("a", "b")]):
        vocabulary = {token: i for i, token in enumerate(["<eos>", "a", "b", "c", "ab", "bc"])}
        backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
        made.append(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>"))
    first, second = made
    assert first.get_vocab() == second.get_vocab()
    assert reads_ids_of(first, first)
    assert not reads_ids_of(first, second)


def test_a_pad_token_that_only_the_reward_model_has_does_not_matter() -> None:
    policy = byte_tokenizer()
    own = byte_tokenizer()
    own.add_special_tokens({"pad_token": "[PAD]"})
    assert reads_ids_of(own, policy)
    assert not reads_ids_of(policy, own)  # the policy could choose it


# --- positions -------------------------------------------------------------------------------------------------------


def env_with(model: Any, tokenizer: Any, horizon: int, prompts: Sequence[str] = ("the film", "a")) -> Any:
    """An env over the word tokenizer with this reward model."""
    lm = CausalLM(freeze(gpt2(len(word_tokenizer()))), word_tokenizer())
    task = Task(
        name="t", model=lm, reward=ClassifierReward(model, tokenizer), prompts={"train": list(prompts)}, kl_coef=0.0,
        max_new_tokens=horizon,
    )  # fmt: skip
    return gym.make("lmgym/RLHF-v0", task=task, device="cpu").unwrapped


def last_score(env: Any, tokens: Sequence[int]) -> float:
    """The score of the first prompt's episode that takes these tokens."""
    env.reset(seed=0, options={"prompt_index": 0})
    for token in tokens:
        *_, info = env.step(token)
    return float(info["score"])


@pytest.mark.parametrize(("own", "most"), [((), 8), (("<pad>",), 7), (("<pad>", "<unk>"), 6)])
def test_a_model_of_few_positions_is_refused_when_the_env_is_made(own: tuple[str, ...], most: int) -> None:
    """Ten positions, of which the prompt takes two, and each special token one."""
    tokenizer = special_tokenizer(*own)
    model = gpt2(len(tokenizer), seed=1, cls=GPT2ForSequenceClassification, num_labels=1, n_positions=10)
    first, second = ([5] * (most - 1) + [last] for last in (6, 7))
    fits = env_with(model, tokenizer, most)
    assert abs(last_score(fits, first) - last_score(fits, second)) > 1e-3  # the last token is not cut off
    with pytest.raises(InvalidArgumentError) as caught:
        env_with(model, tokenizer, most + 1)
    message = str(caught.value)
    assert "`reward` must be a model with at least 11 positions, got 10: the longest prompt has 2 tokens" in message
    assert f"`max_new_tokens` is {most + 1}" in message
    assert "Lower `max_new_tokens`, shorten the prompts, or name another reward model." in message


def test_roberta_has_fewer_positions_than_its_config_says() -> None:
    """40 in its config; those up to the pad token's own, which here is token 1, hold no token."""
    tokenizer = word_tokenizer()
    config = RobertaConfig(
        **_SMALL, vocab_size=len(tokenizer), max_position_embeddings=40, num_labels=1, pad_token_id=1,
        initializer_range=0.3,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForSequenceClassification.from_config(config).eval()
    assert max_positions(model) == 38
    env = env_with(model, tokenizer, 36)
    assert math.isfinite(last_score(env, [5] * 36))
    with pytest.raises(InvalidArgumentError, match="at least 39 positions, got 38"):
        env_with(model, tokenizer, 37)


def test_text_in_tokens_of_another_tokenizer_is_counted_in_these() -> None:
    """8 bytes of prompt for 2 words: 4 bytes a word."""
    tokenizer = byte_tokenizer()
    models = {
        n: gpt2(len(tokenizer), seed=2, cls=GPT2ForSequenceClassification, num_labels=1, n_positions=n)
        for n in (27, 28)
    }
    assert env_with(models[28], tokenizer, 5, ["the film"])
    with pytest.raises(
        InvalidArgumentError,
        match="`reward` must be a model with at least 28 positions, got 27: the longest prompt has 8 tokens of its "
        "tokenizer and `max_new_tokens` is 5, which are about 20 of them.",
    ):
        env_with(models[27], tokenizer, 5, ["the film"])


def test_a_text_longer_than_the_model_is_an_error_and_never_cut() -> None:
    tokenizer = byte_tokenizer()
    model = gpt2(len(tokenizer), seed=2, cls=GPT2ForSequenceClassification, num_labels=1, n_positions=16)
    reward = ClassifierReward(model, tokenizer)
    assert reward(["a"], [" b"]) == [pytest.approx(hand_score(model, tokenizer("a b")["input_ids"]), abs=1e-5)]
    with pytest.raises(RewardError, match="The reward model has 16 positions, and an episode has 36 tokens"):
        reward(["a film", "a"], [" that is much longer than that", " b"])


def test_an_episode_of_no_token_is_an_error() -> None:
    tokenizer = byte_tokenizer()
    model = gpt2(len(tokenizer), seed=2, cls=GPT2ForSequenceClassification, num_labels=1, n_positions=32)
    with pytest.raises(RewardError, match="cannot score an episode that has no token"):
        ClassifierReward(model, tokenizer)(["", ""], ["", "abc"])


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
    same = reward.for_tokenizer(word_tokenizer())
    other = reward.for_tokenizer(word_tokenizer(WORDS[:-1]))
    same(["nothing"], ["of this is read"], prompt_ids=[[3]], completion_ids=[[4]])
    with pytest.raises(KeyError):
        same(["a"], [" film"])
    assert other(["a"], [" film"])  # needs no ids


@pytest.mark.parametrize("weights", ["score.weight", "transformer.h.1.ln_1.bias"])
def test_weights_that_are_missing_are_an_error(reward_dir: str, tmp_path: Path, weights: str) -> None:
    """Such as the head of a causal LM, which would be another in every load."""
    own = shutil.copytree(reward_dir, tmp_path / "reward")
    saved = load_file(own / "model.safetensors")
    save_file({name: x for name, x in saved.items() if name != weights}, own / "model.safetensors", {"format": "pt"})
    with pytest.raises(LmGymError) as caught:
        load_reward_model(str(own), "cpu")
    message = f"lacks weights of GPT2ForSequenceClassification, which would be drawn at random: {weights}."
    assert message in str(caught.value)


def test_a_causal_lm_is_no_reward_model(model_dir: str) -> None:
    with pytest.raises(LmGymError, match="`reward` '.*' lacks weights of GPT2ForSequenceClassification.*score.weight"):
        load_reward_model(model_dir, "cpu")


def test_weights_of_another_shape_are_an_error(reward_dir: str, tmp_path: Path) -> None:
    own = shutil.copytree(reward_dir, tmp_path / "reward")
    saved = load_file(own / "model.safetensors")
    saved["score.weight"] = torch.zeros(1, 7)
    save_file(saved, own / "model.safetensors", {"format": "pt"})
    with pytest.raises(LmGymError, match=r"weights of other shapes .*: score.weight is \(1, 7\) and would have to be"):
        load_reward_model(str(own), "cpu")


@pytest.mark.parametrize("name", ["reviews", "proxy-25", "proxy-200", "proxy-2000"])
def test_shipped_reward_models_score_as_plain_transformers_does(name: str) -> None:
    task = make_task(name)
    lm = task.reference("cpu")
    reward = task.reward_function("cpu")
    assert isinstance(reward, ClassifierReward)
    bound = reward.for_tokenizer(lm.tokenizer)
    assert bound.reads_ids
    rng = np.random.default_rng(0)
    prompt_ids = [lm.encode(text) for text in task.prompts["test"][:40]]
    (eos,) = lm.eos_token_ids
    completion_ids = [rng.integers(3, lm.vocab_size, rng.integers(1, 20)).tolist() for _ in prompt_ids]
    completion_ids = [[*ids, eos] if row % 2 else ids for row, ids in enumerate(completion_ids)]
    found = bound([""] * 40, [""] * 40, prompt_ids=prompt_ids, completion_ids=completion_ids)
    plain = AutoModelForSequenceClassification.from_pretrained(task.reward, dtype=torch.float32)
    assert plain.config.pad_token_id not in {eos, None}
    whole = [torch.tensor([*p, *c]) for p, c in zip(prompt_ids, completion_ids, strict=True)]
    ids = torch.nn.utils.rnn.pad_sequence(whole, batch_first=True, padding_value=plain.config.pad_token_id)
    with torch.inference_mode():
        expected = plain(input_ids=ids, attention_mask=(ids != plain.config.pad_token_id).long()).logits[:, 0]
    np.testing.assert_allclose(found, expected.numpy(), rtol=0, atol=1e-5)
    assert np.std(found) > 0.1


def test_a_directory_that_is_no_classifier(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(LmGymError, match="could not be loaded with AutoModelForSequenceClassification"):
        load_reward_model(str(tmp_path), "cpu")


def test_two_tokenizers_are_compared_once(byte_reward_dir: str, monkeypatch: pytest.MonkeyPatch) -> None:
    reward = load_reward_model(byte_reward_dir, "cpu")
    policys = word_tokenizer()
    calls: list[object] = []

    def compare(*pair: object) -> bool:
        calls.append(pair)
        return False

    monkeypatch.setattr(segmentation, "reads_ids_of", compare)
    for _ in range(3):
        assert not reward.for_tokenizer(policys).reads_ids
    assert len(calls) == 1
