"""TRPO: its linear algebra against dense matrices, and its step against enumeration of a small problem."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import TinyProblem, learn, shifted
from directions import DISCOUNT, agent_of, alone, as_collected, direction, gradient, late_term, parameters_of
from torch import Tensor

import agents.algorithms.trpo
import agents.on_policy
from agents.advantages import returns_to_go
from agents.agent import TokenCount
from agents.algorithms.a2c import A2C
from agents.algorithms.trpo import TRPO, Fisher, TRPOConfig, conjugate_gradient, flat, surrogate
from agents.batch import Batch
from agents.on_policy import OnPolicyAgent
from agents.policies.actor_critic import TrainablePolicy
from lmgym.envs.vector import RLHFVectorEnv
from lmgym.episodes import Episodes
from lmgym.errors import InvalidArgumentError, UnknownNameError
from lmgym.kl import exact
from lmgym.models.sampling import Sampler
from lmgym.optimum.tree import Tree, make_episode_logits

KINDS = ["finetune", "transformer", "gru", "mlp"]


def tiny_envs(reward: Any = None, **task: Any) -> RLHFVectorEnv:
    changes = task if reward is None else {"reward": reward} | task
    made = TinyProblem(**changes).task
    return RLHFVectorEnv(1, autoreset_mode="SameStep", task=made, device="cpu", prompt_order="sequential")


def tiny_trpo(
    envs: RLHFVectorEnv | None = None, *, seed: int = 0, sampler: Sampler | None = None, **config: Any
) -> TRPO:
    config = {"batch_size": 48, "minibatches": 2, "epochs": 2, "width": 4, "layers": 1, "max_kl": 0.01} | config
    return TRPO(envs or tiny_envs(), TRPOConfig(**config), seed=shifted(seed), sampler=sampler)


def moved(agent: TRPO, scale: float = 0.2) -> TRPO:
    """The agent with every parameter of its policy moved, as in the midst of training."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in agent.policy.parameters():
            parameter += scale * torch.randn(parameter.shape, generator=generator)
    agent.num_timesteps = 1
    return agent


def cosine(a: Tensor, b: Tensor) -> float:
    return torch.nn.functional.cosine_similarity(a.double(), b.double(), dim=0).item()


def log_distribution(policy: TrainablePolicy, episodes: Episodes) -> Tensor:
    return policy.read(episodes).logits.log_softmax(-1)


def dense_fisher(log_rows: Tensor, weights: Tensor, parameters: list[Tensor]) -> Tensor:
    """(P, P): the sum over states and tokens of w pi grad log pi grad log pi^T, one gradient at a time."""
    size = sum(p.numel() for p in parameters)
    matrix = torch.zeros((size, size), dtype=torch.float64)
    for weight, row in zip(weights, log_rows, strict=True):
        for log_prob in row:
            if log_prob > -torch.inf:
                found = torch.autograd.grad(log_prob, parameters, retain_graph=True, materialize_grads=True)
                score = flat(found).double()
                matrix += weight.double() * log_prob.detach().double().exp() * torch.outer(score, score)
    return matrix


# -- conjugate gradients ---------------------------------------------------------------------------------------------


@pytest.fixture
def system() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    root = torch.randn((8, 8), generator=generator, dtype=torch.float64)
    return root @ root.T + 0.1 * torch.eye(8, dtype=torch.float64), torch.randn(8, generator=generator).double()


def test_conjugate_gradients_are_a_dense_solve(system: tuple[Tensor, Tensor]) -> None:
    matrix, b = system
    x, residual = conjugate_gradient(lambda v: matrix @ v, b, 40, tolerance=1e-12)
    torch.testing.assert_close(x, torch.linalg.solve(matrix, b), rtol=1e-8, atol=1e-8)
    assert residual.norm() < 1e-10


