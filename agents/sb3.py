"""Algorithms of Stable-Baselines3 and sb3-contrib on the token MDP.

`VecEnvBridge` makes of the vector env what they step, `Trunk` of a language model what they learn on, and
`PolicyKLCallback` adds the half of the KL that the env cannot see. `SB3Agent` puts the three together.

Shapes: N rows, L columns, V vocabulary, D width of the hidden states, H width of an LSTM.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import inspect
import json
import os
import random
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal, cast, get_args

import numpy as np
import numpy.typing as npt
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, VectorEnv
from safetensors.torch import load_file, load_model, save_file, save_model
from stable_baselines3.common.buffers import DictReplayBuffer, DictRolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.type_aliases import DictReplayBufferSamples
from stable_baselines3.common.vec_env import VecEnv, VecNormalize
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from agents.base import Callback
from agents.checkpoint import TokenCount, replacing
from agents.policies import PolicyConfig, make_policy
from agents.policy import TrainablePolicy
from lmgym.envs.vector import RLHFVectorEnv
from lmgym.errors import InvalidArgumentError, check_choice, check_int, check_number, unknown_name
from lmgym.models.policy import Policy, PolicyState
from lmgym.models.sampling import Sampler, inverse_cdf

Algorithm = Literal["PPO", "A2C", "DQN", "TRPO", "QRDQN", "MaskablePPO", "RecurrentPPO"]
_CONTRIB = ("TRPO", "QRDQN", "MaskablePPO", "RecurrentPPO")
_VALUE_BASED = ("DQN", "QRDQN")
_UNCUT = ("A2C", "RecurrentPPO")  # the one has no minibatches, the other's are whole sequences
_OURS = ("policy", "env", "learning_rate", "gamma", "seed", "device", "verbose", "tensorboard_log", "_init_setup_model")
_SHAPES = ("n_quantiles", "lstm_hidden_size", "n_lstm_layers")  # entries of `policy_kwargs` that may be chosen
_IMPOSSIBLE = -1e4  # nats: a probability of 0 in float32, without the NaN that -inf leaves in a KL
_POINT_MASS = 1e4  # logit of an action that is taken for certain


# -- the env -----------------------------------------------------------------------------------------------------------


class VecEnvBridge(VecEnv):
    """A vector env of the token MDP as Stable-Baselines3's `VecEnv`: what `DummyVecEnv` makes of single envs.

    Args:
        envs: `RLHFVectorEnv` in "SameStep" autoreset, or a wrapper around one.

    Raises:
        InvalidArgumentError: for another autoreset mode.
    """

    def __init__(self, envs: VectorEnv[Any, Any, Any]) -> None:
        mode = envs.metadata["autoreset_mode"]
        if mode != AutoresetMode.SAME_STEP:
            raise InvalidArgumentError(
                f"`autoreset_mode` must be 'SameStep', which is what Stable-Baselines3 expects, got {mode.value!r}."
            )
        self.envs = envs
        super().__init__(envs.num_envs, envs.single_observation_space, envs.single_action_space)

    def reset(self) -> Any:
        """Starts an episode in every row, with the seeds and options that `seed` and `set_options` left."""
        options = self._options[0]
        if any(other != options for other in self._options):
            raise InvalidArgumentError(f"`options` must be the same for every row, got {self._options!r}.")
        observation, infos = self.envs.reset(seed=cast(Any, list(self._seeds)), options=options)
        self.reset_infos = _by_row(infos, self.num_envs)
        self._reset_seeds()
        self._reset_options()
        return observation

    def step_async(self, actions: npt.NDArray[np.int64]) -> None:
        self._actions = actions

    def step_wait(self) -> tuple[Any, npt.NDArray[np.float32], npt.NDArray[np.bool_], list[dict[str, Any]]]:
        observation, rewards, terminated, truncated, infos = self.envs.step(self._actions)
        rows = _by_row(infos, self.num_envs)
        for i, row in enumerate(rows):
            if "final_obs" in row:
                row |= {**row.pop("final_info"), "terminal_observation": row.pop("final_obs")}
            row["TimeLimit.truncated"] = bool(truncated[i] and not terminated[i])
        return observation, rewards.astype(np.float32), terminated | truncated, rows

    def action_masks(self) -> npt.NDArray[np.bool_]:
        """(N, V) tokens that may be chosen: those of a wrapper that says so, else all that the tokenizer has."""
        for layer in self._layers():
            if hasattr(layer, "action_masks"):
                return np.asarray(layer.action_masks())
        lm = cast(Any, self.envs.unwrapped).engine.lm
        legal = np.ones((self.num_envs, lm.vocab_size), dtype=np.bool_)
        legal[:, lm.holes] = False
        return legal

    def _layers(self) -> Iterator[Any]:
        layer: Any = self.envs
        while layer is not None:
            yield layer
            layer = getattr(layer, "env", None)

    def _find(self, name: str) -> Any:
        for layer in (*self._layers(), self):
            if hasattr(layer, name):
                return getattr(layer, name)
        raise AttributeError(f"{type(self.envs).__name__} has no attribute {name!r}.")

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        """An attribute of the env, or of a wrapper, once a row: rows share it."""
        return [self._find(attr_name)] * len(list(self._get_indices(indices)))

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        """Sets an attribute of the env, for all rows: they share it."""
        if len(list(self._get_indices(indices))) != self.num_envs:
            raise InvalidArgumentError(f"`indices` must be all rows, which share {attr_name!r}, got {indices!r}.")
        setattr(self.envs.unwrapped, attr_name, value)

    def env_method(self, method_name: str, *method_args: Any, indices: Any = None, **method_kwargs: Any) -> list[Any]:
        """Calls a method once; an array of N entries is one a row, anything else is the same for every row."""
        result = self.action_masks() if method_name == "action_masks" else None
        if result is None:
            result = self._find(method_name)(*method_args, **method_kwargs)
        each = isinstance(result, (np.ndarray, list, tuple)) and len(result) == self.num_envs
        return [result[i] if each else result for i in self._get_indices(indices)]

    def env_is_wrapped(self, wrapper_class: Any, indices: Any = None) -> list[bool]:
        """Whether a wrapper of that class lies around the env."""
        return [any(isinstance(layer, wrapper_class) for layer in self._layers())] * len(
            list(self._get_indices(indices))
        )

    def get_images(self) -> Any:
        """A picture a row, with `render_mode="rgb_array"`."""
        return self.envs.render()

    def close(self) -> None:
        self.envs.close()


def _by_row(infos: Mapping[str, Any], rows: int) -> list[dict[str, Any]]:
    """Infos of a vector env (arrays, with a mask beside each) as one dict of plain values a row."""
    result: list[dict[str, Any]] = [{} for _ in range(rows)]
    for name, values in infos.items():
        if name.startswith("_"):
            continue
        column = _by_row(values, rows) if isinstance(values, dict) else values.tolist()
        for i in np.flatnonzero(infos[f"_{name}"]):
            result[i][name] = column[i]
    return result


# -- the network -------------------------------------------------------------------------------------------------------


class Trunk(BaseFeaturesExtractor):
    """A language model as a features extractor: what it says of the last token's place, side by side.

    The parts, in this order: `logits` (V) and `value` (1) with `heads`, and the hidden state (D) with `hidden`. With
    the heads alone, steps of a rollout decode from a cache, in which a row goes on if it is what it was plus a token.

    Args:
        space: of the observations. make: builds the policy; a factory, since every network needs one of its own.
        tokens: counts what is read.
    """

    def __init__(
        self,
        space: spaces.Space[Any],
        make: Callable[[], TrainablePolicy],
        heads: bool,
        hidden: bool,
        tokens: TokenCount,
    ) -> None:
        policy = make()
        self.vocab_size = int(cast(Any, space)["input_ids"].high.max()) + 1
        self.width: int = cast(Any, policy.value_head).in_features
        super().__init__(space, heads * (self.vocab_size + 1) + hidden * self.width)
        self.policy, self._heads, self._hidden, self._tokens = policy, heads, hidden, tokens
        self._caches = False
        self._state: PolicyState | None = None
        self._seen: tuple[Tensor, Tensor] = (torch.empty(0), torch.empty(0))

    def train(self, mode: bool = True) -> Trunk:
        """Drops the cache, whose weights may be about to change. Dropout stays off in either mode."""
        self._state, self._caches = None, self._heads and not self._hidden and not mode
        return super().train(False)

    def forward(self, observations: dict[str, Tensor]) -> Tensor:
        """(N, features) of ids (N, L) and masks (N, L)."""
        ids, mask = observations["input_ids"].long(), observations["attention_mask"].bool()
        if self._caches and not torch.is_grad_enabled() and (self._state is None or len(ids) == len(self._seen[0])):
            return self._decode(ids, mask)
        sequences, rows, columns, which = _shared(ids, mask)
        read = self.policy.read_at(sequences.clamp(min=0), rows, columns)
        parts = _side_by_side(read.logits, read.values) if self._heads else []
        if self._hidden:
            parts.append(read.hidden)
        features, size = torch.cat(parts, dim=1)[which], int((sequences >= 0).sum())
        self._tokens.forward += size
        self._tokens.backward += size * features.requires_grad
        return features

    def _decode(self, ids: Tensor, mask: Tensor) -> Tensor:
        if self._state is None:
            prompts, prompt_mask = _left_padded(ids, mask)
            self._state = self.policy.begin(prompts, prompt_mask, ids.shape[1] - prompts.shape[1])
            self._tokens.forward += int(mask.sum())
        else:
            old_ids, old_mask = self._seen
            added = mask & ~old_mask
            goes_on = (added.sum(1) == 1) & (~old_mask | (mask & (ids == old_ids))).all(1)
            self._state.step(torch.where(goes_on, (ids * added).sum(1), 0))
            fresh = (~goes_on).nonzero().squeeze(1)
            if len(fresh):
                self._state.begin(fresh, *_left_padded(ids[fresh], mask[fresh]))
            self._tokens.forward += int(goes_on.sum() + mask[fresh].sum())
        self._seen = ids, mask
        assert self._state.values is not None
        return torch.cat(_side_by_side(self._state.logits, self._state.values), dim=1)


def _side_by_side(logits: Tensor, values: Tensor) -> list[Tensor]:
    return [logits.float().clamp(min=_IMPOSSIBLE), values.unsqueeze(1)]


def _left_padded(ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Sequences (n, L) with gaps, moved to the right and cut to the longest."""
    order = mask.to(torch.uint8).argsort(dim=1, stable=True)[:, -int(mask.sum(1).max()) :]
    return ids.gather(1, order), mask.gather(1, order)


