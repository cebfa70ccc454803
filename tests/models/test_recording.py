"""Recorded graphs: what they compute, which modules share one, and what they keep alive."""

from __future__ import annotations

import gc
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import gpt2, word_tokenizer
from torch import Tensor, nn

from lmgym.models import recording
from lmgym.models.causal import CausalLM, freeze
from lmgym.models.recording import Forward, record
from lmgym.models.ring import RingDecoder
from lmgym.models.ring_step import RingStep, make_step
from lmgym.tasks import make_task


class Tied(nn.Module):
    """tanh(x W) W^T at a price, plus a buffer; W is in two places."""

    def __init__(self, seed: int = 0, width: int = 3, price: float = 1.0) -> None:
        super().__init__()
        weight = torch.randn((4, width), generator=torch.Generator().manual_seed(seed))
        self.first = nn.Module()
        self.second = nn.Module()
        self.first.weight = self.second.weight = nn.Parameter(weight)
        self.register_buffer("shift", torch.full((4,), float(seed)))
        self.price = price

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        hidden = (x @ self.first.weight).tanh()
        return self.price * hidden @ self.second.weight.T + self.shift, hidden


class Branching(Tied):
    """Another formula for many rows, which a graph cannot know."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        first, second = super().forward(x)
        return (first if len(x) < 3 else -first), second


def inputs(rows: int, columns: int) -> tuple[Tensor, ...]:
    return (torch.randn((rows, 4), generator=torch.Generator().manual_seed(columns)),)


@pytest.fixture(autouse=True)
def traces(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """One entry for each call of `torch.jit.trace`; no graphs from before the test."""
    calls: list[object] = []
    trace: Callable[..., Any] = torch.jit.trace
    monkeypatch.setattr(recording, "_graphs", {})
    monkeypatch.setattr(torch.jit, "trace", lambda *xs, **kinds: calls.append(0) or trace(*xs, **kinds))
    return calls


def recorded(module: nn.Module) -> Forward:
    graph = record(module, inputs)
    assert graph is not None
    return graph


def assert_agrees(graph: Forward, module: nn.Module) -> None:
    with torch.no_grad():
        for found, expected in zip(graph(*inputs(6, 3)), module(*inputs(6, 3)), strict=True):
            torch.testing.assert_close(found, expected)


def test_modules_that_differ_in_their_weights_share_a_graph_and_keep_their_own(traces: list[object]) -> None:
    modules = [Tied(seed) for seed in range(4)]
    graphs = [recorded(module) for module in modules]
    assert len(traces) == 1
    for graph, module in zip(graphs, modules, strict=True):
        assert_agrees(graph, module)
        assert module.first.weight is module.second.weight
        assert isinstance(module.first.weight, nn.Parameter)


@pytest.mark.parametrize("change", [{"width": 5}, {"price": 2.0}], ids=str)
def test_modules_that_differ_in_more_do_not(traces: list[object], change: dict[str, Any]) -> None:
    """Not even where their outputs agree when they are recorded, as those of a low-rank adapter at its start do."""
    modules = [Tied(), Tied(**change)]
    for module in modules:
        nn.init.zeros_(module.first.weight)
    graphs = [recorded(module) for module in modules]
    assert len(traces) == 2
    for graph, module in zip(graphs, modules, strict=True):
        nn.init.ones_(module.first.weight)
        assert_agrees(graph, module)


def test_a_module_that_cannot_be_written_is_recorded_alone(traces: list[object]) -> None:
    modules = [Tied(seed) for seed in range(2)]
    for module in modules:
        module.note = lambda: None  # type: ignore[assignment]
        assert_agrees(recorded(module), module)
    assert len(traces) == 2


def test_a_graph_follows_its_weights() -> None:
    module = Tied()
    graph = recorded(module)
    with torch.no_grad():
        module.first.weight += 1.0  # type: ignore[operator]
        module.shift += 1.0
    assert_agrees(graph, module)
    module.load_state_dict(Tied(7).state_dict(), assign=True)
    assert_agrees(graph, module)


def test_a_module_that_is_something_else_at_other_sizes_is_not_recorded() -> None:
    assert record(Branching(), inputs) is None


def test_a_graph_keeps_no_module_alive() -> None:
    modules = [Tied(seed) for seed in range(2)]
    for module in modules:
        recorded(module)
    gone = [weakref.ref(x) for module in modules for x in (module, module.first.weight)]
    del module, modules
    gc.collect()
    assert [x() for x in gone] == [None] * 4


def test_policies_of_one_shape_are_recorded_once(traces: list[object]) -> None:
    """What keeps the memory of a process that trains many policies in bounds."""
    tokenizer = word_tokenizer()
    ids = torch.tensor([[3, 4, 5], [6, 7, 8]])
    for seed in range(5):
        lm = CausalLM(freeze(gpt2(len(tokenizer), seed=seed, n_positions=24)), tokenizer)
        decoder = RingDecoder(lm, 2, 8)
        decoder.begin(torch.arange(2), ids[:, :2], torch.ones((2, 2), dtype=torch.bool))
        decoder.step(ids[:, 2])
        with torch.inference_mode():
            torch.testing.assert_close(decoder.logits, lm.model(input_ids=ids).logits[:, -1], rtol=1e-4, atol=1e-4)
    assert len(traces) == 1


# --- steps of decoding -----------------------------------------------------------------------------------------------


def drive(lm: CausalLM) -> None:
    """Makes two decoders of a model, with and without hidden states, and takes a step with each."""
    ids = torch.tensor([[3, 4], [5, 6]])
    for keep_hidden in (False, True, False):
        decoder = RingDecoder(lm, 2, 8, keep_hidden=keep_hidden)
        decoder.begin(torch.arange(2), ids, torch.ones_like(ids).bool())
        decoder.step(ids[:, 0])


def test_the_step_of_the_shipped_model_is_recorded(traces: list[object]) -> None:
    """torch.jit.trace is deprecated upstream: here it shows when a new torch no longer records."""
    lm = make_task("reviews").reference("cpu")
    lm = CausalLM(lm.model, lm.tokenizer)  # one that has not decoded yet
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        drive(lm)
    assert len(traces) == 2  # with and without hidden states
    for keep_hidden in (False, True):
        assert not isinstance(lm.remember(make_step, keep_hidden), RingStep)


def test_a_step_that_cannot_be_recorded_runs_as_it_is_and_warns_once_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.jit, "trace")
    lm = CausalLM(freeze(gpt2(len(word_tokenizer()), n_positions=24)), word_tokenizer())
    with pytest.warns(UserWarning, match="GPT2LMHeadModel could not be recorded with torch.jit.trace") as caught:
        drive(lm)
    assert len(caught) == 1
    assert isinstance(lm.remember(make_step, False), RingStep)