@pytest.mark.parametrize("iterations", [1, 3, 5])
def test_a_few_iterations_leave_the_residual_that_is_told(system: tuple[Tensor, Tensor], iterations: int) -> None:
    matrix, b = system
    calls: list[Tensor] = []
    x, residual = conjugate_gradient(lambda v: calls.append(v) or matrix @ v, b, iterations)
    assert len(calls) == iterations
    torch.testing.assert_close(residual, b - matrix @ x)
    # The best of its Krylov space in the norm of the matrix.
    krylov = torch.linalg.qr(torch.stack([torch.linalg.matrix_power(matrix, k) @ b for k in range(iterations)], 1))[0]
    best = krylov @ torch.linalg.solve(krylov.T @ matrix @ krylov, krylov.T @ b)
    torch.testing.assert_close(x, best, rtol=1e-6, atol=1e-8)


def test_conjugate_gradients_end_at_the_tolerance_and_of_nothing_make_nothing(system: tuple[Tensor, Tensor]) -> None:
    matrix, b = system
    calls: list[Tensor] = []
    _, residual = conjugate_gradient(lambda v: calls.append(v) or matrix @ v, b, 40, tolerance=0.2)
    assert len(calls) < 8
    assert residual.norm() <= 0.2 * b.norm()
    for x in conjugate_gradient(lambda v: matrix @ v, torch.zeros_like(b), 10):
        assert torch.equal(x, torch.zeros_like(b))


# -- the Fisher matrix -----------------------------------------------------------------------------------------------


def test_fisher_products_are_those_of_the_dense_matrix_of_a_table() -> None:
    """Softmax of a row for each state: blocks sum_i w_i (diag p - p p^T) for the states i of that row."""
    generator = torch.Generator().manual_seed(0)
    table = torch.randn((3, 5), generator=generator, dtype=torch.float64).requires_grad_()
    idle = torch.zeros(2, dtype=torch.float64, requires_grad=True)  # the distribution does not depend on it
    states = torch.tensor([0, 2, 2, 0, 0])
    weights = torch.tensor([0.1, 0.3, 0.2, 0.3, 0.1]).double()
    logits = table[states].masked_fill(torch.tensor([False, True, False, False, False]), -torch.inf)
    log_rows = logits.log_softmax(-1)
    expected = torch.zeros((15, 15), dtype=torch.float64)
    for state, weight, distribution in zip(states.tolist(), weights, log_rows.detach().exp(), strict=True):
        block = slice(5 * state, 5 * state + 5)
        expected[block, block] += weight * (distribution.diag() - torch.outer(distribution, distribution))
    torch.testing.assert_close(dense_fisher(log_rows, weights, [table]), expected)
    fisher = Fisher(log_rows, weights, [table, idle])
    for _ in range(3):
        vector = torch.randn(17, generator=generator, dtype=torch.float64)
        got = fisher.times(vector)
        torch.testing.assert_close(got[:15], expected @ vector[:15])
        assert torch.equal(got[15:], torch.zeros(2, dtype=torch.float64))
        torch.testing.assert_close(fisher.along(vector), vector[:15] @ expected @ vector[:15])


