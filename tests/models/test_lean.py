"""Lean forwards against the models' own, for every family and what a config can change in it."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from conftest import tiny_lm
from test_decoding import CAPACITY, SLOTS, config, drive_with_restarts, left_padded
from torch import Tensor, nn

from lmgym.models import causal
from lmgym.models.causal import CausalLM
from lmgym.models.lean import parts, products, scoring
from lmgym.models.lean.find import find_lean
from lmgym.models.lean.products import affine, affine_gelu
from lmgym.models.lean.scoring import score_by_columns
from lmgym.models.lean.transformer import Transformer
from lmgym.models.ring import RingDecoder, find_distinct
from lmgym.models.ring_step import LeanStep, RingStep, make_step

LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 2.0}
YARN = {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4, "original_max_position_embeddings": 20}
KNOWN: list[tuple[str, dict[str, Any]]] = [
    ("GPT-2", {}),
    ("GPT-2", {"tie_word_embeddings": False, "activation_function": "gelu"}),
    ("GPT-2", {"activation_function": "relu", "n_inner": 40}),
    ("GPT-2", {"scale_attn_by_inverse_layer_idx": True}),
    ("GPT-2", {"scale_attn_weights": False}),
    ("GPT-NeoX", {"rotary_pct": 0.5}),
    ("GPT-NeoX", {"use_parallel_residual": False, "tie_word_embeddings": True}),
    ("GPT-NeoX", {"attention_bias": False, "hidden_act": "gelu_new"}),
    ("Llama", {}),
    ("Llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    ("Llama", {"num_key_value_heads": 4, "hidden_act": "gelu"}),
    ("Llama", {"rope_parameters": {**LLAMA3, "rope_theta": 1e4, "original_max_position_embeddings": 20}}),
    ("Llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}),
    ("Llama", {"rope_parameters": YARN}),
    ("Mistral", {"num_key_value_heads": 1, "sliding_window": None}),
    ("Qwen2", {}),
    ("Qwen3", {"head_dim": 16}),
]
UNKNOWN: list[tuple[str, dict[str, Any]]] = [
    ("GPT-2", {"add_cross_attention": True}),
    ("Llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}),
    ("OPT", {}),
    ("Gemma2", {}),
]


def drawn(name: str, changes: dict[str, Any]) -> CausalLM:
    """A tiny model none of whose weights, norms and biases included, is 0 or 1."""
    lm = tiny_lm(config(name, **changes))
    generator = torch.Generator().manual_seed(0)
    for parameter in lm.model.parameters():
        parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return lm


def lean_of(lm: CausalLM) -> Transformer:
    lean = lm.remember(find_lean)
    assert lean is not None
    return lean


def logits_of(lm: CausalLM, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    lean = lean_of(lm)
    with torch.inference_mode():
        hidden, _ = lean.read(ids, mask)
        return lean.logits(hidden.flatten(0, 1), lm.vocab_size).view(*ids.shape, -1)


def assert_alike(found: Tensor, expected: Tensor, atol: float = 1e-5) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=atol * max(1.0, float(expected.abs().max())))


@pytest.fixture
def gpt2_lm() -> CausalLM:
    return drawn("GPT-2", {})


IDS = torch.tensor([[3, 9, 4, 11, 2, 7, 5, 8], [6, 1, 1, 10, 3, 2, 12, 0]])


@pytest.mark.parametrize(("name", "changes"), KNOWN, ids=str)
def test_it_is_the_model_itself(name: str, changes: dict[str, Any]) -> None:
    """Whole sequences, padded on either side, and steps around the ring."""
    lm = drawn(name, changes)
    with torch.inference_mode():
        expected = lm.model(input_ids=IDS).logits
        assert_alike(logits_of(lm, IDS), expected)
        ids, mask = left_padded([IDS[0, :3].tolist(), IDS[1].tolist()])
        padded = logits_of(lm, ids, mask)
    assert_alike(padded[0, 5:], expected[0, :3])
    assert_alike(padded[1], expected[1])
    decoder = RingDecoder(lm, SLOTS, CAPACITY)
    assert isinstance(decoder._step, LeanStep)
    drive_with_restarts(lm, decoder, steps=40)


@pytest.mark.parametrize(("name", "changes"), UNKNOWN, ids=str)
def test_another_model_runs_as_it_is(name: str, changes: dict[str, Any]) -> None:
    lm = tiny_lm(config(name, **changes))
    assert find_lean(lm) is None
    assert isinstance(make_step(lm, False), RingStep)


def scaled(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    return 2 * output


def test_a_hook_or_another_layer_is_not_passed_over(gpt2_lm: CausalLM) -> None:
    class Doubling(nn.LayerNorm):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    hook = gpt2_lm.model.transformer.h[1].mlp.register_forward_hook(scaled)
    assert find_lean(gpt2_lm) is None
    hook.remove()
    assert find_lean(gpt2_lm) is not None
    gpt2_lm.model.transformer.ln_f = Doubling(32)
    assert find_lean(gpt2_lm) is None


def test_another_function_is_refused_by_comparison(gpt2_lm: CausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """The two GELUs differ by 1e-4 of the logits, and the comparison sees it."""
    assert find_lean(gpt2_lm) is not None
    monkeypatch.setattr(parts, "gelu_kind", lambda activation: "none")
    assert find_lean(gpt2_lm) is None


def test_it_follows_training_and_weights_that_are_replaced(gpt2_lm: CausalLM) -> None:
    before = logits_of(gpt2_lm, IDS)
    for parameter in gpt2_lm.model.parameters():
        parameter.requires_grad_(True)
    optimizer = torch.optim.Adam(gpt2_lm.model.parameters(), lr=0.05)
    gpt2_lm.model(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()
    after = logits_of(gpt2_lm, IDS)
    assert (after - before).abs().max() > 0.1
    with torch.no_grad():
        assert_alike(after, gpt2_lm.model(input_ids=IDS).logits)
        gpt2_lm.model.load_state_dict(drawn("GPT-2", {"n_layer": 2}).model.state_dict(), assign=True)
        assert_alike(logits_of(gpt2_lm, IDS), gpt2_lm.model(input_ids=IDS).logits)


@pytest.mark.parametrize("name", ["GPT-2", "Llama", "GPT-NeoX"])
def test_half_precision(name: str) -> None:
    lm = tiny_lm(config(name, initializer_range=0.1))
    lm = CausalLM(lm.model.to(torch.bfloat16), lm.tokenizer)
    with torch.inference_mode():
        expected = lm.model(input_ids=IDS).logits.float()
    assert_alike(logits_of(lm, IDS).float(), expected, atol=0.03)


def test_a_copy_shares_the_weights_and_a_pickle_brings_its_own(gpt2_lm: CausalLM) -> None:
    decoder = RingDecoder(gpt2_lm, 2, 10)
    decoder.begin(torch.arange(2), IDS[:, :4], torch.ones((2, 4)).bool())
    copied = copy.deepcopy(decoder)
    sent = pickle.loads(pickle.dumps(decoder))
    for each in (decoder, copied, sent):
        each.step(IDS[:, 4])
    assert torch.equal(copied.logits, decoder.logits)
    assert torch.equal(sent.logits, decoder.logits)
    gpt2_lm.model.transformer.wte.weight.data.mul_(2)
    for each in (decoder, copied, sent):
        each.step(IDS[:, 5])
    assert torch.equal(copied.logits, decoder.logits)
    assert not torch.allclose(sent.logits, decoder.logits)


# --- products --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 9, 64, 130])
@pytest.mark.parametrize("with_bias", [True, False])
def test_products_are_those_of_torch(rows: int, with_bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn((rows, 64), generator=generator)
    weight = torch.randn((64, 600), generator=generator) / 8
    bias = torch.randn(600, generator=generator) if with_bias else None
    plain = x @ weight + (0.0 if bias is None else bias)
    monkeypatch.setattr(products, "_MIN_NUMBERS", 1000)
    monkeypatch.setattr(products, "_MIN_GELU_PRODUCTS", 1000)
    for onednn in (products.find_onednn(), None):
        monkeypatch.setattr(products, "find_onednn", lambda onednn=onednn: onednn)
        for transposed in (weight, weight.t().contiguous().t()):
            assert_alike(affine(x, transposed, bias), plain)
            for kind in ("none", "tanh"):
                expected = nn.functional.gelu(plain, approximate=kind)
                assert_alike(affine_gelu(x, transposed, bias, kind), expected)


@pytest.mark.parametrize(
    ("name", "changes"), [("GPT-2", {}), ("GPT-2", {"tie_word_embeddings": False}), ("Llama", {})], ids=str
)
def test_scores_by_columns_are_those_of_the_whole_vocabulary(
    name: str, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut at the tokenizer's end, divided by the temperature, without the ids that no token has."""
    lm = drawn(name, changes)
    lean = lean_of(lm)
    hidden = torch.randn((9, 32), generator=torch.Generator().manual_seed(0))
    tokens = torch.tensor([0, 3, 4, 7, 8, 9, 13, 14, 1])
    holes = [2, 5, 6, 11]
    monkeypatch.setattr(scoring, "_COLUMNS", 4)
    with torch.inference_mode():
        logits = lm.model.lm_head(hidden)[:, :15] / 0.7
        logits[:, holes] = -torch.inf
        expected = logits.log_softmax(-1).gather(1, tokens[:, None]).squeeze(1)
        assert_alike(score_by_columns(lean.head, hidden, tokens, 15, holes, 0.7), expected)


