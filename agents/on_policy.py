"""The loop of an agent that learns from its own episodes: collect, shape, advantages, update, log.

An algorithm is one file: a config dataclass, `advantages()` and `loss()`. What else it may change stands below under
"what an algorithm may write"; `learn` is the same for all of them.

Shapes: B episodes of a batch, b of a minibatch, T response columns.
"""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, final

import torch
from torch import Tensor

from agents.advantages import gae
from agents.agent import Callback
from agents.batch import Batch, Minibatch, clip_scores, read_minibatch, recompute, with_values
from agents.diagnostics import check_groups, check_ratio, check_start, eos_fraction, exact_kl, log_prob_gap
from agents.faults.fault import Faults
from agents.finite import check_weights
from agents.importance import measure_sampler, weigh
from agents.learning import LearningAgent
from agents.losses import explained_variance
from agents.memory import Sizes, check_fits, estimate, free_bytes, measure
from agents.offload import count_bytes, find_idle, offloaded
from agents.on_policy_config import OnPolicyConfig
from agents.policies.actor_critic import TrainablePolicy
from agents.policies.choice import make_policy
from agents.update import Loss, average_steps, minibatch_rows
from lmgym.envs.vector import RLHFVectorEnv
from lmgym.episodes import Episodes
from lmgym.errors import InvalidArgumentError
from lmgym.kl import (
    AdaptiveKL,
    FixedKL,
    KLCoefficient,
    check_kl_is_plausible,
    discounted_return,
    episode_kl,
    token_rewards,
)
from lmgym.models.sampling import Sampler
from lmgym.models.transfer import to_device
from lmgym.rollout import check_same_step, collect, collect_steps

if TYPE_CHECKING:
    from agents.remote.policy import RemotePolicy

MAX_EXACT_KL_EPISODES = 16  # a metric: it needs every token's probability under the reference, so a few episodes do


