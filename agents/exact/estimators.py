"""Bias and variance of policy gradients with any baseline or critic, in closed form, for a policy that is a table.

The estimator is sum_t A_t grad log pi(a_t|s_t) of a response. States of a table share no weights, and a response comes
through each once: the squared length of an estimate is the sum of its tokens'.

Shapes: X prompts, R responses of all prompts together, T response columns, S states, A legal tokens, N_t prefixes of t
tokens of one prompt, n chosen tokens, P = S * A weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from agents.advantages import gae
from agents.exact.table import TablePolicy
from lmgym.kl import token_rewards
from lmgym.optimum.anatomy import GradientQuality, critic_targets, soft_values
from lmgym.optimum.tree import Tree


class TableEstimators:
    """What estimators of the gradient of J do at one policy, a response a time; variances are those of one response.

    Args:
        tree: all responses. log_probs: (X, N_t, A) of each level, the policy.

    Attributes:
        gradient: (S, A) of J by the logits of the table.
        steps: expected tokens of a response.
    """

    def __init__(self, tree: Tree, log_probs: Sequence[Tensor]) -> None:
        self.tree = tree
        self._log_probs = list(log_probs)
        self._mask = tree.episodes.response_mask
        sampled = replace(
            tree.episodes,
            log_probs=self._columns(log_probs),
            ref_log_probs=self._columns(tree.reference),
            scores=tree.scores.flatten(),
        )
        self._rewards = token_rewards(sampled, tree.task.kl_coef)
        self._probs = tree.responses.add_up(log_probs).exp().flatten() / len(tree.prompts)  # (R,)
        self._lengths = tree.episodes.lengths.double()
        self._table = torch.cat([level.exp().flatten(0, 1) for level in log_probs])
        self._states = TablePolicy(tree).states(tree.episodes)
        index = torch.zeros(tree.responses.vocab_size, dtype=torch.int64)
        index[tree.responses.legal] = torch.arange(len(tree.responses.legal))
        self._actions = index[tree.episodes.response_ids[self._mask]]
        chosen = self._table[self._states, self._actions]
        sizes = 1 - 2 * chosen + self._table.square().sum(1)[self._states]  # of grad log pi(a|s) by the logits
        self._sizes = torch.zeros_like(self._rewards).masked_scatter(self._mask, sizes)  # (R, T)
        self._values = critic_targets(tree, log_probs)
        self.steps = (self._probs @ self._lengths).item()
        self.gradient = self._mean(self.gae(self._values, 0.0))

    def gae(self, critic: Sequence[Tensor], gae_lambda: float, gamma: float = 1.0) -> Tensor:
        """(R, T) advantages of every response; a critic is (X, N_t) of each level."""
        values = self._columns_of_states(critic)
        return gae(self._rewards, values, self._mask, gamma, gae_lambda)[0]

    def measure(self, advantages: Tensor, noise: float = 0.0) -> GradientQuality:
        """Of the estimator with these advantages (R, T); `noise` is variance that they come with."""
        mean = self._mean(advantages)
        square = (self._probs.unsqueeze(1) * advantages.square() * self._sizes).sum()
        return self._judge(mean, square + noise - mean.square().sum())

    def measure_batch_mean(self) -> GradientQuality:
        """Returns-to-go less their mean over the tokens of a large batch."""
        returns = self.gae([torch.zeros_like(level) for level in self._values], 1.0)
        mean = (self._probs.unsqueeze(1) * returns).sum() / self.steps
        return self.measure(torch.where(self._mask, returns - mean, 0.0))

    def measure_rollouts(self, count: int) -> GradientQuality:
        """TD errors of values that are means over so many rollouts from each state (VinePPO)."""
        spread = self._columns_of_states(self._return_variances()) / count  # (R, T)
        before = torch.nn.functional.pad(self._sizes[:, :-1], (1, 0))
        # What V(s_t) is off by is in the advantage of the token at s_t, and in that of the token before.
        noise = (self._probs.unsqueeze(1) * spread * (before + self._sizes)).sum().item()
        return self.measure(self.gae(self._values, 0.0), noise)

    def rollout_steps(self, count: int) -> float:
        """Expected tokens of a response, and of so many rollouts from each of its states."""
        of_rollouts = (self._probs @ (self._lengths * (self._lengths + 1))).item() / 2
        return self.steps + count * of_rollouts

    def measure_group(self, size: int) -> GradientQuality:
        """Whole returns less the mean of the others in a group (RLOO): G times the variance of the group's estimate.

        That estimate is the mean over pairs of h(i, j) = (R_i - R_j) (S_i - S_j) / 2, with S_i the gradient of
        log pi(y_i): a U-statistic (Hoeffding 1948), whose variance is 4 (G - 2) / (G (G - 1)) Var E[h|i] +
        2 / (G (G - 1)) Var h.
        """
        prompts = len(self.tree.prompts)
        returns = self._rewards.sum(1).view(prompts, -1)
        probs = self._probs.view(prompts, -1) * prompts
        scores = self._response_scores().view(prompts, -1, self._table.numel())
        means = []
        variance = torch.zeros((), dtype=torch.float64)
        for p, r, s in zip(probs, returns, scores, strict=True):
            by_first = 0.5 * (r.unsqueeze(1) * s - r.unsqueeze(1) * (p @ s) - (p @ r) * s + (p * r) @ s)
            mean = p @ by_first
            products = s @ s.T
            distances = products.diagonal().unsqueeze(1) + products.diagonal() - 2 * products
            squares = (r.unsqueeze(1) - r).square() * distances / 4
            one = p @ by_first.square().sum(1) - mean @ mean
            two = p @ squares @ p - mean @ mean
            variance += (4 * (size - 2) * one + 2 * two) / (size * (size - 1)) / prompts
            means.append(mean)
        mean = torch.stack(means).mean(0)
        variance += (torch.stack(means) - mean).square().sum(1).mean()  # from prompt to prompt
        return self._judge(mean.view_as(self._table), size * variance)

    def _columns(self, levels: Sequence[Tensor]) -> Tensor:
        """(R, T) numbers of chosen tokens, from (X, N_t, A) of each level."""
        picked = [self.tree.responses.pick_column(levels, t) for t in range(self._mask.shape[1])]
        return torch.stack(picked, -1).flatten(0, 1)

    def _columns_of_states(self, levels: Sequence[Tensor]) -> Tensor:
        """(R, T) numbers of the states before chosen tokens, from (X, N_t) of each level."""
        wide = [x.unsqueeze(-1).expand_as(own) for x, own in zip(levels, self._log_probs, strict=True)]
        return self._columns(wide)

    def _mean(self, advantages: Tensor) -> Tensor:
        """(S, A) the expected estimate."""
        weights = torch.zeros_like(self._table)
        numbers = (self._probs.unsqueeze(1) * advantages)[self._mask]
        weights.index_put_((self._states, self._actions), numbers, accumulate=True)
        return weights - self._table * weights.sum(1, keepdim=True)

    def _return_variances(self) -> list[Tensor]:
        """(X, N_t) of each level: the variance of the return from a state on."""
        advantages = soft_values(self.tree, self._log_probs).advantages
        after = torch.zeros((len(self.tree.prompts), 0), dtype=torch.float64)
        found: list[Tensor] = []
        for t in reversed(range(len(self._log_probs))):
            later = self.tree.responses.join_actions(t, torch.zeros_like(self.tree.scores), after)
            after = (self._log_probs[t].exp() * (advantages[t].square() + later)).sum(-1)
            found.insert(0, after)
        return found

    def _response_scores(self) -> Tensor:
        """(R, S, A) the gradient of log pi of each response."""
        rows = self._mask.nonzero()[:, 0]
        scores = self._rewards.new_zeros(len(self._mask), *self._table.shape)
        scores[rows, self._states] = -self._table[self._states]
        scores[rows, self._states, self._actions] += 1
        return scores

    def _judge(self, mean: Tensor, variance: Tensor) -> GradientQuality:
        size = self.gradient.norm()
        cosine = (mean * self.gradient).sum() / (mean.norm() * size)
        bias = (mean - self.gradient).norm() / size
        return GradientQuality(float(bias), float(mean.norm() / size), float(cosine), float(variance / size**2))
