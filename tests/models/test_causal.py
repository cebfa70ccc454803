"""A causal LM: log-probs against a slow loop, texts, the shared cache, and errors."""

from __future__ import annotations

import copy
import gc
import pickle
import shutil
import threading
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import WORDS, byte_tokenizer, gpt2, tiny_lm, word_tokenizer
from tokenizers import processors
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Gemma2Config, GPT2Config, LlamaConfig, OPTConfig, PretrainedConfig
from transformers.utils import logging as hf_logging

from lmgym.errors import InvalidArgumentError, LmGymError, UnknownNameError
from lmgym.models.causal import CausalLM, freeze, token_log_probs
from lmgym.models.decoding import make_decoder
from lmgym.models.padding import join, pack
from lmgym.models.sharing import load_causal_lm, resolve_device, temper
from lmgym.models.tables import dirichlet_rows, markov_lm

V = len(WORDS) + 3
PADDED = V + 4  # embeddings without a token
P = 5
T = 20
WIDE = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "vocab_size": PADDED, "max_position_embeddings": 40,
    "bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0, "initializer_range": 0.3,
}  # fmt: skip
CONFIGS: dict[str, PretrainedConfig] = {
    "GPT-2": GPT2Config(vocab_size=PADDED, n_embd=32, n_layer=2, n_head=4, n_positions=40, initializer_range=0.3),
    "Llama": LlamaConfig(**WIDE, num_key_value_heads=2),
    "OPT with a projection": OPTConfig(**WIDE, ffn_dim=48, word_embed_proj_dim=16, init_std=0.3),
    # Caps its logits on the way: not just the head over the trunk.
    "Gemma2": Gemma2Config(
        **WIDE,
        num_key_value_heads=2,
        head_dim=8,
        query_pre_attn_scalar=8,
        sliding_window=7,
        final_logit_softcapping=2.0,
    ),
}


@pytest.fixture(scope="module", params=CONFIGS)
def lm(request: pytest.FixtureRequest) -> CausalLM:
    return tiny_lm(CONFIGS[request.param])


@pytest.fixture(scope="module")
def gpt2_lm() -> CausalLM:
    return tiny_lm(CONFIGS["GPT-2"])


Batch = tuple[Tensor, Tensor, Tensor, Tensor]


def batch(rows: int = 37, seed: int = 0) -> Batch:
    """Ragged prompts and responses with garbage off the masks; more than one chunk, more than one block of the head."""
    rng = torch.Generator().manual_seed(seed)
    prompts = torch.randint(1, P + 1, (rows,), generator=rng)
    responses = torch.randint(1, T + 1, (rows,), generator=rng)
    responses[: rows // 2] = T
    prompt_ids = torch.randint(0, V, (rows, P), generator=rng)
    response_ids = torch.randint(0, V, (rows, T), generator=rng)
    return prompt_ids, torch.arange(P) >= P - prompts[:, None], response_ids, torch.arange(T) < responses[:, None]


def slow_log_probs(lm: CausalLM, data: Batch, vocabulary: int = V) -> Tensor:
    """A full forward a token, on that row's own tokens; normalised over the tokenizer's vocabulary."""
    prompt_ids, prompt_mask, response_ids, response_mask = data
    result = torch.zeros(response_ids.shape)
    for row in range(len(prompt_ids)):
        history = prompt_ids[row][prompt_mask[row]].tolist()
        for t, token in enumerate(response_ids[row][response_mask[row]].tolist()):
            with torch.inference_mode():
                logits = lm.model(input_ids=torch.tensor([history])).logits[0, -1]
            result[row, t] = logits[:vocabulary].double().log_softmax(-1)[token]
            history.append(token)
    return result


# --- log-probs ------------------------------------------------------------------------------------


def test_log_probs_are_those_of_a_slow_loop(lm: CausalLM) -> None:
    few = tuple(x[[0, 18, 20, 30, 36]] for x in batch())
    found = lm.response_log_probs(*few)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, slow_log_probs(lm, few), rtol=0, atol=1e-5)
    assert (found[~few[3]] == 0).all()
    # Normalising over the padded embeddings too would be another distribution.
    assert (found - slow_log_probs(lm, few, vocabulary=PADDED)).abs().max() > 1e-3


