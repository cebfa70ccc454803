"""Grading a policy on a task: means with intervals, against the reference and the optimum."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lmgym.envs.engine import Engine
from lmgym.envs.prompts import Prompt
from lmgym.envs.vector import RLHFVectorEnv
from lmgym.episodes import Episodes
from lmgym.errors import check_int
from lmgym.intervals import Interval, of_episodes
from lmgym.kl import check_kl_is_plausible, discounted_return, episode_kl, token_rewards
from lmgym.models.policy import Policy
from lmgym.models.sampling import Sampler
from lmgym.optimum.bounds import log_weights, multi_sample_bound
from lmgym.optimum.exact import exact_metrics
from lmgym.rewards.base import STOCHASTIC, remove_noise, score_range, scores_agree
from lmgym.rollout import collect, fresh_generator
from lmgym.tasks.base import Task

_BATCH_SIZE = 256  # episodes that are collected at once
_MAX_SCORED_TWICE = 256  # episodes that are scored once more, to notice a reward with noise


@dataclass(frozen=True)
class Evaluation:
    """What a policy earns on a split, each number with a 95 % interval.

    If every prompt of the split was sampled more than once, the numbers are of these very prompts, as V* is, and the
    interval holds the noise of the sampling. Else the prompts are a sample of prompts like these, and the interval
    holds their noise too (`lmgym.intervals.of_episodes`). A number that is known without sampling has an interval of
    width 0 (`Interval.exact`).

    A noisy reward counts as its mean, `expected` (`lmgym.rewards.base.remove_noise`): J is the same, and known more
    closely. The same holds for a noisy gold reward.

    Attributes:
        metrics: `return` (J, units of the score), `score`, `sampled_score` (with its noise, if there is any),
            `gold_score` if there is one, `kl` (nats an episode), `length` (tokens).
        bound: lower bound on V* from these samples; None if there is none.
        episodes: the samples, prompt by prompt; their scores are those without noise.
        no_bound: why there is no bound. It does not hold at `kl_coef=0` or gamma < 1; at one sample a prompt it is J;
            and if the reward has noise of unknown mean, exp(score / kl_coef) counts the noise as gain.
    """

    metrics: dict[str, Interval]
    bound: Interval | None
    episodes: Episodes
    no_bound: str | None = None

    def __repr__(self) -> str:
        numbers = ", ".join(f"{name} {interval}" for name, interval in self.metrics.items())
        return f"Evaluation({numbers}; {len(self.episodes):,} episodes)"


def evaluate(
    policy: Policy,
    envs: RLHFVectorEnv,
    *,
    samples: int = 8,
    prompts: int | None = None,
    sampler: Sampler | None = None,
    generator: torch.Generator | None = None,
    exact: bool = False,
    progress: Callable[[int], object] | None = None,
) -> Evaluation:
    """Samples every prompt of the env's split (or the first `prompts` of them) a number of times, and grades.

    Args:
        policy: what is graded.
        envs: the MDP and its split.
        samples: episodes a prompt.
        prompts: how many prompts; None is all.
        sampler: how tokens are drawn; None draws from the policy as it is.
        generator: a CPU generator; one of its own if None. A reward's noise is drawn from it too; after the grading the
            noise goes on from where it was before.
        exact: give return, score and KL without sampling where that is possible (`lmgym.optimum.exact`): of the
            reference and of pi* on tables and automata, and of any policy where all responses can be written down.
        progress: called with the number of episodes of every batch that has been sampled, such as a bar's `update`.

    Raises:
        LogProbError: if the KL comes out impossibly negative.
    """
    check_int("samples", samples, 1)
    generator = generator or fresh_generator()
    available = envs.engine.prompts
    count = len(available) if prompts is None else min(prompts, len(available))
    wanted = [available[i] for i in range(count) for _ in range(samples)]
    with noise_from(generator, envs.engine.reward):
        parts = []
        for start in range(0, len(wanted), _BATCH_SIZE):
            parts.append(collect(envs, policy, wanted[start : start + _BATCH_SIZE], sampler, generator))
            if progress is not None:
                progress(len(parts[-1]))
    sampled = Episodes.concatenate(parts)
    episodes = without_noise(envs.engine, wanted, sampled)
    task = envs.task
    if task.kl_coef > 0:
        check_kl_is_plausible(episode_kl(episodes))
    has_noise = remove_noise(envs.engine.reward) is not envs.engine.reward
    numbers = _measure(episodes, task, sampled.scores if has_noise else None)
    metrics = intervals({name: x.view(count, samples) for name, x in numbers.items()}, envs)
    steady = _gives_one_score(envs.engine, wanted, episodes)
    if exact and steady:
        metrics.update(_known(policy, envs, count, sampler, metrics))
    reason = _no_bound(task, samples) or (None if steady else STOCHASTIC)
    if reason is not None:
        return Evaluation(metrics, None, episodes, reason)
    weights = log_weights(episodes, task.kl_coef).view(count, samples)
    return Evaluation(metrics, Interval.of(multi_sample_bound(weights, task.kl_coef)), episodes)


def _measure(episodes: Episodes, task: Task, sampled_scores: Tensor | None) -> dict[str, Tensor]:
    """(B,) numbers by the name of their metric, of episodes without noise and of their scores with it."""
    rewards = token_rewards(episodes, task.kl_coef, dense=task.dense_kl)
    numbers = {"return": discounted_return(rewards, task.gamma), "score": episodes.scores}
    if sampled_scores is not None:
        numbers["sampled_score"] = sampled_scores
    if episodes.gold_scores is not None:
        numbers["gold_score"] = episodes.gold_scores
    if task.kl_coef > 0:  # without a price the reference is never asked
        numbers["kl"] = episode_kl(episodes)
    numbers["length"] = episodes.lengths.float()
    return numbers


@contextmanager
def noise_from(generator: torch.Generator, reward: Any) -> Iterator[None]:
    """Draws a reward's noise from a generator, and in the end puts the noise back to where it was.

    So an evaluation does not change the noise of a training run that shares the reward.
    """
    if not all(hasattr(reward, name) for name in ("reseed", "get_state", "set_state")):
        yield
        return
    state = reward.get_state()
    reward.reseed(int(torch.randint(2**62, (), generator=generator)))
    try:
        yield
    finally:
        reward.set_state(state)


def without_noise(engine: Engine, prompts: Sequence[Prompt], episodes: Episodes) -> Episodes:
    """Episodes with the scores, and the gold ones, that their rewards pay on average; as they are without noise."""
    gold = engine.task.gold
    if remove_noise(engine.reward) is engine.reward and (gold is None or remove_noise(gold) is gold):
        return episodes
    scores, gold_scores = _mean_scores(engine, prompts, episodes)
    golden = None if gold_scores is None else torch.tensor(gold_scores)
    return replace(episodes, scores=torch.tensor(scores), gold_scores=golden)


def _mean_scores(
    engine: Engine, prompts: Sequence[Prompt], episodes: Episodes
) -> tuple[list[float], list[float] | None]:
    """B scores and gold scores without noise, from batches like those that were collected."""
    lengths = episodes.lengths.tolist()
    responses = [row[:n] for row, n in zip(episodes.response_ids.tolist(), lengths, strict=True)]
    scores: list[float] = []
    golden: list[float] = []
    for start in range(0, len(prompts), _BATCH_SIZE):
        rows = slice(start, start + _BATCH_SIZE)
        some, gold = engine.mean_scores(prompts[rows], responses[rows])
        scores += some
        golden += gold or []
    return scores, golden or None


def _gives_one_score(engine: Engine, prompts: Sequence[Prompt], episodes: Episodes) -> bool:
    """Whether the reward gives an episode the same score again, of a few episodes that are asked twice."""
    every = max(1, len(episodes) // _MAX_SCORED_TWICE)
    few = episodes[torch.arange(0, len(episodes), every)]
    again, _ = _mean_scores(engine, prompts[::every], few)
    return scores_agree(few.scores.tolist(), again)


def _no_bound(task: Task, samples: int) -> str | None:
    """Why samples of a reward without noise give no bound on V*, or None."""
    if task.kl_coef == 0:
        return "at `kl_coef=0` it is the largest score"
    if task.gamma != 1:
        return "a bound from samples holds at `gamma=1` alone"
    if samples == 1:
        return "it takes more than one sample a prompt to bound it"
    return None


def intervals(numbers: Mapping[str, Tensor], envs: RLHFVectorEnv) -> dict[str, Interval]:
    """Intervals of what S episodes of each of the first X prompts of an env's split measured, (X, S) each.

    They use the range of scores that the reward declares, if it does (`lmgym.rewards.base.score_range`).
    """
    engine = envs.engine
    task = envs.task
    count = len(numbers["score"])
    prompts = [engine.prompts[i].ids for i in range(count)]
    bounds = score_range(remove_noise(engine.reward), prompts, task.max_new_tokens)
    if bounds is not None:
        bounds = (bounds[0] - task.missing_eos_penalty, bounds[1])
    return of_episodes(
        numbers,
        kl_coef=task.kl_coef,
        gamma=task.gamma,
        horizon=task.max_new_tokens,
        score_range=bounds,
        whole=count == len(engine.prompts),
    )


def _known(
    policy: Policy, envs: RLHFVectorEnv, count: int, sampler: Sampler | None, wanted: Iterable[str]
) -> dict[str, Interval]:
    """Those of the wanted metrics of the first `count` prompts that need no sampling."""
    texts = tuple(envs.task.prompts[envs.engine.split][:count])
    task = replace(envs.task, prompts={"graded": texts}, optima={})
    found = exact_metrics(policy, task, "graded", sampler, envs.engine.lm)
    return {name: Interval.point(value) for name, value in found.items() if name in wanted}


def as_json(metrics: dict[str, Interval]) -> dict[str, Any]:
    """Intervals as plain numbers."""
    return {name: vars(interval) for name, interval in metrics.items()}
