"""The transition table as a language model: its probabilities, its caches, and every place that takes a model."""

from __future__ import annotations

import itertools
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import WORDS, table_reward, word_tokenizer
from gymnasium.utils.env_checker import check_env, data_equivalence
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedTokenizerFast

from lmgym.errors import InvalidArgumentError
from lmgym.models import texts
from lmgym.models.caches import CACHE_FIELD, cache_keyword
from lmgym.models.causal import CausalLM, has_separate_head
from lmgym.models.decoding import PlainDecoder, TableDecoder, make_decoder
from lmgym.models.markov import MarkovConfig, MarkovLM
from lmgym.models.policy import CausalPolicy
from lmgym.models.sharing import load_causal_lm
from lmgym.models.tables import dirichlet_rows, fit_markov, markov_lm, symbol_tokenizer
from lmgym.rollout import collect, collect_steps
from lmgym.tasks import Task

V = 5
RANK = 3
SYMBOLS = ["a", "b", "c", "d"]
SHAPES = list(itertools.product((0, 1, 2), (None, RANK)))
every_shape = pytest.mark.parametrize(("order", "rank"), SHAPES)


def tables(order: int, rank: int | None, seed: int = 0) -> tuple[np.ndarray, np.ndarray | None]:
    rng = np.random.default_rng(seed)
    mixture = None if rank is None else dirichlet_rows(rng, V**order, rank, 0.5)
    return dirichlet_rows(rng, rank or V**order, V, 0.7), mixture


def make(order: int, rank: int | None, seed: int = 0) -> CausalLM:
    rows, mixture = tables(order, rank, seed)
    return markov_lm(rows, SYMBOLS, mixture=mixture, order=order)


def distribution(order: int, rank: int | None, history: list[int], eos: int = 0, seed: int = 0) -> np.ndarray:
    """pi(. | history) from the definition: (V,)."""
    rows, mixture = tables(order, rank, seed)
    before, last = ([eos, eos, *history])[-2:]
    context = [0, last, before * V + last][order]
    return rows[context] if mixture is None else sum(mixture[context, k] * rows[k] for k in range(RANK))


def random_ids(*shape: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(0, V, shape))


def left_padded(sequences: list[list[int]], pad: int = 0) -> tuple[Tensor, Tensor]:
    width = max(map(len, sequences))
    ids = torch.tensor([[pad] * (width - len(s)) + s for s in sequences])
    return ids, torch.tensor([[False] * (width - len(s)) + [True] * len(s) for s in sequences])


# --- the distribution --------------------------------------------------------------------------------------------


@every_shape
def test_logits_are_the_log_probs_of_the_table(order: int, rank: int | None) -> None:
    ids = random_ids(3, 9)
    with torch.no_grad():
        out = make(order, rank).model(input_ids=ids, output_hidden_states=True)
    expected = [[distribution(order, rank, row[: t + 1]) for t in range(9)] for row in ids.tolist()]
    np.testing.assert_allclose(out.logits.exp().numpy(), expected, rtol=1e-5)
    assert out.hidden_states[-1].shape == (3, 9, rank or V)


@every_shape
def test_probs_are_those_of_contexts_by_index(order: int, rank: int | None) -> None:
    model = make(order, rank).model
    contexts = list(itertools.product(range(V), repeat=order))
    probs = model.probs(torch.arange(len(contexts)))
    assert probs.dtype == torch.float32
    np.testing.assert_allclose(probs.numpy(), [distribution(order, rank, list(c)) for c in contexts], rtol=1e-5)
    assert model.rows.shape == (rank or V**order, V)
    assert model.mixture is None if rank is None else model.mixture.shape == (V**order, rank)


@pytest.mark.parametrize("eos", [0, 3])
def test_before_the_start_there_are_ends(eos: int) -> None:
    rows, _ = tables(2, None)
    model = MarkovLM.from_probs(rows, order=2, eos_token_id=eos)
    for token in range(V):
        first = model(input_ids=torch.tensor([[token]])).logits[0, 0].exp()
        np.testing.assert_allclose(first.detach().numpy(), rows[eos * V + token], rtol=1e-5)
        after_the_end = model(input_ids=torch.tensor([[1, eos, token]])).logits[0, -1].exp()
        torch.testing.assert_close(first, after_the_end)