def test_log_probs_do_not_feel_batch_mates_padding_or_order(lm: CausalLM) -> None:
    prompt_ids, prompt_mask, response_ids, response_mask = data = batch()
    together = lm.response_log_probs(*data)
    for row in (0, 7, 21, 36):
        alone = lm.response_log_probs(*(x[row : row + 1] for x in data))
        torch.testing.assert_close(alone[0], together[row], rtol=0, atol=1e-5)
    order = torch.randperm(len(prompt_ids), generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(lm.response_log_probs(*(x[order] for x in data)), together[order], rtol=0, atol=1e-5)
    garbage = torch.full_like(prompt_ids, 11)
    wider = (
        torch.cat([garbage, torch.where(prompt_mask, prompt_ids, 7)], 1),
        torch.cat([torch.zeros_like(prompt_mask), prompt_mask], 1),
        torch.cat([torch.where(response_mask, response_ids, 3), garbage], 1),
        torch.cat([response_mask, torch.zeros_like(prompt_mask)], 1),
    )
    found = lm.response_log_probs(*wider)
    torch.testing.assert_close(found[:, :T], together, rtol=0, atol=1e-5)
    assert (found[:, T:] == 0).all()


def test_a_temperature_divides_the_logits_wherever_they_are_read(lm: CausalLM) -> None:
    """Teacher-forced, at chosen places, and while decoding; the weights are shared, and the model itself stays."""
    warm = temper(lm, 0.5)
    data = tuple(x[[0, 20, 36]] for x in batch())
    assert (warm.model, warm.tokenizer) == (lm.model, lm.tokenizer)
    assert temper(lm, 0.5) is warm is not lm
    assert temper(lm, 1.0) is lm
    assert temper(warm, 2.0).temperature == 1.0
    ids, rows, columns, targets = pack(*data)
    with torch.inference_mode():
        cold = lm.response_hidden(ids, rows, columns)[1]
        expected = (cold.double() / 0.5).log_softmax(-1).float()
        found = warm.response_hidden(ids, rows, columns)[1].log_softmax(-1)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    chosen = expected.gather(1, targets[:, None]).squeeze(1)
    torch.testing.assert_close(warm.response_log_probs(*data)[data[3]], chosen, rtol=0, atol=1e-5)
    decoders = [make_decoder(model, 3, P + 4) for model in (warm, lm)]
    for t in range(3):
        for decoder in decoders:
            decoder.begin(torch.arange(3), *data[:2]) if t == 0 else decoder.step(data[2][:, t])
        torch.testing.assert_close(decoders[0].logits, decoders[1].logits / 0.5, rtol=0, atol=1e-5)


def test_what_is_made_of_a_model_is_made_once_and_freed_with_it() -> None:
    made: list[tuple[int, float]] = []

    def make(lm: CausalLM, count: int, price: float) -> object:
        made.append((count, price))
        return nn.Module()

    lm = tiny_lm(CONFIGS["GPT-2"])
    first = lm.remember(make, 1, 0.5)
    assert lm.remember(make, 1, 0.5) is first is not lm.remember(make, 2, 0.5)
    assert made == [(1, 0.5), (2, 0.5)]
    assert tiny_lm(CONFIGS["GPT-2"]).remember(make, 1, 0.5) is not first
    gone = weakref.ref(first)
    del lm, first
    assert gone() is None  # without the collector of cycles


def test_what_fails_is_not_remembered() -> None:
    failures = iter([True, False])

    def make(lm: CausalLM) -> int:
        if next(failures):
            raise LmGymError("not yet")
        return 3

    lm = tiny_lm(CONFIGS["GPT-2"])
    with pytest.raises(LmGymError, match="not yet"):
        lm.remember(make)
    assert lm.remember(make) == 3


def test_a_model_that_has_decoded_can_be_pickled() -> None:
    lm = tiny_lm(CONFIGS["GPT-2"])
    ids = torch.tensor([[3, 4, 5]])
    decoder = make_decoder(lm, 1, 8)
    decoder.begin(torch.tensor([0]), ids, torch.ones_like(ids).bool())
    decoder.step(torch.tensor([6]))
    copied = pickle.loads(pickle.dumps(lm))
    with torch.inference_mode():
        torch.testing.assert_close(copied.model(input_ids=ids).logits, lm.model(input_ids=ids).logits)


def test_whoever_holds_a_tempered_model_shares_the_weights_with_the_next(own_dir: Path) -> None:
    first = temper(load_causal_lm(str(own_dir)), 0.5)
    assert temper(load_causal_lm(str(own_dir)), 0.5) is first
    weights = weakref.ref(first.model)
    del first
    gc.collect()
    assert weights() is None


def test_a_table_at_a_temperature_is_a_table() -> None:
    rows = dirichlet_rows(np.random.default_rng(0), 5, 5, 1.0)
    rows[2] = [0.0, 0.5, 0.5, 0.0, 0.0]  # what is impossible stays so
    warm = temper(markov_lm(rows, ["a", "b", "c", "d"], order=1), 0.5)
    expected = rows**2 / (rows**2).sum(1, keepdims=True)
    np.testing.assert_allclose(warm.model.rows.detach().numpy(), expected, atol=1e-6)
    assert warm.temperature == 1.0
    mixed = markov_lm(rows[:2], ["a", "b", "c", "d"], order=1, mixture=np.full((5, 2), 0.5))
    with pytest.raises(InvalidArgumentError, match="`temperature` must be 1"):
        temper(mixed, 0.5)


def test_a_row_without_a_response_costs_nothing(gpt2_lm: CausalLM) -> None:
    prompt_ids, prompt_mask, response_ids, response_mask = batch(6)
    together = gpt2_lm.response_log_probs(prompt_ids, prompt_mask, response_ids, response_mask)
    response_mask[2] = False
    found = gpt2_lm.response_log_probs(prompt_ids, prompt_mask, response_ids, response_mask)
    assert (found[2] == 0).all()
    others = torch.arange(6) != 2
    torch.testing.assert_close(found[others], together[others], rtol=0, atol=1e-5)


def test_hidden_states_and_logits_at_chosen_positions(lm: CausalLM) -> None:
    rng = torch.Generator().manual_seed(1)
    ids = torch.randint(0, V, (4, 9), generator=rng)
    rows = torch.tensor([0, 3, 1, 3])
    columns = torch.tensor([8, 0, 4, 5])
    with torch.inference_mode():
        hidden, logits = lm.response_hidden(ids, rows, columns)
        for i, (row, column) in enumerate(zip(rows, columns, strict=True)):
            out = lm.model(input_ids=ids[row : row + 1, : column + 1], output_hidden_states=True)
            torch.testing.assert_close(logits[i], out.logits[0, -1, :V], rtol=0, atol=1e-5)
            if hidden.shape[1] == out.hidden_states[-1].shape[-1]:
                torch.testing.assert_close(hidden[i], out.hidden_states[-1][0, -1], rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["GPT-2", "Gemma2"])
def test_the_teacher_forced_pass_is_differentiable(name: str) -> None:
    lm = tiny_lm(CONFIGS[name])
    lm.model.requires_grad_(True)
    _, logits = lm.response_hidden(torch.tensor([[3, 4, 5]]), torch.tensor([0]), torch.tensor([2]))
    logits.log_softmax(-1)[0, 3].backward()
    for parameter_name, parameter in lm.model.named_parameters():
        assert parameter.grad is None or parameter.grad.isfinite().all(), parameter_name
    embeddings = lm.model.get_input_embeddings().weight.grad
    assert embeddings is not None
    assert embeddings[[3, 4, 5]].abs().sum() > 0


def test_token_log_probs_are_log_softmax() -> None:
    logits = torch.randn((3, 4, 9), generator=torch.Generator().manual_seed(0))
    logits[..., 2] = -torch.inf
    tokens = torch.randint(3, 9, (3, 4), generator=torch.Generator().manual_seed(1))
    expected = logits.log_softmax(-1).gather(-1, tokens[..., None]).squeeze(-1)
    torch.testing.assert_close(token_log_probs(logits, tokens), expected)
    assert token_log_probs(logits.bfloat16(), tokens).dtype == torch.float32


def test_pack_joins_prompts_and_responses() -> None:
    prompt_ids, prompt_mask, response_ids, response_mask = data = batch(9)
    ids, rows, columns, targets = pack(*data)
    whole = join(*data)
    assert whole.shape[1] == int((prompt_mask.sum(-1) + response_mask.sum(-1)).max())
    assert torch.equal(ids, whole[:, :-1])  # the last token of the longest predicts nothing
    expected = []
    for row in range(9):
        both = [*prompt_ids[row][prompt_mask[row]].tolist(), *response_ids[row][response_mask[row]].tolist()]
        assert whole[row, : len(both)].tolist() == both
        prompt = int(prompt_mask[row].sum())
        expected += [(row, column, both[column + 1]) for column in range(prompt - 1, len(both) - 1)]
    assert list(zip(rows.tolist(), columns.tolist(), targets.tolist(), strict=True)) == expected


# --- what exists ------------------------------------------------------------------------------------


def test_the_vocabulary_is_the_tokenizers(gpt2_lm: CausalLM) -> None:
    assert gpt2_lm.vocab_size == V
    assert gpt2_lm.legal_logits(torch.zeros(2, PADDED)).shape == (2, V)
    assert [gpt2_lm.is_legal(i) for i in (-1, 0, V - 1, V, PADDED - 1)] == [False, True, True, False, False]
    assert gpt2_lm.eos_token_ids == {1}
    assert gpt2_lm.pad_token_id == 0
    assert gpt2_lm.max_positions == 40


def test_holes_in_the_vocabulary_are_impossible() -> None:
    tokenizer = word_tokenizer()
    tokenizer.get_vocab = lambda: {w: i for w, i in word_tokenizer().get_vocab().items() if i not in (4, 9)}
    model = freeze(gpt2(PADDED))
    lm = CausalLM(model, tokenizer)
    assert [lm.is_legal(i) for i in (4, 9, 5)] == [False, False, True]
    raw = torch.randn(2, PADDED)
    logits = lm.legal_logits(raw)
    assert (logits[:, [4, 9]] == -torch.inf).all()
    assert raw.isfinite().all()
    data = (torch.tensor([[3]]), torch.ones(1, 1).bool(), torch.tensor([[5, 6]]), torch.ones(1, 2).bool())
    for t, history in enumerate([[3], [3, 5]]):
        slow = model(input_ids=torch.tensor([history])).logits[0, -1, :V]
        slow[[4, 9]] = -torch.inf
        assert lm.response_log_probs(*data)[0, t] == pytest.approx(slow.log_softmax(-1)[5 + t].item(), abs=1e-5)


def test_a_tokenizer_larger_than_the_model_is_refused() -> None:
    with pytest.raises(
        InvalidArgumentError, match=f"`model` embeds {V - 2} tokens but its tokenizer has ids up to {V - 1}"
    ):
        CausalLM(gpt2(V - 2), word_tokenizer())


def test_every_end_token_of_the_generation_config_ends() -> None:
    model = gpt2(PADDED)
    model.generation_config.eos_token_id = [1, 7, PADDED - 1]
    lm = CausalLM(model, word_tokenizer())
    assert lm.eos_token_ids == {1, 7}  # the last is no token


def test_a_tokenizer_without_a_pad_token_has_something_to_fill_with() -> None:
    lm = CausalLM(gpt2(257), byte_tokenizer())
    assert lm.is_legal(lm.pad_token_id)


def test_a_copy_is_the_same_object(gpt2_lm: CausalLM) -> None:
    assert copy.deepcopy({"model": gpt2_lm})["model"] is gpt2_lm


# --- text ------------------------------------------------------------------------------------


def test_a_prompt_is_encoded_without_an_end_token() -> None:
    tokenizer = word_tokenizer()
    lm = CausalLM(gpt2(V), tokenizer)
    plain = lm.encode("the film")
    assert plain == tokenizer("the film")["input_ids"]
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
        single="<unk> $A <eos>", special_tokens=[("<unk>", 2), ("<eos>", 1)]
    )
    assert lm.encode("the film") == [2, *plain]  # its own start token, and no end
    assert lm.encode_all(("the film", "a")) == [[2, *plain], [2, *lm.encode("a")[1:]]]
    assert lm.encode_all(("the film", "a")) is lm.encode_all(("the film", "a"))