def _shared(ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sequences (N, L) with gaps, in as few as will do: one that begins another is read on the way through that.

    Returns:
        ids (B, W) from column 0, -1 behind the end; the row and column (n,) of the last token of each that differs; and
        which of those (N,) each sequence is.
    """
    order = (~mask).to(torch.uint8).argsort(dim=1, stable=True)[:, : max(1, int(mask.sum(1).max()))]
    marked = torch.where(mask, ids, -1).gather(1, order)
    unique, which = torch.unique(marked, dim=0, return_inverse=True)  # sorted: what begins with a row comes behind it
    begins = torch.zeros(len(unique), dtype=torch.bool, device=ids.device)
    begins[:-1] = ((unique[:-1] == unique[1:]) | (unique[:-1] < 0)).all(1)
    columns = ((unique >= 0).sum(1) - 1).clamp(min=0)  # RecurrentPPO pads with sequences of no token
    return unique[~begins], (~begins).cumsum(0) - (~begins).long(), columns, which


class _Head(nn.Module):
    """Columns [start, stop) of the features, plus a linear map, 0 at first, of those from `rest` on (an LSTM's)."""

    def __init__(self, start: int, stop: int, rest: int, width: int) -> None:
        super().__init__()
        self._columns, self._rest, self.more = slice(start, stop), rest, None
        if width:
            self.more = nn.utils.skip_init(nn.Linear, width, stop - start)
            nn.init.zeros_(self.more.weight)
            nn.init.zeros_(self.more.bias)

    def forward(self, features: Tensor) -> Tensor:
        chosen = features[:, self._columns]
        return chosen if self.more is None else chosen + self.more(features[:, self._rest :])


class _OnTrunk:
    """Mixed into an actor-critic policy of SB3: its two heads are those of the trunk, and nothing is drawn anew."""

    def _build(self: Any, lr_schedule: Callable[[float], float]) -> None:
        trunk, width = self.features_extractor, getattr(self, "lstm_output_dim", 0)
        if width:
            self.features_dim = trunk.width  # what the LSTMs read
        self._build_mlp_extractor()
        v = trunk.vocab_size
        self.action_net, self.value_net = _Head(0, v, v + 1, width), _Head(v, v + 1, v + 1, width)
        self.optimizer = self.optimizer_class(self.parameters(), lr=lr_schedule(1), **self.optimizer_kwargs)


def _policy_class(algorithm: Any) -> type:
    """The algorithm's own actor-critic policy, on a trunk."""
    aliases = algorithm.policy_aliases
    base = aliases["MlpLstmPolicy" if "MlpLstmPolicy" in aliases else "MlpPolicy"]
    members: dict[str, Any] = {}
    if hasattr(base, "_process_sequence"):

        def process(features: Tensor, states: Any, starts: Tensor, lstm: nn.LSTM) -> tuple[Tensor, Any]:
            """Runs the LSTM over the hidden states (last D features) and puts what it says (H) in their place."""
            out, states = base._process_sequence(features[:, -lstm.input_size :], states, starts, lstm)
            return torch.cat([features[:, : -lstm.input_size], out], dim=1), states

        members["_process_sequence"] = staticmethod(process)
    return type(f"Token{base.__name__}", (_OnTrunk, base), members)


# -- the buffers -------------------------------------------------------------------------------------------------------


class StretchReplayBuffer(DictReplayBuffer):
    """A replay buffer that draws stretches of successive steps of a row; any step is as likely as another.

    Args:
        stretch: steps each; 1 is SB3's own way.
    """

    def __init__(self, *args: Any, stretch: int = 1, **kwargs: Any) -> None:
        self._stretch = stretch
        super().__init__(*args, **kwargs)

    def sample(self, batch_size: int, env: VecNormalize | None = None) -> DictReplayBufferSamples:  # type: ignore[override]
        """Draws `batch_size` steps."""
        stretches = -(-batch_size // self._stretch)
        starts = np.random.randint(0, self.size(), size=(stretches, 1))  # noqa: NPY002 - what SB3 draws from
        rows = np.random.randint(0, self.n_envs, size=(stretches, 1))  # noqa: NPY002
        steps = (starts + np.arange(self._stretch)) % self.size()
        return self._at(steps.ravel()[:batch_size], np.repeat(rows, self._stretch)[:batch_size], env)

    def _at(self, steps: Any, rows: Any, env: VecNormalize | None) -> DictReplayBufferSamples:
        def tensors(observations: dict[str, Any]) -> Any:
            chosen = self._normalize_obs({name: x[steps, rows] for name, x in observations.items()}, env)
            return {name: self.to_torch(x) for name, x in cast(Any, chosen).items()}

        return DictReplayBufferSamples(
            observations=tensors(self.observations),
            actions=self.to_torch(self.actions[steps, rows]),
            next_observations=tensors(self.next_observations),
            dones=self.to_torch((self.dones[steps, rows] * (1 - self.timeouts[steps, rows]))[:, None]),
            rewards=self.to_torch(self._normalize_reward(self.rewards[steps, rows, None], env)),
        )


class _Stretches:
    """Mixed into a rollout buffer of SB3: its minibatches are stretches of `stretch` successive steps of a row."""

    def __init__(self, *args: Any, stretch: int = 1, **kwargs: Any) -> None:
        self._stretch = stretch
        super().__init__(*args, **kwargs)

    def get(self: Any, batch_size: int | None = None) -> Generator[Any, None, None]:
        whole = next(super().get())  # type: ignore[misc]
        if batch_size is None:
            yield whole
            return
        steps = np.arange(self.buffer_size * self.n_envs).reshape(-1, self._stretch)  # row after row
        order = np.random.permutation(steps).ravel()  # noqa: NPY002 - what SB3 draws from
        for start in range(0, len(order), batch_size):
            yield self._get_samples(order[start : start + batch_size])


class StretchRolloutBuffer(_Stretches, DictRolloutBuffer):
    """The rollout buffer of PPO and TRPO, in stretches."""


def _in_stretches(algorithm: Algorithm, stretch: int, given: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments that give an algorithm its buffer in stretches, with what was `given` for it."""
    buffer: Any = StretchReplayBuffer if algorithm in _VALUE_BASED else StretchRolloutBuffer
    if algorithm == "MaskablePPO":
        from sb3_contrib.common.maskable.buffers import MaskableDictRolloutBuffer

        buffer = type("StretchMaskableRolloutBuffer", (_Stretches, MaskableDictRolloutBuffer), {})
    kind = "replay" if algorithm in _VALUE_BASED else "rollout"
    more = {**given.get(f"{kind}_buffer_kwargs", {}), "stretch": stretch}
    return {f"{kind}_buffer_class": buffer, f"{kind}_buffer_kwargs": more}


# -- the callbacks -----------------------------------------------------------------------------------------------------


class PolicyKLCallback(BaseCallback):
    """Subtracts `kl_coef * log pi(a|s)` from the rewards of an on-policy algorithm, before the buffer stores them.

    The env's reward already holds the other half, `kl_coef * log pi_ref(a|s)`. An algorithm without log-probs (DQN)
    takes an action for certain: log pi is 0, and there is nothing to subtract.

    Args:
        kl_coef: beta, in units of the score a nat.
        dense: whether it is paid with every token, as by default, or with the last one for the whole episode.
    """

    def __init__(self, kl_coef: float, dense: bool = True) -> None:
        super().__init__()
        self.kl_coef, self.dense = kl_coef, dense
        self.restart()

    def restart(self) -> None:
        """Forgets the episodes in hand."""
        self._owed: npt.NDArray[np.float64] = np.zeros(0)

    def _on_step(self) -> bool:
        if "log_probs" in self.locals and self.kl_coef:
            log_probs, dones = self.locals["log_probs"].cpu().numpy().astype(np.float64), self.locals["dones"]
            if len(self._owed) != len(log_probs):
                self._owed = np.zeros(len(log_probs))
            self._owed += log_probs
            paying = np.ones_like(dones) if self.dense else dones
            self.locals["rewards"] -= self.kl_coef * self._owed * paying  # in place: the buffer stores this very array
            self._owed[paying] = 0.0
        return True


class _Stop(Exception):
    """The caller wants no further batch."""


class _Report(BaseCallback):
    """Hands over metrics of the episodes that ended, and of the update on them, every `every` env steps."""

    def __init__(self, gamma: float, every: int, tokens: TokenCount) -> None:
        super().__init__()
        self.gamma, self.every, self.tokens = gamma, every, tokens
        self.receiver: Callback | None = None
        self.restart()

    def restart(self) -> None:
        """Forgets the episodes in hand."""
        self._rows: list[dict[str, float]] = []
        self._ended: list[dict[str, float]] = []
        self._steps = 0

    def _on_training_start(self) -> None:
        self._started = time.perf_counter()

    def _on_step(self) -> bool:
        infos, rewards = self.locals["infos"], self.locals["rewards"]
        log_probs = self.locals["log_probs"].cpu().numpy() if "log_probs" in self.locals else np.zeros(len(infos))
        self._rows = self._rows or [_nothing() for _ in infos]
        for i, (row, info) in enumerate(zip(self._rows, infos, strict=True)):
            row["return"] += self.gamma ** row["length"] * float(rewards[i])
            row["kl"] += float(log_probs[i]) - info.get("ref_log_prob", 0.0)
            row["length"] += 1
            if self.locals["dones"][i]:
                row |= {name: info[name] for name in ("score", "gold_score") if name in info}
                row["eos_fraction"] = float(info["finish_reason"] == "eos")
                self._ended.append(row)
                self._rows[i] = _nothing()
        self._steps += len(infos)
        return True

    def _on_rollout_start(self) -> None:
        if self._steps >= self.every:
            self._hand_over()

    def _on_training_end(self) -> None:
        if self._steps:
            with contextlib.suppress(_Stop):
                self._hand_over()

    def _hand_over(self) -> None:
        seconds = time.perf_counter() - self._started
        metrics = {name: float(x) for name, x in self.logger.name_to_value.items()}
        for name in self._ended[0] if self._ended else ():
            metrics[f"rollout/{name}"] = float(np.mean([row[name] for row in self._ended]))
        if not self.training_env.get_attr("kl_coef")[0]:
            metrics.pop("rollout/kl", None)  # without a price the reference is never asked
        metrics["time/tokens_per_second"] = self._steps / seconds
        metrics |= self.tokens.metrics()
        self._ended, self._steps, self._started = [], 0, time.perf_counter()
        if self.receiver is not None and self.receiver(self.num_timesteps, metrics) is False:
            raise _Stop


def _nothing() -> dict[str, float]:
    return {"return": 0.0, "kl": 0.0, "length": 0.0}


# -- the agent ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SB3Config(PolicyConfig):
    """What an algorithm of Stable-Baselines3 runs with; null leaves its own default."""

    algorithm: Algorithm = "PPO"
    n_envs: int = 64  # rows of the env
    n_steps: int = 32  # steps of every row between two updates; of DQN and QRDQN, between two rows of metrics
    learning_rate: float = 5e-4
    lr_schedule: Literal["constant", "linear"] = "linear"  # linear ends at 0
    batch_size: int | None = None  # tokens a minibatch
    n_epochs: int | None = None  # passes over a rollout
    stretch: int | None = None  # successive steps of a row that stay together in a minibatch; null, as SB3: 1
    kwargs: dict[str, Any] = field(default_factory=dict)  # further arguments of the algorithm, by SB3's names

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("algorithm", self.algorithm, get_args(Algorithm))
        check_choice("lr_schedule", self.lr_schedule, ("constant", "linear"))
        for name in ("n_envs", "n_steps"):
            check_int(name, getattr(self, name), 1)
        check_number("learning_rate", self.learning_rate, 0)
        for name in ("batch_size", "n_epochs", "stretch"):
            if getattr(self, name) is not None:
                check_int(name, getattr(self, name), 1)
        if self.stretch is not None and self.algorithm in _UNCUT:
            raise InvalidArgumentError(f"`stretch` must be None for {self.algorithm}, got {self.stretch}.")
        if self.stretch is not None and self.algorithm not in _VALUE_BASED and self.n_steps % self.stretch:
            raise InvalidArgumentError(f"`stretch` must divide n_steps={self.n_steps}, got {self.stretch}.")
        if not isinstance(self.kwargs, Mapping):
            raise InvalidArgumentError(f"`kwargs` must be a mapping of names to plain values, got {self.kwargs!r}.")
        for name in self.kwargs.get("policy_kwargs", {}):
            check_choice("kwargs.policy_kwargs", name, _SHAPES)
        if self.algorithm not in _CONTRIB or importlib.util.find_spec("sb3_contrib"):
            self.arguments(algorithm_class(self.algorithm))

    @property
    def num_envs(self) -> int:
        """Rows that the vector env must have."""
        return self.n_envs

    def arguments(self, algorithm: Any) -> dict[str, Any]:
        """Keyword arguments of the algorithm, but for those that come from the env.

        Raises:
            InvalidArgumentError: for one that it does not take. UnknownNameError: for one of `kwargs`.
        """
        taken = [n for n in inspect.signature(algorithm.__init__).parameters if n not in ("self", *_OURS)]
        for name in self.kwargs:
            if name not in taken or name in ("n_epochs", "batch_size"):
                raise unknown_name("kwargs", name, set(taken) - {"n_epochs", "batch_size"})
        given: dict[str, Any] = {"batch_size": self.batch_size, "n_epochs": self.n_epochs}
        for name, value in given.items():
            if value is not None and name not in taken:
                raise InvalidArgumentError(f"`{name}` must be None, for {self.algorithm} has no such, got {value!r}.")
        if self.algorithm not in _VALUE_BASED:
            given["n_steps"] = self.n_steps
        return {**self.kwargs, **{name: value for name, value in given.items() if value is not None}}


def algorithm_class(name: Algorithm) -> Any:
    """The class of an algorithm.

    Raises:
        InvalidArgumentError: naming the package that it needs, where that is not installed.
    """
    package, distribution = ("sb3_contrib", "sb3-contrib") if name in _CONTRIB else ("stable_baselines3",) * 2
    try:
        found = getattr(importlib.import_module(package), name)
    except ModuleNotFoundError as error:
        raise InvalidArgumentError(
            f"`algorithm` must be one that is installed, got {name!r}: it needs the package {distribution} "
            f"(pip install {distribution})."
        ) from error
    return _one_backward(found) if name == "TRPO" else found


def _one_backward(trpo: Any) -> Any:
    """TRPO that differentiates the KL by all parameters in one backward pass, where sb3-contrib takes one for each.

    The numbers are the same; every product with the Fisher matrix then runs through one graph.
    """

    class TRPO(trpo):
        def _compute_actor_grad(self, kl: Tensor, objective: Tensor) -> tuple[list[Any], Tensor, Tensor, list[Any]]:
            named = [parameter for name, parameter in self.policy.named_parameters() if "value" not in name]
            of_kl = torch.autograd.grad(kl, named, create_graph=True, allow_unused=True)
            found = [(parameter, grad) for parameter, grad in zip(named, of_kl, strict=True) if grad is not None]
            actor = [parameter for parameter, _ in found]
            of_objective = torch.autograd.grad(objective, actor, retain_graph=True)
            flat = [torch.cat([grad.flatten() for grad in grads]) for grads in (of_objective, [g for _, g in found])]
            return actor, flat[0], flat[1], [parameter.shape for parameter in actor]

    return TRPO


class SB3Agent:
    """An algorithm of Stable-Baselines3 that starts as the reference and pays both halves of the KL.

    Args:
        envs: the token MDP, `config.n_envs` rows in "SameStep" autoreset with dict observations.
        config: the algorithm and its numbers.
        seed: of the prompts, the tokens sampled, the order of minibatches and the weights that are drawn.
        sampler: only the policy's own law: SB3 samples from nothing else.

    Attributes:
        model: SB3's object.
        tokens: what its networks have read to learn. The products of TRPO with the Fisher matrix are not counted.
        policy: the policy, as `lmgym.evaluation.evaluate` takes it; of DQN and QRDQN the greedy one.

    Raises:
        InvalidArgumentError: for a package that is not installed, or an env or sampler that cannot be.
    """

    Config: ClassVar[type[SB3Config]] = SB3Config

    def __init__(
        self, envs: RLHFVectorEnv, config: SB3Config | None = None, *, seed: int = 0, sampler: Sampler | None = None
    ) -> None:
        self.config = config = config or SB3Config()
        self.envs, self._inner = envs, envs.unwrapped
        algorithm = algorithm_class(config.algorithm)
        self._value_based, self._recurrent = config.algorithm in _VALUE_BASED, config.algorithm == "RecurrentPPO"
        self._check(sampler)
        self.tokens = TokenCount()
        trunk = {
            "features_extractor_class": Trunk,
            "features_extractor_kwargs": {
                "make": partial(make_policy, self._inner, config, seed),
                "heads": not self._value_based,
                "hidden": self._value_based or self._recurrent,
                "tokens": self.tokens,
            },
            "net_arch": [],
        }
        arguments = config.arguments(algorithm)
        if config.stretch is not None:
            arguments |= _in_stretches(config.algorithm, config.stretch, arguments)
        if not self._value_based:
            trunk["ortho_init"] = False  # it would draw the language model anew
        arguments["policy_kwargs"] = {**arguments.get("policy_kwargs", {}), **trunk}
        rate, falling = config.learning_rate, config.lr_schedule == "linear"
        self._randomness: _Randomness | None = None  # None: that of the process is the agent's, now
        with self._own_randomness():
            self.model: Any = algorithm(
                "MultiInputPolicy" if self._value_based else _policy_class(algorithm),
                VecEnvBridge(envs),
                learning_rate=(lambda remaining: rate * max(0.0, remaining)) if falling else rate,
                gamma=self._inner.gamma,
                seed=seed,
                device=self._inner.engine.lm.device,
                **arguments,
            )
        networks = self.model.policy
        if config.algorithm == "TRPO":  # whose optimiser is the critic's: it must not move the policy
            critic = [p for name, p in networks.named_parameters() if "value" in name]
            networks.optimizer = networks.optimizer_class(critic, lr=rate, **networks.optimizer_kwargs)
        networks.set_training_mode(False)
        prefix = self._value_based or self._recurrent
        self.policy: Policy = PrefixPolicy(self.model, self.tokens) if prefix else networks.features_extractor.policy
        self.generator = torch.Generator().manual_seed(seed)
        task = self._inner.task
        self._kl = PolicyKLCallback(task.kl_coef, task.dense_kl)
        self._report = _Report(task.gamma, config.n_steps * config.n_envs, self.tokens)

    def _check(self, sampler: Sampler | None) -> None:
        envs, config = self._inner, self.config
        if sampler not in (None, Sampler()):
            raise InvalidArgumentError(f"`sampler` must be the policy's own law, which SB3 samples, got {sampler}.")
        if envs.num_envs != config.n_envs:
            raise InvalidArgumentError(f"`envs` must have n_envs={config.n_envs} rows, got {envs.num_envs}.")
        if envs.settings.obs_format != "dict":
            raise InvalidArgumentError(f"`obs_format` must be 'dict', got {envs.settings.obs_format!r}.")
        if self._value_based and envs.engine.lm.holes:
            raise InvalidArgumentError(
                f"`algorithm` must be one that learns a policy, got {config.algorithm!r}: it would explore ids that "
                "the tokenizer lacks."
            )

    @property
    def name(self) -> str:
        """What a report calls it."""
        return f"SB3 {self.config.algorithm}"

    @property
    def num_timesteps(self) -> int:
        """Env steps (tokens) so far."""
        return int(self.model.num_timesteps)

    def learn(self, total_timesteps: int, callback: Callback | None = None) -> None:
        """Trains until `total_timesteps` env steps have been taken in all, rollouts being finished.

        Args:
            total_timesteps: of the whole run, steps before a resume included.
            callback: sees (num_timesteps, metrics) after every rollout and its update; training stops if it returns
                False.
        """
        remaining = total_timesteps - self.num_timesteps
        if remaining <= 0:
            return
        self._report.receiver = callback
        # TRPO differentiates twice, which the fused kernels of attention cannot.
        kernels = sdpa_kernel(SDPBackend.MATH) if self.config.algorithm == "TRPO" else contextlib.nullcontext()
        with self._own_randomness(), kernels, contextlib.suppress(_Stop):
            self.model.learn(remaining, [self._kl, self._report], log_interval=None, reset_num_timesteps=False)
        self.model.policy.set_training_mode(False)

    @torch.inference_mode()
    def predict(self, observation: dict[str, Any], deterministic: bool = False) -> tuple[Any, None]:
        """Tokens for a (batched or single) dict observation: (actions, None). DQN and QRDQN are always greedy."""
        ids, mask = np.asarray(observation["input_ids"]), np.asarray(observation["attention_mask"]).astype(bool)
        single = ids.ndim == 1
        logits = self._logits(*(torch.from_numpy(np.atleast_2d(x)).to(self.policy.device) for x in (ids, mask)))
        if deterministic:
            actions = logits.argmax(-1)
        else:
            actions, _ = inverse_cdf(logits, torch.rand(len(logits), generator=self.generator, dtype=torch.float64))
        chosen = actions.cpu().numpy()
        return (chosen[0] if single else chosen), None

    def _logits(self, ids: Tensor, mask: Tensor) -> Tensor:
        """(B, V) of the next token, each row followed from its prompt to where it stands (an LSTM has to)."""
        horizon = self._inner.engine.horizon
        width = ids.shape[1] - horizon
        state = self.policy.begin(ids[:, :width], mask[:, :width], horizon)
        lengths = mask[:, width:].sum(1)
        logits = state.logits.float().clone()
        for t in range(int(lengths.max())):
            state.step(ids[:, width + t])
            logits[lengths == t + 1] = state.logits[lengths == t + 1].float()
        return logits

    # -- saving and loading ----------------------------------------------------------------------------------------

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Writes weights and optimiser as safetensors and the rest as JSON, under a temporary name first.

        `AutoModelForCausalLM` loads a fine-tuned actor. A replay buffer is not written, nor are the episodes in hand.
        """
        with replacing(directory) as scratch:
            if isinstance(self.policy, TrainablePolicy):
                self.policy.save(scratch)
            else:
                save_model(self.model.policy, str(scratch / "policy.safetensors"))
            save_file(_flat(self.model.policy.optimizer.state_dict()["state"]), scratch / "optimizer.safetensors")
            state = {
                "num_timesteps": self.num_timesteps,
                "tokens": asdict(self.tokens),
                "config": asdict(self.config),
                "env": self._inner.get_state(),
                "randomness": (self._randomness or _Randomness.now()).as_json(),
                "actions": self.model.action_space.np_random.bit_generator.state,
                "generator": self.generator.get_state().tolist(),
            }
            (scratch / "state.json").write_text(json.dumps(state))

    def load(self, directory: str | os.PathLike[str]) -> None:
        """Reads back what `save` wrote; episodes begin anew, and a replay buffer is empty.

        Raises:
            InvalidArgumentError: for a checkpoint of another algorithm or shape.
        """
        directory = Path(directory)
        state = json.loads((directory / "state.json").read_text())
        for name in ("algorithm", *PolicyConfig.__dataclass_fields__):
            if state["config"][name] != getattr(self.config, name):
                raise InvalidArgumentError(
                    f"`directory` must hold a checkpoint with {name}={getattr(self.config, name)!r}, got "
                    f"{state['config'][name]!r}."
                )
        if isinstance(self.policy, TrainablePolicy):
            self.policy.load(directory)
        else:
            load_model(self.model.policy, str(directory / "policy.safetensors"))
        optimizer = self.model.policy.optimizer
        moments = _nested(load_file(directory / "optimizer.safetensors", device=str(self.policy.device)))
        optimizer.load_state_dict({**optimizer.state_dict(), "state": moments})
        self.model.num_timesteps, self.model._last_obs = state["num_timesteps"], None
        self.model.env._reset_seeds()  # its streams of prompts go on, and are not seeded again
        self.model.policy.set_training_mode(False)
        self.model.action_space.np_random.bit_generator.state = state["actions"]
        self._randomness = _Randomness.of_json(state["randomness"])
        self.generator.set_state(torch.tensor(state["generator"], dtype=torch.uint8))
        self.tokens.forward, self.tokens.backward = state["tokens"]["forward"], state["tokens"]["backward"]
        self._inner.set_state(state["env"])
        self._report.restart()
        self._kl.restart()

    @contextlib.contextmanager
    def _own_randomness(self) -> Iterator[None]:
        """SB3 seeds and draws from the generators of the process: lends it ones of its own, and puts those back."""
        outside, python = _Randomness.now(), random.getstate()
        if self._randomness is not None:
            self._randomness.put()
        self._randomness = None
        try:
            yield
        finally:
            self._randomness = _Randomness.now()
            outside.put()
            random.setstate(python)


@dataclass(frozen=True)
class _Randomness:
    """Where the generators of the process stand."""

    numpy: Any
    torch: Tensor
    cuda: list[Tensor]

    @classmethod
    def now(cls) -> _Randomness:
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
        return cls(np.random.get_state(legacy=False), torch.get_rng_state(), cuda)  # noqa: NPY002 - what SB3 draws from

    def put(self) -> None:
        np.random.set_state(self.numpy)  # noqa: NPY002 - what SB3 draws from
        torch.set_rng_state(self.torch)
        if self.cuda:
            torch.cuda.set_rng_state_all(self.cuda)

    def as_json(self) -> dict[str, Any]:
        key = {**self.numpy["state"], "key": self.numpy["state"]["key"].tolist()}
        cuda = [x.tolist() for x in self.cuda]
        return {"numpy": {**self.numpy, "state": key}, "torch": self.torch.tolist(), "cuda": cuda}

    @classmethod
    def of_json(cls, values: dict[str, Any]) -> _Randomness:
        numpy = values["numpy"]
        numpy["state"]["key"] = np.array(numpy["state"]["key"], dtype=np.uint32)
        states = [torch.tensor(x, dtype=torch.uint8) for x in (values["torch"], *values["cuda"])]
        return cls(numpy, states[0], states[1:] if torch.cuda.is_available() else [])


def _flat(state: dict[int, dict[str, Any]]) -> dict[str, Tensor]:
    """An optimiser's state, parameter by parameter, as named tensors."""
    return {f"{i}.{name}": torch.as_tensor(x).contiguous() for i, row in state.items() for name, x in row.items()}


def _nested(flat: dict[str, Tensor]) -> dict[int, dict[str, Tensor]]:
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in flat.items():
        i, name = key.split(".")
        state.setdefault(int(i), {})[name] = tensor
    return state


# -- acting without SB3 ------------------------------------------------------------------------------------------------


class PrefixPolicy:
    """What DQN, QRDQN or RecurrentPPO does, as a policy: a full forward over what has been written a token.

    Of the first two the law is a point mass on the token of the highest Q.

    Args:
        model: SB3's object.
        tokens: what the networks count when they read; acting is no cost of training, and is taken off again.
    """

    def __init__(self, model: Any, tokens: TokenCount) -> None:
        self._networks, self._tokens = model.policy, tokens

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self._networks.device

    def begin(self, prompt_ids: Tensor, prompt_mask: Tensor, max_new_tokens: int) -> PrefixState:
        """Reads prompts (B, P), left-padded."""
        self._networks.set_training_mode(False)
        state = PrefixState(self._read, prompt_ids[:, :0], prompt_mask[:, :0].bool())
        state.begin(torch.arange(len(prompt_ids), device=prompt_ids.device), prompt_ids, prompt_mask)
        return state

    @torch.no_grad()
    def _read(self, ids: Tensor, mask: Tensor, memory: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """(n, V) logits behind sequences (n, W), and an LSTM's memory (n, layers, 2H) behind that before them."""
        spent = self._tokens.forward
        try:
            return self._logits(ids, mask, memory)
        finally:
            self._tokens.forward = spent

    def _logits(self, ids: Tensor, mask: Tensor, memory: Tensor | None) -> tuple[Tensor, Tensor | None]:
        observation = {"input_ids": ids, "attention_mask": mask}
        if hasattr(self._networks, "lstm_actor"):
            layers, _, h = self._networks.lstm_hidden_state_shape
            if memory is None:
                memory = torch.zeros((len(ids), layers, 2 * h), device=ids.device)
            both = [x.transpose(0, 1).contiguous() for x in memory.split(h, dim=-1)]
            starts = torch.zeros(len(ids), device=ids.device)
            law, both = self._networks.get_distribution(observation, tuple(both), starts)
            return law.distribution.logits, torch.cat([x.transpose(0, 1) for x in both], dim=-1)
        if hasattr(self._networks, "q_net"):
            q = self._networks.q_net(observation)
        else:
            q = self._networks.quantile_net(observation).mean(1)
        return torch.zeros_like(q).scatter_(1, q.argmax(1, keepdim=True), _POINT_MASS), None


class PrefixState:
    """Running responses (`lmgym.models.policy.PolicyState`), read anew with every token."""

    def __init__(self, read: Callable[..., tuple[Tensor, Tensor | None]], ids: Tensor, mask: Tensor) -> None:
        self._read, self._ids, self._mask = read, ids, mask
        self._memory: Tensor | None = None
        self.logits: Tensor = torch.empty(0)
        self.values: Tensor | None = None

    def begin(self, rows: Tensor, prompt_ids: Tensor, prompt_mask: Tensor) -> None:
        """Restarts rows (n,) from prompts (n, P), left-padded."""
        width = max(self._ids.shape[1], prompt_ids.shape[1])
        self._ids, prompt_ids = (nn.functional.pad(x, (width - x.shape[1], 0)) for x in (self._ids, prompt_ids))
        self._mask, prompt_mask = (
            nn.functional.pad(x.bool(), (width - x.shape[1], 0)) for x in (self._mask, prompt_mask)
        )
        self._ids[rows], self._mask[rows] = prompt_ids, prompt_mask
        logits, memory = self._read(prompt_ids, prompt_mask, None)
        if not len(self.logits):
            self.logits = logits.new_zeros((len(self._ids), logits.shape[1]))
            self._memory = None if memory is None else memory.new_zeros((len(self._ids), *memory.shape[1:]))
        self.logits[rows] = logits
        if self._memory is not None:
            self._memory[rows] = cast(Tensor, memory)

    def step(self, tokens: Tensor) -> None:
        """Appends a token (B,) to every response."""
        self._ids = torch.cat([self._ids, tokens.unsqueeze(1)], dim=1)
        self._mask = nn.functional.pad(self._mask, (0, 1), value=True)
        self.logits, self._memory = self._read(self._ids, self._mask, self._memory)

    def keep(self, rows: Tensor) -> None:
        """Keeps only these rows (n,), in this order."""
        self._ids, self._mask, self.logits = self._ids[rows], self._mask[rows], self.logits[rows]
        self._memory = None if self._memory is None else self._memory[rows]
