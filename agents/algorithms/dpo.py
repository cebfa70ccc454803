"""Direct preference optimisation (Rafailov et al. 2023): the policy itself is fitted to preferences, as a reward model.

Shapes: B responses, n pairs, K ranked completions a prompt.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from agents.diagnostics import share_prompts
from agents.supervised import SupervisedAgent, SupervisedConfig, named_row, response_ids, unscored, with_reference
from agents.update import Loss
from lmgym.envs.engine import Engine
from lmgym.envs.prompts import Prompt
from lmgym.envs.vector import RLHFVectorEnv
from lmgym.episodes import Episodes
from lmgym.errors import InvalidArgumentError
from lmgym.feedback.annotators import preference_probability
from lmgym.feedback.comparisons import pairs_of, ranked
from lmgym.feedback.files import locate_records
from lmgym.feedback.rendering import render_record
from lmgym.kl import check_kl_is_plausible, discounted_return, episode_kl, token_rewards
from lmgym.models.sampling import Sampler
from lmgym.ranges import Positive
from lmgym.rollout import collect

Mode = Literal["online", "offline"]
Labels = Literal["bradley_terry", "argmax"]


@dataclass(frozen=True)
class DPOConfig(SupervisedConfig):
    """DPO's own numbers. An example is a pair."""

    mode: Mode = "online"  # pairs sampled from the policy as it is, labelled by the task's score; or those of a file
    preferences: str | None = None  # a file of feedback (`lmgym.feedback.files`), for offline
    labels: Labels = "bradley_terry"  # online: preferred at random, with probability sigmoid(score - other), or always
    beta: Positive | None = None  # units of the score a nat; null is the task's kl_coef

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.preferences is None) != (self.mode == "online"):
            expected = "null where `mode` is 'online'" if self.mode == "online" else "a file where `mode` is 'offline'"
            raise InvalidArgumentError(f"`preferences` must be {expected}, got {self.preferences!r}.")
        if self.preferences is not None and not os.path.isfile(self.preferences):
            raise InvalidArgumentError(f"`preferences` must be a file, and there is none at {self.preferences!r}.")


@dataclass(frozen=True)
class Pairs:
    """Pairs of responses to one prompt each.

    Attributes:
        episodes: B responses; one may be in several pairs. `ref_log_probs` are those of the reference.
        chosen: (n,) int64 rows of the preferred ones. rejected: (n,) of the others.
        tied: (n,) bool, True where neither was preferred.
    """

    episodes: Episodes
    chosen: Tensor
    rejected: Tensor
    tied: Tensor

    def __post_init__(self) -> None:
        both = torch.stack([self.chosen, self.rejected], dim=1).flatten()
        same = share_prompts(self.episodes[both], 2)
        if not same.all():
            raise InvalidArgumentError(
                f"`chosen` and `rejected` must be responses to one prompt, and in {int((~same).sum())} of {len(same)} "
                "pairs they are not."
            )

    def __len__(self) -> int:
        return len(self.chosen)

    def take(self, rows: Tensor | slice) -> Pairs:
        """Some of the pairs, of the same episodes."""
        return Pairs(self.episodes, self.chosen[rows], self.rejected[rows], self.tied[rows])


