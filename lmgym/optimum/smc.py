"""Bounds from both sides on the optimum of any task at gamma = 1, by sequential Monte Carlo over tokens.

With b = kl_coef, Z(x) = E_{y ~ pi_ref} exp(score(x, y) / b) and V*(x) = b log Z(x):

1. Below. An estimate with E Z_hat = Z has b E log Z_hat <= b log E Z_hat = V* (Jensen). Importance sampling is one
   (Burda et al. 2016), sequential Monte Carlo (SMC) is another, with any proposal and any twist (Del Moral 2004, prop.
   7.4.1; for language models Zhao et al. 2024), resampled whenever the weights ask for it (Whiteley et al. 2016).
2. Above. Conditional SMC (Andrieu et al. 2010) runs the same particles with one of them bound to y* ~ pi*. The joint
   distribution of all it draws is Z_hat / Z times that of SMC, so E [1 / Z_hat] = 1 / Z, and b E log Z_hat >= V*
   (Jensen again: bidirectional Monte Carlo, Grosse et al. 2015). Without resampling it is b E log [(w(y*) + the sum of
   S - 1 fresh w) / S], the multi-sample upper bound (Sobolev & Vetrov 2019).

Both tighten as the particles grow in number. Where the proposal is pi* and the twist its V, both are V* itself.

Shapes: X runs (a prompt each), S particles a run, N = X S particles in all, T response columns, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from lmgym.errors import InvalidArgumentError, check_int, check_number
from lmgym.models.causal import CausalLM, token_log_probs
from lmgym.models.padding import pad_left, pad_right
from lmgym.models.policy import CausalPolicy, Policy
from lmgym.models.sampling import inverse_cdf
from lmgym.optimum.answer import check_bounded, check_repeatable, expected_reward
from lmgym.optimum.resampling import conditional_stratified, stratified
from lmgym.rewards.base import RewardFunction, bind_tokenizer, score
from lmgym.tasks.base import Task, check_split

MAX_PARTICLES_AT_ONCE = 512  # that decode in one batch
_MAX_SCORED_TWICE = 64  # particles that are scored once more, to notice a reward with noise
_COMPACT_AT = 0.25  # share of ended particles at which the batch is worth compacting
_RESAMPLE_AT = 0.5  # share of the particles that the effective sample size may fall to


@dataclass(frozen=True, eq=False)
class Particles:
    """What X runs of S particles gave.

    Attributes:
        log_z: (X,) float64 nats, log Z_hat.
        log_weights: (X, S) float64 nats, of the particles since the last resampling; without one, of whole responses,
            as `multi_sample_bound` takes them.
        response_ids: (X, S, T) int64, right-padded. lengths: (X, S) int64, the EOS included.
        scores: (X, S) float64, as paid.
    """

    log_z: Tensor
    log_weights: Tensor
    response_ids: Tensor
    lengths: Tensor
    scores: Tensor

    def response(self, x: int, s: int) -> tuple[int, ...]:
        """Token ids of one particle's response."""
        return tuple(self.response_ids[x, s, : self.lengths[x, s]].tolist())


