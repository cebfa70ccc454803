"""The template of an agent that learns from its own episodes: collect, shape, advantages, update, log.

An algorithm is one file: a config dataclass, `advantages()` and `loss()`. The loop here is the same for all of them.
"""

from __future__ import annotations

import json
import math
import os
import time
from abc import abstractmethod
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from agents.advantages import gae
from agents.agent import Callback, PolicyAgent, TokenCount
from agents.finite import GRAD_NORM, check_saving, check_step, check_weights
from agents.losses import explained_variance
from agents.master_weights import MasterWeights
from agents.policies.actor_critic import Critic, TrainablePolicy, read_logits
from agents.policies.choice import PolicyConfig, make_policy
from agents.seeds import WEIGHTS, row_seeds, stream_seed
from lmgym.envs.vector import RLHFVectorEnv
from lmgym.episodes import Episodes
from lmgym.errors import InvalidArgumentError, check_bool, check_choice, check_int, check_number
from lmgym.kl import (
    AdaptiveKL,
    FixedKL,
    KLCoefficient,
    check_sampled_law,
    discounted_return,
    entropy,
    episode_kl,
    exact,
    token_rewards,
)
from lmgym.models.sampling import Sampler
from lmgym.rollout import check_same_step, collect, collect_steps

_EXACT_KL_EPISODES = 16  # the exact KL needs the reference's whole law: a metric, so a few episodes do


@dataclass(frozen=True)
class OnPolicyConfig(PolicyConfig):
    """What every on-policy agent has."""

    batch_size: int = 256  # episodes a batch
    epochs: int = 4  # passes over a batch
    minibatches: int = 4  # optimiser steps a pass
    micro_batch_size: int = 128  # episodes a forward; gradients of a minibatch accumulate over them
    lr: float = 5e-4  # Adam's, at first
    critic_lr: float | None = None  # of the value head and a critic's own trunk; null is lr
    lr_schedule: Literal["constant", "linear", "cosine"] = "linear"  # over the whole run
    lr_warmup: float = 0.0  # share of the run over which it rises to lr from 0, before the schedule begins
    lr_end: float = 0.0  # share of lr that linear and cosine end at
    adam: Literal["pytorch", "tensorflow"] = "pytorch"  # tensorflow corrects adam_eps for bias like the second moment
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_eps: float = 1e-5
    max_grad_norm: float = 1.0  # gradients are clipped to this norm; 0 does not clip
    critic: Critic = "shared"  # where the value head sits
    kl_controller: Literal["fixed", "adaptive"] = "fixed"  # adaptive: Ziegler et al. 2019, from the task's kl_coef
    kl_target: float = 6.0  # nats an episode, for the adaptive coefficient
    kl_horizon: float = 10_000.0  # episodes, for the adaptive coefficient
    score_clip: float | None = None  # scores are kept within +- this before they are learned from; null does not clip
    recompute_log_probs: bool = False  # those that an update starts from: of one more forward, or of the sampling
    collect: Literal["episodes", "steps"] = "episodes"  # whole episodes at once, or one env step at a time

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("batch_size", "epochs", "minibatches", "micro_batch_size"):
            check_int(name, getattr(self, name), 1)
        check_int("minibatches", self.minibatches, 1, self.batch_size)
        for name in ("lr", "adam_eps", "max_grad_norm"):
            check_number(name, getattr(self, name), 0)
        if self.critic_lr is not None:
            check_number("critic_lr", self.critic_lr, 0)
        check_choice("lr_schedule", self.lr_schedule, ("constant", "linear", "cosine"))
        for name in ("lr_warmup", "lr_end"):
            check_number(name, getattr(self, name), 0, 1)
        check_choice("adam", self.adam, ("pytorch", "tensorflow"))
        for name in ("adam_beta1", "adam_beta2"):
            check_number(name, getattr(self, name), 0, 1, open_high=True)
        check_choice("critic", self.critic, get_args(Critic))
        check_choice("kl_controller", self.kl_controller, ("fixed", "adaptive"))
        for name in ("kl_target", "kl_horizon"):
            check_number(name, getattr(self, name), 0, open_low=True)
        if self.score_clip is not None:
            check_number("score_clip", self.score_clip, 0, open_low=True)
        check_bool("recompute_log_probs", self.recompute_log_probs)
        check_choice("collect", self.collect, ("episodes", "steps"))

    @property
    def num_envs(self) -> int:
        """Rows that the vector env must have."""
        return self.batch_size if self.collect == "steps" else self.responses


