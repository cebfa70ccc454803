"""Best-of-n sampling (Stiennon et al. 2020, appendix G.3): of n responses of the reference, the one that scores best.

What it costs in KL is known as a function of the score's distribution alone (Beirami et al. 2024, "Theoretical
guarantees on the best-of-n alignment policy").

Shapes: X prompts, S answers a prompt, n candidates an answer, M = S n, R responses, B rows, L columns.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from agents.fixed import FixedAgent, FixedConfig
from agents.seeds import CANDIDATES, torch_generator
from lmgym.envs.prompts import Prompt
from lmgym.envs.vector import RLHFVectorEnv
from lmgym.episodes import Episodes
from lmgym.errors import InvalidArgumentError, check_int
from lmgym.evaluation import Evaluation, intervals, noise_from, without_noise
from lmgym.intervals import Interval
from lmgym.kl import episode_kl
from lmgym.models.policy import CausalPolicy
from lmgym.models.sampling import Sampler
from lmgym.ranges import Count
from lmgym.rewards.base import remove_noise
from lmgym.rollout import collect

MAX_DECODED_CANDIDATES = 256  # at once


@dataclass(frozen=True)
class BestOfNConfig(FixedConfig):
    """How many to choose from."""

    n: Count = 16  # candidates an answer


class BestOfN(FixedAgent):
    """Draws n responses of the reference and answers with the one of the highest score, the first of equal ones.

    It sees every score, as no policy does. The distribution of its next token is not known, so it has no `policy` and
    grades itself. `num_timesteps` and `tokens` count all candidates.
    """

    Config = BestOfNConfig
    config: BestOfNConfig
    knows_log_probs = False

    def __init__(
        self, envs: RLHFVectorEnv, config: BestOfNConfig | None = None, *, seed: int = 0, sampler: Sampler | None = None
    ) -> None:
        super().__init__(envs, config, seed=seed, sampler=sampler)
        self._answers: dict[int, tuple[list[int], list[int]]] = {}  # prompt and response in each row of `predict`

    def respond(
        self,
        envs: RLHFVectorEnv,
        prompts: Sequence[Prompt],
        *,
        sampler: Sampler | None = None,
        generator: torch.Generator | None = None,
    ) -> Episodes:
        """The best of n for each prompt; its log-probs are those of the candidate, not of the choice."""
        return self._choose(envs, prompts, sampler or self.sampler, generator or self.generator)[0]

    def predict(self, observation: dict[str, Any], deterministic: bool = False) -> tuple[Any, None]:
        """Tokens for a (batched or single) dict observation, as SB3's `predict`: (actions, None).

        A row at the start of an episode gets an answer, which is then played a token at a time.

        Args:
            observation: (B, L), or (L,) for one row.
            deterministic: draw the candidates from the same uniforms at every start.

        Raises:
            InvalidArgumentError: for a row in mid-episode that was not played by this agent.
        """
        ids = np.atleast_2d(observation["input_ids"])
        mask = np.atleast_2d(observation["attention_mask"]).astype(bool)
        width = ids.shape[1] - self.envs.engine.horizon
        prompts = [row[seen].tolist() for row, seen in zip(ids[:, :width], mask[:, :width], strict=True)]
        responses = [row[seen].tolist() for row, seen in zip(ids[:, width:], mask[:, width:], strict=True)]
        fresh = [row for row, response in enumerate(responses) if not response]
        if fresh:
            generator = torch_generator(self.seed, CANDIDATES) if deterministic else self.generator
            wanted = [self.envs.engine.prompts.of_ids(prompts[row]) for row in fresh]
            chosen = self._choose(self.envs, wanted, self.sampler, generator)[0]
            for i, row in enumerate(fresh):
                self._answers[row] = prompts[row], chosen.response_ids[i][chosen.response_mask[i]].tolist()
        actions = []
        for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
            of, answer = self._answers.get(row, ([], []))
            if of != prompt or answer[: len(response)] != response:
                raise InvalidArgumentError(
                    f"`observation` must be at the start of an episode, or after tokens of this agent, and row {row} "
                    f"has the response {response}."
                )
            actions.append(answer[min(len(response), len(answer) - 1)])  # after the end any token will do
        return np.array(actions) if np.ndim(observation["input_ids"]) == 2 else np.int64(actions[0]), None

    @torch.no_grad()
    def evaluate(
        self,
        envs: RLHFVectorEnv,
        *,
        samples: int = 8,
        prompts: int | None = None,
        sampler: Sampler | None = None,
        generator: torch.Generator | None = None,
        progress: Callable[[int], object] | None = None,
    ) -> Evaluation:
        """Grades the agent as `lmgym.evaluation.evaluate` grades a policy, its KL estimated from ranks.

        `kl` is the mean of the candidate's own log-ratio, 0 for the reference, and `log_ratio_of_best`, from all
        samples * n scores of the prompt. The whole of it is priced, so that at gamma < 1 with a dense KL, where it is
        not known at which token it falls due, `return` is a lower bound. `kl` and `return` have intervals over prompts,
        for the answers to a prompt share its ranks. There is no bound on V*, whose weights would have to be exact.

        Args:
            envs: the MDP and its split.
            samples: answers a prompt, of n candidates each.
            prompts: how many prompts; None is all.
            sampler: how candidates are drawn, given logits; the agent's own if None.
            generator: a CPU generator; the agent's own if None.
            progress: called with the number of answers of every batch that has been sampled.

        Returns:
            The metrics of `lmgym.evaluation.evaluate`, and `kl_bound`, what `kl` is at most where candidates are of the
            reference itself. The log-ratio of the choice is in the log-prob of each answer's last token.
        """
        check_int("samples", samples, 1)
        available = envs.engine.prompts
        task = envs.task
        count = len(available) if prompts is None else min(prompts, len(available))
        wanted = [available[i] for i in range(count) for _ in range(samples)]
        generator = generator or self.generator
        with noise_from(generator, envs.engine.reward):
            chosen, scores = self._choose(envs, wanted, sampler or self.sampler, generator, progress)
        sampled = self._with_log_ratios(chosen, scores.view(count, -1))
        chosen = without_noise(envs.engine, wanted, sampled)
        discounts = task.gamma ** (chosen.lengths - 1)
        price = task.kl_coef * episode_kl(chosen)
        if not task.dense_kl:
            price = discounts * price
        returns = discounts * chosen.scores - price
        numbers: dict[str, Tensor] = {"return": returns, "score": chosen.scores}
        if remove_noise(envs.engine.reward) is not envs.engine.reward:
            numbers["sampled_score"] = sampled.scores
        if chosen.gold_scores is not None:
            numbers["gold_score"] = chosen.gold_scores
        if task.kl_coef > 0:
            numbers["kl"] = episode_kl(chosen)
        numbers["length"] = chosen.lengths.float()
        by_prompt = {name: x.view(count, samples) for name, x in numbers.items()}
        metrics = intervals(by_prompt, envs)
        for name in ("return", "kl"):
            if name in metrics:
                metrics[name] = Interval.of(by_prompt[name].mean(1))
        if task.kl_coef > 0:
            metrics["kl_bound"] = Interval.point(kl_bound(self.config.n))
        return Evaluation(metrics, None, chosen, "log-ratios of the best of n are estimated from ranks")

    def _with_log_ratios(self, chosen: Episodes, scores: Tensor) -> Episodes:
        """Adds the log-ratio of the choice to the log-prob of the last token of each answer.

        Args:
            chosen: X S answers, those to a prompt next to each other. scores: (X, M) of all candidates for a prompt.
        """
        answers = chosen.scores.view(len(scores), -1)
        ratios = [log_ratio_of_best(best, drawn, self.config.n) for best, drawn in zip(answers, scores, strict=True)]
        last = (chosen.lengths - 1).unsqueeze(1)
        added = torch.cat(ratios).unsqueeze(1).float()
        return replace(chosen, log_probs=chosen.log_probs.scatter_add(1, last, added))

    def _choose(
        self,
        envs: RLHFVectorEnv,
        prompts: Sequence[Prompt],
        sampler: Sampler,
        generator: torch.Generator,
        progress: Callable[[int], object] | None = None,
    ) -> tuple[Episodes, Tensor]:
        """The best candidate for each of B prompts, and the scores (B, n) of all."""
        n = self.config.n
        reference = CausalPolicy(envs.engine.lm)
        size = max(1, MAX_DECODED_CANDIDATES // n)
        parts = []
        scores = []
        for start in range(0, len(prompts), size):
            repeated = [prompt for prompt in prompts[start : start + size] for _ in range(n)]
            play = partial(collect, envs, reference, repeated, sampler, generator)
            candidates = self.processes.play(len(repeated), play)
            self.num_timesteps += candidates.num_tokens
            self.tokens.read(candidates)
            scores.append(candidates.scores.view(-1, n))
            first = torch.arange(len(scores[-1])) * n
            parts.append(candidates[first + scores[-1].argmax(1)])  # of equal ones the first
            if progress is not None:
                progress(len(parts[-1]))
        return Episodes.concatenate(parts), torch.cat(scores)


def kl_bound(n: int) -> float:
    """log n - (n - 1) / n nats, which KL(best of n || reference) never passes (Beirami et al. 2024, theorem 3.1).

    It is equal where no two responses have the same score, and each has next to no probability.
    """
    return math.log(n) - (n - 1) / n


def best_of_n_log_probs(log_probs: Tensor, scores: Tensor, n: int) -> Tensor:
    """The distribution of the best of n, exactly: pi_n(y) = pi(y) [F(s)^n - F(s-)^n] / P(score = s), s the score of y.

    F(s) is the probability of a score of at most s, F(s-) of one below. Of equal scores the first drawn wins, so
    that a response has its share of those that score alike.

    Args:
        log_probs: (R,) nats, of every response there is to a prompt. scores: (R,). n: candidates.

    Returns:
        (R,) float64 nats.
    """
    levels, level = scores.unique(return_inverse=True)
    tied = torch.zeros(len(levels), dtype=torch.float64).index_add(0, level, log_probs.double().exp())
    up_to = tied.cumsum(0) / tied.sum()
    return log_probs.double() + _log_ratio(up_to, tied / tied.sum(), n)[level]


def log_ratio_of_best(best: Tensor, scores: Tensor, n: int) -> Tensor:
    """Estimates log pi_n(y) / pi(y) of answers from their ranks among all candidates for their prompt.

    Where an answer shares its score with other candidates, F and P of `best_of_n_log_probs` are counts over M. Where
    it does not, the score is taken for continuous, so that the log-ratio is log n + (n - 1) log F(s), and log F(s) of
    a rank r (from below) is digamma(r) - digamma(M + 1), its mean over a Beta(r, M + 1 - r).

    Without ties the mean over answers is unbiased for the KL, log n - (n - 1) / n, at any number of answers. With ties
    it is biased by a term of order 1 / M, for the logarithm of a count is not that of a probability.

    Args:
        best: (S,) scores of the answers, each the best of n. scores: (M,) of all M = S n candidates. n: candidates.

    Returns:
        (S,) float64 nats.
    """
    ordered = scores.sort().values
    total = scores.numel()
    up_to = torch.searchsorted(ordered, best, right=True).double()
    tied = up_to - torch.searchsorted(ordered, best)
    alone = math.log(n) + (n - 1) * (up_to.digamma() - torch.tensor(total + 1.0, dtype=torch.float64).digamma())
    return torch.where(tied == 1, alone, _log_ratio(up_to / total, tied / total, n))


def _log_ratio(up_to: Tensor, tied: Tensor, n: int) -> Tensor:
    """log [F^n - (F - p)^n] - log p of F = `up_to` and p = `tied`, without cancellation."""
    return n * up_to.log() + (-torch.expm1(n * torch.log1p(-(tied / up_to).clamp(max=1.0)))).log() - tied.log()
