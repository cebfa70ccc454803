"""The template of an agent that learns from its own episodes: collect, shape, advantages, update, log.

An algorithm is one file: a config dataclass, `advantages()` and `loss()`. The loop here is the same for all of them.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from agents.advantages import gae
from agents.losses import explained_variance
from agents.policy import ActorCritic, Critic, TrainablePolicy, read_logits
from agents.residual import Network, ResidualPolicy
from lmgym.envs.vector import RLHFVectorEnv
from lmgym.episodes import Episodes
from lmgym.errors import InvalidArgumentError, check_choice, check_int, check_number
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
from lmgym.rewards.classifier import ClassifierReward
from lmgym.rollout import collect, collect_steps

Callback = Callable[[int, dict[str, float]], bool | None]
_EXACT_KL_EPISODES = 16  # the exact KL needs the reference's whole law: a metric, so a few episodes do


@dataclass(frozen=True)
class OnPolicyConfig:
    """What every on-policy agent has."""

    batch_size: int = 256  # episodes a batch
    epochs: int = 4  # passes over a batch
    minibatches: int = 4  # optimiser steps a pass
    micro_batch_size: int = 128  # episodes a forward; gradients of a minibatch accumulate over them
    lr: float = 5e-4  # Adam's, at first
    lr_schedule: Literal["constant", "linear", "cosine"] = "linear"  # over the whole run; linear and cosine end at 0
    adam_eps: float = 1e-5
    max_grad_norm: float = 1.0  # gradients are clipped to this norm; 0 does not clip
    policy: Literal["auto", "finetune", Network] = "auto"  # a copy of the reference, or a residual on its logits
    width: int = 64  # of a residual network's hidden states
    layers: int = 2  # of a residual network
    critic: Critic = "shared"  # where the value head sits
    kl_controller: Literal["fixed", "adaptive"] = "fixed"  # adaptive: Ziegler et al. 2019, from the task's kl_coef
    kl_target: float = 6.0  # nats an episode, for the adaptive coefficient
    kl_horizon: float = 10_000.0  # episodes, for the adaptive coefficient
    collect: Literal["episodes", "steps"] = "episodes"  # whole episodes at once, or one env step at a time

    def __post_init__(self) -> None:
        check_choice("policy", self.policy, ("auto", "finetune", *get_args(Network)))
        for name in ("batch_size", "epochs", "minibatches", "micro_batch_size", "width", "layers"):
            check_int(name, getattr(self, name), 1)
        check_int("minibatches", self.minibatches, 1, self.batch_size)
        for name in ("lr", "adam_eps", "max_grad_norm"):
            check_number(name, getattr(self, name), 0)
        for name in ("kl_target", "kl_horizon"):
            check_number(name, getattr(self, name), 0, open_low=True)

    @property
    def responses(self) -> int:
        """Responses to each prompt of a batch; more than one where an algorithm compares them (`GroupConfig`)."""
        return 1

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


class OnPolicyAgent(ABC):
    """Learns by policy gradients from episodes it has just sampled.

    Args:
        envs: the token MDP. With `collect="steps"` it must hold `batch_size` rows in "SameStep" autoreset.
        config: the algorithm's numbers.
        seed: of the tokens sampled, of the order of minibatches, and of the weights of a residual.
        sampler: the law that tokens are drawn from, given the policy's logits; the update is of that same law.
    """

    Config: ClassVar[type[OnPolicyConfig]] = OnPolicyConfig

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
        self.envs, self.config, self.sampler = envs, config, sampler or Sampler()
        self.policy = self.new_policy(seed)
        parameters = [p for p in self.policy.parameters() if p.requires_grad]
        self.optimizer = torch.optim.Adam(parameters, lr=config.lr, eps=config.adam_eps)
        self.generator = torch.Generator().manual_seed(seed)
        self.num_timesteps = 0
        self.kl: KLCoefficient = FixedKL(envs.kl_coef)
        if config.kl_controller == "adaptive":
            self.kl = AdaptiveKL(envs.kl_coef, config.kl_target, config.kl_horizon)
        envs.reset(seed=seed)

    # -- what an algorithm writes --------------------------------------------------------------------------------

    def new_policy(self, seed: int) -> TrainablePolicy:
        """The policy at the start; `seed` is of the weights of a residual."""
        return make_policy(self.envs, self.config, seed)

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
            episodes = self._collect()
            collected = time.perf_counter()
            self._set_lr(self.num_timesteps / total_timesteps)
            metrics = self._describe(episodes)
            metrics |= self._update(episodes)
            self.num_timesteps += episodes.num_tokens
            self.kl.update(metrics.get("rollout/kl", 0.0), len(episodes))
            ended = time.perf_counter()
            metrics["time/tokens_per_second"] = episodes.num_tokens / (ended - started)
            metrics["time/collect_seconds"], metrics["time/update_seconds"] = collected - started, ended - collected
            if callback is not None and callback(self.num_timesteps, metrics) is False:
                return

    def _collect(self) -> Episodes:
        gather = collect if self.config.collect == "episodes" else collect_steps
        episodes = gather(self.envs, self.policy, self.config.batch_size, self.sampler, self.generator)
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
        t = few.response_mask.nonzero()[:, 1]
        law = self.sampler.log_law(self.policy.read(few).logits, t)
        reference = read_logits(self.envs.engine.lm, few).float().log_softmax(-1)
        return exact(law, reference).sum().item() / len(few)

    def _update(self, episodes: Episodes) -> dict[str, float]:
        if episodes.values is None:
            episodes = self._with_values(episodes)
        assert episodes.values is not None
        advantages, returns = self.advantages(episodes, self.rewards(episodes))
        metrics = self._optimise(episodes, advantages, returns)
        self._check_first_update(metrics)
        if self.uses_critic:
            mask = episodes.response_mask
            metrics["train/explained_variance"] = explained_variance(episodes.values[mask], returns[mask])
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

    def _with_values(self, episodes: Episodes) -> Episodes:
        """Episodes collected without values (a critic with its own trunk) get them from one forward."""
        parts = [self.policy.values(part) for part in _split(episodes, self.config.micro_batch_size)]
        return replace(episodes, values=torch.cat(parts))

    def _step(self, episodes: Episodes, advantages: Tensor, returns: Tensor, rows: Tensor) -> dict[str, float]:
        """One optimiser step on a minibatch, its gradient accumulated over micro-batches of like length."""
        total, count = episodes.lengths[rows].sum(), len(rows)
        rows = rows[episodes.lengths[rows].argsort()]
        self.optimizer.zero_grad(set_to_none=True)
        metrics: dict[str, float] = {}
        for part in rows.split(self.config.micro_batch_size):
            batch = self._read(episodes, advantages, returns, part, total, count)
            loss, parts = self.loss(batch)
            loss.backward()
            with torch.no_grad():
                parts["train/entropy"] = (batch.weights * entropy(batch.log_law.detach())).sum()
                gaps = (batch.log_probs - batch.old_log_probs).abs()
                parts["train/ratio_error"] = (batch.weights * gaps).sum()
            for name, value in parts.items():
                metrics[name] = metrics.get(name, 0.0) + value.item()
        limit = self.config.max_grad_norm or math.inf
        metrics["train/grad_norm"] = torch.nn.utils.clip_grad_norm_(self.policy.parameters(), limit).item()
        self.optimizer.step()
        return metrics

    def _read(
        self, episodes: Episodes, advantages: Tensor, returns: Tensor, rows: Tensor, total: Tensor, count: int
    ) -> Minibatch:
        few = episodes[rows]
        assert few.values is not None
        mask = few.response_mask
        read = self.policy.read(few)
        law = self.sampler.log_law(read.logits, mask.nonzero()[:, 1])
        return Minibatch(
            log_law=law,
            log_probs=law.gather(1, few.response_ids[mask].unsqueeze(1)).squeeze(1),
            old_log_probs=few.log_probs[mask],
            values=read.values,
            old_values=few.values[mask],
            advantages=advantages[rows][mask],
            returns=returns[rows][mask],
            weights=torch.full_like(read.values, 1.0) / total,
            episode_weights=torch.full_like(read.values, 1.0 / count),
            lengths=few.lengths.unsqueeze(1).expand_as(mask)[mask],
            places=mask.nonzero()[:, 1],
            ref_log_probs=few.ref_log_probs[mask],
            ref_log_law=self._reference_law(few) if self.reads_reference else None,
        )

    @torch.no_grad()
    def _reference_law(self, episodes: Episodes) -> Tensor:
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

    def _check_first_update(self, metrics: dict[str, float]) -> None:
        """Before anything has changed the ratio is 1: log-probs recomputed equal those that sampled."""
        if not metrics["train/ratio_error"] < self._round_off:
            raise RuntimeError(
                "A batch's first update must have ratio 1, and log-probs recomputed differ from those that sampled by "
                f"{metrics['train/ratio_error']:.2g} nats a token: the update is not of the law that sampled."
            )

    def _set_lr(self, progress: float) -> None:
        schedule = self.config.lr_schedule
        factor = {"constant": 1.0, "linear": 1 - progress, "cosine": 0.5 * (1 + math.cos(math.pi * progress))}[schedule]
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.lr * factor

    # -- acting, saving, loading ---------------------------------------------------------------------------------

    @torch.inference_mode()
    def predict(self, observation: dict[str, Any], deterministic: bool = False) -> tuple[Any, None]:
        """Tokens for a (batched or single) dict observation, as SB3's `predict`: (actions, None)."""
        ids = torch.as_tensor(np.asarray(observation["input_ids"]), device=self.policy.device)
        mask = torch.as_tensor(np.asarray(observation["attention_mask"]), device=self.policy.device).bool()
        single = ids.ndim == 1
        ids, mask = (ids[None], mask[None]) if single else (ids, mask)
        lengths = mask.sum(-1)
        left = ids.gather(1, (~mask).to(torch.uint8).argsort(dim=1, stable=True))
        logits = self.policy.next_logits(left, lengths)
        if deterministic:
            actions = logits.argmax(-1)
        else:
            uniforms = torch.rand(len(ids), generator=self.generator, dtype=torch.float64)
            actions, places = logits.argmax(-1), mask[:, -self.envs.engine.horizon :].sum(-1)
            for t in places.unique().tolist():
                rows = places == t
                actions[rows], _ = self.sampler.sample(logits[rows], t, uniforms[rows.cpu()])
        chosen = actions.cpu().numpy()
        return (chosen[0] if single else chosen), None

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Writes what a resumed run needs, under a temporary name first.

        `AutoModelForCausalLM` loads a fine-tuned policy; a residual is no model of its own.
        """
        directory = Path(directory)
        scratch = directory.with_name(f".{directory.name}.{os.getpid()}.tmp")
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        self.policy.save(scratch)
        torch.save(
            {"optimizer": self.optimizer.state_dict(), "generator": self.generator.get_state()}, scratch / "training.pt"
        )
        state = {
            "num_timesteps": self.num_timesteps,
            "kl_coef": self.kl.value,
            "config": asdict(self.config),
            "prompts": self.envs.prompt_state(),
            "own": self.own_state(),
        }
        reward = self.envs.engine.reward
        if hasattr(reward, "get_state"):  # one that draws its own noise
            state["reward"] = reward.get_state()
        (scratch / "state.json").write_text(json.dumps(state))
        old = directory.with_name(f".{directory.name}.{os.getpid()}.old")
        if directory.exists():
            os.replace(directory, old)
        os.replace(scratch, directory)
        shutil.rmtree(old, ignore_errors=True)

    def load(self, directory: str | os.PathLike[str]) -> None:
        """Goes on from what `save` wrote: the same curve as if there had been no break."""
        directory = Path(directory)
        self.policy.load(directory)
        training = torch.load(directory / "training.pt", weights_only=True, map_location=self.policy.device)
        self.optimizer.load_state_dict(training["optimizer"])
        self.generator.set_state(training["generator"].cpu())
        state = json.loads((directory / "state.json").read_text())
        self.num_timesteps, self.kl.value = state["num_timesteps"], state["kl_coef"]
        self.envs.restore_prompt_state(state["prompts"])
        self.restore_own_state(state["own"])
        if "reward" in state:
            self.envs.engine.reward.set_state(state["reward"])  # type: ignore[attr-defined]


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


def make_policy(envs: RLHFVectorEnv, config: OnPolicyConfig, seed: int) -> TrainablePolicy:
    """The policy that a config asks for, which starts as the reference.

    Raises:
        InvalidArgumentError: for a table to fine-tune, or a critic that a residual does not have.
    """
    lm, kind = envs.engine.lm, config.policy
    is_table = lm.model.config.model_type == "lmgym_markov"
    if kind == "finetune" and is_table:
        raise InvalidArgumentError(
            f"`policy` must be 'auto' or one of {list(get_args(Network))}, got 'finetune': the reference is a table of "
            "transition probabilities, in which a state is no more than the last tokens, so that a copy of it cannot "
            "learn."
        )
    if kind == "auto":
        kind = "transformer" if is_table else "finetune"
    if kind == "finetune":
        return ActorCritic(lm, config.critic, _reward_model(envs))
    if config.critic != "shared":
        raise InvalidArgumentError(
            f"`critic` must be 'shared' where the policy is a residual ({kind!r}), got {config.critic!r}."
        )
    positions = envs.engine.width + envs.engine.horizon
    return ResidualPolicy(lm, kind, width=config.width, layers=config.layers, positions=positions, seed=seed)


def _reward_model(envs: RLHFVectorEnv) -> torch.nn.Module | None:
    """The model behind the reward, where it reads the policy's own tokens; None where there is none to copy."""
    reward = envs.engine.reward
    if isinstance(reward, ClassifierReward) and reward.tokenizer.get_vocab() == envs.tokenizer.get_vocab():
        return reward.model
    return None


def _split(episodes: Episodes, size: int) -> Iterator[Episodes]:
    for start in range(0, len(episodes), size):
        yield episodes[start : start + size]