@every_shape
def test_left_padding_changes_nothing(order: int, rank: int | None) -> None:
    model = make(order, rank).model
    sequences = [[1, 2, 3, 4, 2], [3], [4, 1]]
    for pad in (0, 4):
        ids, mask = left_padded(sequences, pad)
        logits = model(input_ids=ids, attention_mask=mask.long()).logits
        for row, sequence in zip(logits, sequences, strict=True):
            alone = model(input_ids=torch.tensor([sequence])).logits[0]
            torch.testing.assert_close(row[-len(sequence) :], alone)


def test_a_probability_of_zero_has_a_finite_log_and_gradient() -> None:
    model = MarkovLM.from_probs(np.array([[1.0, 0.0, 0.0]]), order=0)
    logits = model(input_ids=torch.tensor([[0]])).logits
    logits.sum().backward()
    assert logits.isfinite().all()
    assert logits.min() < -25
    assert model.rows.grad is not None
    assert model.rows.grad.isfinite().all()


def test_logits_of_the_last_columns_alone() -> None:
    model = make(2, RANK).model
    ids = random_ids(2, 6)
    whole = model(input_ids=ids).logits
    for kept, columns in ((2, [4, 5]), (torch.tensor([0, 3]), [0, 3])):
        torch.testing.assert_close(model(input_ids=ids, logits_to_keep=kept).logits, whole[:, columns])


def test_making_a_model_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    make(2, RANK)
    assert torch.equal(torch.get_rng_state(), before)


# --- the cache ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["past_key_values", "cache"])
def test_a_cache_goes_by_its_old_name_and_by_its_new_one(name: str) -> None:
    """transformers 5.24 calls it `cache`, and warns of `past_key_values`."""
    model = make(1, None).model
    ids = random_ids(2, 5)
    cache = DynamicCache()
    model(input_ids=ids[:, :3], use_cache=True, **{name: cache})
    out = model(input_ids=ids[:, 3:], use_cache=True, **{name: cache})
    torch.testing.assert_close(out.logits, model(input_ids=ids).logits[:, 3:])
    assert out[CACHE_FIELD] is cache
    assert cache.get_seq_length() == 5


def test_a_model_is_given_its_cache_by_the_name_that_it_knows() -> None:
    assert cache_keyword(SimpleNamespace(forward=lambda input_ids, cache=None: None)) == "cache"
    assert cache_keyword(SimpleNamespace(forward=lambda input_ids, past_key_values=None: None)) == "past_key_values"


@every_shape
@pytest.mark.parametrize("padded", [False, True])
def test_a_cache_changes_nothing(order: int, rank: int | None, padded: bool) -> None:
    model = make(order, rank).model
    ids = random_ids(3, 8)
    mask = torch.ones_like(ids)
    if padded:
        mask[1, :2] = 0
        mask[2, :4] = 0
    whole = model(input_ids=ids, attention_mask=mask).logits
    cache = None
    parts = []
    start = 0
    for end in (2, 3, 4, 7, 8):
        seen = {"attention_mask": mask[:, :end]} if padded else {}
        out = model(input_ids=ids[:, start:end], past_key_values=cache, use_cache=True, **seen)
        cache = out[CACHE_FIELD]
        start = end
        parts.append(out.logits)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole)
    assert isinstance(cache, DynamicCache)
    assert cache.get_seq_length() == 8


@every_shape
def test_generate_is_the_same_with_and_without_a_cache(order: int, rank: int | None) -> None:
    model = make(order, rank).model
    sequences = [[1, 2, 3], [4], [2, 2]]
    ids, mask = left_padded(sequences)
    rest: dict[str, Any] = {"max_new_tokens": 7, "pad_token_id": 0}
    for how in ({"do_sample": False}, {"do_sample": False, "num_beams": 3}):
        cached = model.generate(ids, attention_mask=mask.long(), **how, **rest)
        assert torch.equal(cached, model.generate(ids, attention_mask=mask.long(), use_cache=False, **how, **rest))
    batch = model.generate(ids, attention_mask=mask.long(), do_sample=False, **rest)
    for sequence, row in zip(sequences, batch, strict=True):
        expected = list(sequence)
        while len(expected) < len(sequence) + 7 and (len(expected) == len(sequence) or expected[-1]):
            expected.append(int(distribution(order, rank, expected).argmax()))
        alone = model.generate(torch.tensor([sequence]), do_sample=False, **rest)[0]
        assert alone.tolist() == expected
        assert row[3 - len(sequence) :].tolist()[: len(expected)] == expected