def test_a_wide_head_scores_responses_by_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = drawn("GPT-2", {})
    prompt_mask = torch.tensor([[False, True, True], [True, True, True]])
    response_mask = torch.tensor([[True, True, True, True], [True, True, False, False]])
    arguments = (IDS[:, :3], prompt_mask, IDS[:, 3:7], response_mask)
    expected = lm.response_log_probs(*arguments)
    monkeypatch.setattr(causal, "_MIN_WIDE_VOCABULARY", 1)
    monkeypatch.setattr(causal, "_WIDE_HEAD_ROWS", 4)
    monkeypatch.setattr(scoring, "_COLUMNS", 5)
    assert_alike(lm.response_log_probs(*arguments), expected)


# --- sequences that are read once ------------------------------------------------------------------------------------


def test_equal_sequences_are_read_once(gpt2_lm: CausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = [[3, 4], [3, 4], [7, 3, 4], [3, 4], [7, 3, 4]]
    reads: list[int] = []
    prefill = RingDecoder.prefill
    monkeypatch.setattr(
        RingDecoder, "prefill", lambda self, ids, mask: reads.append(len(ids)) or prefill(self, ids, mask)
    )
    together = RingDecoder(gpt2_lm, 5, 10)
    together.begin(torch.arange(5), *left_padded(prompts))
    started = RingDecoder(gpt2_lm, 5, 10)
    started.start({slot: tuple(ids) for slot, ids in enumerate(prompts)})
    assert reads == [2, 2]
    tokens = torch.tensor([2, 5, 2, 6, 8])
    for each in (together, started):
        each.step(tokens)
        for slot, ids in enumerate(prompts):
            with torch.inference_mode():
                alone = gpt2_lm.model(input_ids=torch.tensor([[*ids, int(tokens[slot])]])).logits[0, -1]
            assert_alike(each.logits[slot], alone)


def test_find_distinct_tells_padding_from_tokens() -> None:
    ids = torch.tensor([[0, 0, 5], [0, 0, 5], [0, 0, 5], [4, 0, 5]])
    mask = torch.tensor([[0, 0, 1], [0, 1, 1], [0, 0, 1], [0, 0, 1]]).bool()
    read, rows = find_distinct(ids, mask)
    assert read.tolist() == [0, 1]
    assert rows.tolist() == [0, 1, 0, 0]


def test_slots_are_dropped_without_another_ring(gpt2_lm: CausalLM) -> None:
    decoder = RingDecoder(gpt2_lm, 4, 10)
    decoder.begin(torch.arange(4), *left_padded([[3], [4, 5], [6], [7, 8, 9]]))
    before = [ring.data_ptr() for ring in decoder._rings]
    decoder.keep(torch.tensor([3, 0]))
    assert [ring.data_ptr() for ring in decoder._rings] == before
    decoder.step(torch.tensor([2, 5]))
    for found, ids in zip(decoder.logits, [[7, 8, 9, 2], [3, 5]], strict=True):
        with torch.inference_mode():
            assert_alike(found, gpt2_lm.model(input_ids=torch.tensor([ids])).logits[0, -1])