class OnPolicyAgent(LearningAgent):
    """Learns by policy gradients from episodes it has just sampled.

    Args:
        envs: the token MDP with dict observations. With `collect="steps"` it must hold `batch_size` rows in "SameStep"
            autoreset.
        config: the algorithm's numbers.
        seed: of the prompts, the tokens sampled, the order of minibatches and the weights that are drawn.
        sampler: how tokens are drawn, given the policy's logits; the update is of that same distribution.

    Attributes:
        Config: a subclass of `OnPolicyConfig`.
        carried: names of attributes that an algorithm carries from batch to batch, JSON values; they are saved.
        kl: the price of a nat, which `kl_controller` may adapt.
        faults: by which the loop is wrong on purpose; none at first (`agents.faults.make.add_faults`).
        idle: weights that leave the GPU during an update.
        remote: an engine that samples in the policy's stead; None at first (`agents.remote.connect`).
    """

    Config: ClassVar[type[OnPolicyConfig]] = OnPolicyConfig
    carried: ClassVar[tuple[str, ...]] = ()
    config: OnPolicyConfig

    def __init__(
        self, envs: RLHFVectorEnv, config: OnPolicyConfig, *, seed: int = 0, sampler: Sampler | None = None
    ) -> None:
        if envs.group_size != config.responses:
            raise InvalidArgumentError(
                f"`envs` must have group_size={config.responses}, got {envs.group_size}: rows of a group share prompts."
            )
        if config.collect == "steps":
            check_same_step(envs)
        super().__init__(envs, config, seed=seed, sampler=sampler)
        self.faults = Faults()
        self.remote: RemotePolicy | None = None
        self.kl: KLCoefficient = FixedKL(envs.kl_coef)
        if config.kl_controller == "adaptive":
            self.kl = AdaptiveKL(envs.kl_coef, config.kl_target, config.kl_horizon)
        self.idle = find_idle(envs.engine, self.policy, config.reads_reference) if config.offload else []
        device = self.policy.device
        if device.type == "cuda":
            check_fits(estimate(memory_sizes(self)), free_bytes(device) + count_bytes(self.idle), device)

    # -- what an algorithm writes --------------------------------------------------------------------------------

    @abstractmethod
    def advantages(self, episodes: Episodes, rewards: Tensor) -> tuple[Tensor, Tensor]:
        """(B, T) advantages and the critic's targets, from episodes and their (B, T) rewards.

        Rows of a group of responses to one prompt lie next to each other. Without a critic the targets do not matter.
        """

    @abstractmethod
    def loss(self, batch: Minibatch) -> Loss:
        """The loss of a micro-batch, whose weights sum to its share of the minibatch, and metrics summed alike."""

    # -- what an algorithm may write -----------------------------------------------------------------------------

    @property
    def uses_critic(self) -> bool:
        """Whether values are learned; if not, the value head stays as it is."""
        return True

    def new_policy(self, seed: int) -> TrainablePolicy:
        """The policy at the start of a run; `seed` is of the weights that are drawn."""
        if not self.uses_critic and (self.config.critic != "shared" or self.config.critic_lr is not None):
            raise InvalidArgumentError(
                "`critic` must be 'shared' and `critic_lr` null where no values are learned, got "
                f"{self.config.critic!r} and {self.config.critic_lr!r}."
            )
        return make_policy(self.envs, self.config, seed, self.config.critic)

    def rewards(self, episodes: Episodes) -> Tensor:
        """(B, T) the reward of each token: both halves of the KL, and the score at the end."""
        return token_rewards(episodes, self.kl.value, dense=self.envs.task.dense_kl)

    def gae(self, episodes: Episodes, rewards: Tensor, gae_lambda: float) -> tuple[Tensor, Tensor]:
        """(B, T) GAE advantages and returns; an episode that was truncated is bootstrapped with V of its last state."""
        assert episodes.values is not None
        bootstrap = None
        if not bool(episodes.terminated.all()):
            bootstrap = torch.where(episodes.terminated, 0.0, self.policy.next_values(episodes))
            self.tokens.read(episodes)
        return gae(rewards, episodes.values, episodes.response_mask, self.envs.gamma, gae_lambda, bootstrap)

    def start_log_probs(self, episodes: Episodes) -> Tensor:
        """(B, T) log-probs that the tokens of the first batch must have: those of the reference."""
        return episodes.ref_log_probs

    def estimates(self, episodes: Episodes) -> Tensor:
        """(B, T) what the critic said of each token before the update: what its targets are compared with."""
        assert episodes.values is not None
        return episodes.values

    def update(self, batch: Batch) -> dict[str, float]:
        """Changes the weights on a batch: passes of optimiser steps over its minibatches.

        An algorithm with a step of its own writes this anew.

        Returns:
            Metrics; among them `train/ratio_error`, how far the log-probs before any change were from those of the
            sampling, nats a token.
        """
        return average_steps(take_passes(self, batch, self.config.epochs))

    def losses(self, minibatch: Batch) -> Iterator[Loss]:
        """Yields the losses of one optimiser step: one of each micro-batch, whose sum is that of the minibatch.

        Of several processes each yields those of its own rows.
        """
        total = minibatch.episodes.lengths.sum()
        own = minibatch if self.processes.count == 1 else minibatch[self.processes.rows]
        before = replace(self.tokens)
        for part in own.split_for_gradients(self.config.micro_batch_size):
            read = self.read(part, total, len(minibatch), backward=1)
            loss, metrics = self.loss(read)
            with torch.no_grad():
                metrics["train/entropy"] = (read.weights * read.entropies).sum()
                metrics["train/ratio_error"] = (read.weights * ratio_gaps(self, read)).sum()
            yield loss, metrics
        self.tokens.share(before, self.processes)

    def read(self, part: Batch, total: Tensor, count: int, *, backward: int = 0) -> Minibatch:
        """Has the policy read a part of a minibatch (`read_minibatch`), and counts the tokens.

        Args:
            part: the episodes of a micro-batch.
            total: () tokens of the whole minibatch. count: episodes of the whole minibatch.
            backward: how many gradients will be taken through what is read.
        """
        self.tokens.read(part.episodes, backward=backward)
        return read_minibatch(self.policy, self.sampler, part, total, count)

    def stop_early(self, metrics: dict[str, float]) -> bool:
        """Whether the metrics of a minibatch say that the batch has been used enough."""
        return False

    # -- the loop ------------------------------------------------------------------------------------------------

    @final
    def learn(self, total_timesteps: int, callback: Callback | None = None) -> None:
        """Trains until `total_timesteps` env steps (sampled tokens) have been taken in all.

        Args:
            total_timesteps: of the whole run, steps before a resume included.
            callback: gets (num_timesteps, metrics) after every batch; training stops if it returns False.
        """
        while self.num_timesteps < total_timesteps:
            started = time.perf_counter()
            self.note_state()
            episodes = self.collect()
            collected = time.perf_counter()
            progress = self.num_timesteps / total_timesteps
            self.updater.set_lr(progress, (self.num_timesteps + episodes.num_tokens) / total_timesteps)
            metrics = self.describe(episodes) | measure_exact_kl(self, episodes)
            with self.changing_weights():
                metrics |= self.learn_from(self.shape(episodes, progress))
                self.num_timesteps += episodes.num_tokens
                self.kl.update(metrics.get("rollout/kl", 0.0), len(episodes))
            ended = time.perf_counter()
            metrics["time/tokens_per_second"] = episodes.num_tokens / (ended - started)
            metrics["time/collect_seconds"] = collected - started
            metrics["time/update_seconds"] = ended - collected
            metrics |= self.tokens.metrics()
            goes_on = callback is None or callback(self.num_timesteps, metrics) is not False
            if not self.processes.all_agree(goes_on):
                return

    def collect(self) -> Episodes:
        """The batch that is learned from next, on the policy's device."""
        return self.faults.choose(partial(sample_batch, self))

    def describe(self, episodes: Episodes) -> dict[str, float]:
        """Metrics of a batch before it is learned from."""
        task = self.envs.task
        rewards = token_rewards(episodes, self.kl.value, dense=task.dense_kl)
        metrics = {"rollout/return": discounted_return(rewards, task.gamma).mean().item()}
        metrics["rollout/score"] = episodes.scores.mean().item()
        if episodes.gold_scores is not None:
            metrics["rollout/gold_score"] = episodes.gold_scores.mean().item()
        if task.kl_coef > 0:
            metrics["rollout/kl"] = episode_kl(episodes).mean().item()
        metrics["rollout/length"] = episodes.lengths.float().mean().item()
        metrics["rollout/eos_fraction"] = eos_fraction(episodes, self.envs.engine.is_eos)
        metrics["train/kl_coef"] = self.kl.value
        metrics["train/lr"] = self.updater.lr
        return metrics

    def shape(self, episodes: Episodes, progress: float = 0.0) -> Batch:
        """Gives episodes their values, rewards and advantages; `progress` is the share of the run before them."""
        config = self.config
        episodes = self.faults.tell(episodes)
        sampler_log_probs = None
        is_possible = None
        if config.recompute_log_probs:
            sampler_log_probs = episodes.log_probs
            again, is_possible = recompute(self.policy, self.sampler, episodes, config.micro_batch_size)
            if not self.uses_critic and episodes.values is not None:
                again = replace(again, values=episodes.values)
            episodes = again
            self.tokens.read(episodes)
            if self.remote is None and not self.faults.trips("ratio"):
                check_ratio(log_prob_gap(episodes, sampler_log_probs), self.policy.dtype)
        elif episodes.values is None:  # a critic with its own trunk gives none while decoding
            episodes = with_values(self.policy, episodes, config.micro_batch_size)
            self.tokens.read(episodes)
        episodes = self.faults.judge(episodes)
        episodes = clip_scores(episodes, config.score_clip)
        advantages, returns = self.advantages(episodes, self.rewards(episodes))
        batch = Batch(episodes, advantages, returns, progress, sampler_log_probs)
        if config.importance != "none":
            batch = replace(batch, importance=weigh(batch, config, is_possible))
        return self.faults.filter(batch)

    def learn_from(self, batch: Batch) -> dict[str, float]:
        """Updates on a batch, and checks what came of it; returns the metrics of the update."""
        with offloaded(self.idle):
            metrics = self.update(batch)
        check_weights(self.policy, self.config)
        if self.config.recompute_log_probs or not self.faults.trips("ratio"):
            check_ratio(metrics["train/ratio_error"], self.policy.dtype)
        self.faults.finish_update()
        told = {} if self.remote is None else self.remote.metrics
        return metrics | measure_critic(self, batch) | measure_sampler(batch) | self.faults.metrics | told

    # -- saving and loading --------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """What changes from batch to batch, but for the weights (`LearningAgent.state`)."""
        own = {name: getattr(self, name) for name in self.carried}
        faults = {f"fault.{name}": value for name, value in self.faults.state().items()}
        return {**super().state(), "kl_coef": self.kl.value, "own": own, **faults}

    def restore(self, state: dict[str, Any]) -> None:
        """Takes up what `state` gave."""
        super().restore(state)
        self.kl.value = state["kl_coef"]
        for name in self.carried:
            setattr(self, name, state["own"][name])
        faults = {name.removeprefix("fault."): x for name, x in state.items() if name.startswith("fault.")}
        self.faults.restore(faults)