# --- decoding ----------------------------------------------------------------------------------------------------


def holed_lm(order: int, rank: int | None) -> CausalLM:
    """Token 2 is a hole, and the last token of the model is beyond the tokenizer."""
    backend = Tokenizer(models.WordLevel({"<eos>": 0, "a": 1, "c": 3}, unk_token=""))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")
    return CausalLM(make(order, rank).model, tokenizer)


@every_shape
@pytest.mark.parametrize("make_lm", [make, holed_lm])
def test_the_table_decoder_is_the_plain_one(make_lm: Any, order: int, rank: int | None) -> None:
    lm = make_lm(order, rank)
    rng = np.random.default_rng(1)
    legal = [i for i in range(lm.vocab_size) if lm.is_legal(i)]
    table = make_decoder(lm, 4, 30, keep_hidden=True)
    plain = PlainDecoder(lm, 4, 30)
    assert isinstance(table, TableDecoder)
    slots = 4

    def begin(which: list[int]) -> None:
        sequences = [rng.choice(legal, size=rng.integers(1, 5)).tolist() for _ in which]
        for decoder in (table, plain):
            decoder.begin(torch.tensor(which), *left_padded(sequences, pad=1))

    begin([2, 0, 3, 1])
    for t in range(20):
        torch.testing.assert_close(table.logits, plain.logits)
        torch.testing.assert_close(table.hidden, plain.hidden)
        tokens = torch.from_numpy(rng.choice(legal, size=slots))
        expected = plain.logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0]
        torch.testing.assert_close(table.log_probs(tokens), expected)
        for decoder in (table, plain):
            decoder.step(tokens)
        if t == 6:
            begin([3, 1])
        if t == 12:
            slots = 3
            for decoder in (table, plain):
                decoder.keep(torch.tensor([3, 0, 1]))
        if t == 15:
            begin([0])


def test_a_decoder_without_hidden_states_keeps_none() -> None:
    assert make_decoder(make(1, None), 2, 5).hidden is None


def test_a_decoder_follows_the_training_of_its_model() -> None:
    lm = make(1, RANK)
    decoder = make_decoder(lm, 1, 5)
    assert isinstance(decoder, TableDecoder)
    decoder.begin(torch.tensor([0]), torch.tensor([[2]]), torch.tensor([[True]]))
    with torch.no_grad():
        lm.model.rows.copy_(lm.model.rows.roll(1, 1))
    now = lm.model(input_ids=torch.tensor([[2]])).logits[0]
    torch.testing.assert_close(decoder.logits, now)
    torch.testing.assert_close(decoder.log_probs(torch.tensor([3])), now[:, 3])


@every_shape
def test_the_trunk_and_the_head_are_told_apart(order: int, rank: int | None) -> None:
    lm = make(order, rank)
    ids = random_ids(2, 6)
    rows = torch.tensor([0, 1, 1])
    columns = torch.tensor([5, 0, 3])
    hidden, logits = lm.response_hidden(ids, rows, columns)
    assert lm.remember(has_separate_head)
    assert hidden.shape == (3, rank or V)
    torch.testing.assert_close(logits, lm.model(input_ids=ids).logits[rows, columns])
    assert lm.max_positions is None


# --- files -------------------------------------------------------------------------------------------------------


@every_shape
def test_what_was_saved_is_what_loads(order: int, rank: int | None, tmp_path: Path) -> None:
    lm = make(order, rank)
    ids = random_ids(2, 6)
    lm.model.save_pretrained(tmp_path)
    lm.tokenizer.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").is_file()
    loaded = load_causal_lm(str(tmp_path), "cpu")
    for model in (loaded.model, AutoModelForCausalLM.from_pretrained(tmp_path), MarkovLM.from_pretrained(tmp_path)):
        assert type(model) is MarkovLM
        assert isinstance(model.config, MarkovConfig)
        assert (model.config.order, model.config.rank, model.config.eos_token_id) == (order, rank, 0)
        assert torch.equal(model(input_ids=ids).logits, lm.model(input_ids=ids).logits)
    assert loaded.eos_token_ids == {0}
    assert loaded.vocab_size == V
    assert not loaded.holes
    assert loaded.encode("a d") == [1, 4]
    assert not any(p.requires_grad for p in loaded.model.parameters())


