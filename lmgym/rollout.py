"""Collecting episodes: whole ones by decoding with the policy's own cache, or step by step through any vector env.

Shapes: B episodes, P prompt columns, T response columns, N envs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from gymnasium.vector import AutoresetMode
from torch import Tensor

from lmgym.envs.engine import Engine
from lmgym.envs.prompts import Prompt
from lmgym.envs.vector import RLHFVectorEnv
from lmgym.episodes import Episodes
from lmgym.errors import InvalidArgumentError, check_int
from lmgym.models.drawing import Drawing
from lmgym.models.graph_pool import is_captured
from lmgym.models.policy import CausalPolicy, CausalState, PlainSteps, Policy, Responder, Steps
from lmgym.models.sampling import Sampler, check_finite_log_probs
from lmgym.models.transfer import to_device

_COMPACT_AT = 0.25  # share of finished rows at which the batch is worth compacting
_LOOK_EVERY = 8  # tokens between two looks at which rows have ended, where a look has a GPU wait
_MIN_ROWS = 8  # of a batch there, which a smaller one would not make faster


@torch.no_grad()
def collect(
    envs: RLHFVectorEnv,
    policy: Policy | Responder,
    episodes: int | list[Prompt],
    sampler: Sampler | None = None,
    generator: torch.Generator | None = None,
    response_ids: Tensor | None = None,
    rows: slice | None = None,
) -> Episodes:
    """Decodes whole episodes and has the env pay for them in one teacher-forced pass.

    Log-probs and values are taken from the very logits that sampled. Finished rows leave the batch while the others go
    on. An episode depends on its own prompt and uniforms, not on its batch-mates.

    Args:
        envs: the MDP; its rows are not touched, its stream of prompts is.
        policy: what decodes, or what answers with whole responses.
        episodes: how many (prompts are the next of the env's stream), or the prompts themselves.
        sampler: how tokens are drawn, given the policy's logits; None draws from the policy as it is.
        generator: a CPU generator; B x T uniforms are drawn from it. One of its own if None.
        response_ids: (B, S) tokens that the responses go on from, as with the option of `reset`. They stand in the
            episodes and their mask, with log-probs of 0 under policy and reference alike: nobody chose them.
        rows: which of these episodes to play, where others play the rest: prompts and uniforms are drawn for all. None
            is all.

    Returns:
        Episodes on the CPU.
    """
    prompts = envs.next_prompts(episodes) if isinstance(episodes, int) else episodes
    prefix = _check_prefixes(envs.engine, len(prompts), response_ids)
    uniforms = _draw_uniforms(len(prompts), envs.engine.horizon, generator or fresh_generator())
    if rows is not None:
        prompts = prompts[rows]
        uniforms = uniforms[rows]
        prefix = prefix[rows]
    if isinstance(policy, Responder):
        decoded = _ask(envs.engine, policy, prompts, sampler or Sampler(), uniforms, prefix)
    else:
        decoded = _decode(envs.engine, policy, prompts, sampler or Sampler(), uniforms, prefix)
    # What samples from the reference itself has just given the reference's log-probs.
    is_reference = isinstance(policy, CausalPolicy) and policy.lm is envs.engine.lm and sampler in (None, Sampler())
    paid = _pay(envs, prompts, decoded, decoded.log_probs.numpy() if is_reference else None)
    paid.ref_log_probs[:, : prefix.shape[1]] = 0.0
    return paid


@torch.no_grad()
def collect_side_by_side(
    envs: Sequence[RLHFVectorEnv],
    policy: Policy,
    episodes: int,
    sampler: Sampler,
    generators: Sequence[torch.Generator],
) -> list[Episodes]:
    """A batch from each of several envs of one task, decoded together; each is what `collect` gives of its env.

    Args:
        envs: S of them, equal but for their streams.
        policy: decodes S * `episodes` rows, env by env.
        episodes: of each env. sampler: how tokens are drawn.
        generators: S CPU generators.
    """
    engine = envs[0].engine
    prompts = [each.next_prompts(episodes) for each in envs]
    uniforms = torch.cat([_draw_uniforms(episodes, engine.horizon, generator) for generator in generators])
    decoded = _decode(engine, policy, [prompt for batch in prompts for prompt in batch], sampler, uniforms)
    parts = decoded.split(episodes)
    return [_pay(each, batch, part) for each, batch, part in zip(envs, prompts, parts, strict=True)]


def _pay(
    envs: RLHFVectorEnv,
    prompts: list[Prompt],
    decoded: _Decoded,
    ref_log_probs: npt.NDArray[np.float32] | None = None,
) -> Episodes:
    """Episodes of responses that were drawn to B prompts of an env, with what the env pays for them.

    Args:
        envs: pays. prompts: B. decoded: what was drawn. ref_log_probs: (B, T) where they are known already.
    """
    engine = envs.engine
    prompt_ids, prompt_mask = engine.pad_prompts(prompts)
    replay = envs.replay(prompts, decoded.response_ids.numpy(), ref_log_probs)
    gold = replay.outcomes.gold_scores
    return Episodes(
        prompt_ids=prompt_ids,
        prompt_mask=prompt_mask,
        response_ids=decoded.response_ids,
        response_mask=torch.from_numpy(replay.response_mask),
        log_probs=decoded.log_probs,
        ref_log_probs=torch.from_numpy(replay.ref_log_probs).float(),
        scores=torch.tensor(replay.outcomes.scores),
        values=decoded.values,
        terminated=torch.from_numpy(replay.terminated),
        prompt_index=torch.tensor([p.index for p in prompts]),
        gold_scores=None if gold is None else torch.tensor(gold),
    ).with_tokenizer(engine.lm.tokenizer)


class _Decoded(NamedTuple):
    """What decoding gave, on the CPU: (B, T) each, `values` None of a policy without."""

    response_ids: Tensor
    log_probs: Tensor
    values: Tensor | None

    def split(self, size: int) -> list[_Decoded]:
        """Parts of `size` rows."""
        columns = [[None] * (len(self.log_probs) // size) if x is None else x.split(size) for x in self]
        return [_Decoded(*part) for part in zip(*columns, strict=True)]


def _check_prefixes(engine: Engine, count: int, response_ids: Tensor | None) -> Tensor:
    """(B, S) int64 on the CPU: the tokens that B responses go on from, none where none are given."""
    if response_ids is None:
        return torch.zeros((count, 0), dtype=torch.int64)
    if response_ids.ndim != 2 or len(response_ids) != count:
        raise InvalidArgumentError(f"`response_ids` must have shape ({count}, S), got {tuple(response_ids.shape)}.")
    prefix = response_ids.cpu()
    for tokens in {tuple(row) for row in prefix.tolist()}:
        engine.check_prefix(tokens)
    return prefix


def _draw_uniforms(count: int, horizon: int, generator: torch.Generator) -> Tensor:
    """(B, T) float64: all the randomness of so many responses."""
    return torch.rand((count, horizon), generator=generator, dtype=torch.float64)


def _ask(
    engine: Engine, policy: Responder, prompts: list[Prompt], sampler: Sampler, uniforms: Tensor, prefix: Tensor
) -> _Decoded:
    """Has whole responses drawn to B prompts; the arguments are those of `_decode`."""
    if prefix.shape[1]:
        raise InvalidArgumentError("`response_ids` must be None where whole responses are drawn elsewhere.")
    ids = [list(prompt.ids) for prompt in prompts]
    return _Decoded(*policy.complete(engine.lm, ids, sampler, uniforms, engine.end_rule), None)


def _decode(
    engine: Engine,
    policy: Policy,
    prompts: list[Prompt],
    sampler: Sampler,
    uniforms: Tensor,
    prefix: Tensor | None = None,
) -> _Decoded:
    """Draws a response to each of B prompts, to its end, by uniforms (B, T); it goes on from a prefix (B, S)."""
    device = policy.device
    prefix = uniforms.new_zeros((len(prompts), 0), dtype=torch.int64) if prefix is None else prefix
    steps = _begin(engine, policy, prompts, sampler, uniforms, prefix)
    for t in range(prefix.shape[1] + 1, engine.horizon):
        drawing = steps.drawing
        if not is_captured(device) or t % _LOOK_EVERY == 0:
            running = drawing.running[: drawing.size]
            if not running.any():
                break
            slots = _find_slots_to_keep(running)
            if slots is not None:
                steps.keep(slots)
        steps.advance()
    drawing = steps.drawing
    # Copies also on a CPU: the next batch may be drawn in the same tensors.
    response_ids, log_probs = (x.to("cpu", copy=True) for x in (drawing.response_ids, drawing.log_probs))
    check_finite_log_probs(log_probs, drawing.dtype)
    return _Decoded(response_ids, log_probs, None if drawing.values is None else drawing.values.to("cpu", copy=True))


def _begin(
    engine: Engine, policy: Policy, prompts: list[Prompt], sampler: Sampler, uniforms: Tensor, prefix: Tensor
) -> Steps:
    """Has a policy read B prompts and a prefix (B, S) of each response, and draws the next token by uniforms (B, T)."""
    device = policy.device
    prompt_ids, prompt_mask = (to_device(x, device) for x in engine.pad_prompts(prompts))
    state = policy.begin(prompt_ids, prompt_mask, engine.horizon)
    prefix = to_device(prefix, device)
    for tokens in prefix.T:
        state.step(tokens)
    end_rule = engine.task.end_rule(engine.lm, device)
    key = (engine.task.min_new_tokens, *sorted(engine.lm.eos_token_ids))
    drawing = Drawing(sampler, end_rule, to_device(uniforms, device), engine.lm.pad_token_id, key)
    drawing.start(prefix)
    drawing.draw(state.logits, state.values)
    drawing.position += 1
    drawing.column += 1
    return state.steps(drawing) if isinstance(state, CausalState) else PlainSteps(state, drawing)


def _find_slots_to_keep(running: Tensor) -> Tensor | None:
    """The slots (n,) that a batch goes on with, given which of them (B,) still run; None where it stays as it is.

    They are those that run, once a quarter have ended. Where steps are captured they are filled up to a power of two
    with slots that have ended, so that few sizes come up.
    """
    alive = int(running.sum())
    size = len(running)
    if not is_captured(running.device):
        return running.nonzero().squeeze(1) if alive <= (1 - _COMPACT_AT) * size else None
    target = max(_MIN_ROWS, 1 << (alive - 1).bit_length())
    return running.to(torch.uint8).argsort(descending=True, stable=True)[:target] if target < size else None


@torch.no_grad()
def collect_steps(
    envs: Any,
    policy: Policy,
    episodes: int,
    sampler: Sampler | None = None,
    generator: torch.Generator | None = None,
) -> Episodes:
    """The same through `envs.step` alone: slower, and the definition that `collect` must agree with.

    Every row plays one episode a round, and steps on idly until the last of them has ended.

    Args:
        envs: any vector env of the token MDP in "SameStep" autoreset with dict observations.
        policy, sampler, generator: as in `collect`.
        episodes: a multiple of the number of envs.

    Returns:
        Episodes on the CPU; `prompt_index` is -1, for an observation does not tell it.

    Raises:
        InvalidArgumentError: for another autoreset mode, or a number of episodes that is no such multiple.
    """
    check_same_step(envs)
    sampler = sampler or Sampler()
    generator = generator or fresh_generator()
    n = envs.num_envs
    check_int("episodes", episodes, 1)
    if episodes % n:
        raise InvalidArgumentError(f"`episodes` must be a multiple of the number of envs, {n}, got {episodes}.")
    task = envs.get_attr("task")[0]
    rounds = [_play_round(envs, policy, task.max_new_tokens, sampler, generator) for _ in range(episodes // n)]
    return Episodes.concatenate(rounds)


def check_same_step(envs: Any) -> None:
    """Raises `InvalidArgumentError` for a vector env whose infos do not tell how an episode ended as it ends."""
    mode = envs.metadata["autoreset_mode"]
    if mode != AutoresetMode.SAME_STEP:
        raise InvalidArgumentError(
            f"`autoreset_mode` must be 'SameStep' for episodes to be collected step by step, got {mode.value!r}."
        )


def fresh_generator() -> torch.Generator:
    """A generator of its own, seeded by the machine: the global one is never read."""
    generator = torch.Generator()
    generator.seed()
    return generator


def _play_round(envs: Any, policy: Policy, horizon: int, sampler: Sampler, generator: torch.Generator) -> Episodes:
    """One episode in every row of an env."""
    observation, _ = envs.reset()
    played = _Round(observation, horizon)
    uniforms = torch.rand((envs.num_envs, horizon), generator=generator, dtype=torch.float64)
    state = policy.begin(played.prompt_ids.to(policy.device), played.prompt_mask.to(policy.device), horizon)
    for t in range(horizon):
        tokens, log_probs = sampler.sample(state.logits, t, uniforms[:, t])
        played.add_tokens(t, tokens.cpu(), log_probs.cpu(), state.values)
        _, _, terminated, truncated, infos = envs.step(tokens.cpu().numpy())
        played.add_outcomes(t, torch.from_numpy(terminated), torch.from_numpy(truncated), infos)
        if t == horizon - 1 or not played.running.any():
            break
        state.step(tokens)
    check_finite_log_probs(played.log_probs, state.logits.dtype)
    return played.episodes().with_tokenizer(getattr(envs.unwrapped, "tokenizer", None))


class _Round:
    """One episode in each of N rows, while they are played.

    Args:
        observation: of the reset. horizon: T.

    Attributes:
        prompt_ids: (N, P) int64. prompt_mask: (N, P) bool. log_probs: (N, T) nats. running: (N,) bool.
    """

    def __init__(self, observation: dict[str, Any], horizon: int) -> None:
        ids = observation["input_ids"]
        n = len(ids)
        width = ids.shape[1] - horizon
        self.prompt_ids = torch.from_numpy(ids[:, :width].copy())
        self.prompt_mask = torch.from_numpy(observation["attention_mask"][:, :width].astype(bool))
        self.log_probs = torch.zeros((n, horizon))
        self.running = torch.ones(n, dtype=torch.bool)
        self._response_ids = torch.zeros((n, horizon), dtype=torch.int64)
        self._response_mask = torch.zeros((n, horizon), dtype=torch.bool)
        self._ref_log_probs = torch.zeros((n, horizon))
        self._scores = torch.zeros(n)
        self._gold_scores = torch.zeros(n)
        self._has_gold = False
        self._terminated = torch.zeros(n, dtype=torch.bool)
        self._values: Tensor | None = None

    def add_tokens(self, t: int, tokens: Tensor, log_probs: Tensor, values: Tensor | None) -> None:
        """Notes the tokens (N,) that are chosen at step t, with their log-probs and the critic's estimates before."""
        rows = self.running
        self._response_ids[rows, t] = tokens[rows]
        self._response_mask[rows, t] = True
        self.log_probs[rows, t] = log_probs[rows]
        if values is not None:
            if self._values is None:
                self._values = torch.zeros_like(self.log_probs)
            self._values[rows, t] = values.float().cpu()[rows]

    def add_outcomes(self, t: int, terminated: Tensor, truncated: Tensor, infos: dict[str, Any]) -> None:
        """Notes what the env answered at step t."""
        final = infos.get("final_info", {})
        for source in (infos, final):
            if "ref_log_prob" in source:
                paid = torch.from_numpy(source["_ref_log_prob"]) & self.running
                self._ref_log_probs[paid, t] = torch.from_numpy(source["ref_log_prob"]).float()[paid]
        ended = (terminated | truncated) & self.running
        if ended.any():
            self._scores[ended] = torch.from_numpy(final["score"]).float()[ended]
            self._terminated[ended] = terminated[ended]
            if "gold_score" in final:
                self._has_gold = True
                self._gold_scores[ended] = torch.from_numpy(final["gold_score"]).float()[ended]
        self.running = self.running & ~ended

    def episodes(self) -> Episodes:
        """The N episodes."""
        return Episodes(
            prompt_ids=self.prompt_ids,
            prompt_mask=self.prompt_mask,
            response_ids=self._response_ids,
            response_mask=self._response_mask,
            log_probs=self.log_probs,
            ref_log_probs=self._ref_log_probs,
            scores=self._scores,
            values=self._values,
            terminated=self._terminated,
            prompt_index=torch.full((len(self.prompt_ids),), -1),
            gold_scores=self._gold_scores if self._has_gold else None,
        )
