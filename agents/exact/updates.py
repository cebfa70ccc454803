"""The exact expected update of any agent's loss, and its exact spread, by enumeration of all batches of a small task.

Shapes: X prompts, R responses of all prompts together, T response columns, W ways, G responses of a group, P numbers in
all weights of the policy.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from agents.algorithms.trpo import flat
from agents.batch import Batch
from agents.exact.batches import Ways, enumerate_batches, judge_each
from agents.on_policy import OnPolicyAgent
from lmgym.episodes import Episodes
from lmgym.errors import InvalidArgumentError
from lmgym.optimum.anatomy import GradientQuality
from lmgym.optimum.tree import EpisodeLogits, Tree

_SAME = 1e-9  # numbers so close, relative to their size, are the same


@dataclass(frozen=True, eq=False)
class Updates:
    """The exact distribution of an update, which is the direction that a loss moves the policy's weights in.

    Attributes:
        probs: (W,) of the batches. updates: (W, P) float64, of each, before any optimiser.
    """

    probs: Tensor
    updates: Tensor

    @property
    def mean(self) -> Tensor:
        """(P,) the expected update."""
        return self.probs @ self.updates


def policy_logits(agent: OnPolicyAgent) -> EpisodeLogits:
    """The logits that an agent's tokens are drawn from, differentiable."""

    def logits(episodes: Episodes) -> Tensor:
        columns = episodes.response_mask.nonzero()[:, 1]
        return agent.sampler.adjust_rows(agent.policy.read(episodes).logits, columns)

    return logits


def exact_gradient(agent: OnPolicyAgent, tree: Tree) -> Tensor:
    """(P,) float64, the gradient of J by the weights of an agent's policy."""
    return flat(tree.gradient(policy_logits(agent), agent.policy.policy_parameters())[1]).double()


def expected_update(agent: OnPolicyAgent, tree: Tree, behaviour: EpisodeLogits | None = None) -> Tensor:
    """(P,) float64: the expected update of an agent's loss, on a batch of many groups.

    Means over tokens are over the expected number of tokens, as those of a large batch are. Groups come in by how many
    of their responses have the same rewards, so that groups of eight are no matter where scores are few.

    Args:
        agent: any that learns with a loss. Its policy may be a network.
        tree: all responses to the prompts that it learns from.
        behaviour: what the responses were sampled from (`Tree.evaluate`); None is the agent's own policy.

    Raises:
        InvalidArgumentError: where a group feels the others of its batch, as under whitening: `enumerate_updates` has
            batches of a fixed size.
    """
    with _undisturbed(agent):
        _check_groups_are_apart(agent, _as_sampled(agent, tree, behaviour))
    return expect(agent, tree, behaviour)


def expect(agent: OnPolicyAgent, tree: Tree, behaviour: EpisodeLogits | None = None) -> Tensor:
    """`expected_update` of an agent that is known to judge groups by themselves."""
    with _undisturbed(agent):
        every = _as_sampled(agent, tree, behaviour)
        ways = judge_each(_probs(every, tree), _classify(agent, every), agent.config.responses)
        loss = _expected_loss(agent, every, ways)
        return -_gradient(agent, loss)


def enumerate_updates(
    agent: OnPolicyAgent, tree: Tree, groups: int = 1, behaviour: EpisodeLogits | None = None
) -> Updates:
    """Every batch of some groups, and the update that each gives: a slow twin of `expected_update`, and its spread.

    Args:
        agent, tree, behaviour: as in `expected_update`. groups: of a batch; each is of one response where the agent
            compares none.
    """
    found = []
    with _undisturbed(agent):
        every = _as_sampled(agent, tree, behaviour)
        ways = enumerate_batches(_probs(every, tree), agent.config.responses, groups)
        for rows in ways.rows:
            loss = sum(loss for loss, _ in agent.losses(_shape(agent, every[rows])))
            assert isinstance(loss, Tensor)
            found.append(-_gradient(agent, loss))
    return Updates(ways.probs, torch.stack(found))


def measure_updates(
    agent: OnPolicyAgent, tree: Tree, groups: int = 1, behaviour: EpisodeLogits | None = None
) -> GradientQuality:
    """Bias and variance of an agent's update against the gradient of J, exact (`enumerate_updates`)."""
    found = enumerate_updates(agent, tree, groups, behaviour)
    return GradientQuality.of(found.probs, found.updates, exact_gradient(agent, tree))