# --- making one --------------------------------------------------------------------------------------------------

GOOD = np.full((V, V), 1 / V)


@pytest.mark.parametrize(
    ("rows", "mixture", "changes", "message"),
    [
        (GOOD * 2, None, {}, "`rows` must hold distributions"),
        (np.where(np.eye(V, dtype=bool), -0.2, 0.3), None, {}, "`rows` must hold distributions"),
        (np.full((V, V), np.nan), None, {}, "`rows` must hold distributions"),
        (GOOD, GOOD * 0.9, {}, "`mixture` must hold distributions"),
        (GOOD[0], None, {}, "`rows` must be a table of two dimensions"),
        (GOOD[:3], None, {}, "`rows` must have shape (5, 5) at order 1"),
        (GOOD, None, {"order": 2}, "`rows` must have shape (25, 5) at order 2"),
        (GOOD[:3], GOOD, {}, "`mixture` must have shape (5, 3)"),
        (GOOD, None, {"order": 3}, "`order` must be an int >= 0 and <= 2"),
        (GOOD, None, {"eos_token_id": V}, "`eos_token_id` must be an int >= 0 and <= 4"),
    ],
)
def test_what_is_no_distribution_is_refused(
    rows: np.ndarray, mixture: np.ndarray | None, changes: dict[str, int], message: str
) -> None:
    with pytest.raises(InvalidArgumentError) as raised:
        MarkovLM.from_probs(rows, mixture, **{"order": 1, **changes})
    assert message in str(raised.value)


def test_tables_may_be_tensors_and_may_be_read_only() -> None:
    rows, mixture = tables(1, RANK)
    assert mixture is not None
    expected = MarkovLM.from_probs(rows, mixture, order=1)
    rows.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for given in ((rows, mixture), (torch.tensor(rows), torch.tensor(mixture))):
            model = MarkovLM.from_probs(*given, order=1)
            assert torch.equal(model.rows, expected.rows)
            assert torch.equal(model.mixture, expected.mixture)


def test_a_frozen_model_with_its_tokenizer() -> None:
    lm = make(1, None)
    assert not any(p.requires_grad for p in lm.model.parameters())
    assert not lm.model.training
    assert lm.eos_token_ids == {0}
    assert lm.pad_token_id == 0
    with pytest.raises(InvalidArgumentError, match="do not belong together"):
        markov_lm(GOOD, [*SYMBOLS, "e"])


@pytest.mark.parametrize("concentration", [0.01, 1.0, 50.0])
def test_drawn_rows_are_distributions_above_the_floor(concentration: float) -> None:
    rows = dirichlet_rows(np.random.default_rng(3), 40, 7, concentration)
    assert rows.shape == (40, 7)
    assert rows.dtype == np.float64
    np.testing.assert_allclose(rows.sum(1), 1)
    assert rows.min() >= 1e-6
    np.testing.assert_array_equal(rows, dirichlet_rows(np.random.default_rng(3), 40, 7, concentration))


def test_the_concentration_is_that_of_the_dirichlet_distribution() -> None:
    rng = np.random.default_rng(0)
    size = 4
    concentration = 2.0
    rows = dirichlet_rows(rng, 20_000, size, concentration)
    variance = (1 / size) * (1 - 1 / size) / (size * concentration + 1)
    np.testing.assert_allclose(rows.var(0), variance, rtol=0.05)
    np.testing.assert_allclose(rows.mean(0), 1 / size, rtol=0.02)


# --- fitting -----------------------------------------------------------------------------------------------------


def test_counts_by_hand() -> None:
    corpus = [[1, 2, 1, 0], [2], []]
    # EOS before the start: 0 -> 1 and 0 -> 2; then 1 -> 2, 2 -> 1, 1 -> 0.
    counts = np.array([[0, 1, 1], [1, 0, 1], [0, 1, 0]]) + 0.5
    np.testing.assert_allclose(fit_markov(corpus, 3, 1, smoothing=0.5), counts / counts.sum(1, keepdims=True))
    np.testing.assert_allclose(fit_markov(corpus, 3, 0, smoothing=0.5), [np.array([1.5, 2.5, 2.5]) / 6.5])
    second = fit_markov(corpus, 3, 2, smoothing=0.5, eos_token_id=2)
    counts = np.full((9, 3), 0.5)
    for before, last, token in [(2, 2, 1), (2, 1, 2), (1, 2, 1), (2, 1, 0), (2, 2, 2)]:
        counts[3 * before + last, token] += 1
    np.testing.assert_allclose(second, counts / counts.sum(1, keepdims=True))


