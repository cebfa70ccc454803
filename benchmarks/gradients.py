"""Bias and variance of the gradients that ways of handling the KL give, all exact: `python -m benchmarks.gradients`.

The task is so small that every response can be written down, so the expectation and the covariance of what one episode
tells are sums over responses, not means over samples. They are compared with the gradient of J itself.

Shapes: R responses, T columns, V vocabulary, P parameters.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from lmgym.automata import phrases
from lmgym.episodes import Episodes
from lmgym.kl import exact, k2, k3
from lmgym.models.tables import dirichlet_rows, markov_lm
from lmgym.optimum.anatomy import GradientQuality
from lmgym.optimum.tree import Tree, make_episode_logits
from lmgym.rewards.automaton import AutomatonReward
from lmgym.tasks import Task

SYMBOLS = ["a", "b", "c"]
HORIZON = 5
KL_COEF = 0.2
DISTANCES = (0.1, 1.0, 3.0)  # nats
DIRECTIONS = 10


def make_task() -> Task:
    """364 responses of at most 5 tokens; "a b" and "c c" pay 1/2 each, and the reference is a random table."""
    rows = dirichlet_rows(np.random.default_rng(0), 4, 4, 2.0)
    return Task(
        name="gradients",
        model=markov_lm(rows, SYMBOLS),
        reward=AutomatonReward(phrases([[1, 2], [3, 3]], 4)),
        prompts={"test": ["b"]},
        kl_coef=KL_COEF,
        max_new_tokens=HORIZON,
    )


def states(episodes: Episodes) -> Tensor:
    """(n,) which of the T * V rows of a table each chosen token is drawn from: by its position and the token before."""
    before = torch.cat([episodes.prompt_ids[:, -1:], episodes.response_ids[:, :-1]], 1)
    positions = torch.arange(before.shape[1]) * (len(SYMBOLS) + 1)
    return (positions + before)[episodes.response_mask]


def table_logits(table: Tensor, episodes: Episodes) -> Tensor:
    """(n, V) logits at every chosen token, from a table (T, V, V) by position and last token."""
    return table.flatten(0, 1)[states(episodes)]


def reference_table(task: Task) -> Tensor:
    """(T, V, V) float64: the table of the reference, the same at every position."""
    probs = task.reference("cpu").model.probs(torch.arange(len(SYMBOLS) + 1))
    return probs.double().log().repeat(task.max_new_tokens, 1, 1)


def at_distance(tree: Tree, direction: Tensor, nats: float) -> Tensor:
    """(T, V, V) logits: the reference's plus so much of a direction that KL(pi || pi_ref) is `nats`, by bisection."""
    start = reference_table(tree.task)
    low = 0.0
    high = 16.0
    for _ in range(50):
        middle = (low + high) / 2
        far = tree.evaluate(partial(table_logits, start + middle * direction)).kl.item() > nats
        low, high = (low, middle) if far else (middle, high)
    return start + high * direction


def padded(mask: Tensor, numbers: Tensor) -> Tensor:
    """(R, T, ...) from numbers (n, ...) of the chosen tokens; 0 off the mask."""
    return numbers.new_zeros(*mask.shape, *numbers.shape[1:]).masked_scatter(
        mask.view(*mask.shape, *[1] * (numbers.ndim - 1)), numbers
    )


def to_go(x: Tensor) -> Tensor:
    """(R, T): sums of (R, T) from each column to the last."""
    return x.flip(1).cumsum(1).flip(1)