@dataclass(frozen=True)
class GroupConfig(OnPolicyConfig):
    """What an agent has that compares several responses to one prompt."""

    group_size: int = 4  # responses to each prompt; a batch holds batch_size / group_size prompts

    def __post_init__(self) -> None:
        super().__post_init__()
        check_int("group_size", self.group_size, 2)
        if self.batch_size % self.group_size:
            raise InvalidArgumentError(
                f"`batch_size` must be a multiple of `group_size`={self.group_size}, got {self.batch_size}."
            )
        if self.collect == "steps":  # rows that wait for the slowest draw prompts of their own, and groups fall apart
            raise InvalidArgumentError("`collect` must be 'episodes' where responses are compared in groups.")

    @property
    def responses(self) -> int:
        """Responses to each prompt of a batch."""
        return self.group_size


class OnPolicyAgent(PolicyAgent):
    """Learns by policy gradients from episodes it has just sampled.

    Args:
        envs: the token MDP with dict observations. With `collect="steps"` it must hold `batch_size` rows in "SameStep"
            autoreset.
        config: the algorithm's numbers.
        seed: of the prompts, the tokens sampled, the order of minibatches and the weights that are drawn.
        sampler: the law that tokens are drawn from, given the policy's logits; the update is of that same law.

    Attributes:
        at_rest: whether a run goes on to the same curve from what `save` would write now. It is False in the midst of
            an update; where the collecting of a batch fails, `save` writes the state before that batch.
    """

    Config: ClassVar[type[OnPolicyConfig]] = OnPolicyConfig
    config: OnPolicyConfig
    policy: TrainablePolicy

    @property
    def reads_reference(self) -> bool:
        """Whether `loss` needs the reference's whole law at every token: one more forward, without a gradient."""
        return False

    @property
    def uses_critic(self) -> bool:
        """Whether values are learned; without, the value head stays as it is."""
        return True

    def __init__(
        self, envs: RLHFVectorEnv, config: OnPolicyConfig, *, seed: int = 0, sampler: Sampler | None = None
    ) -> None:
        if envs.group_size != config.responses:
            raise InvalidArgumentError(
                f"`envs` must have group_size={config.responses}, got {envs.group_size}: rows of a group share prompts."
            )
        super().__init__(envs, config, seed=seed, sampler=sampler)
        if config.collect == "steps":
            check_same_step(envs)
        if not self.uses_critic and (config.critic != "shared" or config.critic_lr is not None):
            raise InvalidArgumentError(
                "`critic` must be 'shared' and `critic_lr` null where no values are learned, got "
                f"{config.critic!r} and {config.critic_lr!r}."
            )
        self.policy = self.new_policy(stream_seed(seed, WEIGHTS))
        self._rates = (config.lr, config.lr if config.critic_lr is None else config.critic_lr)
        groups = [{"params": x, "lr": rate} for x, rate in zip(self._parameters(), self._rates, strict=True)]
        on_gpu = self.policy.device.type == "cuda"
        self.optimizer = torch.optim.Adam(groups, fused=on_gpu or None, **self._adam())
        self.masters = MasterWeights(self.optimizer)
        self._before_batch: dict[str, Any] | None = None  # the state there, while nothing has been learned since
        self.kl: KLCoefficient = FixedKL(envs.kl_coef)
        if config.kl_controller == "adaptive":
            self.kl = AdaptiveKL(envs.kl_coef, config.kl_target, config.kl_horizon)
        envs.reset(seed=row_seeds(seed, envs.num_envs))

    # -- what an algorithm writes --------------------------------------------------------------------------------

    def new_policy(self, seed: int) -> TrainablePolicy:
        """The policy at the start; `seed` is of the weights of a residual."""
        return make_policy(self.envs, self.config, seed, self.config.critic)

    def rewards(self, episodes: Episodes) -> Tensor:
        """(B, T) what the agent is paid for each token: both halves of the KL, and the score at the end."""
        return token_rewards(episodes, self.kl.value, dense=self.envs.task.dense_kl)

    @abstractmethod
    def advantages(self, episodes: Episodes, rewards: Tensor) -> tuple[Tensor, Tensor]:
        """(B, T) advantages and the critic's targets, from episodes and their (B, T) rewards.

        Rows of a group of responses to one prompt lie next to each other. Without a critic the targets do not matter.
        """

    @abstractmethod
    def loss(self, batch: Minibatch) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a micro-batch, whose weights sum to its share of the minibatch, and metrics summed alike."""

    def stop_early(self, metrics: dict[str, float]) -> bool:
        """Whether a minibatch's metrics say that the batch has been used enough."""
        return False

    def estimates(self, episodes: Episodes) -> Tensor:
        """(B, T) what the critic said of each token before the update: what its targets are compared with."""
        assert episodes.values is not None
        return episodes.values

    def minibatch_advantages(self, advantages: Tensor, mask: Tensor) -> Tensor:
        """(b, T) advantages that a minibatch learns from, given its own (b, T)."""
        return advantages

    def auxiliary_loss(self) -> tuple[Tensor, dict[str, Tensor]] | None:
        """A loss that is of no episode, added once an optimiser step, and metrics; None where there is none."""
        return None

    def own_state(self) -> dict[str, Any]:
        """What an algorithm carries from batch to batch besides weights, as JSON values."""
        return {}

    def restore_own_state(self, state: dict[str, Any]) -> None:
        """Takes up what `own_state` gave."""
        assert not state

    def gae(self, episodes: Episodes, rewards: Tensor, gae_lambda: float) -> tuple[Tensor, Tensor]:
        """(B, T) GAE advantages and returns; an episode that was truncated is bootstrapped with V of its last state."""
        assert episodes.values is not None
        bootstrap = None
        if not bool(episodes.terminated.all()):
            bootstrap = torch.where(episodes.terminated, 0.0, self.policy.values_behind(episodes))
            self.tokens.read(episodes)
        return gae(rewards, episodes.values, episodes.response_mask, self.envs.gamma, gae_lambda, bootstrap)

    # -- the loop ------------------------------------------------------------------------------------------------

    def learn(self, total_timesteps: int, callback: Callback | None = None) -> None:
        """Trains until `total_timesteps` env steps (sampled tokens) have been taken in all.

        Args:
            total_timesteps: of the whole run, steps before a resume included.
            callback: sees (num_timesteps, metrics) after every batch; training stops if it returns False.
        """
        while self.num_timesteps < total_timesteps:
            started = time.perf_counter()
            self._before_batch = self._state()
            episodes = self._collect()
            collected = time.perf_counter()
            behind = self.num_timesteps + episodes.num_tokens
            self._set_lr(self.num_timesteps / total_timesteps, behind / total_timesteps)
            metrics = self._describe(episodes)
            self._before_batch, self.at_rest = None, False
            metrics |= self._update(episodes)
            self.num_timesteps += episodes.num_tokens
            self.kl.update(metrics.get("rollout/kl", 0.0), len(episodes))
            self.at_rest = True
            ended = time.perf_counter()
            metrics["time/tokens_per_second"] = episodes.num_tokens / (ended - started)
            metrics["time/collect_seconds"], metrics["time/update_seconds"] = collected - started, ended - collected
            metrics |= self.tokens.metrics()
            if callback is not None and callback(self.num_timesteps, metrics) is False:
                return

    def _collect(self) -> Episodes:
        gather = collect if self.config.collect == "episodes" else collect_steps
        episodes = gather(self.envs, self.policy, self.config.batch_size, self.sampler, self.generator)
        check_groups(episodes, self.config.responses)
        self.tokens.read(episodes)
        if self.envs.kl_coef > 0:
            check_sampled_law(episode_kl(episodes))
            if self.num_timesteps == 0 and self.sampler == Sampler():
                self._check_start(episodes)
        return episodes.to(self.policy.device)

    def _describe(self, episodes: Episodes) -> dict[str, float]:
        task = self.envs.task
        returns = discounted_return(token_rewards(episodes, self.kl.value, dense=task.dense_kl), task.gamma)
        metrics = {"rollout/return": returns.mean().item(), "rollout/score": episodes.scores.mean().item()}
        if episodes.gold_scores is not None:
            metrics["rollout/gold_score"] = episodes.gold_scores.mean().item()
        if task.kl_coef > 0:
            metrics["rollout/kl"] = episode_kl(episodes).mean().item()
            metrics["rollout/exact_kl"] = self._exact_kl(episodes)
        metrics["rollout/length"] = episodes.lengths.float().mean().item()
        metrics["rollout/eos_fraction"] = self._eos_fraction(episodes)
        metrics["train/kl_coef"], metrics["train/lr"] = self.kl.value, self.optimizer.param_groups[0]["lr"]
        return metrics

    def _eos_fraction(self, episodes: Episodes) -> float:
        last = episodes.response_ids.gather(1, (episodes.lengths - 1).unsqueeze(1)).squeeze(1).cpu()
        return torch.from_numpy(self.envs.engine.is_eos)[last].float().mean().item()

    @torch.no_grad()
    def _exact_kl(self, episodes: Episodes) -> float:
        """Nats an episode: KL over the whole vocabulary at every state visited, of a few episodes."""
        few = episodes[:_EXACT_KL_EPISODES].trimmed()
        self.tokens.read(few, forward=2)
        t = few.response_mask.nonzero()[:, 1]
        law = self.sampler.log_distribution(self.policy.read(few).logits, t)
        reference = read_logits(self.envs.engine.lm, few).float().log_softmax(-1)
        return exact(law, reference).sum().item() / len(few)

    def _update(self, episodes: Episodes) -> dict[str, float]:
        config = self.config
        if config.recompute_log_probs:
            episodes = self._recomputed(episodes)
        elif episodes.values is None:  # a critic with its own trunk gives none while decoding
            parts = [self.policy.values(episodes[rows]) for rows in self._chunks(episodes)]
            self.tokens.read(episodes)
            episodes = replace(episodes, values=torch.cat(parts))
        if config.score_clip is not None:
            episodes = replace(episodes, scores=episodes.scores.clamp(-config.score_clip, config.score_clip))
        assert episodes.values is not None
        advantages, returns = self.advantages(episodes, self.rewards(episodes))
        metrics = self._optimise(episodes, advantages, returns)
        check_weights(self.policy, self.config)
        self._check_law(metrics["train/ratio_error"])
        if self.uses_critic:
            mask = episodes.response_mask
            metrics["train/explained_variance"] = explained_variance(self.estimates(episodes)[mask], returns[mask])
        return metrics

    def _optimise(self, episodes: Episodes, advantages: Tensor, returns: Tensor) -> dict[str, float]:
        """Passes of optimiser steps over a batch."""
        config = self.config
        history: list[dict[str, float]] = []
        for _ in range(config.epochs):
            order = torch.randperm(len(episodes), generator=self.generator).to(self.policy.device)
            for rows in order.tensor_split(config.minibatches):
                history.append(self._step(episodes, advantages, returns, rows))
                if self.stop_early(history[-1]):
                    break
            if self.stop_early(history[-1]):
                break
        metrics = {name: float(np.mean([row[name] for row in history])) for name in history[0]}
        # Of the first step alone, before anything has changed: 0 but for rounding.
        metrics["train/ratio_error"] = history[0]["train/ratio_error"]
        metrics["train/updates"] = len(history)
        return metrics

    @torch.no_grad()
    def _recomputed(self, episodes: Episodes) -> Episodes:
        """Episodes with the log-probs and values of one forward instead of those of the sampling.

        A token that rounding puts off the support of a truncated law keeps the log-prob that it was drawn with.
        """
        values, log_probs = torch.zeros_like(episodes.log_probs), episodes.log_probs.clone()
        for rows in self._chunks(episodes):
            few = episodes[rows]
            read, mask = self.policy.read(few), few.response_mask
            law = self.sampler.log_distribution(read.logits, mask.nonzero()[:, 1])
            found = law.gather(1, few.response_ids[mask].unsqueeze(1)).squeeze(1)
            part = few.log_probs.clone()
            part[mask] = torch.where(found == -torch.inf, part[mask], found)
            log_probs[rows] = part
            part = torch.zeros_like(part)
            part[mask] = read.values
            values[rows] = part
        self.tokens.read(episodes)
        self._check_law((log_probs - episodes.log_probs).abs().sum().item() / episodes.num_tokens)
        return replace(episodes, values=values, log_probs=log_probs)

    def _chunks(self, episodes: Episodes) -> tuple[Tensor, ...]:
        """Rows of episodes, as many at a time as a forward takes."""
        return torch.arange(len(episodes), device=self.policy.device).split(self.config.micro_batch_size)

    def _step(self, episodes: Episodes, advantages: Tensor, returns: Tensor, rows: Tensor) -> dict[str, float]:
        """One optimiser step on a minibatch, its gradient accumulated over micro-batches of like length."""
        total, count = episodes.lengths[rows].sum(), len(rows)
        rows = rows[episodes.lengths[rows].argsort()]
        chosen = self.minibatch_advantages(advantages[rows], episodes.response_mask[rows])
        advantages = advantages.index_copy(0, rows, chosen)
        self.policy.zero_grad(set_to_none=True)
        sums: dict[str, Tensor] = {}  # in float64; read once a step, for on a GPU every look waits for it
        for part in rows.split(self.config.micro_batch_size):
            batch = self._read(episodes, advantages, returns, part, total, count, backward=1)
            loss, parts = self.loss(batch)
            loss.backward()
            with torch.no_grad():
                parts["train/entropy"] = (batch.weights * entropy(batch.log_law.detach())).sum()
                gaps = (batch.log_probs - batch.old_log_probs).abs()
                parts["train/ratio_error"] = (batch.weights * gaps).sum()
            for name, value in parts.items():
                sums[name] = sums[name] + value.double() if name in sums else value.double()
        auxiliary = self.auxiliary_loss()
        if auxiliary is not None:
            auxiliary[0].backward()
            sums |= {name: value.double() for name, value in auxiliary[1].items()}
        limit = self.config.max_grad_norm or math.inf
        sums[GRAD_NORM] = torch.nn.utils.clip_grad_norm_(self.policy.parameters(), limit).double()
        metrics = dict(zip(sums, torch.stack(list(sums.values())).tolist(), strict=True))
        assert episodes.values is not None
        inputs = {"scores": episodes.scores, "values": episodes.values, "advantages": advantages, "returns": returns}
        check_step(metrics, self.policy, self.config, inputs)
        if self.config.adam == "tensorflow":
            self._correct_epsilon()
        self.optimizer.step()
        return metrics

    def _correct_epsilon(self) -> None:
        """TensorFlow adds epsilon to the second moment's root before the correction for bias, PyTorch behind it."""
        steps = max((int(state["step"]) for state in self.optimizer.state.values()), default=0)
        for group in self.optimizer.param_groups:
            group["eps"] = self.config.adam_eps / math.sqrt(1 - self.config.adam_beta2 ** (steps + 1))

    def _read(
        self,
        episodes: Episodes,
        advantages: Tensor,
        returns: Tensor,
        rows: Tensor,
        total: Tensor,
        count: int,
        *,
        backward: int = 0,
    ) -> Minibatch:
        """A micro-batch, read by the policy; `backward` is how many gradients will be taken through that."""
        few = episodes[rows]
        assert few.values is not None
        self.tokens.read(few, backward=backward)
        chosen = few.response_mask.nonzero(as_tuple=True)
        row, places = chosen
        read = self.policy.read(few)
        law = self.sampler.log_distribution(read.logits, places)
        return Minibatch(
            log_law=law,
            log_probs=law.gather(1, few.response_ids[chosen].unsqueeze(1)).squeeze(1),
            old_log_probs=few.log_probs[chosen],
            values=read.values,
            old_values=few.values[chosen],
            advantages=advantages[rows][chosen],
            returns=returns[rows][chosen],
            weights=torch.full_like(read.values, 1.0) / total,
            episode_weights=torch.full_like(read.values, 1.0 / count),
            lengths=few.lengths[row],
            places=places,
            ref_log_probs=few.ref_log_probs[chosen],
            ref_log_law=self._reference_law(few) if self.reads_reference else None,
        )

    @torch.no_grad()
    def _reference_law(self, episodes: Episodes) -> Tensor:
        self.tokens.read(episodes)
        return read_logits(self.envs.engine.lm, episodes).float().log_softmax(-1)

    def _check_start(self, episodes: Episodes) -> None:
        """The policy starts as the reference: in the first batch a response has the same log-prob under both."""
        gap = episode_kl(episodes).abs().sum().item() / episodes.num_tokens
        if not gap < self._round_off:
            raise RuntimeError(
                f"The first batch must have KL 0, and its log-probs differ from the reference's by {gap:.2g} nats "
                "a token: the policy does not start as the reference."
            )

    @property
    def _round_off(self) -> float:
        """Nats a token by which two computations of one log-prob may differ on average."""
        return 1e-3 if self.policy.dtype == torch.float32 else 0.1

    def _check_law(self, gap: float) -> None:
        """Before anything has changed the ratio is 1: log-probs recomputed equal those that sampled.

        Args:
            gap: mean absolute difference of the two, nats a token.
        """
        if not gap < self._round_off:
            raise RuntimeError(
                "A batch's first update must have ratio 1, and log-probs recomputed differ from those that sampled by "
                f"{gap:.2g} nats a token: the update is not of the law that sampled."
            )

    def _set_lr(self, progress: float, end: float) -> None:
        """Sets the rates of a batch, which begins and ends at those shares of the run; one that rises is its end's."""
        config = self.config
        place = min(end, config.lr_warmup) if progress < config.lr_warmup else progress
        factor = lr_factor(config.lr_schedule, place, config.lr_warmup, config.lr_end)
        for group, rate in zip(self.optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * factor

    def _adam(self) -> dict[str, Any]:
        return {"betas": (self.config.adam_beta1, self.config.adam_beta2), "eps": self.config.adam_eps}

    def _parameters(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """What learns: of the law, a shared trunk included, and of the critic alone."""
        law: list[nn.Parameter] = []
        critic: list[nn.Parameter] = []
        for name, parameter in self.policy.named_parameters():
            if parameter.requires_grad:
                (critic if {"critic", "value_head"} & set(name.split(".")) else law).append(parameter)
        return law, critic

    # -- acting, saving, loading ---------------------------------------------------------------------------------

    def next_logits(self, ids: Tensor, mask: Tensor) -> Tensor:
        """(B, V) logits of each row's next token, from one forward over (B, L) ids; mask (B, L) is True on tokens."""
        left = ids.gather(1, (~mask).to(torch.uint8).argsort(dim=1, stable=True))
        return self.policy.next_logits(left, mask.sum(-1))

    def write(self, directory: Path) -> None:
        """Writes the files of a checkpoint into an empty directory."""
        check_saving(self.policy, self.optimizer, self.config)
        self.policy.save(directory)
        state = dict(self._before_batch or self._state())
        training = {"optimizer": self.optimizer.state_dict(), "generator": state.pop("generator")}
        torch.save(training, directory / "training.pt")
        (directory / "state.json").write_text(json.dumps(state, default=np.ndarray.tolist))

    def _state(self) -> dict[str, Any]:
        """What changes from batch to batch but for the weights and what the optimiser knows of them."""
        return {
            "num_timesteps": self.num_timesteps,
            "tokens": asdict(self.tokens),
            "kl_coef": self.kl.value,
            "config": asdict(self.config),
            "env": self.envs.streams(),
            "own": self.own_state(),
            "generator": self.generator.get_state(),
        }

    def load(self, directory: str | os.PathLike[str]) -> None:
        """Goes on from what `save` wrote: the same curve as if there had been no break."""
        directory = Path(directory)
        self.policy.load(directory)
        training = torch.load(directory / "training.pt", weights_only=True, map_location=self.policy.device)
        self.optimizer.load_state_dict(training["optimizer"])
        for group in self.optimizer.param_groups:
            group |= self._adam()
        self.generator.set_state(training["generator"].cpu())
        state = json.loads((directory / "state.json").read_text())
        self.num_timesteps, self.kl.value = state["num_timesteps"], state["kl_coef"]
        self.tokens = TokenCount(**state["tokens"])
        self.envs.set_state(state["env"])
        self.restore_own_state(state["own"])
        self._before_batch, self.at_rest = None, True


@dataclass(frozen=True)
class Minibatch:
    """Chosen tokens of some episodes, flat. All (n,) but `log_law` and `ref_log_law` (n, V).

    `log_law` and `log_probs` and `values` are of the policy being updated and carry gradients; `old_*` are those that
    the episodes were collected with. `weights` sum, over the micro-batches of a minibatch, to 1: the mean over tokens.
    `episode_weights` are 1 / (episodes of the minibatch): the mean over episodes of a sum over tokens, or, divided by
    `lengths`, of a mean over tokens. `places` are the tokens' places in their responses, from 0.
    """

    log_law: Tensor
    log_probs: Tensor
    old_log_probs: Tensor
    values: Tensor
    old_values: Tensor
    advantages: Tensor
    returns: Tensor
    weights: Tensor
    episode_weights: Tensor
    lengths: Tensor
    places: Tensor
    ref_log_probs: Tensor
    ref_log_law: Tensor | None


def check_groups(episodes: Episodes, group_size: int) -> None:
    """Raises `InvalidArgumentError` unless each `group_size` neighbours of B episodes are responses to one prompt."""
    same = share_prompts(episodes, group_size)
    if not same.all():
        raise InvalidArgumentError(
            f"`envs` must give the {group_size} rows of a group the same prompts in the same order, and in "
            f"{int((~same).sum())} of {len(same)} groups they differ: rows that end one by one in `envs.step` draw "
            "their next prompts apart. Bring them back together by envs.reset(seed=...), or step another env."
        )


def share_prompts(episodes: Episodes, group_size: int) -> Tensor:
    """(B / group_size,) bool: whether neighbours, in groups of `group_size`, are responses to one prompt."""
    prompts = torch.cat([episodes.prompt_ids, episodes.prompt_mask.long()], dim=1).unflatten(0, (-1, group_size))
    return (prompts == prompts[:, :1]).flatten(1).all(1)


def lr_factor(schedule: str, progress: float, warmup: float = 0.0, end: float = 0.0) -> float:
    """What the learning rate is multiplied by.

    Args:
        schedule: "constant", "linear" or "cosine", the latter two from 1 to `end`.
        progress: share of the run that is over, in [0, 1].
        warmup: share of the run over which the factor rises from 0 to 1; the schedule takes up the rest.
        end: factor at the end.
    """
    if progress < warmup:
        return progress / warmup
    left = (progress - warmup) / (1 - warmup) if warmup < 1 else 0.0
    falling = {"constant": 1.0, "linear": 1 - left, "cosine": 0.5 * (1 + math.cos(math.pi * left))}[schedule]
    return falling if schedule == "constant" else end + (1 - end) * falling