def memory_sizes(agent: OnPolicyAgent) -> Sizes:
    """What the memory of a run depends on, from forwards over episodes of full length."""
    config = agent.config
    engine = agent.envs.engine
    sizes = measure(
        agent.policy,
        engine.lm,
        agent.sampler,
        batch_size=config.batch_size,
        micro_batch_size=min(config.micro_batch_size, -(-config.batch_size // config.minibatches)),
        prompt=engine.width,
        horizon=engine.horizon,
        recomputes=config.gradient_checkpointing,
    )
    return replace(sizes, moment=1) if config.adam == "8bit" else sizes


def take_passes(agent: OnPolicyAgent, batch: Batch, passes: int) -> list[dict[str, float]]:
    """Passes of optimiser steps over the minibatches of a batch; the metrics of each step."""
    episodes = batch.episodes
    assert episodes.values is not None
    inputs = {"scores": episodes.scores, "values": episodes.values}
    inputs |= {"advantages": batch.advantages, "returns": batch.returns}
    history: list[dict[str, float]] = []
    lengths = episodes.lengths.cpu()
    for rows in minibatch_rows(len(batch), passes, agent.config.minibatches, agent.generator):
        # Short episodes first: parts have little padding. The host orders them, and rows are copied once.
        minibatch = batch[to_device(rows[lengths[rows].argsort()], agent.policy.device)]
        history.append(agent.updater.step(agent.losses(minibatch), inputs, agent.processes))
        if agent.stop_early(history[-1]):
            break
    return history


def sample_batch(agent: OnPolicyAgent, count: int | None = None) -> Episodes:
    """Samples a batch, or so many episodes, on the policy's device; checks that log-probs are those of the sampling."""
    sampler = agent.faults.change_sampler(agent.sampler)
    count = agent.config.batch_size if count is None else count
    actor = agent.remote or agent.policy
    with agent.faults.sampling():
        if agent.config.collect == "steps":
            episodes = collect_steps(agent.envs, agent.policy, count, sampler, agent.generator)
        else:
            play = partial(collect, agent.envs, actor, count, sampler, agent.generator)
            episodes = agent.processes.play(count, play)
        check_collected(agent, episodes)
    return episodes.to(agent.policy.device)


def check_collected(agent: OnPolicyAgent, episodes: Episodes) -> None:
    """Counts the tokens of a batch, and checks that its log-probs are those of the sampling."""
    check_groups(episodes, agent.config.responses)
    agent.tokens.read(episodes)
    if agent.envs.kl_coef > 0:
        check_kl_is_plausible(episode_kl(episodes))
    if agent.remote is not None:  # it is the policy but for rounding, and that is measured
        return
    is_start = agent.num_timesteps == 0 and agent.envs.kl_coef > 0 and agent.sampler == Sampler()
    if is_start and not agent.faults.trips("start"):
        check_start(episodes, agent.start_log_probs(episodes), agent.policy.dtype)
    if agent.faults.trips("ratio"):  # which no update can check then
        sampler = agent.faults.change_sampler(agent.sampler)
        episodes = episodes.to(agent.policy.device)
        again = recompute(agent.policy, sampler, episodes, agent.config.micro_batch_size).episodes
        check_ratio(log_prob_gap(again, episodes.log_probs), agent.policy.dtype)


def ratio_gaps(agent: OnPolicyAgent, read: Minibatch) -> Tensor:
    """(n,) how far each token is from ratio 1, nats."""
    gaps = (read.log_probs - read.old_log_probs).abs()
    if agent.config.recompute_log_probs or agent.faults.trips("ratio"):  # a token off the support is no mistake then
        gaps = gaps.masked_fill(read.log_probs == -torch.inf, 0.0)
    return gaps


def measure_exact_kl(agent: OnPolicyAgent, episodes: Episodes) -> dict[str, float]:
    """`rollout/exact_kl` of a few episodes of a batch, where the KL has a price."""
    if agent.envs.kl_coef == 0:
        return {}
    few = episodes[:MAX_EXACT_KL_EPISODES].trimmed()
    agent.tokens.read(few, forward=2)
    return {"rollout/exact_kl": exact_kl(agent.policy, agent.sampler, agent.envs.engine.lm, few)}


def measure_critic(agent: OnPolicyAgent, batch: Batch) -> dict[str, float]:
    """`train/explained_variance` of a batch, where values are learned."""
    if not agent.uses_critic:
        return {}
    mask = batch.episodes.response_mask
    before = agent.estimates(batch.episodes)[mask]
    return {"train/explained_variance": explained_variance(before, batch.returns[mask])}