@contextmanager
def _undisturbed(agent: OnPolicyAgent) -> Iterator[None]:
    """What an agent carries from batch to batch, and its count of tokens, come out of this block as they went in."""
    held = {name: getattr(agent, name) for name in agent.carried} | {"tokens": copy(agent.tokens)}
    try:
        yield
    finally:
        for name, value in held.items():
            setattr(agent, name, value)


def _shape(agent: OnPolicyAgent, episodes: Episodes) -> Batch:
    """Values, rewards and advantages, as if the agent had not seen these episodes before."""
    with _undisturbed(agent):
        batch = agent.shape(episodes)
    if len(batch) != len(episodes):
        raise InvalidArgumentError(
            f"`agent` must learn from every episode that it samples, and {agent.name} with these numbers drops some: "
            "switch its dynamic sampling off (`sampling_rounds=1`)."
        )
    return batch


@torch.no_grad()
def _as_sampled(agent: OnPolicyAgent, tree: Tree, behaviour: EpisodeLogits | None) -> Episodes:
    """All R responses in float64, with log-probs of what samples them and values of the agent's critic."""
    mask = tree.episodes.response_mask
    own = tree.responses.read(behaviour or policy_logits(agent))

    def columns(levels: list[Tensor]) -> Tensor:
        picked = [tree.responses.pick_column(levels, t) for t in range(mask.shape[1])]
        return torch.stack(picked, -1).flatten(0, 1)

    return replace(
        tree.episodes,
        log_probs=columns(own),
        ref_log_probs=columns(tree.reference),
        scores=tree.scores.flatten(),
        values=agent.policy.values(tree.episodes).double(),
    )


def _probs(every: Episodes, tree: Tree) -> Tensor:
    """(X, R / X) of the responses to each prompt, as sampled."""
    return every.log_probs.sum(1).exp().view(tree.scores.shape)


def _classify(agent: OnPolicyAgent, every: Episodes) -> Tensor:
    """(R,) int64: responses of one class do the same to the advantages of the others in their group.

    They have the same return; where that is not enough for the agent, the same rewards token by token.
    """
    rewards = agent.rewards(every)
    group = agent.config.responses
    first = torch.zeros(len(every), dtype=torch.int64)
    for keys in (rewards.sum(1, keepdim=True), torch.cat([rewards, every.lengths.unsqueeze(1)], 1)):
        classes = keys.unique(dim=0, return_inverse=True)[1]
        if group == 1:
            break
        member = torch.zeros(len(every), dtype=torch.int64).scatter(0, classes, torch.arange(len(every)))
        beside = []
        for others in (torch.arange(len(every)), member[classes]):
            rows = torch.stack([first, *[others] * (group - 1)], 1).flatten()
            beside.append(_shape(agent, every[rows]).advantages[::group])
        if _is_same(*beside):
            break
    return classes


def _expected_loss(agent: OnPolicyAgent, every: Episodes, ways: Ways) -> Tensor:
    """() the sum over ways of their probabilities times the loss of the first response of each."""
    group = ways.rows.shape[1]
    batch = _shape(agent, every[ways.rows.flatten()])[::group]
    mask = batch.episodes.response_mask
    weights = ways.probs.unsqueeze(1).expand_as(mask)[mask]
    total = weights.sum()  # the expected tokens of a response
    read = agent.read(batch, total, len(batch))
    return agent.loss(replace(read, weights=weights / total, episode_weights=weights))[0]


def _gradient(agent: OnPolicyAgent, loss: Tensor) -> Tensor:
    parameters = agent.policy.policy_parameters()
    return flat(torch.autograd.grad(loss, parameters, materialize_grads=True)).double()


def _check_groups_are_apart(agent: OnPolicyAgent, every: Episodes) -> None:
    """Looks whether two groups get the same advantages together as alone, and the loss is that of what is read."""
    group = agent.config.responses
    spread = torch.arange(2 * group) * (len(every) - 1) // (2 * group - 1)
    both = _shape(agent, every[spread])
    alone = [_shape(agent, every[rows]) for rows in spread.split(group)]
    advantages = torch.cat([batch.advantages for batch in alone])
    returns = torch.cat([batch.returns for batch in alone])
    read = agent.read(both, both.episodes.lengths.sum(), len(both))
    losses = torch.stack([loss for loss, _ in agent.losses(both)])
    same = _is_same(both.advantages, advantages) and _is_same(both.returns, returns)
    if not (same and _is_same(losses.sum(), agent.loss(read)[0])):
        raise InvalidArgumentError(
            f"`agent` must judge a group by itself for the expected update of a large batch, and {agent.name} with "
            "these numbers looks at the whole batch: take `enumerate_updates`, or switch its whitening off."
        )


def _is_same(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, rtol=_SAME, atol=_SAME)