@torch.no_grad()
def smc(
    task: Task,
    prompt_ids: Sequence[Sequence[int]],
    proposal: Policy,
    particles: int,
    generator: torch.Generator,
    *,
    retained: Sequence[Sequence[int]] | None = None,
    resample_at: float = _RESAMPLE_AT,
) -> Particles:
    """Twisted SMC over tokens, one run for each prompt given (repeat a prompt for more runs of it).

    A particle whose response so far is y_<=t has weight pi_ref(y_<=t) / q(y_<=t) * exp(psi / kl_coef), where psi is the
    proposal's value of that prefix, or the score as paid once it has ended. A run whose effective sample size
    (sum w)^2 / sum w^2 is below `resample_at * S` is resampled by strata. A proposal without values is never resampled:
    if it is near pi*, then kl_coef log(q / pi_ref) of a prefix is itself the twist, under which weights stay even, and
    the estimate is that of plain importance sampling.

    Args:
        task: the MDP; a noisy reward counts as expected.
        prompt_ids: X prompts.
        proposal: q, with a probability > 0 for whatever the reference can write (such as a `Mixture` with it).
        particles: S.
        generator: a CPU generator, the source of all randomness.
        retained: X whole responses, each a sample of pi* of its prompt. They make it conditional SMC: log Z_hat is then
            too large in expectation, not too small. Each starts at a uniform index of its run; resampling moves it.
        resample_at: share of S in [0, 1]; 0 never resamples.

    Returns:
        The particles and log Z_hat of each run.

    Raises:
        InvalidArgumentError: for a task without an optimum, a retained response that is not a whole one, or a proposal
            that has another vocabulary or cannot write a retained response; and for a reward with noise whose mean is
            not known, because exp(score / kl_coef) counts noise as gain: exp of a Gaussian has a mean above 1.
    """
    check_bounded(task)
    check_int("particles", particles, 1)
    check_number("resample_at", resample_at, 0, 1)
    lm = task.reference("cpu")
    reward = bind_tokenizer(expected_reward(task), lm.tokenizer)
    for response in retained or []:
        _check_whole(task, lm, response)
    if retained is not None and len(retained) != len(prompt_ids):
        raise InvalidArgumentError(
            f"`retained` must be {len(prompt_ids)} responses, one a prompt, got {len(retained)}."
        )
    at_once = max(1, MAX_PARTICLES_AT_ONCE // particles)
    parts = []
    for start in range(0, len(prompt_ids), at_once):
        few = slice(start, start + at_once)
        run = _Run(task, lm, reward, prompt_ids[few], particles, generator, retained and retained[few])
        parts.append(run.finish(proposal, resample_at))
        if start == 0:
            run.check_repeatable()
    return Particles(*(torch.cat([getattr(part, f.name) for part in parts]) for f in fields(Particles)))


class _Decoders:
    """The proposal and the reference, which read the same particles side by side.

    Both hold only the particles that have not been dropped: row i is particle `live[i]`.

    Args:
        proposal: q. lm: the reference. prompt_ids: X prompts. particles: S, of each. horizon: T.
    """

    def __init__(
        self, proposal: Policy, lm: CausalLM, prompt_ids: Sequence[Sequence[int]], particles: int, horizon: int
    ) -> None:
        ids, mask = pad_left(prompt_ids, lm.pad_token_id)
        is_reference = isinstance(proposal, CausalPolicy) and proposal.lm is lm
        self._policies: list[Policy] = [proposal] if is_reference else [proposal, CausalPolicy(lm)]
        self._states = [p.begin(ids.to(p.device), mask.to(p.device), horizon) for p in self._policies]
        self._keep(torch.arange(len(prompt_ids)).repeat_interleave(particles))
        self.live = torch.arange(len(prompt_ids) * particles)
        vocab_size = self._states[0].logits.shape[1]
        if vocab_size != lm.vocab_size:
            raise InvalidArgumentError(
                f"`proposal` must have the reference's vocabulary of {lm.vocab_size}, got {vocab_size}."
            )

    @property
    def logits(self) -> tuple[Tensor, Tensor]:
        """(n, V) of the proposal, and of the reference."""
        logits = self._states[0].logits
        return logits, logits if len(self._states) == 1 else self._states[1].logits

    @property
    def values(self) -> Tensor | None:
        """(n,) float64 of the proposal, on the CPU; None where it has none."""
        values = self._states[0].values
        return None if values is None else values.cpu().double()

    def step(self, tokens: Tensor) -> None:
        """Appends a token (n,) to every row."""
        for policy, state in zip(self._policies, self._states, strict=True):
            state.step(tokens.to(policy.device))

    def compact(self, running: Tensor) -> Tensor:
        """Drops ended particles once they are many.

        Args:
            running: (N,) bool, of all particles.

        Returns:
            (n,) bool, the rows that are left.
        """
        rows = running[self.live]
        if rows.float().mean() > 1 - _COMPACT_AT:
            return torch.ones_like(rows)
        self._keep(rows.nonzero().squeeze(1))
        self.live = self.live[rows]
        return rows

    def resample(self, ancestors: Tensor, running: Tensor) -> None:
        """Makes each running particle a copy of its ancestor.

        Args:
            ancestors: (N,) int64. running: (N,) bool, after resampling.
        """
        rows = torch.zeros(len(ancestors), dtype=torch.int64)
        rows[self.live] = torch.arange(len(self.live))
        self.live = running.nonzero().squeeze(1)
        self._keep(rows[ancestors[self.live]])

    def _keep(self, rows: Tensor) -> None:
        for policy, state in zip(self._policies, self._states, strict=True):
            state.keep(rows.to(policy.device))


class _Run:
    """X runs at once, token by token."""

    def __init__(
        self,
        task: Task,
        lm: CausalLM,
        reward: RewardFunction,
        prompt_ids: Sequence[Sequence[int]],
        particles: int,
        generator: torch.Generator,
        retained: Sequence[Sequence[int]] | None,
    ) -> None:
        self._task = task
        self._lm = lm
        self._reward = reward
        self._prompt_ids = prompt_ids
        self._generator = generator
        self._x = len(prompt_ids)
        self._s = particles
        self._horizon = task.max_new_tokens
        self._end_rule = task.end_rule(lm)
        self._texts = task.texts_of(prompt_ids, lm)
        n = self._x * self._s
        self._response = torch.full((n, self._horizon), lm.pad_token_id)
        self._lengths = torch.zeros(n, dtype=torch.int64)
        self._running = torch.ones(n, dtype=torch.bool)
        self._unscored = torch.ones(n, dtype=torch.bool)
        self._scores = torch.zeros(n, dtype=torch.float64)
        self._log_ratio = torch.zeros(n, dtype=torch.float64)  # log pi_ref / q of the response so far
        self._psi = torch.zeros(n, dtype=torch.float64)  # the twist, in nats
        self._base = torch.zeros(n, dtype=torch.float64)  # log weight at the last resampling
        self._log_z = torch.zeros(self._x, dtype=torch.float64)
        self._retained: Tensor | None = None
        if retained is not None:
            self._retained, _ = pad_right(retained, lm.pad_token_id, self._horizon)
            self._retained_index = (self._rand(self._x) * self._s).long()  # of the retained particle in its run

    def finish(self, proposal: Policy, resample_at: float) -> Particles:
        """Draws token after token, until every response has ended."""
        decoders = _Decoders(proposal, self._lm, self._prompt_ids, self._s, self._horizon)
        is_twisted = resample_at > 0 and decoders.values is not None
        uniforms = self._rand(len(self._response), self._horizon)
        for t in range(self._horizon):
            tokens = self._extend(t, decoders.live, uniforms[decoders.live, t], *decoders.logits)
            if t == self._horizon - 1 or not self._running.any():
                break
            if is_twisted:
                self._score_ended()
            decoders.step(tokens[decoders.compact(self._running)])
            if is_twisted:
                self._twist(decoders)
                ancestors = self._resample(resample_at)
                if ancestors is not None:
                    decoders.resample(ancestors, self._running)
        self._score_ended()
        weights = self._log_weights()
        log_z = self._log_z + weights.logsumexp(1) - math.log(self._s)
        shape = (self._x, self._s)
        response = self._response.view(*shape, -1)
        return Particles(log_z, weights, response, self._lengths.view(shape), self._scores.view(shape))

    def _extend(self, t: int, live: Tensor, uniforms: Tensor, q_logits: Tensor, ref_logits: Tensor) -> Tensor:
        """Draws token t of the particles in `live` (n,), which is appended to the running ones; (n,) tokens."""
        tokens = inverse_cdf(q_logits.float(), uniforms)[0].cpu()
        running = self._running[live]
        if self._retained is not None:
            forced = torch.full((len(self._running),), -1)
            forced[torch.arange(self._x) * self._s + self._retained_index] = self._retained[:, t]
            given = running & (forced[live] >= 0)
            tokens = torch.where(given, forced[live], tokens)
        log_q = token_log_probs(q_logits, tokens.to(q_logits.device)).cpu().double()[running]
        log_ref = token_log_probs(ref_logits, tokens.to(ref_logits.device)).cpu().double()[running]
        if log_q.isneginf().any():
            raise InvalidArgumentError(
                "`proposal` must be able to write every retained response, and gives one of them 0."
            )
        moved = live[running]
        self._log_ratio[moved] += log_ref - log_q
        self._response[moved, t] = tokens[running]
        self._lengths[moved] += 1
        self._running[moved] = ~self._end_rule.is_end(tokens[running], t)
        return tokens

    def check_repeatable(self) -> None:
        """Raises `InvalidArgumentError` unless a few of the final responses get the same scores once more."""
        few = torch.arange(len(self._response))[:_MAX_SCORED_TWICE]
        check_repeatable(self._scores[few].tolist(), self._score(few).tolist())

    def _score_ended(self) -> None:
        """Scores the particles that have ended since the last call; their twist is then the score."""
        rows = (self._unscored & ~self._running).nonzero().squeeze(1)
        if not len(rows):
            return
        self._scores[rows] = self._score(rows)
        self._psi[rows] = self._scores[rows] / self._task.kl_coef
        self._unscored[rows] = False

    def _score(self, rows: Tensor) -> Tensor:
        """(n,) float64 scores, as paid, of particles (n,) that have ended."""
        lengths = self._lengths[rows].tolist()
        responses = [ids[:n] for ids, n in zip(self._response[rows].tolist(), lengths, strict=True)]
        prompts = (rows // self._s).tolist()
        ids = [list(self._prompt_ids[x]) for x in prompts]
        texts = [self._texts[x] for x in prompts]
        completions = self._lm.completions(ids, responses)
        paid = score(self._reward, texts, completions, prompt_ids=ids, completion_ids=responses)
        missing = torch.tensor([response[-1] not in self._lm.eos_token_ids for response in responses])
        return torch.tensor(paid, dtype=torch.float64) - self._task.missing_eos_penalty * missing

    def _twist(self, decoders: _Decoders) -> None:
        """Takes the twist of the running particles from the proposal's values."""
        values = decoders.values
        if values is not None:
            rows = self._running[decoders.live]
            self._psi[decoders.live[rows]] = values[rows] / self._task.kl_coef

    def _log_weights(self) -> Tensor:
        """(X, S) nats since the last resampling."""
        return (self._log_ratio + self._psi - self._base).view(self._x, self._s)

    def _resample(self, resample_at: float) -> Tensor | None:
        """Resamples the runs that need it; (N,) the particle that each particle now is a copy of, or None."""
        weights = self._log_weights()
        size = (2 * weights.logsumexp(1) - (2 * weights).logsumexp(1)).exp()
        due = (size < resample_at * self._s) & self._running.view(self._x, self._s).any(1)
        if not due.any():
            return None
        columns = torch.arange(self._s).repeat(self._x, 1)
        few = due.nonzero().squeeze(1)
        uniforms = self._rand(len(few), self._s)
        if self._retained is None:
            columns[few] = stratified(weights[few], uniforms)
        else:
            columns[few], self._retained_index[few] = conditional_stratified(
                weights[few], uniforms, self._retained_index[few], self._rand(len(few))
            )
        self._log_z[few] += weights[few].logsumexp(1) - math.log(self._s)
        ancestors = (torch.arange(self._x)[:, None] * self._s + columns).view(-1)
        for name in ("_response", "_lengths", "_running", "_unscored", "_scores", "_log_ratio", "_psi", "_base"):
            setattr(self, name, getattr(self, name)[ancestors])
        reset = due.repeat_interleave(self._s)
        self._base[reset] = (self._log_ratio + self._psi)[reset]
        return ancestors

    def _rand(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self._generator, dtype=torch.float64)


def encode_prompts(task: Task, split: str, prompts: int | None, lm: CausalLM) -> list[list[int]]:
    """Token ids of the first so many prompts of a split; None is all."""
    check_split(task, split)
    if prompts is not None:
        check_int("prompts", prompts, 1)
    return lm.encode_all(tuple(task.prompts[split]))[:prompts]


def _check_whole(task: Task, lm: CausalLM, response: Sequence[int]) -> None:
    is_legal = all(lm.is_legal(token) for token in response)
    if not is_legal or task.end_rule(lm).find_end(response) != len(response) - 1:
        raise InvalidArgumentError(f"`retained` must hold whole responses, up to their end, got {list(response)!r}.")
