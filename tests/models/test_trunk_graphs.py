"""Optimiser steps of a trunk in graphs against the plain forward: values, gradients, and when they do not run."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from conftest import WORDS, gpt2, word_count, word_tokenizer
from test_lean import KNOWN, drawn
from torch import Tensor, nn

from agents.algorithms.ppo import PPO, PPOConfig
from agents.policies.actor_critic import ActorCritic
from agents.policies.recomputing import recompute_layers
from agents.update import sum_gradients
from lmgym.envs.vector import RLHFVectorEnv
from lmgym.models import graph_pool
from lmgym.models.causal import CausalLM, freeze
from lmgym.models.lean import graphs
from lmgym.models.lean.graphs import adding_gradients, round_up_shape
from lmgym.tasks import Task

V = len(WORDS) + 3
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
Parts = tuple[Tensor, Tensor, Tensor]  # ids, and the row and column of each position that is read


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Where graphs run: on a CPU their functions are called."""
    monkeypatch.setattr(graph_pool, "CAPTURED_DEVICES", {request.param})
    return str(request.param)


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """The shape of the graphs of each forward."""
    seen: list[tuple[int, int]] = []
    forward = graphs._Graph.forward

    def note(self: graphs._Graph, *parts: Any) -> Tensor:
        seen.append(self.shape)
        return forward(self, *parts)

    monkeypatch.setattr(graphs._Graph, "forward", note)
    return seen


def trained(lm: CausalLM, device: str, dtype: torch.dtype = torch.float32) -> CausalLM:
    """A copy whose parameters take gradients."""
    return CausalLM(copy.deepcopy(lm.model).to(device, dtype).requires_grad_(True), lm.tokenizer)