class DPO(SupervisedAgent[Pairs]):
    """Learns from pairs of responses, one of which was preferred; no reward model and no critic.

    Raises:
        InvalidArgumentError: for a file of preferences that does not fit the task, and at a beta of 0.
    """

    Config = DPOConfig
    config: DPOConfig

    def __init__(
        self, envs: RLHFVectorEnv, config: DPOConfig | None = None, *, seed: int = 0, sampler: Sampler | None = None
    ) -> None:
        super().__init__(envs, config, seed=seed, sampler=sampler)
        self.beta = envs.kl_coef if self.config.beta is None else self.config.beta
        if self.beta == 0:
            raise InvalidArgumentError("`beta` must be given where the task's `kl_coef` is 0, got null.")
        preferences = self.config.preferences
        self._file = None if preferences is None else read_pairs(preferences, envs.engine)
        if self._file is not None:
            self.tokens.read(self._file.episodes)  # by the reference

    @property
    def file_size(self) -> int | None:
        """Pairs of the file."""
        return None if self._file is None else len(self._file)

    def sample(self) -> tuple[Pairs, int]:
        """Two responses of the policy to each of `batch_size` prompts, labelled by their scores."""
        prompts = [prompt for prompt in self.envs.next_prompts(self.config.batch_size) for _ in range(2)]
        play = partial(collect, self.envs, self.policy, prompts, self.sampler, self.generator)
        episodes = self.processes.play(len(prompts), play)
        self.tokens.read(episodes)
        if self.envs.kl_coef > 0:
            check_kl_is_plausible(episode_kl(episodes))
        else:
            self.tokens.read(episodes)
            episodes = with_reference(self.envs.engine, episodes)
        scores = episodes.scores.double().view(-1, 2)
        if self.config.labels == "argmax":
            first = (scores[:, 0] - scores[:, 1]).sign() / 2 + 0.5  # a tie is a coin toss
        else:
            first = torch.from_numpy(preference_probability(scores[:, 0], scores[:, 1], 1.0))
        uniforms = torch.rand(len(first), generator=self.generator, dtype=torch.float64)
        chosen = 2 * torch.arange(len(first)) + (uniforms >= first)
        return Pairs(episodes, chosen, chosen ^ 1, torch.zeros_like(chosen, dtype=torch.bool)), episodes.num_tokens

    def select(self, rows: Tensor) -> tuple[Pairs, int]:
        """Pairs of the file, and the tokens of both sides."""
        assert self._file is not None
        pairs = self._file.take(rows)
        return pairs, int(pairs.episodes.lengths[torch.cat([pairs.chosen, pairs.rejected])].sum())

    def part(self, examples: Pairs, rows: slice) -> tuple[Pairs, float]:
        """Some pairs, and the share of all that they are."""
        own = examples.take(rows)
        return own, len(own) / len(examples)

    def describe(self, examples: Pairs) -> dict[str, float]:
        """Of pairs that the policy has just sampled, what they are worth; of a file nothing."""
        if self._file is not None:
            return {}
        task = self.envs.task
        episodes = examples.episodes
        returns = discounted_return(token_rewards(episodes, task.kl_coef, dense=task.dense_kl), task.gamma)
        metrics = {"rollout/return": returns.mean().item(), "rollout/score": episodes.scores.mean().item()}
        if episodes.gold_scores is not None:
            metrics["rollout/gold_score"] = episodes.gold_scores.mean().item()
        metrics["rollout/kl"] = episode_kl(episodes).mean().item()
        return metrics | {"rollout/length": episodes.lengths.float().mean().item()}

    def loss(self, examples: Pairs) -> Loss:
        """The mean of `pair_losses`; of a tie, each of the two is the preferred one by half."""
        both = examples.episodes[torch.cat([examples.chosen, examples.rejected])]
        chosen, rejected = self.log_ratios(both).chunk(2)
        self.tokens.read(both, backward=1)
        margins = self.beta * (chosen - rejected).detach()
        accuracy = ((margins.sign() + 1) / 2).mean()
        metrics = {"train/accuracy": accuracy, "train/margin": margins.mean()}
        losses = self.pair_losses(chosen, rejected)
        both_ways = (losses + self.pair_losses(rejected, chosen)) / 2
        return torch.where(examples.tied.to(losses.device), both_ways, losses).mean(), metrics

    def pair_losses(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        """(n,) the loss of each pair, from the log-ratios (n,) of its two responses."""
        return dpo_loss(chosen, rejected, self.beta)

    def log_ratios(self, episodes: Episodes) -> Tensor:
        """(B,) log pi(y|x) / pi_ref(y|x), nats a response; differentiable."""
        episodes = episodes.to(self.policy.device)
        gaps = self.log_probs(episodes) - episodes.ref_log_probs[episodes.response_mask]
        return gaps.new_zeros(len(episodes)).index_add(0, episodes.response_mask.nonzero()[:, 0], gaps)


def dpo_loss(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    """-log sigmoid(beta (h_chosen - h_rejected)), h = log pi / pi_ref (Rafailov et al. 2023, eq. 7).

    Args:
        chosen: (n,) log pi(y|x) / pi_ref(y|x) in nats of the preferred responses. rejected: (n,) of the others.
        beta: units of the score a nat, > 0.

    Returns:
        (n,) nats; log 2 where pi is the reference.
    """
    return -F.logsigmoid(beta * (chosen - rejected))


def read_pairs(source: object, engine: Engine) -> Pairs:
    """Every pair that the judgements of a file compare, as token ids, with the reference's log-probs.

    Args:
        source: records of feedback, in any layout (`lmgym.feedback.files.read_records`); all pairs count alike.
        engine: of the task.

    Raises:
        InvalidArgumentError: for a source that cannot be read or compares nothing, and for a prompt or a completion
            that is none of the task's.
    """
    prompts: list[Prompt] = []
    responses: list[list[int]] = []
    compared: list[tuple[int, int, bool]] = []
    for location, record in locate_records(source, "preferences"):
        order = ranked(record)
        if order is None:
            continue
        where = f"{location} of `preferences`"
        texts = render_record("preferences", order, engine.lm.tokenizer, where)
        compared += [(len(responses) + pair.better, len(responses) + pair.worse, pair.tie) for pair in pairs_of(record)]
        with named_row(where[:1].upper() + where[1:]):
            prompt = engine.prompts.of_text(str(texts.prompt))
            prompts += [prompt] * len(texts.completions)
            responses += [response_ids(engine, str(texts.prompt), prompt, str(c.text)) for c in texts.completions]
    if not compared:
        raise InvalidArgumentError("`preferences` must hold at least one judgement that compares, got none.")
    chosen, rejected, tied = (torch.tensor(column) for column in zip(*compared, strict=True))
    return Pairs(unscored(engine, prompts, responses), chosen, rejected, tied)
