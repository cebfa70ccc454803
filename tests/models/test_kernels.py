"""Triton's kernels against plain operations, and the fused step against the model, on a GPU.

Without one they run in Triton's interpreter, where Triton is installed and TRITON_INTERPRET=1 is set.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_lm
from test_decoding import config
from test_lean import drawn
from torch import Tensor

from lmgym.models.causal import CausalLM, freeze
from lmgym.models.lean.find import find_lean
from lmgym.models.lean.fused import AlignedHead, FusedStep, find_fused
from lmgym.models.lean.parts import Norm, rotate
from lmgym.models.ring import RingDecoder
from lmgym.models.ring_step import LeanStep

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    pytest.importorskip("triton")
    if request.param == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("TRITON_INTERPRET=1 is not set")
    return str(request.param)


def randn(*shape: int, device: str) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(device)


@pytest.mark.parametrize(
    ("heads", "groups", "width", "columns", "column", "turned"),
    [
        (4, 4, 16, 32, 5, 0),
        (4, 4, 24, 96, 50, 0),
        (4, 2, 16, 96, 95, 16),
        (6, 1, 32, 160, 7, 16),
        (2, 2, 128, 64, 0, 0),
    ],
)
def test_a_look_at_rings(
    heads: int, groups: int, width: int, columns: int, column: int, turned: int, device: str
) -> None:
    from lmgym.models.lean.kernels import attend_ring

    n = 3
    keys_and_values = randn(2, n, groups, columns + 32, width, device=device)
    rings = list(keys_and_values[:, :, :, :columns])
    wide = randn(n, heads + 2 * groups, width, device=device)  # the heads of a token stand together
    queries, keys, values = wide.split([heads, groups, groups], 1)
    angles = None
    if turned:
        angle = randn(n, 1, turned // 2, device=device)
        angles = (torch.cat([angle.cos()] * 2, -1), torch.cat([-angle.sin(), angle.sin()], -1))
    age = torch.tensor([0, 17, columns + 3], device=device)
    at = torch.tensor([column], device=device)
    found = attend_ring((queries, keys, values), angles, (rings[0], rings[1]), age, at, 0.3)
    if angles is not None:
        queries = rotate(queries, *angles)
        keys = rotate(keys, *angles)
    torch.testing.assert_close(rings[0][:, :, column], keys)
    torch.testing.assert_close(rings[1][:, :, column], values)
    seen = (at - torch.arange(columns, device=device)) % columns <= age[:, None]
    expected = F.scaled_dot_product_attention(
        queries[:, :, None], *rings, attn_mask=seen[:, None, None], scale=0.3, enable_gqa=True
    )
    torch.testing.assert_close(found, expected.flatten(1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("by_root_mean_square", [False, True])
@pytest.mark.parametrize("has_bias", [False, True])
def test_a_sum_and_its_norm(by_root_mean_square: bool, has_bias: bool, device: str) -> None:
    from lmgym.models.lean.kernels import add_norm

    x = randn(5, 40, device=device)
    bias = randn(40, device=device) if has_bias else None
    parameters: dict[str, Any] = {"weight": randn(40, device=device), "bias": randn(1, 40, device=device)[0]}
    norm = Norm(parameters, 1e-5, by_root_mean_square)
    expected = x if bias is None else x + bias
    read = add_norm(x, bias, norm)
    torch.testing.assert_close(x, expected)
    torch.testing.assert_close(read, norm(expected), rtol=0, atol=1e-5)


def test_a_gated_product(device: str) -> None:
    from lmgym.models.lean.kernels import silu_times

    gate = randn(7, 300, device=device)
    x = randn(7, 301, device=device)[:, 1:].contiguous()
    expected = F.silu(gate) * x
    torch.testing.assert_close(silu_times(gate, x), expected, rtol=0, atol=1e-5)


FAMILIES: list[tuple[str, dict[str, Any]]] = [
    ("GPT-2", {}),
    ("GPT-2", {"activation_function": "relu"}),
    ("GPT-NeoX", {"rotary_pct": 0.5}),
    ("GPT-NeoX", {"use_parallel_residual": False}),
    ("Llama", {}),
    ("Llama", {"attention_bias": True, "mlp_bias": True, "hidden_act": "gelu"}),
    ("Qwen2", {}),
    ("Qwen3", {"head_dim": 16}),
]


@pytest.mark.parametrize(("name", "changes"), FAMILIES, ids=str)
def test_a_fused_step_is_the_step(name: str, changes: dict[str, Any], device: str) -> None:
    from lmgym.models.lean import kernels

    lm = drawn(name, changes)
    lean = CausalLM(freeze(lm.model.to(device)), lm.tokenizer).remember(find_lean)
    assert lean is not None
    ids = torch.randint(0, lm.vocab_size, (3, 7), generator=torch.Generator().manual_seed(0)).to(device)
    _, states = lean.read(ids)
    rings = [x.new_zeros((3, x.shape[1], 32, x.shape[3])) for x in states]
    for ring, state in zip(rings, states, strict=True):
        ring[:, :, :7] = state
    other = [ring.clone() for ring in rings]
    age = torch.tensor([7, 4, 1], device=device)
    with torch.inference_mode():
        for t in range(4):
            column = torch.tensor([7 + t], device=device)
            expected = lean.step(ids[:, t], age + t, column, rings)
            found = FusedStep(lean, kernels).step(ids[:, t], age + t, column, other)
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    for ring, mine in zip(rings, other, strict=True):
        torch.testing.assert_close(mine, ring, rtol=0, atol=1e-4)


def test_an_aligned_head_follows_its_weight() -> None:
    lm = tiny_lm(config("GPT-2"))
    lean = lm.remember(find_lean)
    assert lean is not None
    assert lean.head is not None
    head = AlignedHead(lean.head, lm.vocab_size)
    hidden = torch.randn(3, lean.head.weight.shape[0], generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(head(hidden), lean.logits(hidden, lm.vocab_size))
    with torch.no_grad():
        lm.model.lm_head.weight.add_(1)
    head.sync()
    torch.testing.assert_close(head(hidden), lean.logits(hidden, lm.vocab_size))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("name", "changes"), FAMILIES, ids=str)
def test_a_gpu_takes_the_fused_step(name: str, changes: dict[str, Any], dtype: torch.dtype) -> None:
    lm = drawn(name, changes)
    lm = CausalLM(freeze(lm.model.to("cuda", dtype)), lm.tokenizer)
    lean = lm.remember(find_lean)
    assert lean is not None
    assert find_fused(lean) is not None
    decoder = RingDecoder(lm, 2, 20)
    ids = torch.tensor([[2, 3, 4, 5], [6, 7, 8, 9]], device="cuda")
    decoder.begin(torch.arange(2, device="cuda"), ids, torch.ones_like(ids, dtype=torch.bool))
    assert isinstance(decoder._step, LeanStep)
    assert decoder._step._fused is not None
    assert (decoder._step._head is not None) == (dtype == torch.bfloat16 and lm.vocab_size % 8 != 0)
    tokens = torch.tensor([3, 5], device="cuda")
    decoder.step(tokens)
    expected = lm.model(input_ids=torch.cat([ids, tokens[:, None]], 1)).logits[:, -1]
    tolerance = 1e-4 if dtype == torch.float32 else 0.05 * float(expected.abs().max())
    torch.testing.assert_close(decoder.logits, lm.legal_logits(expected), rtol=0, atol=tolerance)