@dataclass(frozen=True, eq=False)
class Facts:
    """What the estimators are made of, for every response, at one policy.

    Attributes:
        probs: (R,) pi(y).
        score_function: (R, T, P) gradients of log pi(a_t|s_t); 0 off the mask, as all that follows.
        kl_gradient: (R, T, P) gradients of KL(pi(.|s_t) || pi_ref(.|s_t)), the state held.
        log_ratio: (R, T) nats, log pi / pi_ref of the chosen tokens.
        scores: (R,).
        prefixes: (R, T) number of the state s_t of each column: the responses that share it have the same one.
        mask: (R, T) bool.
        kl_coef: price of a nat.
    """

    probs: Tensor
    score_function: Tensor
    kl_gradient: Tensor
    log_ratio: Tensor
    scores: Tensor
    prefixes: Tensor
    mask: Tensor
    kl_coef: float

    def value(self, returns: Tensor) -> Tensor:
        """(R, T): the expectation of (R, T) returns given the state of their column, 0 off the mask."""
        result = torch.zeros_like(returns)
        for t in range(returns.shape[1]):
            total, mass = torch.zeros((2, int(self.prefixes.max()) + 1), dtype=torch.float64)
            rows = self.mask[:, t]
            states = self.prefixes[rows, t]
            probs = self.probs[rows]
            total.index_add_(0, states, probs * returns[rows, t])
            mass.index_add_(0, states, probs)
            result[rows, t] = (total / mass)[states]
        return result


def facts(tree: Tree, table: Tensor) -> Facts:
    """Looks at a policy at every chosen token of every response. Gradients are those of a softmax, in closed form."""
    episodes = tree.episodes
    mask = tree.episodes.response_mask
    tokens = episodes.response_ids[mask].unsqueeze(1)
    log_ref = make_episode_logits(tree.task.reference("cpu"))(episodes).double().log_softmax(-1)
    log_pi = table_logits(table, episodes).log_softmax(-1)
    probs = log_pi.exp()
    log_ratio = log_pi - log_ref

    def by_parameter(by_logit: Tensor) -> Tensor:
        jacobian = torch.zeros((len(by_logit), *table.flatten(0, 1).shape), dtype=torch.float64)
        jacobian[torch.arange(len(by_logit)), states(episodes)] = by_logit
        return padded(mask, jacobian.flatten(1))

    prefixes = [episodes.response_ids[:, :t].unique(dim=0, return_inverse=True)[1] for t in range(1, mask.shape[1])]
    return Facts(
        probs=padded(mask, log_pi.gather(1, tokens).squeeze(1)).sum(1).exp(),
        score_function=by_parameter(torch.zeros_like(probs).scatter(1, tokens, 1.0) - probs),
        kl_gradient=by_parameter(probs * (log_ratio - exact(log_pi, log_ref).unsqueeze(1))),
        log_ratio=padded(mask, log_ratio.gather(1, tokens).squeeze(1)),
        scores=tree.scores[0],
        prefixes=torch.stack([torch.zeros_like(episodes.prompt_index), *prefixes], 1),
        mask=mask,
        kl_coef=tree.task.kl_coef,
    )


def estimates(f: Facts, *, baseline: bool = False) -> dict[str, Tensor]:
    """(R, P) by name: what each way of handling the KL takes for the gradient of J, from one episode, at gamma = 1.

    Args:
        f: of the policy.
        baseline: subtract the exact value function of what is credited to the actions, from REINFORCE's returns.
    """
    total_ratio = f.log_ratio.sum(1, keepdim=True)

    def reinforce(returns: Tensor) -> Tensor:
        returns = returns * f.mask
        credit = returns - f.value(returns) if baseline else returns
        return (credit.unsqueeze(-1) * f.score_function).sum(1)

    def weighted(weights: Tensor) -> Tensor:
        return (weights.unsqueeze(-1) * f.score_function).sum(1)

    score = f.scores.unsqueeze(1)
    by_score = reinforce(score.expand_as(f.log_ratio))
    whole = weighted(total_ratio.expand_as(f.log_ratio))
    return {
        "k1 in the reward": reinforce(score - f.kl_coef * to_go(f.log_ratio)),
        "k1 in the loss": by_score - f.kl_coef * f.score_function.sum(1),
        "k2 in the loss, a token": by_score - f.kl_coef * weighted(f.log_ratio),
        "k2 in the loss, whole response": by_score - f.kl_coef * whole,
        "k3 in the loss, a token": by_score - f.kl_coef * weighted(-torch.expm1(-f.log_ratio)),
        "exact KL in the loss, a state": by_score - f.kl_coef * f.kl_gradient.sum(1),
    }