@pytest.mark.parametrize("make", [word_tokenizer, byte_tokenizer])
def test_prompt_and_completion_are_the_whole(make: Any) -> None:
    tokenizer = make()
    size = len(tokenizer)
    lm = CausalLM(gpt2(size, n_positions=64), tokenizer)
    prompts = ["the film was", "a book , a meal", "it", "we liked it .", "not"]
    rng = torch.Generator().manual_seed(0)
    ids = [lm.encode(p) for p in prompts for _ in range(8)]
    texts = [lm.decode_prompt(i) for i in ids]
    responses = [
        torch.randint(0, size, (int(torch.randint(1, 9, (1,), generator=rng)),), generator=rng).tolist() for _ in ids
    ]
    responses[0] = []
    responses[1] = [*lm.encode(" and good"), tokenizer.eos_token_id]
    completions = lm.completions(ids, responses)
    for prompt, completion, p, r in zip(texts, completions, ids, responses, strict=True):
        assert prompt + completion == tokenizer.decode([*p, *r], skip_special_tokens=True)
    assert completions[0] == ""
    assert completions[1] == " and good"  # with its blank, without the end token
    assert lm.completions([], []) == []


def test_a_character_may_be_cut_in_two_by_the_end_of_the_prompt() -> None:
    tokenizer = byte_tokenizer()
    lm = CausalLM(gpt2(len(tokenizer)), tokenizer)
    whole = tokenizer("café")["input_ids"]
    assert not "café".startswith(tokenizer.decode(whole[:-1]))  # half of the last letter is no letter
    assert lm.decode_prompt(whole[:-1]) == "caf"
    assert lm.completions([whole[:-1]], [whole[-1:]]) == ["é"]
    assert lm.decode_prompt(tokenizer("\ufffd")["input_ids"]) == "\ufffd"  # the letter itself is whole


