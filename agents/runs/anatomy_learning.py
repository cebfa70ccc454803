"""What keeps the agent of a run from getting better: its critic, the class of its policy, and its estimator.

All against exact numbers, from all responses of a task that has few.

Shapes: X prompts, N_t prefixes of t tokens of one prompt, A legal tokens, T steps, P parameters, M batches.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from agents.algorithms.trpo import Fisher, conjugate_gradient, flat, twice_differentiable
from agents.on_policy import OnPolicyAgent
from agents.policies.actor_critic import TrainablePolicy
from agents.update import sum_gradients
from lmgym.envs.vector import RLHFVectorEnv
from lmgym.episodes import Episodes
from lmgym.models.sampling import Sampler
from lmgym.optimum.anatomy import CriticError, GradientQuality, critic_targets, soft_values, visits
from lmgym.optimum.tree import EpisodeLogits, Tree, TreePolicy

EPISODES = 8192  # that gradients are taken of, in batches as large as in training
MIN_BATCHES = 16  # the spread of fewer says little
MAX_BATCHES = 256
CG_ITERATIONS = 20  # more come closer, and take longer
_TOLERANCE = 1e-4  # of the conjugate gradients, in float32
_NOTHING_LEFT = 1e-12  # mean squared advantage of a policy that is optimal up to rounding


@dataclass(frozen=True, eq=False)
class Known:
    """A policy and all responses of its task.

    Attributes:
        tree: all responses. policy, sampler: what draws. logits: of the distributions that tokens are drawn from,
            differentiable.
        log_probs: (X, N_t, A) of each level.
    """

    tree: Tree
    policy: TrainablePolicy
    sampler: Sampler
    logits: EpisodeLogits
    log_probs: list[Tensor]

    @classmethod
    def of(cls, tree: Tree, policy: TrainablePolicy, sampler: Sampler) -> Known:
        """Reads the policy at every prefix."""

        def logits(episodes: Episodes) -> Tensor:
            episodes = episodes.to(policy.device)
            columns = episodes.response_mask.nonzero()[:, 1]
            return sampler.adjust_rows(policy.read(episodes).logits, columns)

        with torch.no_grad():
            return cls(tree, policy, sampler, logits, tree.responses.read(logits))


def measure_critic(known: Known) -> dict[str, Any]:
    """The critic beside V^pi (`CriticError`)."""
    targets = critic_targets(known.tree, known.log_probs)
    values = known.tree.responses.read_values(lambda e: known.policy.values(e.to(known.policy.device)))
    return asdict(CriticError.of(values, targets, visits(known.tree.responses, known.log_probs)))


def measure_class(known: Known, iterations: int = CG_ITERATIONS) -> dict[str, Any]:
    """How much of the way up the policy's weights can go, to first order.

    With A the soft advantage (`soft_values`), the steepest way up for a table of all states gains E A^2 at first. The
    weights can change log pi only along the gradients of log pi, so that the most that they gain is g F^-1 g, with g
    the gradient of J and F the Fisher matrix: the share of it is the R^2 of A regressed on these gradients (compatible
    function approximation, Sutton et al. 2000; Kakade 2001). F^-1 g comes by conjugate gradients, which approach it
    from below.

    Args:
        known: the policy. iterations: of the conjugate gradients, at most.

    Returns:
        `share`, in [0, 1], or None of a policy that nothing can improve; `gradient_norm`; `squared_advantage`, E A^2.
    """
    tree = known.tree
    task = tree.task
    discounts = [task.gamma**t / len(tree.prompts) for t in range(len(known.log_probs))]
    weights = [d * w for d, w in zip(discounts, visits(tree.responses, known.log_probs), strict=True)]
    advantages = soft_values(tree, known.log_probs).advantages
    squared = sum(
        (w.unsqueeze(-1) * p.exp() * a.square()).sum().item()
        for w, p, a in zip(weights, known.log_probs, advantages, strict=True)
    )
    parameters = known.policy.policy_parameters()
    gradient = flat(tree.gradient(known.logits, parameters)[1])
    found: dict[str, Any] = {"gradient_norm": gradient.norm().item(), "squared_advantage": squared, "share": None}
    if squared < _NOTHING_LEFT or not found["gradient_norm"]:
        return found
    fishers = _make_fishers(known, weights, parameters)

    def product(vector: Tensor) -> Tensor:
        return sum((fisher.times(vector) for fisher in fishers), torch.zeros_like(vector))

    x, _ = conjugate_gradient(product, gradient, iterations, _TOLERANCE)
    found["share"] = min(max((gradient @ x).item() / squared, 0.0), 1.0)
    return found


def _make_fishers(known: Known, weights: list[Tensor], parameters: Any) -> list[Fisher]:
    """The Fisher matrices of parts of all states, each state once, whose sum is that of the policy."""
    responses = known.tree.responses
    fishers = []
    with twice_differentiable():
        for first, rows, log_probs in responses.read_chunks(known.logits):
            own = []
            mass = []
            for t, (_, chosen, nodes) in enumerate(responses.find_first_rows(first, len(rows))):
                own.append(log_probs[chosen, t])
                mass.append(weights[t].flatten()[nodes])
            fishers.append(Fisher(torch.cat(own), torch.cat(mass), parameters))
    return fishers


def measure_estimator(
    agent: OnPolicyAgent, envs: RLHFVectorEnv, known: Known, seed: int, episodes: int = EPISODES
) -> dict[str, Any]:
    """The agent's expected update beside the gradient of J: cosine, norm and noise (`GradientQuality`).

    The update is the gradient of the agent's own loss on batches that it collects and shapes as in training, before any
    optimiser.

    Args:
        agent: of the run. envs: a vector env of the split of the tree, with the agent's rows; its stream is drawn from.
        known: its policy. seed: of the batches. episodes: that they have, all M together.

    Returns:
        By name: `update`, all of the loss; `policy`, without the loss of the critic, which pulls at weights that it
        shares with the policy; `exact_values`, the same with V^pi instead of the critic. None where there is none.
    """
    twin = _make_twin(agent, envs, seed)
    variants: dict[str, OnPolicyAgent] = {"update": twin}
    if twin.uses_critic and getattr(twin.config, "vf_coef", False):
        variants["policy"] = _make_twin(agent, envs, seed, vf_coef=0.0)
    gradient = flat(known.tree.gradient(known.logits, known.policy.policy_parameters())[1])
    exact = None
    if twin.uses_critic and not twin.config.recompute_log_probs:
        targets = critic_targets(known.tree, known.log_probs)
        exact = TreePolicy(known.tree.responses, known.log_probs, targets)
        variants["exact_values"] = variants.get("policy", twin)
    found: dict[str, list[Tensor]] = {name: [] for name in variants}
    batches = min(max(episodes // twin.config.batch_size, MIN_BATCHES), MAX_BATCHES)
    for _ in range(batches):
        collected = twin.collect()
        for name, variant in variants.items():
            given = collected
            if name == "exact_values" and exact is not None:
                given = replace(collected, values=exact.values_along(collected.to("cpu")).to(collected.log_probs))
            found[name].append(_update_of(variant, given))
    qualities = {name: asdict(GradientQuality.of_samples(torch.stack(g), gradient)) for name, g in found.items()}
    return {"update": None, "policy": None, "exact_values": None, **qualities, "batches": batches}


def _make_twin(agent: OnPolicyAgent, envs: RLHFVectorEnv, seed: int, **changes: Any) -> OnPolicyAgent:
    """An agent with the same weights in another env, and with some numbers changed."""
    config = replace(agent.config, **changes)
    twin = type(agent)(envs, config, seed=seed, sampler=agent.sampler)
    twin.policy.load_state_dict(agent.policy.state_dict())
    twin.num_timesteps = agent.num_timesteps
    return twin


def _update_of(agent: OnPolicyAgent, episodes: Episodes) -> Tensor:
    """(P,) the direction in which an agent's loss moves the weights of its policy, before any optimiser."""
    batch = agent.shape(episodes)
    sum_gradients(agent.losses(batch), agent.policy.parameters())
    parameters = agent.policy.policy_parameters()
    return -flat([torch.zeros_like(p) if p.grad is None else p.grad for p in parameters])
