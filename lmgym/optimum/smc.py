"""Bounds from both sides on the optimum of any task at gamma = 1, by sequential Monte Carlo over tokens.

With b = kl_coef, Z(x) = E_{y ~ pi_ref} exp(score(x, y) / b) and V*(x) = b log Z(x):

1. Below. An estimate with E Z_hat = Z has b E log Z_hat <= b log E Z_hat = V* (Jensen). Importance sampling is one
   (Burda et al. 2016), sequential Monte Carlo (SMC) is another, with any proposal and any twist (Del Moral 2004, prop.
   7.4.1; for language models Zhao et al. 2024), resampled whenever the weights ask for it (Whiteley et al. 2016).
2. Above. Conditional SMC (Andrieu et al. 2010) runs the same particles with one of them bound to y* ~ pi*. The joint
   law of all it draws is Z_hat / Z times that of SMC, so E [1 / Z_hat] = 1 / Z, and b E log Z_hat >= V* (Jensen again:
   bidirectional Monte Carlo, Grosse et al. 2015). Without resampling it is b E log [(w(y*) + the sum of S - 1 fresh
   w) / S], the multi-sample upper bound (Sobolev & Vetrov 2019).

Both tighten as the particles grow in number. Where the proposal is pi* and the twist its V, both are V* itself.

Shapes: X runs (a prompt each), S particles a run, N = X S particles in all, T response columns, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from lmgym.errors import InvalidArgumentError, LmGymError, check_int, check_number
from lmgym.intervals import Interval
from lmgym.models.causal import CausalLM, token_log_probs
from lmgym.models.policy import CausalPolicy, Policy
from lmgym.models.sampling import inverse_cdf
from lmgym.optimum.answer import Optimum, check_repeatable, check_solvable, expected_reward
from lmgym.rewards.base import RewardFunction, bind_tokenizer, score
from lmgym.tasks.base import Task, check_split

_ROWS = 512  # particles that decode at once
_ASKED_TWICE = 64  # of them that are scored once more, to notice a reward with noise
_DROP_AT = 0.25  # share of finished particles at which the batch is worth compacting
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

    A particle that has written y_<=t has weight pi_ref(y_<=t) / q(y_<=t) * exp(psi / kl_coef), where psi is the
    proposal's value of that prefix, or the score as paid once it has ended. A run whose effective sample size
    (sum w)^2 / sum w^2 is below `resample_at * S` is resampled by strata. A proposal without values is never resampled:
    if it is near pi*, then kl_coef log(q / pi_ref) of a prefix is itself the twist, under which weights stay even, and
    the estimate is that of plain importance sampling.

    Args:
        task: the MDP; a noisy reward counts as expected.
        prompt_ids: X prompts.
        proposal: q; must be able to write whatever the reference can (`Mixture` with the reference is).
        particles: S.
        generator: a CPU generator, the source of all randomness.
        retained: X whole responses, each a sample of pi* of its prompt: then conditional SMC, whose Z_hat is too large
            as often as SMC's is too small. Each rests on a uniform place, and moves with its strata in resampling.
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
    at_once = max(1, _ROWS // particles)
    parts = []
    for start in range(0, len(prompt_ids), at_once):
        few = slice(start, start + at_once)
        run = _Run(task, lm, reward, prompt_ids[few], particles, generator, retained and retained[few])
        parts.append(run.finish(proposal, resample_at))
        if start == 0:
            run.check_repeatable()
    return Particles(*(torch.cat([getattr(part, f.name) for part in parts]) for f in fields(Particles)))


class _Run:
    """X runs at once, in lockstep."""

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
        self._task, self._lm, self._reward = task, lm, reward
        self._prompt_ids, self._generator = prompt_ids, generator
        self._x, self._s, self._horizon = len(prompt_ids), particles, task.max_new_tokens
        n = self._x * self._s
        self._end_rule = task.end_rule(lm)
        self._texts = task.texts_of(prompt_ids, lm)
        self._response = torch.full((n, self._horizon), lm.pad_token_id)
        self._lengths = torch.zeros(n, dtype=torch.int64)
        self._running = torch.ones(n, dtype=torch.bool)
        self._scores = torch.zeros(n, dtype=torch.float64)
        self._log_ratio = torch.zeros(n, dtype=torch.float64)  # log pi_ref / q of the response so far
        self._psi = torch.zeros(n, dtype=torch.float64)  # the twist, in nats
        self._base = torch.zeros(n, dtype=torch.float64)  # log weight at the last resampling
        self._log_z = torch.zeros(self._x, dtype=torch.float64)
        self._retained: Tensor | None = None
        if retained is not None:
            self._retained = _right_padded(retained, self._horizon, lm.pad_token_id)
            self._place = (self._rand(self._x) * self._s).long()  # of the retained particle in its run

    def finish(self, proposal: Policy, resample_at: float) -> Particles:
        """Runs to the end."""
        ids, mask = _left_padded(self._prompt_ids, self._lm.pad_token_id)
        own = isinstance(proposal, CausalPolicy) and proposal.lm is self._lm
        policies: list[Policy] = [proposal] if own else [proposal, CausalPolicy(self._lm)]
        states = [p.begin(ids.to(p.device), mask.to(p.device), self._horizon) for p in policies]

        def keep(rows: Tensor) -> None:
            for policy, state in zip(policies, states, strict=True):
                state.keep(rows.to(policy.device))

        keep(torch.arange(self._x).repeat_interleave(self._s))
        if states[0].logits.shape[1] != self._lm.vocab_size:
            raise InvalidArgumentError(
                f"`proposal` must have the reference's vocabulary of {self._lm.vocab_size}, "
                f"got {states[0].logits.shape[1]}."
            )
        twisted = resample_at > 0 and states[0].values is not None
        uniforms = self._rand(len(self._response), self._horizon)
        live = torch.arange(len(self._response))  # the particle in each row of the states
        unscored = torch.ones(len(self._response), dtype=torch.bool)
        for t in range(self._horizon):
            tokens = self._extend(t, live, uniforms[live, t], [state.logits for state in states])
            if t == self._horizon - 1 or not self._running.any():
                break
            if twisted:
                ended = unscored & ~self._running
                self._pay(ended.nonzero().squeeze(1))
                unscored &= ~ended
            kept = self._running[live]
            if kept.float().mean() <= 1 - _DROP_AT:
                keep(kept.nonzero().squeeze(1))
                live, tokens = live[kept], tokens[kept]
            for policy, state in zip(policies, states, strict=True):
                state.step(tokens.to(policy.device))
            if twisted and (values := states[0].values) is not None:
                kept = self._running[live]
                self._psi[live[kept]] = values.cpu().double()[kept] / self._task.kl_coef
                ancestors = self._resample(resample_at)
                if ancestors is not None:
                    rows = torch.zeros(len(self._response), dtype=torch.int64)
                    rows[live] = torch.arange(len(live))
                    unscored = unscored[ancestors]
                    live = self._running.nonzero().squeeze(1)
                    keep(rows[ancestors[live]])
        self._pay(unscored.nonzero().squeeze(1))
        weights = self._log_weights()
        log_z = self._log_z + weights.logsumexp(1) - math.log(self._s)
        shape = (self._x, self._s)
        response, lengths, scores = self._response.view(*shape, -1), self._lengths.view(shape), self._scores.view(shape)
        return Particles(log_z, weights, response, lengths, scores)

    def _extend(self, t: int, live: Tensor, uniforms: Tensor, logits: list[Tensor]) -> Tensor:
        """Draws token t of the particles in `live` (n,), whose running ones take it; (n,) tokens."""
        tokens = inverse_cdf(logits[0].float(), uniforms)[0].cpu()
        running = self._running[live]
        if self._retained is not None:
            forced = torch.full((len(self._running),), -1)
            forced[torch.arange(self._x) * self._s + self._place] = self._retained[:, t]
            given = running & (forced[live] >= 0)
            tokens = torch.where(given, forced[live], tokens)
        log_q, log_ref = (
            token_log_probs(x, tokens.to(x.device)).cpu().double()[running] for x in (logits[0], logits[-1])
        )
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
        few = torch.arange(len(self._response))[:_ASKED_TWICE]
        check_repeatable(self._scores[few].tolist(), self._scored(few).tolist())

    def _pay(self, rows: Tensor) -> None:
        """Scores finished particles (n,), whose twist is then the score."""
        if not len(rows):
            return
        self._scores[rows] = self._scored(rows)
        self._psi[rows] = self._scores[rows] / self._task.kl_coef

    def _scored(self, rows: Tensor) -> Tensor:
        """(n,) float64 scores of finished particles (n,), as paid."""
        responses = _responses(self._response[rows], self._lengths[rows])
        prompts = (rows // self._s).tolist()
        ids, texts = [list(self._prompt_ids[x]) for x in prompts], [self._texts[x] for x in prompts]
        completions = self._lm.completions(ids, responses)
        paid = score(self._reward, texts, completions, prompt_ids=ids, completion_ids=responses)
        missing = torch.tensor([r[-1] not in self._lm.eos_token_ids for r in responses])
        return torch.tensor(paid, dtype=torch.float64) - self._task.missing_eos_penalty * missing

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
            columns[few], self._place[few] = conditional_stratified(
                weights[few], uniforms, self._place[few], self._rand(len(few))
            )
        self._log_z[few] += weights[few].logsumexp(1) - math.log(self._s)
        ancestors = (torch.arange(self._x)[:, None] * self._s + columns).view(-1)
        for name in ("_response", "_lengths", "_running", "_scores", "_log_ratio", "_psi", "_base"):
            setattr(self, name, getattr(self, name)[ancestors])
        reset = due.repeat_interleave(self._s)
        self._base[reset] = (self._log_ratio + self._psi)[reset]
        return ancestors

    def _rand(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self._generator, dtype=torch.float64)


def stratified(log_weights: Tensor, uniforms: Tensor) -> Tensor:
    """Stratified resampling (Kitagawa 1996): child i is the particle at quantile (i + uniform_i) / n of the weights.

    Args:
        log_weights: (X, S), at least one finite in each row. uniforms: (X, n) float64 in [0, 1).

    Returns:
        (X, n) int64 ancestors, none of weight 0.
    """
    cumulative = log_weights.softmax(1).cumsum(1)
    n = uniforms.shape[1]
    quantiles = (torch.arange(n) + uniforms) / n
    # The sum may round to a little under 1, and a quantile must not fall beyond it.
    return torch.searchsorted(cumulative, torch.minimum(quantiles, cumulative[:, -1:] * (1 - 1e-15)), right=True)


def conditional_stratified(
    log_weights: Tensor, uniforms: Tensor, place: Tensor, where: Tensor
) -> tuple[Tensor, Tensor]:
    """Stratified resampling given that the particle at `place` has a child that goes on as the retained one.

    The child is i with the probability that quantile i falls on the particle, which is that of the stratum of a uniform
    point of its share; the other children are drawn as ever. So if the particle was drawn by its weight, then ancestors
    and the child's place have the law of `stratified` and of a uniform place (as Chopin & Singh 2015 do for other
    schemes), which is what the identity of conditional SMC asks for.

    Args:
        log_weights: (X, S). uniforms: (X, S) float64. place: (X,) int64. where: (X,) float64, the point in the share.

    Returns:
        ancestors (X, S), and the place (X,) of the retained child.
    """
    rows = torch.arange(len(place))
    shares = log_weights.softmax(1)
    point = shares.cumsum(1)[rows, place] - shares[rows, place] * (1 - where)
    child = (point * shares.shape[1]).long().clamp(0, shares.shape[1] - 1)
    ancestors = stratified(log_weights, uniforms)
    ancestors[rows, child] = place
    return ancestors, child


def rejection_samples(
    task: Task,
    split: str,
    max_score: float,
    count: int,
    budget: int,
    generator: torch.Generator,
    prompts: int | None = None,
) -> list[list[tuple[int, ...]]]:
    """Exact samples of pi*(y|x) = pi_ref(y|x) exp((score - V*(x)) / kl_coef), at gamma = 1.

    A response of the reference is accepted with probability exp((score - max_score) / kl_coef), which happens with
    probability exp((V*(x) - max_score) / kl_coef): affordable only where the best score is not rare.

    Args:
        task: the MDP. split: whose prompts.
        max_score: what no score, as paid, is above.
        count: samples a prompt. budget: responses that may be drawn a prompt.
        generator: a CPU generator.
        prompts: the first so many of the split; None is all.

    Returns:
        `count` independent responses, as token ids, for each prompt.

    Raises:
        LmGymError: if a score is above `max_score`, or if the budget did not give every prompt its samples.
    """
    check_bounded(task)
    lm = task.reference("cpu")
    encoded = encode_prompts(task, split, prompts, lm)
    log_caps = torch.full((len(encoded),), max_score / task.kl_coef, dtype=torch.float64)
    found = accept(task, encoded, CausalPolicy(lm), log_caps, count, budget, generator)
    highest = task.kl_coef * (found.excess.max().item() + max_score / task.kl_coef)
    if highest > max_score + 1e-9:
        raise LmGymError(f"`max_score` must be what no score is above, got {max_score}, and saw a score of {highest}.")
    check_enough(found, count, budget, f"scores near `max_score` {max_score} are too rare under the reference.")
    return found.responses


@dataclass(frozen=True, eq=False)
class Accepted:
    """What rejection kept.

    Attributes:
        responses: of each of X prompts, at most as many as were asked for. log_weights: of each of them, nats.
        excess: (X,) nats, the largest log-weight seen less the cap.
    """

    responses: list[list[tuple[int, ...]]]
    log_weights: list[list[float]]
    excess: Tensor


def accept(
    task: Task,
    prompt_ids: Sequence[Sequence[int]],
    proposal: Policy,
    log_caps: Tensor,
    count: int,
    budget: int,
    generator: torch.Generator,
) -> Accepted:
    """Rejection sampling: a response y of the proposal q is kept with probability min(1, w(y) / cap).

    With w = pi_ref(y|x) exp(score / kl_coef) / q(y|x), what is kept has the law q min(w, cap) / E_q min(w, cap). That
    is pi* where no weight is above the cap.

    Args:
        task: the MDP. prompt_ids: X prompts. proposal: q.
        log_caps: (X,) nats. count: responses wanted of each prompt. budget: responses that may be drawn of each.
        generator: a CPU generator.
    """
    check_int("count", count, 1)
    check_int("budget", budget, count)
    responses: list[list[tuple[int, ...]]] = [[] for _ in prompt_ids]
    log_weights: list[list[float]] = [[] for _ in prompt_ids]
    log_caps = log_caps.double()
    excess = torch.full_like(log_caps, -math.inf)
    wanting = list(range(len(prompt_ids)))
    drawn = 0
    while wanting and drawn < budget:
        draws = min(max(1, _ROWS // len(wanting)), budget - drawn)
        got = smc(task, [prompt_ids[x] for x in wanting], proposal, draws, generator, resample_at=0)
        over = got.log_weights - log_caps[wanting, None]
        excess[wanting] = torch.maximum(excess[wanting], over.amax(1))
        uniforms = torch.rand(over.shape, generator=generator, dtype=torch.float64)
        for i, s in (uniforms < over.exp()).nonzero().tolist():
            x = wanting[i]
            if len(responses[x]) < count:
                responses[x].append(got.response(i, s))
                log_weights[x].append(got.log_weights[i, s].item())
        drawn += draws
        wanting = [x for x in wanting if len(responses[x]) < count]
    return Accepted(responses, log_weights, excess)


def check_enough(found: Accepted, count: int, budget: int, cause: str) -> None:
    """Raises `LmGymError` unless every prompt has its `count` responses."""
    wanting = [x for x, kept in enumerate(found.responses) if len(kept) < count]
    if wanting:
        none = [x for x in wanting if not found.responses[x]]
        raise LmGymError(
            f"`budget` must give every prompt {count} samples of the optimal policy, and {budget} responses a prompt "
            f"gave fewer to prompts {wanting}, and none to prompts {none}: {cause} More budget may do, or a lower "
            "maximum that still holds."
        )


def sandwich(
    task: Task,
    split: str,
    *,
    proposal: Policy | None = None,
    particles: int = 64,
    repeats: int = 16,
    max_score: float | None = None,
    budget: int = 10_000,
    prompts: int | None = None,
    generator: torch.Generator,
) -> Optimum:
    """Bounds V* of a task from both sides by `smc`, the upper one from exact samples of pi* by rejection.

    `lower` is the low end of the 95 % interval of b E log Z_hat, `upper` the high end of that of its conditional twin,
    and never above `max_score`, which V* cannot pass. The intervals are of the mean over these very prompts: they hold
    the sampling noise of every prompt, as its repeats show it, and no noise of a choice of prompts
    (`Interval.over_repeats`). `values` are the middle of each prompt's two means, or its lower one alone.

    Args:
        task: the MDP, at gamma = 1. split: whose prompts.
        proposal: the reference if None; a trained policy, or a `Mixture` of it with the reference, is much tighter at a
            small `kl_coef`. Of a policy that cannot write all that the reference can, only the lower bound holds.
        particles: S. repeats: independent runs a prompt and side, at least 2.
        max_score: what no score, as paid, is above; None gives no upper bound.
        budget: responses that rejection may draw a prompt for its `repeats` samples.
        prompts: the first so many of the split; None is all.
        generator: a CPU generator.

    Returns:
        An Optimum with method "bounds"; its `references` are the mean scores of `particles * repeats` samples each.

    Raises:
        InvalidArgumentError: unless gamma is 1 and kl_coef > 0.
        LmGymError: if a score is above `max_score`, or if rejection is not affordable.
    """
    check_bounded(task)
    check_int("repeats", repeats, 2)
    lm = task.reference("cpu")
    encoded = encode_prompts(task, split, prompts, lm)
    runs = [ids for ids in encoded for _ in range(repeats)]
    plain = smc(task, runs, CausalPolicy(lm), particles, generator, resample_at=0)
    below = plain if proposal is None else smc(task, runs, proposal, particles, generator)
    sides, upper = [below], math.inf
    if max_score is not None:
        _check_max_score(plain, max_score)
        _check_max_score(below, max_score)
        exact = rejection_samples(task, split, max_score, repeats, budget, generator, prompts=prompts)
        retained = [response for responses in exact for response in responses]
        sides.append(smc(task, runs, proposal or CausalPolicy(lm), particles, generator, retained=retained))
        _check_max_score(sides[1], max_score)
    bounds = [task.kl_coef * side.log_z.view(len(encoded), repeats) for side in sides]
    if max_score is not None:
        upper = min(Interval.over_repeats(bounds[1]).high, max_score)
    of_reference = Interval.over_repeats(plain.scores.view(len(encoded), -1))
    return Optimum(
        method="bounds",
        values=torch.stack(bounds).mean((0, 2)),
        references=plain.scores.view(len(encoded), -1).mean(1),
        lower=Interval.over_repeats(bounds[0]).low,
        upper=upper,
        exact=False,
        reference_half_width=of_reference.high - of_reference.mean,
    )


def check_bounded(task: Task) -> None:
    """Raises `InvalidArgumentError` unless V* is kl_coef log E exp(score / kl_coef): at gamma = 1 and a price."""
    check_solvable(task)
    if task.gamma != 1:
        raise InvalidArgumentError(f"`gamma` must be 1 for these bounds on the optimum, got {task.gamma!r}.")


def _check_whole(task: Task, lm: CausalLM, response: Sequence[int]) -> None:
    is_legal = all(lm.is_legal(token) for token in response)
    if not is_legal or task.end_rule(lm).find_end(response) != len(response) - 1:
        raise InvalidArgumentError(f"`retained` must hold whole responses, up to their end, got {list(response)!r}.")


def _check_max_score(got: Particles, max_score: float) -> None:
    highest = got.scores.max().item()
    if highest > max_score:
        raise LmGymError(f"`max_score` must be what no score is above, got {max_score}, and saw a score of {highest}.")


def encode_prompts(task: Task, split: str, prompts: int | None, lm: CausalLM) -> list[list[int]]:
    """Token ids of the first so many prompts of a split; None is all."""
    check_split(task, split)
    if prompts is not None:
        check_int("prompts", prompts, 1)
    return lm.encode_all(tuple(task.prompts[split]))[:prompts]


def _responses(ids: Tensor, lengths: Tensor) -> list[list[int]]:
    """Tokens of right-padded responses (n, T), without the padding."""
    return [row[:n] for row, n in zip(ids.tolist(), lengths.tolist(), strict=True)]


def _left_padded(rows: Sequence[Sequence[int]], pad: int) -> tuple[Tensor, Tensor]:
    """(n, longest) int64 ids and bool mask of prompts."""
    width = max(len(ids) for ids in rows)
    ids = torch.tensor([[pad] * (width - len(row)) + list(row) for row in rows])
    return ids, torch.tensor([[False] * (width - len(row)) + [True] * len(row) for row in rows])


def _right_padded(rows: Sequence[Sequence[int]], width: int, pad: int) -> Tensor:
    return torch.tensor([[*row, *[pad] * (width - len(row))] for row in rows])