# --- loading ------------------------------------------------------------------------------------


@pytest.fixture
def own_dir(model_dir: str, tmp_path: Path) -> Path:
    """A copy of the tiny model that no other test has loaded."""
    return Path(shutil.copytree(model_dir, tmp_path / "model"))


def test_two_loads_are_one_object_freed_when_dropped(own_dir: Path) -> None:
    first = load_causal_lm(str(own_dir), "cpu")
    second = load_causal_lm(str(own_dir) + "/", "cpu")
    assert first is second
    assert load_causal_lm(str(own_dir), "cpu", "bfloat16") is not first
    link = own_dir.parent / "link"
    link.symlink_to(own_dir)
    assert load_causal_lm(str(link), "cpu") is first
    gone = weakref.ref(first)
    model = weakref.ref(first.model)
    del first, second
    gc.collect()
    assert gone() is None
    assert model() is None


def test_threads_share_one_copy(own_dir: Path) -> None:
    found: list[CausalLM] = []
    threads = [threading.Thread(target=lambda: found.append(load_causal_lm(str(own_dir), "cpu"))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert len({id(lm) for lm in found}) == 1


def test_what_is_loaded_is_frozen_and_in_eval_mode(own_dir: Path) -> None:
    shown = hf_logging.is_progress_bar_enabled()
    lm = load_causal_lm(str(own_dir), "cpu", "bfloat16")
    assert not lm.model.training
    assert not any(p.requires_grad for p in lm.model.parameters())
    assert lm.dtype == torch.bfloat16
    assert lm.device == torch.device("cpu")
    assert hf_logging.is_progress_bar_enabled() == shown
    expected = AutoModelForCausalLM.from_pretrained(own_dir).state_dict()
    for name, tensor in lm.model.state_dict().items():
        assert torch.equal(tensor, expected[name].bfloat16()), name


def test_the_device_is_the_gpu_where_there_is_one() -> None:
    assert resolve_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert resolve_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "/no/such/directory",
            "`model` must be a local directory or a hub name, and there is no '/no/such/directory'.",
        ),
        ("./nothing", "there is no './nothing'."),
        ("", "there is no ''."),
        ("a/b/c", "there is no 'a/b/c'."),
        ("with a blank", "there is no 'with a blank'."),
        (7, "`model` must be a local directory or a hub name, got 7."),
        (None, "`model` must be a local directory or a hub name, got None."),
    ],
)
def test_names_that_cannot_be(name: Any, message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        load_causal_lm(name)


def test_a_directory_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgumentError, match=r"must be a directory with a config.json .*, and .* has none."):
        load_causal_lm(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(LmGymError, match="could not be loaded with AutoModelForCausalLM") as caught:
        load_causal_lm(str(tmp_path))
    assert caught.value.__cause__ is not None


def test_devices_and_dtypes_that_cannot_be(model_dir: str) -> None:
    with pytest.raises(
        InvalidArgumentError, match="`device` must be 'auto' or a torch device such as 'cpu', got 'gpu:0'."
    ):
        load_causal_lm(model_dir, "gpu:0")
    with pytest.raises(UnknownNameError, match=r"`dtype` must be one of .*, got 'float23'. Did you mean 'float32'\?"):
        load_causal_lm(model_dir, "cpu", "float23")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_gpu_that_is_not_there(model_dir: str) -> None:
    with pytest.raises(
        InvalidArgumentError, match="`device` must be one this machine has, got 'cuda' and torch sees no GPU."
    ):
        load_causal_lm(model_dir, "cuda")