@pytest.mark.parametrize("order", [0, 1, 2])
def test_the_table_that_made_a_corpus_is_found_again(order: int) -> None:
    rng = np.random.default_rng(5)
    rows = dirichlet_rows(rng, 3**order, 3, 2.0)
    errors = []
    for size in (300, 30_000):
        sequence = [0, 0]
        for u in rng.random(size):
            context = [0, sequence[-1], sequence[-2] * 3 + sequence[-1]][order]
            sequence.append(min(int(np.searchsorted(rows[context].cumsum(), u)), 2))
        errors.append(np.abs(fit_markov([sequence[2:]], 3, order) - rows).max())
    assert errors[1] < min(errors[0], 0.03)


def test_ids_beyond_the_vocabulary_are_refused() -> None:
    for sequence in ([0, 3], [-1]):
        with pytest.raises(InvalidArgumentError, match="`sequences` must hold ids from 0 to 2"):
            fit_markov([sequence], 3, 1)
    with pytest.raises(InvalidArgumentError, match="`smoothing`"):
        fit_markov([[1]], 3, 1, smoothing=0)


# --- symbols -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("symbols", "chars"), [(["ab", "c", "<x>"], False), (["a", " ", "é", "\n"], True)])
def test_texts_and_ids_of_symbols(symbols: list[str], chars: bool, tmp_path: Path) -> None:
    tokenizer = symbol_tokenizer(symbols, chars=chars)
    tokenizer.save_pretrained(tmp_path)
    for one in (tokenizer, PreTrainedTokenizerFast.from_pretrained(tmp_path)):
        assert one.get_vocab() == {"<eos>": 0} | {s: i for i, s in enumerate(symbols, start=1)}
        assert one.eos_token_id == 0
        assert one.pad_token_id is None
        assert one.unk_token_id is None
        for ids in ([1], [3, 1, 1, 2], [2, 3, 2]):
            text = ("" if chars else " ").join(symbols[i - 1] for i in ids)
            assert one(text)["input_ids"] == ids
            assert one.decode([*ids, 0], skip_special_tokens=True) == text


@pytest.mark.parametrize(
    ("symbols", "chars"), [(["a b"], False), ([""], False), (["a", "a"], False), (["<eos>"], False), (["ab"], True)]
)
def test_symbols_that_cannot_be_told_apart_are_refused(symbols: list[str], chars: bool) -> None:
    with pytest.raises(InvalidArgumentError, match="`symbols`"):
        symbol_tokenizer(symbols, chars=chars)


def test_a_text_the_tokenizer_cannot_read_is_named() -> None:
    lm = make(1, None)
    with pytest.raises(InvalidArgumentError, match="'a zz'"):
        lm.encode("a zz")
    with pytest.raises(InvalidArgumentError, match="'b zz'"):
        lm.encode_all(("a", "b zz", "yy"))
    assert lm.encode_all(("a", "b c")) == [[1], [2, 3]]
    with pytest.raises(InvalidArgumentError, match="'q'"):
        gym.make("lmgym/RLHF-v0", task=task(1, None), prompts=["q"])


def test_many_short_texts_decode_as_in_one_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    lm = CausalLM(MarkovLM.from_probs(np.full((1, len(WORDS) + 3), 1 / (len(WORDS) + 3)), order=0), word_tokenizer())
    rows = [rng.integers(0, lm.vocab_size, rng.integers(0, 9)).tolist() for _ in range(30)]
    few = lm.completions([[4]] * 30, rows)
    monkeypatch.setattr(texts, "_MAX_IDS_FOR_ONE_THREAD", 0)
    assert few == lm.completions([[4]] * 30, rows)


# --- in the environments -----------------------------------------------------------------------------------------

PROMPTS = ["a", "b c", "d d a", "c"]


def task(order: int, rank: int | None, **changes: Any) -> Task:
    fields: dict[str, Any] = {"kl_coef": 0.3, "max_new_tokens": 6, "gamma": 0.9, "prompts": {"train": PROMPTS}}
    return Task(name="table", model=make(order, rank), reward=table_reward, **{**fields, **changes})