def test_conjugate_gradients_with_the_products_of_one_graph_solve_the_dense_system() -> None:
    agent = moved(tiny_trpo(policy="gru", width=3))
    episodes = agent.collect()[:8]
    parameters = agent.policy.policy_parameters()
    agent.policy.double()
    generator = torch.Generator().manual_seed(0)
    weights = torch.rand(episodes.num_tokens, generator=generator, dtype=torch.float64)
    with agents.algorithms.trpo.twice_differentiable():
        log_rows = log_distribution(agent.policy, episodes)
    matrix = dense_fisher(log_rows, weights, parameters)
    fisher = Fisher(log_rows, weights, parameters)
    b = torch.randn(len(matrix), generator=generator, dtype=torch.float64)
    x, residual = conjugate_gradient(lambda v: fisher.times(v) + 0.1 * v, b, 400, tolerance=1e-10)
    damped = matrix + 0.1 * torch.eye(len(matrix), dtype=torch.float64)
    torch.testing.assert_close(x, torch.linalg.solve(damped, b), rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(fisher.along(x) + 0.1 * (x @ x), x @ (b - residual))


@pytest.mark.parametrize("kind", KINDS)
def test_fisher_products_are_those_of_the_hessian_of_the_kl(kind: Any) -> None:
    """Against central differences of the gradient of KL(pi_old || pi), in float64, for every kind of policy."""
    agent = moved(tiny_trpo(policy=kind))
    episodes = agent.collect()
    parameters = agent.policy.policy_parameters()
    agent.policy.double()
    if kind == "finetune":
        agent.policy.value_head.float()
    generator = torch.Generator().manual_seed(1)
    weights = torch.rand(episodes.num_tokens, generator=generator, dtype=torch.float64)
    vector = torch.randn(sum(p.numel() for p in parameters), generator=generator, dtype=torch.float64)
    vector /= vector.norm()
    with agents.algorithms.trpo.twice_differentiable():
        old = log_distribution(agent.policy, episodes)
    assert old.dtype == torch.float64
    fisher = Fisher(old, weights, parameters)
    got = fisher.times(vector)
    torch.testing.assert_close(fisher.along(vector), vector @ got)
    start = flat(parameters)
    gradients = []
    for sign in (1, -1):
        agents.algorithms.trpo.assign(parameters, start + sign * 1e-4 * vector)
        kl = (weights * exact(old.detach(), log_distribution(agent.policy, episodes))).sum()
        gradients.append(flat(torch.autograd.grad(kl, parameters, materialize_grads=True)))
    torch.testing.assert_close(got, (gradients[0] - gradients[1]) / 2e-4, rtol=1e-4, atol=1e-4 * got.abs().max().item())
    assert vector @ got > 0


# -- the step --------------------------------------------------------------------------------------------------------


def stepped(agent: TRPO) -> tuple[Episodes, Tensor, Tensor, Tensor, dict[str, float]]:
    """A batch, its advantages (B, T), the parameters before and after its update, and the metrics."""
    episodes = agent.collect()
    advantages, _ = agent.advantages(episodes, agent.rewards(episodes))
    before = flat(agent.policy.policy_parameters()).detach()
    metrics = agent.learn_from(agent.shape(episodes))
    return episodes, advantages, before, flat(agent.policy.policy_parameters()).detach(), metrics


@pytest.mark.slow
@pytest.mark.parametrize("fraction", [1.0, 0.04])
def test_the_step_is_the_natural_gradient(fraction: float) -> None:
    """(F + damping)^-1 g of dense matrices, F of the episodes drawn, at the length F of the whole batch allows."""
    numbers: dict[str, Any] = {"cg_iterations": 400, "cg_damping": 0.01, "max_kl": 1e-4, "fisher_fraction": fraction}
    agent = moved(tiny_trpo(seed=1, policy="gru", width=3, micro_batch_size=7, **numbers))
    episodes = agent.collect()
    generator = torch.Generator()
    generator.set_state(agent.generator.get_state())
    few = episodes[torch.randperm(48, generator=generator)[: 2 if fraction < 1 else 48]]
    advantages, _ = agent.advantages(episodes, agent.rewards(episodes))
    before = flat(agent.policy.policy_parameters()).detach()
    metrics = agent.learn_from(agent.shape(episodes))
    after = flat(agent.policy.policy_parameters()).detach()
    agents.algorithms.trpo.assign(agent.policy.policy_parameters(), before)
    mask = episodes.response_mask
    parameters = agent.policy.policy_parameters()

    def damped(some: Episodes) -> Tensor:
        weights = torch.full((some.num_tokens,), 1 / some.num_tokens)
        matrix = dense_fisher(log_distribution(agent.policy, some), weights, parameters)
        return matrix + 0.01 * torch.eye(len(before), dtype=torch.float64)

    chosen = log_distribution(agent.policy, episodes).gather(1, episodes.response_ids[mask].unsqueeze(1)).squeeze(1)
    gradient = flat(torch.autograd.grad((chosen * advantages[mask]).mean(), parameters)).double()
    whole = damped(episodes)
    direction = torch.linalg.solve(damped(few) if fraction < 1 else whole, gradient)
    full = direction * (2 * 1e-4 / (direction @ whole @ direction)).sqrt()
    assert cosine(after - before, full) > 0.999
    assert cosine(gradient, full) < 0.95  # or it would tell little
    if fraction < 1:  # nor is it the direction or the length that the other F gives
        assert cosine(torch.linalg.solve(whole, gradient), full) < 0.99
        assert abs((direction @ gradient) / (direction @ whole @ direction) - 1) > 0.05
    assert ((after - before).norm() / full.norm()).item() == pytest.approx(metrics["train/step_fraction"], rel=0.01)
    assert metrics["train/grad_norm"] == pytest.approx(gradient.norm().item(), rel=1e-3)
    assert metrics["train/cg_residual"] < 1e-3


@pytest.mark.parametrize("fraction", [1.0, 0.25])
def test_what_an_update_reads(fraction: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """The graphs that conjugate gradients need are made once, of the fraction; a trial is a forward of the batch."""
    agent = moved(tiny_trpo(max_kl=0.01, backtrack=0.5, cg_iterations=3, cg_damping=0.01, fisher_fraction=fraction))
    prices = iter([0.02, 0.02, 0.0])
    solve = torch.autograd.grad
    solves = []
    monkeypatch.setattr(agents.algorithms.trpo, "exact", lambda old, new: torch.full((len(old),), next(prices)))
    episodes = agent.collect()
    agent.policy.read(episodes)  # once before, for the gradients by which the forward is chosen
    monkeypatch.setattr(torch.autograd, "grad", lambda *xs, **kinds: solves.append(0) or solve(*xs, **kinds))
    generator = torch.Generator()
    generator.set_state(agent.generator.get_state())
    few = episodes[torch.randperm(48, generator=generator)[: math.ceil(48 * fraction)]]
    whole, part = (x.num_prompt_tokens + x.num_tokens for x in (episodes, few))
    agent.tokens = TokenCount()
    monkeypatch.setattr(agents.on_policy.OnPolicyAgent, "update", lambda *xs: {})
    agent.update(agent.shape(episodes))
    scale = fraction < 1  # otherwise the graphs are there
    assert agent.tokens.forward == (1 + scale + 3) * whole + part
    assert agent.tokens.backward == (1 + scale + 1) * whole + (1 + 3 * 2) * part
    assert len(solves) == 1 + scale + 1 + 1 + 3 * 2


def test_the_trust_region_shrinks_to_nothing() -> None:
    agent = tiny_trpo(max_kl=0.02, max_kl_schedule="linear", cg_damping=0.01)
    history = learn(agent, 100, total=600)
    assert len(history) > 3
    for step, metrics in zip([0, *(row["step"] for row in history)], history, strict=False):
        assert metrics["train/max_kl"] == pytest.approx(0.02 * (1 - step / 600))
        assert 0 <= metrics["train/kl"] <= metrics["train/max_kl"] * (1 + 1e-6)
    steady = tiny_trpo(max_kl=0.02, max_kl_schedule="constant")
    assert {row["train/max_kl"] for row in learn(steady, 2, total=600)} == {0.02}


@pytest.mark.parametrize(("kind", "max_kl"), [*((kind, 0.1) for kind in KINDS), ("gru", 0.001)])
def test_a_step_improves_the_surrogate_within_the_kl_or_is_not_taken(kind: Any, max_kl: float) -> None:
    agent = moved(tiny_trpo(policy=kind, max_kl=max_kl, cg_damping=0.01, micro_batch_size=20))
    episodes, advantages, before, after, metrics = stepped(agent)
    log_rows = []
    for weights in (before, after):
        agents.algorithms.trpo.assign(agent.policy.policy_parameters(), weights)
        log_rows.append(log_distribution(agent.policy, episodes).detach())
    old, new = log_rows
    kl = (old.exp() * (old - new)).sum(-1).mean().item()
    chosen = episodes.response_ids[episodes.response_mask].unsqueeze(1)
    ratio = (new - old).gather(1, chosen).squeeze(1).exp()
    gain = ((ratio - 1) * advantages[episodes.response_mask]).mean().item()
    assert metrics["train/kl"] == pytest.approx(kl, rel=1e-2, abs=1e-7)
    assert metrics["train/surrogate_gain"] == pytest.approx(gain, rel=1e-2, abs=1e-7)
    assert 0 <= metrics["train/step_fraction"] <= 1
    if metrics["train/step_fraction"] > 0:
        assert 0 < kl <= max_kl * (1 + 1e-3)
        assert gain > 0
    else:
        assert torch.equal(before, after)
    assert metrics["train/step_fraction"] > 0 or max_kl > 0.01  # where the model of the step is good, one is found


def test_the_line_search_takes_the_first_step_that_will_do(monkeypatch: pytest.MonkeyPatch) -> None:
    agent = moved(tiny_trpo(max_kl=0.01, backtrack=0.5))
    prices = iter([math.inf, 0.02, 0.0100001, 0.01, 0.0])
    monkeypatch.setattr(agents.algorithms.trpo, "exact", lambda old, new: torch.full((len(old),), next(prices)))
    *_, metrics = stepped(agent)
    assert metrics["train/step_fraction"] == 0.125
    assert metrics["train/kl"] == pytest.approx(0.01)


@pytest.mark.parametrize("kl", [math.inf, math.nan, 0.02])
def test_where_no_step_will_do_the_policy_stays(kl: float, monkeypatch: pytest.MonkeyPatch) -> None:
    agent = moved(tiny_trpo(line_search_steps=4))
    calls: list[int] = []
    monkeypatch.setattr(
        agents.algorithms.trpo, "exact", lambda old, new: calls.append(0) or torch.full((len(old),), kl)
    )
    head = agent.policy.value_head.weight.clone()
    _, _, before, after, metrics = stepped(agent)
    assert len(calls) == 4
    assert torch.equal(before, after)
    assert not torch.equal(head, agent.policy.value_head.weight)  # the critic learns all the same
    assert [metrics[f"train/{name}"] for name in ("kl", "step_fraction", "surrogate_gain")] == [0.0, 0.0, 0.0]


def test_a_step_that_does_not_gain_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    agent = moved(tiny_trpo())
    solve = agents.algorithms.trpo.conjugate_gradient

    def downhill(product: Any, b: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
        x, residual = solve(product, b, iterations)
        return -x, 2 * b - residual  # b - A (-x)

    monkeypatch.setattr(agents.algorithms.trpo, "conjugate_gradient", downhill)
    tried: list[float] = []
    monkeypatch.setattr(agents.algorithms.trpo, "exact", lambda old, new: tried.append(0) or exact(old, new))
    _, _, before, after, metrics = stepped(agent)
    assert len(tried) == 10
    assert torch.equal(before, after)
    assert metrics["train/step_fraction"] == 0


def test_without_advantages_nothing_moves() -> None:
    agent = tiny_trpo(tiny_envs(lambda prompts, completions, **_: [0.0] * len(prompts), kl_coef=0.0))
    _, _, before, after, metrics = stepped(agent)
    assert torch.equal(before, after)
    finite = {name: x for name, x in metrics.items() if name != "train/explained_variance"}  # of nothing, nan
    assert all(math.isfinite(x) for x in finite.values())


@pytest.mark.parametrize("micro_batch_size", [5, 11])
def test_accumulating_does_not_change_the_step(micro_batch_size: int) -> None:
    ends = []
    for size in (48, micro_batch_size):
        agent = moved(tiny_trpo(policy="gru", micro_batch_size=size, cg_damping=0.1, cg_iterations=5, max_kl=1e-3))
        *_, before, after, _ = stepped(agent)
        ends.append(after - before)
    torch.testing.assert_close(*ends, rtol=0, atol=0.01 * ends[0].abs().max().item())


@pytest.mark.slow
def test_the_gradient_is_that_of_the_objective() -> None:
    """So much damping that the step is along the plain gradient, which Tree knows exactly."""
    envs = tiny_envs()
    big = {"batch_size": 9_000, "micro_batch_size": 9_000, "epochs": 1, "minibatches": 1, "cg_iterations": 1}
    agent = moved(tiny_trpo(envs, policy="gru", gae_lambda=1.0, cg_damping=1e3, lr=0.0, **big), scale=0.4)
    torch.nn.init.zeros_(agent.policy.value_head.weight)
    torch.nn.init.zeros_(agent.policy.value_head.bias)
    tree = Tree.of(envs.task, "train")
    parameters = agent.policy.policy_parameters()

    def logits_of(episodes: Episodes) -> Tensor:
        return agent.policy.read(episodes).logits

    value, right = tree.gradient(logits_of, parameters)
    assert tree.evaluate(logits_of).kl.mean() > 0.02
    *_, before, after, _ = stepped(agent)
    assert cosine(after - before, flat(right)) > 0.99
    assert tree.evaluate(logits_of).value > value


# -- the expected direction ------------------------------------------------------------------------------------------


def states(episodes: Episodes) -> Tensor:
    """(n,) number of the state of each chosen token."""
    mask = episodes.response_mask
    t = torch.arange(episodes.response_mask.shape[1])
    before = torch.where(t < t.unsqueeze(1), episodes.response_ids.unsqueeze(1), -1)  # (B, T, T)
    index = episodes.prompt_index.view(-1, 1, 1).expand(*mask.shape, 1)
    return torch.cat([index, before], 2)[mask].unique(dim=0, return_inverse=True)[1]


def summed(x: Tensor, groups: Tensor) -> Tensor:
    """(n,) float64: for each entry the sum of x (n,) over its group."""
    return torch.zeros(len(x), dtype=torch.float64).index_add(0, groups, x.double())[groups]


def expected_gradient(
    agent: OnPolicyAgent, tree: Tree, *, own_values: bool = False, discounted: bool = False
) -> Tensor:
    """(p,) float64 of E sum_t A_t grad log pi(a_t|s_t), from the surrogate, over all responses.

    Args:
        agent: TRPO. tree: of the same task.
        own_values: takes V of the policy itself, E [G_t | s_t], for what the critic says.
        discounted: weighs the place t with gamma^t.
    """
    episodes = as_collected(agent, tree.episodes)
    mask = tree.episodes.response_mask
    gamma = tree.task.gamma
    weights = alone(agent, tree).weights.unsqueeze(1).expand_as(mask)[mask]
    rewards = agent.rewards(episodes)
    if own_values:
        returns = returns_to_go(rewards, mask, gamma)[mask]
        state = states(episodes)
        values = summed(weights * returns, state) / summed(weights, state)
        episodes = replace(episodes, values=torch.zeros(mask.shape).masked_scatter(mask, values.float()))
    count = len(episodes)
    batch = agent.read(Batch(episodes, *agent.advantages(episodes, rewards)), torch.tensor(count), count)
    weights = weights * gamma**batch.positions if discounted else weights
    gain = surrogate(replace(batch, weights=weights.float()))
    return flat(torch.autograd.grad(gain, parameters_of(agent), materialize_grads=True)).double()


@pytest.mark.parametrize("dense_kl", [True, False])
@pytest.mark.parametrize("gamma", [1.0, DISCOUNT])
@pytest.mark.parametrize("gae_lambda", [1.0, 0.5])
def test_the_expected_gradient_is_a2cs_and_so_are_its_biases(gae_lambda: float, gamma: float, dense_kl: bool) -> None:
    tree = Tree.of(TinyProblem(gamma=gamma, dense_kl=dense_kl).task, "train")
    agent = agent_of(TRPO, tree.task, gae_lambda=gae_lambda)
    other = agent_of(A2C, tree.task, gae_lambda=gae_lambda, vf_coef=0.0)
    found = expected_gradient(agent, tree)
    right = gradient(agent, tree)
    near = {"rtol": 0.0, "atol": 1e-5 * right.norm().item()}
    ways = alone(other, tree)
    tokens = ways.weights @ tree.episodes.lengths.double()
    torch.testing.assert_close(found, tokens * direction(other, tree, ways), **near)
    if gae_lambda < 1 or gamma < 1:
        assert cosine(found, right) < 0.99
    missing = 0.0 if dense_kl else late_term(agent, tree)
    mended = expected_gradient(agent, tree, own_values=gae_lambda < 1, discounted=True) + missing
    torch.testing.assert_close(mended, right, **near)


@pytest.mark.slow
def test_the_step_is_along_the_natural_gradient_of_the_objective() -> None:
    """(F + damping)^-1 grad J, both by sums over all responses."""
    envs = tiny_envs(horizon=2)
    big = {"batch_size": 6_000, "micro_batch_size": 6_000, "epochs": 1, "minibatches": 1, "cg_iterations": 30}
    agent = moved(tiny_trpo(envs, policy="gru", gae_lambda=1.0, cg_damping=0.02, max_kl=1e-4, **big), scale=0.4)
    tree = Tree.of(envs.task, "train")
    parameters = agent.policy.policy_parameters()
    episodes = tree.episodes
    log_rows = log_distribution(agent.policy, episodes)
    state = states(episodes)
    probs = alone(agent, tree).weights.unsqueeze(1).expand_as(episodes.response_mask)[episodes.response_mask]
    once = list({s: i for i, s in enumerate(state.tolist())}.values())  # a token of each state
    matrix = dense_fisher(log_rows[once], (summed(probs, state) / probs.sum())[once], parameters)
    plain = flat(tree.gradient(lambda few: agent.policy.read(few).logits, parameters)[1]).double()
    natural = torch.linalg.solve(matrix + 0.02 * torch.eye(len(plain)), plain)
    *_, before, after, _ = stepped(agent)
    assert cosine(after - before, natural) > 0.99
    assert cosine(plain, natural) < 0.9


# -- the loop --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_at_first_the_kl_is_zero_and_the_ratio_one(kind: Any) -> None:
    agent = tiny_trpo(policy=kind)
    first, second = learn(agent, 2)
    assert abs(first["rollout/kl"]) < 1e-4
    assert abs(first["rollout/exact_kl"]) < 1e-4
    for metrics in (first, second):
        assert metrics["train/ratio_error"] < 1e-5
        assert 0 <= metrics["train/kl"] <= 0.01
        assert (metrics["train/surrogate_gain"] > 0) == (metrics["train/step_fraction"] > 0)
        assert metrics["train/updates"] == 4
    assert second["rollout/exact_kl"] > 0


def test_the_critic_learns_and_the_distribution_does_not_notice(monkeypatch: pytest.MonkeyPatch) -> None:
    envs = tiny_envs(lambda prompts, completions, **_: [3.0] * len(prompts), kl_coef=0.0)
    for critic in ("shared", "reference"):
        agent = tiny_trpo(envs, critic=critic, lr=5e-2, lr_schedule="constant", batch_size=24)
        monkeypatch.setattr(agent, "natural_step", lambda *xs: {})
        before = flat(agent.policy.policy_parameters())
        rest = flat(agent.policy.critic_parameters())
        history = learn(agent, 10)
        assert torch.equal(before, flat(agent.policy.policy_parameters()))
        after = flat(agent.policy.critic_parameters())
        assert (after != rest).float().mean() > 0.8
        assert history[-1]["train/value_loss"] < 0.05 * history[0]["train/value_loss"]
        assert all(p.requires_grad for p in agent.policy.policy_parameters())


@pytest.mark.parametrize("sampler", [Sampler(temperature=0.7), Sampler(top_k=3), Sampler(top_p=0.8)])
def test_the_step_is_of_the_distribution_that_sampled(sampler: Sampler) -> None:
    agent = tiny_trpo(sampler=sampler, cg_damping=0.01)
    for metrics in learn(agent, 3):
        assert metrics["train/ratio_error"] < 1e-5
        assert all(math.isfinite(x) for x in metrics.values())
        assert metrics["train/kl"] <= 0.01
    assert flat(agent.policy.policy_parameters()).isfinite().all()


@pytest.mark.slow
def test_trpo_learns_and_never_passes_the_optimum() -> None:
    envs = tiny_envs()
    agent = tiny_trpo(envs, batch_size=96, max_kl=0.05, cg_iterations=5, fisher_fraction=0.5, max_kl_schedule="linear")
    tree = Tree.of(envs.task, "train")
    logits_of = make_episode_logits(agent.policy.lm)
    curve = []
    reference = tree.evaluate(logits_of).value
    best = tree.solve().value
    agent.learn(5000, lambda step, metrics: curve.append(tree.evaluate(logits_of).value))
    assert best > reference + 0.1
    assert max(curve) <= best + 1e-5
    share = (curve[-1] - reference) / (best - reference)
    assert share > 0.8, f"{share:.2f} of the gain from {reference:.2f} to {best:.2f}"


def test_an_interrupted_run_goes_on_to_the_same_curve(tmp_path: Any) -> None:
    def agent() -> TRPO:
        return tiny_trpo(policy="gru", kl_controller="adaptive", kl_horizon=100.0)

    whole = learn(agent(), 4, total=600)
    first = agent()
    second = agent()
    curve = learn(first, 2, total=600)
    first.save(tmp_path / "checkpoint")
    learn(second, 1, total=600)  # a loaded agent forgets what it was
    second.load(tmp_path / "checkpoint")
    assert curve + learn(second, 2, total=600) == whole
    observation, _ = second.envs.reset(seed=1)
    ids, mask = (torch.as_tensor(observation[name]) for name in ("input_ids", "attention_mask"))
    row = ids[:, mask[0].bool()]
    position = torch.tensor([int(mask.sum()) - 1])
    expected = second.policy.read_at(row, torch.zeros(1, dtype=torch.int64), position).logits.argmax(-1)
    assert second.predict(observation, deterministic=True)[0] == expected.numpy()


def test_the_global_generator_is_not_touched() -> None:
    state = torch.get_rng_state()
    runs = [learn(tiny_trpo(policy="mlp"), 2) for _ in range(2)]
    assert torch.equal(torch.get_rng_state(), state)
    assert runs[0] == runs[1]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_kl", 0.0),
        ("max_kl_schedule", "cubic"),
        ("fisher_fraction", 0.0),
        ("fisher_fraction", 1.5),
        ("cg_iterations", 0),
        ("cg_damping", -1.0),
        ("line_search_steps", 0),
        ("backtrack", 0.0),
        ("backtrack", 1.5),
        ("gae_lambda", 1.1),
    ],
)
def test_bad_numbers_are_told(name: str, value: Any) -> None:
    with pytest.raises((InvalidArgumentError, UnknownNameError), match=f"`{name}`"):
        TRPOConfig(**{name: value})