def sequences(device: str, lengths: list[int], seed: int = 0) -> Parts:
    """Sequences of these lengths, read from the middle of each to the token before its last."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(7, (len(lengths), max(lengths)), generator=generator)
    read = [(row, t) for row, length in enumerate(lengths) for t in range(length // 2, length - 1)]
    rows, columns = torch.tensor(read).T
    return ids.to(device), rows.to(device), columns.to(device)


def loss_of(*outputs: Tensor) -> Tensor:
    """A sum that weighs every number differently."""
    return sum(
        (torch.linspace(-1, 1, x.numel(), device=x.device).view_as(x) * x.float()).sum() / len(x) for x in outputs
    )


def gradients(
    read: Callable[..., tuple[Tensor, ...]], weights: list[nn.Parameter], batches: list[Parts]
) -> list[Tensor]:
    """Values and gradients of the sum of the losses of some batches, as an optimiser step takes them."""
    values: list[Tensor] = []

    def losses() -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        for batch in batches:
            outputs = read(*batch)
            values.extend(x.detach() for x in outputs)
            yield loss_of(*outputs), {}

    sum_gradients(losses(), weights)
    return values + [torch.zeros_like(weight) if weight.grad is None else weight.grad.clone() for weight in weights]


def assert_alike(found: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    for x, y in zip(found, expected, strict=True):
        finite = y[y.isfinite()]
        assert x.dtype == y.dtype
        torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance * max(1.0, float(finite.abs().max())))


@pytest.mark.parametrize("recomputes", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize(("name", "changes"), KNOWN, ids=[f"{i} {name}" for i, (name, _) in enumerate(KNOWN)])
def test_values_and_gradients_are_those_of_the_plain_forward(
    name: str, changes: dict[str, Any], recomputes: bool, device: str, launches: list[Any]
) -> None:
    lm = trained(drawn(name, changes), device)
    if recomputes:
        recompute_layers(lm.model)
    weights = list(lm.model.parameters())
    batches = [sequences(device, [9, 4, 7], 1), sequences(device, [5, 17], 2), sequences(device, [6, 9], 3)]
    for few in (batches[:1], batches):
        found = gradients(lm.read_at, weights, few)
        assert_alike(found, gradients(lm.response_hidden, weights, few), 2e-5 if device == "cpu" else 1e-4)
    assert launches == [(4, 16), (4, 16), (4, 32), (4, 16)]


@pytest.mark.gpu
def test_half_precision_differs_by_rounding(monkeypatch: pytest.MonkeyPatch, launches: list[Any]) -> None:
    lm = trained(drawn("GPT-2", {}), "cuda", torch.bfloat16)
    weights = list(lm.model.parameters())
    batches = [sequences("cuda", [9, 4, 7], 1), sequences("cuda", [5, 17], 2)]
    found = gradients(lm.read_at, weights, batches)
    assert len(launches) == 2
    exact = trained(drawn("GPT-2", {}), "cuda", torch.bfloat16)
    exact.model.float()
    expected = gradients(exact.response_hidden, list(exact.model.parameters()), batches)
    plain = gradients(lm.response_hidden, weights, batches)
    for x, y, z in zip(found, expected, plain, strict=True):
        finite = y.isfinite()
        gap = (x.float() - y)[finite].norm()
        # Two roundings of the same numbers: neither is much further from them than the other.
        assert gap <= 2 * (z.float() - y)[finite].norm() + 1e-2 * y[finite].norm() + 1e-4


@pytest.mark.parametrize("recomputes", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("name", ["GPT-2", "Llama"])
def test_layers_in_half_precision_on_demand(name: str, recomputes: bool, device: str, launches: list[Any]) -> None:
    lm = trained(drawn(name, {}), device)
    if recomputes:
        recompute_layers(lm.model)
    weights = list(lm.model.parameters())
    batches = [sequences(device, [9, 4, 7], 1), sequences(device, [5, 17], 2)]
    fine = gradients(lm.response_hidden, weights, batches)
    coarse = gradients(lambda *parts: lm.read_at(*parts, torch.bfloat16), weights, batches)
    assert len(launches) == 2
    assert all(x.dtype == torch.float32 for x in coarse)
    found, expected = (torch.cat([x.flatten() for x in y[-len(weights) :]]) for y in (coarse, fine))
    assert 0.99 < torch.cosine_similarity(found, expected, dim=0) < 1 - 1e-7
    assert_alike(gradients(lm.read_at, weights, batches), fine, 1e-4)
    assert len(launches) == 4


def test_steps_follow_weights_that_change_and_weights_that_move(device: str, launches: list[Any]) -> None:
    lm = trained(drawn("GPT-2", {}), device)
    weights = list(lm.model.parameters())
    batches = [sequences(device, [9, 4, 7])]
    tolerance = 2e-5 if device == "cpu" else 1e-4
    for change in ("none", "in place", "moved", "replaced"):
        with torch.no_grad():
            for weight in weights:
                if change == "in place":
                    weight.mul_(1.1)
                elif change == "moved":
                    weight.data = 0.9 * weight.data
        if change == "replaced":
            block = lm.model.transformer.h[0]
            block.ln_1.weight = nn.Parameter(2 * block.ln_1.weight.detach())
            weights = list(lm.model.parameters())
        found = gradients(lm.read_at, weights, batches)
        assert_alike(found, gradients(lm.response_hidden, weights, batches), tolerance)
    assert len(launches) == 4


def test_graphs_run_where_gradients_are_added_up_alone(device: str, launches: list[Any]) -> None:
    lm = trained(drawn("GPT-2", {}), device)
    weights = list(lm.model.parameters())
    parts = sequences(device, [9, 4, 7])
    expected = torch.autograd.grad(loss_of(*lm.response_hidden(*parts)), weights)
    assert_alike(list(torch.autograd.grad(loss_of(*lm.read_at(*parts)), weights)), list(expected), 1e-4)
    with adding_gradients():
        with torch.no_grad():
            lm.read_at(*parts)
        weights[0].requires_grad_(False)
        lm.read_at(*parts)
        weights[0].requires_grad_(True)
        assert not launches
        first = lm.read_at(*parts)
        second = lm.read_at(*parts)  # while the first waits for its backward pass
        assert len(launches) == 1
        loss = loss_of(*first, *second)
        loss.backward(retain_graph=True)
        assert_alike([weight.grad for weight in weights], [2 * x for x in expected], 1e-4)
        with pytest.raises(RuntimeError, match="once"):
            loss.backward()
        del first, second, loss
        lm.read_at(*parts)  # and nothing is done with it
        lm.read_at(*parts)
        assert len(launches) == 3
    lm.read_at(*parts)
    assert len(launches) == 3


def test_a_gradient_that_a_weight_has_is_added_to(device: str, launches: list[Any]) -> None:
    lm = trained(drawn("GPT-2", {}), device)
    weights = list(lm.model.parameters())
    parts = sequences(device, [9, 4, 7])
    expected = torch.autograd.grad(loss_of(*lm.response_hidden(*parts)), weights)
    lm.read_at(*parts)[0].sum()
    for weight in weights[::2]:
        weight.grad = torch.ones_like(weight)
    with adding_gradients():
        for _ in range(2):
            loss_of(*lm.read_at(*parts)).backward()
    assert len(launches) == 2
    found = [weight.grad for weight in weights]
    assert_alike(found, [2 * x + (1 - i % 2) for i, x in enumerate(expected)], 1e-4)


def test_many_shapes_and_many_tokens(device: str, launches: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "MAX_SHAPES", 2)
    monkeypatch.setattr(graphs, "MAX_TOKENS", 256)
    lm = trained(gpt2_lm(), device)
    weights = list(lm.model.parameters())
    for lengths in ([9] * 3, [40] * 3, [9] * 3, [9] * 6, [20] * 2, [50] * 2, [50] * 5, [9] * 30):
        batches = [sequences(device, lengths)]
        found = gradients(lm.read_at, weights, batches)
        assert_alike(found, gradients(lm.response_hidden, weights, batches), 1e-4)
    # 20 columns fit into 48; 6 rows and 50 columns fit into no known shape, and the last two are too many tokens.
    assert launches == [(4, 16), (4, 48), (4, 16), (4, 48)]


def gpt2_lm() -> CausalLM:
    return CausalLM(gpt2(24, seed=0, scale=0.25, n_positions=60), drawn("GPT-2", {}).tokenizer)


def test_a_critic_with_a_trunk_of_its_own_has_graphs_of_its_own(
    device: str, launches: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = drawn("GPT-2", {})
    policy = ActorCritic(CausalLM(lm.model.to(device), lm.tokenizer), "reference")
    nn.init.constant_(policy.value_head.weight, 0.3)
    weights = list(policy.parameters())
    batches = [sequences(device, [9, 4, 7], 1), sequences(device, [5, 17], 2)]

    def read(*parts: Tensor) -> tuple[Tensor, ...]:
        found = policy.read_at(*parts)
        return found.logits, found.values

    found = gradients(read, weights, batches)
    assert launches == [(4, 16), (4, 16), (4, 32), (4, 32)]
    policy._lean_critic = None
    monkeypatch.setattr(CausalLM, "read_at", lambda lm, *parts: lm.response_hidden(*parts[:3]))
    assert_alike(found, gradients(read, weights, batches), 1e-4)


def learned(device: str, dtype: str, config: dict[str, Any]) -> tuple[list[Tensor], list[dict[str, float]]]:
    """The weights after two iterations of PPO, and the metrics of each."""
    lm = CausalLM(freeze(gpt2(V, seed=11, scale=0.25, n_positions=60)), word_tokenizer())
    with torch.no_grad():  # responses of all lengths
        lm.model.transformer.ln_f.bias += lm.model.lm_head.weight[1]
    prompts = {"train": ["the film was", "a very good book", "dull"]}
    task = Task(name="t", model=lm, reward=word_count, prompts=prompts, kl_coef=0.1, max_new_tokens=24)
    envs = RLHFVectorEnv(1, task=task, device=device, dtype=dtype)
    numbers = {"batch_size": 16, "micro_batch_size": 3, "epochs": 2, "minibatches": 2, "lr": 1e-3, "adam_eps": 1e-2}
    agent = PPO(envs, PPOConfig(**numbers | config), seed=0)
    history: list[dict[str, float]] = []
    agent.learn(10**9, lambda _, metrics: history.append(metrics) or len(history) < 2)
    return [weight.detach().clone() for weight in agent.policy.parameters()], history


@pytest.mark.parametrize(
    "config", [{}, {"critic": "reference", "micro_batch_size": 8, "gradient_checkpointing": True}], ids=str
)
def test_a_run_of_ppo_learns_the_same(
    config: dict[str, Any], device: str, launches: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    found, history = learned(device, "float32", config)
    assert len(launches) == (24 if not config else 16)  # of 8 steps
    monkeypatch.setattr(graphs, "MAX_TOKENS", 0)
    expected, plain = learned(device, "float32", config)
    assert_alike(found, expected, 2e-5)
    assert {name for name in history[1] if "seconds" not in name} <= plain[1].keys()
    for name, value in plain[1].items():
        if not name.startswith("time/"):
            assert history[1][name] == pytest.approx(value, rel=1e-2, abs=1e-2), name
    assert len(launches) == (24 if not config else 16)


@pytest.mark.gpu
def test_a_run_of_ppo_in_half_precision(launches: list[Any]) -> None:
    _, history = learned("cuda", "bfloat16", {})
    assert len(launches) == 24
    assert all(metrics["train/ratio_error"] < 0.1 for metrics in history)


def test_shapes() -> None:
    assert round_up_shape(1, 1, None) == (4, 16)
    assert round_up_shape(16, 79, 1024) == (16, 80)
    assert round_up_shape(17, 55, 60) == (20, 60)
    assert round_up_shape(4, 60, 60) == (4, 60)
