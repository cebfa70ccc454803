"""Bounds on the optimum V* of a task at gamma = 1, from samples (docs/mdp.md)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lmgym.episodes import Episodes
from lmgym.errors import InvalidArgumentError
from lmgym.intervals import Interval as Interval  # also found here
from lmgym.kl import episode_kl
from lmgym.models.causal import token_log_probs
from lmgym.models.policy import Policy, PolicyState


def log_weights(episodes: Episodes, kl_coef: float) -> Tensor:
    """(B,) log [pi_ref(y|x) / pi(y|x) * exp(score / kl_coef)]; at pi = pi* it is V*(x) / kl_coef for every y.

    The scores must be without noise, as those of `lmgym.evaluation.evaluate` are: E exp(noise / kl_coef) > 1, so that
    noise of standard deviation s adds s^2 / (2 kl_coef) to the bound.
    """
    if kl_coef <= 0:
        raise InvalidArgumentError(f"`kl_coef` must be > 0 for a bound on the optimum, got {kl_coef!r}.")
    return episodes.scores.double() / kl_coef - episode_kl(episodes).double()


def multi_sample_bound(weights: Tensor, kl_coef: float, n: int | None = None) -> Tensor:
    """Lower bound on V*(x) from n samples a prompt (Burda et al. 2016, section 3, for this problem).

    `kl_coef * log mean_{i<=n} weight_i` is J(pi) at n = 1 in expectation, never falls with n, and never passes V*(x).

    Args:
        weights: (X, S) `log_weights` of S samples of each of X prompts.
        kl_coef: the price of a nat.
        n: a divisor of S; the bound is averaged over the S / n disjoint groups. None is S.

    Returns:
        (X,) bound of each prompt, in units of the score.
    """
    prompts, samples = weights.shape
    n = samples if n is None else n
    if n < 1 or samples % n:
        raise InvalidArgumentError(f"`n` must divide the {samples} samples of a prompt, got {n}.")
    groups = weights.view(prompts, samples // n, n)
    return kl_coef * (torch.logsumexp(groups, dim=-1) - math.log(n)).mean(-1)


def multi_sample_upper_bound(weights: Tensor, exact: Tensor, kl_coef: float) -> Tensor:
    """Upper bound on V*(x) from samples of a policy and one of pi* (Sobolev & Vetrov 2019, for this problem).

    `kl_coef * log mean_i weight_i`, where one of the S weights is that of a response of pi*. In expectation it never
    falls below V*(x), provided that the policy can write all that the reference can.

    Args:
        weights: (..., S) `log_weights` of S samples of the policy; `exact` replaces the first.
        exact: (...) log-weight of a sample of pi*, drawn apart from them.
        kl_coef: the price of a nat.

    Returns:
        (...) bound of each row, in units of the score.
    """
    replaced = torch.cat([exact.unsqueeze(-1), weights[..., 1:]], dim=-1)
    return kl_coef * (replaced.logsumexp(-1) - math.log(weights.shape[-1]))


class Mixture:
    """Policies mixed over whole responses, q(y|x) = sum_k weights_k q_k(y|x), written as a policy itself.

    By the chain rule its next token has the probabilities of its components, weighted by how probable each component
    finds the response so far: q(a|s_t) = sum_k w_k q_k(y_<t) q_k(a|s_t) / sum_k w_k q_k(y_<t). So every component steps
    along every response. A weight pi_ref / q is at most pi_ref / q_k over weights_k, for any k. With the reference as a
    component, or another that covers it, every weight is finite (Hesterberg 1995; Veach & Guibas 1995, the balance
    heuristic). `values` are those of the first component that has any.

    Args:
        policies: K components over one vocabulary. weights: K shares > 0 that sum to 1.
    """

    def __init__(self, policies: Sequence[Policy], weights: Sequence[float]) -> None:
        if len(weights) != len(policies) or min(weights, default=0) <= 0 or abs(sum(weights) - 1) > 1e-6:
            raise InvalidArgumentError(
                f"`weights` must be {len(policies)} numbers > 0 that sum to 1, one a policy, got {weights!r}."
            )
        self.policies = tuple(policies)
        self.weights = tuple(weights)

    @property
    def device(self) -> torch.device:
        """Where the first component computes, and the mixture with it."""
        return self.policies[0].device

    def begin(self, prompt_ids: Tensor, prompt_mask: Tensor, max_new_tokens: int) -> MixtureState:
        """Reads prompts (B, P), left-padded, with every component."""
        states = [p.begin(prompt_ids.to(p.device), prompt_mask.to(p.device), max_new_tokens) for p in self.policies]
        devices = [p.device for p in self.policies]
        prior = torch.tensor(self.weights, dtype=torch.float64, device=self.device).log()
        return MixtureState(states, devices, prior, len(prompt_ids))


class MixtureState:
    """B running responses of a mixture of K policies; `shares` (B, K) float64 are log w_k q_k(y_<t) / q(y_<t)."""

    def __init__(self, states: list[PolicyState], devices: list[torch.device], prior: Tensor, rows: int) -> None:
        self._states = states
        self._devices = devices
        self._prior = prior
        self.shares = prior.repeat(rows, 1)

    @property
    def logits(self) -> Tensor:
        """(B, V) float64 log-probs of each response's next token."""
        log_probs = [state.logits.to(self._prior.device).double().log_softmax(-1) for state in self._states]
        joint = torch.stack(log_probs, 1) + self.shares.unsqueeze(2)
        return joint.logsumexp(1)

    @property
    def values(self) -> Tensor | None:
        """(B,) of the first component that has them, else None."""
        for state in self._states:
            if (values := state.values) is not None:
                return values.to(self._prior.device)
        return None

    def step(self, tokens: Tensor) -> None:
        """Appends a token (B,) to every response."""
        for k, (state, device) in enumerate(zip(self._states, self._devices, strict=True)):
            chosen = tokens.to(device)
            self.shares[:, k] += token_log_probs(state.logits, chosen).to(self._prior.device)
            state.step(chosen)
        self.shares -= self.shares.logsumexp(1, keepdim=True)

    def keep(self, rows: Tensor) -> None:
        """Keeps only these rows (n,), in this order."""
        for state, device in zip(self._states, self._devices, strict=True):
            state.keep(rows.to(device))
        self.shares = self.shares[rows]

    def begin(self, rows: Tensor, prompt_ids: Tensor, prompt_mask: Tensor) -> None:
        """Restarts rows (n,) from prompts (n, P), left-padded."""
        for state, device in zip(self._states, self._devices, strict=True):
            state.begin(rows.to(device), prompt_ids.to(device), prompt_mask.to(device))
        self.shares[rows] = self._prior