def surrogates(table: Tensor, tree: Tree, episodes: Episodes) -> dict[str, Tensor]:
    """Scalar by name: the losses of episodes, summed, as a training loop writes them; autograd does the rest."""
    mask = episodes.response_mask
    log_pi = table_logits(table, episodes).log_softmax(-1)
    log_ref = make_episode_logits(tree.task.reference("cpu"))(episodes).double().log_softmax(-1)
    tokens = episodes.response_ids[mask].unsqueeze(1)
    log_probs = padded(mask, log_pi.gather(1, tokens).squeeze(1))
    log_ratio = log_probs - padded(mask, log_ref.gather(1, tokens).squeeze(1))
    b = tree.task.kl_coef
    score = episodes.scores.double().unsqueeze(1)
    by_score = -(log_probs * score).sum()
    return {
        "k1 in the reward": -(log_probs * (score - b * to_go(log_ratio.detach()))).sum(),
        "k1 in the loss": by_score + b * log_ratio.sum(),
        "k2 in the loss, a token": by_score + b * k2(log_ratio).sum(),
        "k2 in the loss, whole response": by_score + b * k2(log_ratio.sum(1)).sum(),
        "k3 in the loss, a token": by_score + b * k3(log_ratio).sum(),
        "exact KL in the loss, a state": by_score + b * exact(log_pi, log_ref).sum(),
    }


def exact_gradient(tree: Tree, table: Tensor) -> Tensor:
    """(P,) of J."""
    parameter = table.clone().requires_grad_()
    return tree.gradient(partial(table_logits, parameter), [parameter])[1][0].flatten()


def directions(tree: Tree, count: int, seed: int) -> list[Tensor]:
    """Standard normal (T, V, V) tables."""
    generator = torch.Generator().manual_seed(seed)
    shape = reference_table(tree.task).shape
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(count)]


def sample_error(tree: Tree, table: Tensor, count: int, seed: int) -> float:
    """The largest distance, in standard errors, of means of the losses' sampled gradients from the exact ones."""
    f = facts(tree, table)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.multinomial(f.probs, count, replacement=True, generator=generator)
    parameter = table.clone().requires_grad_()
    worst = 0.0
    losses = surrogates(parameter, tree, tree.episodes[drawn])
    for name, estimate in estimates(f).items():
        (gradient,) = torch.autograd.grad(-losses[name] / count, parameter, retain_graph=True)
        mean = f.probs @ estimate
        error = (f.probs @ (estimate - mean).square() / count).sqrt()
        moved = error > 1e-12
        worst = max(worst, float(((gradient.flatten() - mean)[moved] / error[moved]).abs().max()))
    return worst


def measure() -> Iterator[tuple[float, str, float, float, float, float]]:
    """Distance in nats, estimator, and medians over policies: bias, cosine, variance, variance with a baseline."""
    tree = Tree.of(make_task())
    for nats in DISTANCES:
        found: dict[str, list[list[float]]] = {}
        for direction in directions(tree, DIRECTIONS, seed=0):
            table = at_distance(tree, direction, nats)
            f = facts(tree, table)
            gradient = exact_gradient(tree, table)
            based = estimates(f, baseline=True)
            for name, estimate in estimates(f).items():
                plain, other = (GradientQuality.of(f.probs, g, gradient) for g in (estimate, based[name]))
                found.setdefault(name, []).append([plain.bias, plain.cosine, plain.variance, other.variance])
        for name, numbers in found.items():
            bias, cosine, variance, with_value = map(statistics.median, zip(*numbers, strict=True))
            yield nats, name, bias, cosine, variance, with_value


def main() -> None:
    """Prints the table, and how far samples are from it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=100_000, help="of the check by sampling")
    args = parser.parse_args()
    print("| KL (nats) | estimator | bias | cosine | variance | variance, with V |\n|---|---|---|---|---|---|")
    for nats, name, bias, cosine, variance, with_value in measure():
        print(f"| {nats:g} | {name} | {bias:.3f} | {cosine:.3f} | {variance:.1f} | {with_value:.1f} |")
    tree = Tree.of(make_task())
    (direction,) = directions(tree, 1, seed=0)
    error = max(sample_error(tree, at_distance(tree, direction, nats), args.samples, seed=1) for nats in DISTANCES)
    print(f"\n{args.samples:,} sampled episodes: every mean is within {error:.1f} standard errors of its expectation.")


if __name__ == "__main__":
    main()
