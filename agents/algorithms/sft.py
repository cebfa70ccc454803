"""Supervised fine-tuning: behaviour cloning of demonstrated responses.

Shapes: n response tokens of a batch.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import partial
from typing import Literal

from torch import Tensor

from agents.algorithms.best_of_n import BestOfN, BestOfNConfig
from agents.algorithms.optimal import Optimal
from agents.supervised import SupervisedAgent, SupervisedConfig, named_row, response_ids, unscored
from agents.update import Loss
from lmgym.envs.engine import Engine
from lmgym.envs.vector import RLHFVectorEnv
from lmgym.episodes import Episodes
from lmgym.errors import InvalidArgumentError
from lmgym.feedback.demonstrations import read_demonstrations
from lmgym.kl import discounted_return, episode_kl, token_rewards
from lmgym.models.policy import Policy
from lmgym.models.sampling import Sampler
from lmgym.ranges import Count, NonNegative
from lmgym.rollout import collect

Demonstrations = Literal["best_of_n", "optimal", "file"]


@dataclass(frozen=True)
class SFTConfig(SupervisedConfig):
    """Behaviour cloning's own numbers. An example is a demonstration."""

    batch_size: Count = 16
    epochs: Count = 4
    lr: NonNegative = 1e-3
    demonstrations: Demonstrations = "best_of_n"  # the best of n responses of the reference, pi*'s, or those of a file
    n: Count = 16  # best_of_n: candidates a demonstration
    path: str | None = None  # file: feedback, or rows with "prompt" and "completion", or "messages"

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.path is None) != (self.demonstrations != "file"):
            expected = "a file where" if self.demonstrations == "file" else "null unless"
            raise InvalidArgumentError(f"`path` must be {expected} `demonstrations` is 'file', got {self.path!r}.")
        if self.path is not None and not os.path.isfile(self.path):
            raise InvalidArgumentError(f"`path` must be a file, and there is none at {self.path!r}.")


class SFT(SupervisedAgent[Episodes]):
    """Clones demonstrated responses (Pomerleau 1991; Ouyang et al. 2022, section 3.5): maximum likelihood, no returns.

    `num_timesteps` counts candidates that are not cloned too; of a file no env step is taken, and the reward is never
    asked. `sampler` is of the reference's candidates, and of `predict`; pi* is drawn from as it is.

    Raises:
        InvalidArgumentError: for a file that does not fit the task, and where pi* is asked for and no solver knows it.
    """

    Config = SFTConfig
    config: SFTConfig

    def __init__(
        self, envs: RLHFVectorEnv, config: SFTConfig | None = None, *, seed: int = 0, sampler: Sampler | None = None
    ) -> None:
        super().__init__(envs, config, seed=seed, sampler=sampler)
        self._expert: Policy | None = Optimal(envs).policy if self.config.demonstrations == "optimal" else None
        self._file = None if self.config.path is None else episodes_of(self.config.path, envs.engine)
        if self._file is not None:
            self.tokens.read(self._file)  # by the reference

    @property
    def file_size(self) -> int | None:
        """Demonstrations of the file."""
        return None if self._file is None else len(self._file)

    def sample(self) -> tuple[Episodes, int]:
        """A response to each of the next `batch_size` prompts, and how many tokens were sampled for them."""
        prompts = self.envs.next_prompts(self.config.batch_size)
        if self._expert is None:
            chooser = BestOfN(self.envs, BestOfNConfig(self.config.n), sampler=self.sampler)
            chooser.generator = self.generator
            chooser.tokens = self.tokens
            chooser.processes = self.processes
            return chooser.respond(self.envs, prompts), chooser.num_timesteps
        play = partial(collect, self.envs, self._expert, prompts, generator=self.generator)
        episodes = self.processes.play(len(prompts), play)
        self.tokens.read(episodes)
        return episodes, episodes.num_tokens

    def select(self, rows: Tensor) -> tuple[Episodes, int]:
        """Demonstrations of the file."""
        assert self._file is not None
        return self._file[rows], self._file[rows].num_tokens

    def part(self, examples: Episodes, rows: slice) -> tuple[Episodes, float]:
        """Some demonstrations, and the share of the response tokens that they have."""
        own = examples[rows]
        return own, own.num_tokens / examples.num_tokens

    def loss(self, examples: Episodes) -> Loss:
        """The mean of -log pi over response tokens; the prompt is read and not learned."""
        self.tokens.read(examples, backward=1)
        return -self.log_probs(examples).mean(), {}

    def describe(self, examples: Episodes) -> dict[str, float]:
        """What is known of demonstrations, whoever they are of."""
        task = self.envs.task
        metrics = {"train/demonstration_length": examples.lengths.float().mean().item()}
        if self._file is not None or task.kl_coef > 0:
            metrics["train/reference_loss"] = -examples.ref_log_probs[examples.response_mask].mean().item()
        if self._file is not None:
            return metrics
        metrics["train/demonstration_score"] = examples.scores.mean().item()
        if examples.gold_scores is not None:
            metrics["train/demonstration_gold_score"] = examples.gold_scores.mean().item()
        if self._expert is not None:  # the distribution of a best of n is not known, nor its KL
            returns = discounted_return(token_rewards(examples, task.kl_coef, dense=task.dense_kl), task.gamma)
            metrics["train/demonstration_return"] = returns.mean().item()
            metrics["train/demonstration_kl"] = episode_kl(examples).mean().item()
        return metrics


def episodes_of(source: object, engine: Engine) -> Episodes:
    """Demonstrations of a file, as token ids, with the reference's log-probs; nobody has scored them.

    Of texts `prompt + completion` is what is learned: a completion carries its own leading space, and the EOS token as
    text where the response ends by itself. What people corrected or preferred is complete where the record says so.

    Args:
        source: the file, or rows (`lmgym.feedback.demonstrations`).
        engine: of the task.

    Raises:
        InvalidArgumentError: naming the first row that is no demonstration, and for a prompt or a completion that is
            none of the task's.
    """
    prompts = []
    responses = []
    for text, completion, location in read_demonstrations("path", source, engine.lm.tokenizer):
        with named_row(location[:1].upper() + location[1:]):
            prompts.append(engine.prompts.of_text(text))
            responses.append(response_ids(engine, text, prompts[-1], completion))
    if not prompts:
        raise InvalidArgumentError("`path` must hold at least one demonstration, got none: nothing is preferred in it.")
    return unscored(engine, prompts, responses)
