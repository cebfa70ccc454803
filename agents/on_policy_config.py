"""The numbers of agents that learn from their own episodes: what all of them have, and those that compare responses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from agents.learning import LearningConfig
from agents.policies.actor_critic import Critic, TrainablePolicy
from agents.update import AdamConfig, Updater, check_bitsandbytes
from lmgym.errors import InvalidArgumentError, check_int
from lmgym.ranges import Count, Decay, Fraction, NonNegative, Positive, Range

GroupSize = Annotated[int, Range(2)]


@dataclass(frozen=True)
class OnPolicyConfig(LearningConfig):
    """What every on-policy agent has."""

    batch_size: Count = 256  # episodes a batch
    epochs: Count = 4  # passes over a batch
    minibatches: Count = 4  # optimiser steps a pass
    micro_batch_size: Count = 128  # episodes a forward, at most (32 on a CPU); gradients of a minibatch add up
    lr: NonNegative = 5e-4  # Adam's, at first
    critic_lr: NonNegative | None = None  # of the value head and a critic's own trunk; null is lr
    lr_schedule: Literal["constant", "linear", "cosine"] = "linear"  # over the whole run
    lr_warmup: Fraction = 0.0  # share of the run over which it rises to lr from 0, before the schedule begins
    lr_end: Fraction = 0.0  # share of lr that linear and cosine end at
    adam: Literal["pytorch", "tensorflow", "8bit"] = "pytorch"  # tensorflow: adam_eps as there; 8bit: moments in bytes
    adam_beta1: Decay = 0.9
    adam_beta2: Decay = 0.999
    adam_eps: NonNegative = 1e-5
    max_grad_norm: NonNegative = 1.0  # gradients are clipped to this norm; 0 does not clip
    critic: Critic = "shared"  # where the value head sits
    kl_controller: Literal["fixed", "adaptive"] = "fixed"  # adaptive: Ziegler et al. 2019, from the task's kl_coef
    kl_target: Positive = 6.0  # nats an episode, for the adaptive coefficient
    kl_horizon: Positive = 10_000.0  # episodes, for the adaptive coefficient
    score_clip: Positive | None = None  # scores are clipped to +- this before they are learned from; null does not clip
    recompute_log_probs: bool = False  # those that an update starts from: of one more forward, or of the sampling
    importance: Literal["none", "truncated", "masked"] = "none"  # tokens weigh trainer's over sampler's probability
    importance_level: Literal["token", "response"] = "token"  # the ratio is of a token, or of the whole response
    importance_high: Positive = 2.0  # the largest weight; masked ratios above it weigh 0
    importance_low: NonNegative = 0.5  # masked ratios below it weigh 0
    offload: bool = False  # moves the reference and reward models from the GPU to the CPU during updates
    collect: Literal["episodes", "steps"] = "episodes"  # whole episodes at once, or one env step at a time

    def __post_init__(self) -> None:
        super().__post_init__()
        check_int("minibatches", self.minibatches, 1, self.batch_size)
        if self.adam == "8bit":
            check_bitsandbytes()
        if self.importance != "none" and not self.recompute_log_probs:
            raise InvalidArgumentError(
                f"`recompute_log_probs` must be true where `importance` is {self.importance!r}: the trainer's "
                "log-probs are compared with the sampler's."
            )

    @property
    def num_envs(self) -> int:
        """Rows that the vector env must have."""
        return self.batch_size if self.collect == "steps" else self.responses

    @property
    def reads_reference(self) -> bool:
        """Whether a loss reads the reference itself, not only its log-probs of the tokens."""
        return False

    def new_updater(self, policy: TrainablePolicy) -> Updater:
        """The optimiser of a policy: its critic may have a learning rate of its own."""
        groups = [
            (policy.policy_parameters(), self.lr),
            (policy.critic_parameters(), self.lr if self.critic_lr is None else self.critic_lr),
        ]
        adam = AdamConfig(
            schedule=self.lr_schedule,
            warmup=self.lr_warmup,
            end=self.lr_end,
            betas=(self.adam_beta1, self.adam_beta2),
            eps=self.adam_eps,
            is_tensorflow=self.adam == "tensorflow",
            is_8bit=self.adam == "8bit",
            max_grad_norm=self.max_grad_norm,
        )
        return Updater(policy, groups, adam, self)


@dataclass(frozen=True)
class GroupConfig(OnPolicyConfig):
    """What an agent has that compares several responses to one prompt."""

    group_size: GroupSize = 4  # responses to each prompt; a batch holds batch_size / group_size prompts

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.batch_size % self.group_size:
            raise InvalidArgumentError(
                f"`batch_size` must be a multiple of `group_size`={self.group_size}, got {self.batch_size}."
            )
        if (
            self.group_size > 1 and self.collect == "steps"
        ):  # rows that wait for the slowest draw prompts of their own, and groups fall apart
            raise InvalidArgumentError("`collect` must be 'episodes' where responses are compared in groups.")

    @property
    def responses(self) -> int:
        """Responses to each prompt of a batch."""
        return self.group_size


@dataclass(frozen=True)
class ScaledGroupConfig(GroupConfig):
    """What an agent has that divides the differences in a group by a standard deviation."""

    group_size: GroupSize = 8
    scale: Literal["batch", "group"] = "batch"  # whose standard deviation that is
