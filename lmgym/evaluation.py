"""Grading a policy on a task: means with intervals, against the reference and the optimum."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lmgym.envs.vector import RLHFVectorEnv
from lmgym.episodes import Episodes
from lmgym.errors import check_int
from lmgym.intervals import Interval
from lmgym.kl import check_sampled_law, discounted_return, episode_kl, token_rewards
from lmgym.models.policy import Policy
from lmgym.models.sampling import Sampler
from lmgym.optimum.bounds import log_weights, multi_sample_bound
from lmgym.rollout import collect

_BATCH = 256


@dataclass(frozen=True)
class Evaluation:
    """What a policy earns on a split, each number with a 95 % interval.

    Where every prompt of the split was sampled more than once, the numbers are of these prompts, as V* is, and the
    interval is that of the sampling; else they are of prompts like these, and it is that over prompts.

    Attributes:
        metrics: `return` (J, units of the score), `score`, `gold_score` if there is one, `kl` (nats an episode),
            `length` (tokens).
        bound: lower bound on V* from these samples; None at `kl_coef=0` or gamma < 1, where it does not hold, and at
            one sample a prompt, where it is J.
        episodes: the samples themselves, prompt by prompt.
    """

    metrics: dict[str, Interval]
    bound: Interval | None
    episodes: Episodes


def evaluate(
    policy: Policy,
    envs: RLHFVectorEnv,
    *,
    samples: int = 8,
    prompts: int | None = None,
    sampler: Sampler | None = None,
    generator: torch.Generator | None = None,
) -> Evaluation:
    """Samples every prompt of the env's split (or the first `prompts` of them) a number of times, and grades.

    Args:
        policy: what is graded.
        envs: the MDP and its split.
        samples: episodes a prompt.
        prompts: how many prompts; None is all.
        sampler: the law tokens are drawn from; the policy's own if None.
        generator: a CPU generator.

    Raises:
        LogProbError: if the KL comes out impossibly negative.
    """
    check_int("samples", samples, 1)
    available = envs.engine.prompts
    count = len(available) if prompts is None else min(prompts, len(available))
    wanted = [available[i] for i in range(count) for _ in range(samples)]
    parts = [
        collect(envs, policy, wanted[start : start + _BATCH], sampler, generator)
        for start in range(0, len(wanted), _BATCH)
    ]
    episodes = Episodes.concatenate(parts)
    task = envs.task
    if task.kl_coef > 0:
        check_sampled_law(episode_kl(episodes))
    rewards = token_rewards(episodes, task.kl_coef, dense=task.dense_kl)
    numbers: dict[str, Tensor] = {"return": discounted_return(rewards, task.gamma), "score": episodes.scores}
    if episodes.gold_scores is not None:
        numbers["gold_score"] = episodes.gold_scores
    if task.kl_coef > 0:  # without a price the reference is never asked
        numbers["kl"] = episode_kl(episodes)
    numbers["length"] = episodes.lengths.float()
    of = Interval.over_repeats if count == len(available) and samples > 1 else _over_prompts
    metrics = {name: of(x.view(count, samples)) for name, x in numbers.items()}
    bound = None
    if task.kl_coef > 0 and task.gamma == 1 and samples > 1:
        weights = log_weights(episodes, task.kl_coef).view(count, samples)
        bound = Interval.of(multi_sample_bound(weights, task.kl_coef))
    return Evaluation(metrics, bound, episodes)


def _over_prompts(x: Tensor) -> Interval:
    return Interval.of(x.mean(1))


def as_json(metrics: dict[str, Interval]) -> dict[str, Any]:
    """Intervals as plain numbers."""
    return {name: vars(interval) for name, interval in metrics.items()}