def envs_of(game: Task, num_envs: int = 4, **changes: Any) -> Any:
    return gym.make_vec("lmgym/RLHF-v0", num_envs=num_envs, task=game, **{"autoreset_mode": "SameStep", **changes})


def test_the_checker_finds_nothing_to_say() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(gym.make("lmgym/RLHF-v0", task=task(2, RANK)).unwrapped, skip_render_check=True)


@every_shape
def test_the_reference_of_an_env_is_the_table(order: int, rank: int | None) -> None:
    env = gym.make("lmgym/RLHF-v0", task=task(order, rank))
    rng = np.random.default_rng(0)
    for episode in range(6):
        observation, _ = env.reset(seed=episode)
        history = observation["input_ids"][observation["attention_mask"] == 1].tolist()
        done = False
        if episode == 5:  # after a prefix of a response
            observation, info = env.reset(options={"prompt_index": 1, "response_ids": [4, 3]})
            history = [2, 3, 4, 3]
        discounted = 0.0
        discount = 0.9 ** (2 if episode == 5 else 0)
        while not done:
            token = int(rng.integers(0, V))
            _, reward, terminated, truncated, info = env.step(token)
            assert info["ref_log_prob"] == pytest.approx(np.log(distribution(order, rank, history)[token]), rel=1e-5)
            done = terminated or truncated
            assert reward == pytest.approx(0.3 * info["ref_log_prob"] + (info["score"] if done else 0.0))
            history.append(token)
            discounted += discount * reward
            discount *= 0.9
        assert info["discounted_return"] == pytest.approx(discounted)


@every_shape
def test_the_vector_env_is_many_single_ones(order: int, rank: int | None) -> None:
    game = task(order, rank)
    rng = np.random.default_rng(2)
    native = envs_of(game)
    singles = SyncVectorEnv([lambda: gym.make("lmgym/RLHF-v0", task=game)] * 4, autoreset_mode=AutoresetMode.SAME_STEP)
    assert data_equivalence(native.reset(seed=7)[0], singles.reset(seed=7)[0])
    for _ in range(30):
        actions = rng.integers(0, V, 4)
        ours = native.step(actions)
        theirs = singles.step(actions)
        assert data_equivalence(ours[0], theirs[0])
        np.testing.assert_allclose(ours[1], theirs[1], rtol=1e-5, atol=1e-7)
        np.testing.assert_array_equal(ours[2], theirs[2])


@every_shape
@pytest.mark.parametrize("dense_kl", [True, False])
def test_whole_episodes_are_what_stepping_gives(order: int, rank: int | None, dense_kl: bool) -> None:
    game = task(order, rank, dense_kl=dense_kl)
    head = torch.nn.Linear(rank or V, 1)
    torch.nn.init.normal_(head.weight, generator=torch.Generator().manual_seed(0))
    policy = CausalPolicy(make(order, rank, seed=9), head)
    whole, steps = (
        run(envs_of(game, prompt_order="sequential"), policy, 4, generator=torch.Generator().manual_seed(1))
        for run in (collect, collect_steps)
    )
    assert torch.equal(whole.response_ids[whole.response_mask], steps.response_ids[steps.response_mask])
    assert torch.equal(whole.response_mask, steps.response_mask)
    assert torch.equal(whole.terminated, steps.terminated)
    for name in ("log_probs", "ref_log_probs", "scores", "values"):
        if dense_kl or name != "ref_log_probs":
            torch.testing.assert_close(getattr(whole, name), getattr(steps, name), msg=name)
    for i in range(4):
        history = whole.prompt_ids[i][whole.prompt_mask[i]].tolist()
        for t in range(int(whole.response_mask[i].sum())):
            token = int(whole.response_ids[i, t])
            for seed, log_probs in ((9, whole.log_probs), (0, whole.ref_log_probs)):
                expected = np.log(distribution(order, rank, history, seed=seed)[token])
                assert log_probs[i, t].item() == pytest.approx(expected, rel=1e-4, abs=1e-5)
            history.append(token)


def test_gradients_reach_both_factors() -> None:
    model = make(1, RANK).model.requires_grad_(True)
    model(input_ids=random_ids(2, 5)).logits[..., 1].sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in model.parameters())
