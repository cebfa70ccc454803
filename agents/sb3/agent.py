"""Algorithms of Stable-Baselines3 and sb3-contrib on the token MDP, each as an agent: `SB3Agent`.

The env that they step is in lmgym/sb3, the network that they learn on in agents/sb3/network.py, and the buffers
that they draw minibatches from in agents/sb3/buffers.py.
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
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import numpy as np
import torch
from safetensors.torch import load_file, load_model, save_file, save_model
from stable_baselines3.common.callbacks import BaseCallback
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from agents.agent import Callback, PolicyAgent, TokenCount
from agents.finite import all_finite, check_saving, check_weights, diverged
from agents.master_weights import MasterWeights
from agents.policies.actor_critic import TrainablePolicy
from agents.policies.choice import PolicyConfig, make_policy
from agents.sb3.buffers import Stretches, StretchReplayBuffer, StretchRolloutBuffer
from agents.sb3.episodes import memory_of, remember, running_episodes, take_up
from agents.sb3.network import MaskedPolicy, PrefixPolicy, Trunk, critic_parameters, policy_class
from agents.seeds import SB3, SB3_NUMPY, WEIGHTS, row_seeds, stream_seed
from lmgym.envs.vector import RLHFVectorEnv
from lmgym.errors import InvalidArgumentError, check_choice, check_int, check_number, unknown_name
from lmgym.models.sampling import Sampler
from lmgym.sb3 import PolicyKLCallback, VecEnvBridge
from lmgym.wrappers import VectorActionMask

Algorithm = Literal["PPO", "A2C", "DQN", "TRPO", "QRDQN", "MaskablePPO", "RecurrentPPO"]
_CONTRIB = ("TRPO", "QRDQN", "MaskablePPO", "RecurrentPPO")
_VALUE_BASED = ("DQN", "QRDQN")
_UNCUT = ("A2C", "RecurrentPPO")  # the one has no minibatches, the other's are whole sequences
_OURS = ("policy", "env", "learning_rate", "gamma", "seed", "device", "verbose", "tensorboard_log", "_init_setup_model")
_SHAPES = ("n_quantiles", "lstm_hidden_size", "n_lstm_layers")  # entries of `policy_kwargs` that may be chosen


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
    mask_top_k: int | None = None  # of MaskablePPO: only the reference's k likeliest tokens may be chosen, and EOS
    mask_top_p: float | None = None  # the same, of the smallest set of likeliest tokens that has this mass
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
        for name in ("mask_top_k", "mask_top_p"):
            if getattr(self, name) is not None and self.algorithm != "MaskablePPO":
                raise InvalidArgumentError(f"`{name}` must be None for {self.algorithm}, got {getattr(self, name)!r}.")
        if self.mask_top_k is not None:
            check_int("mask_top_k", self.mask_top_k, 1)
        if self.mask_top_p is not None:
            check_number("mask_top_p", self.mask_top_p, 0, 1, open_low=True)
            if self.mask_top_k is not None:
                raise InvalidArgumentError(f"`mask_top_k` must be None beside `mask_top_p`, got {self.mask_top_k!r}.")
        if not isinstance(self.kwargs, Mapping):
            raise InvalidArgumentError(f"`kwargs` must be a mapping of names to plain values, got {self.kwargs!r}.")
        if self.algorithm in _VALUE_BASED and self.kwargs.get("n_steps", 1) != 1:
            raise InvalidArgumentError(
                f"`kwargs.n_steps` must be 1, for SB3 has no n-step returns of dict observations, got "
                f"{self.kwargs['n_steps']!r}."
            )
        shapes = self.kwargs.get("policy_kwargs", {})
        if not isinstance(shapes, Mapping):
            raise InvalidArgumentError(f"`kwargs.policy_kwargs` must be a mapping of names to values, got {shapes!r}.")
        for name in shapes:
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


def _in_stretches(algorithm: Algorithm, stretch: int, given: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments that give an algorithm its buffer in stretches, with what was `given` for it."""
    buffer: Any = StretchReplayBuffer if algorithm in _VALUE_BASED else StretchRolloutBuffer
    if algorithm == "MaskablePPO":
        from sb3_contrib.common.maskable.buffers import MaskableDictRolloutBuffer

        buffer = type("StretchMaskableRolloutBuffer", (Stretches, MaskableDictRolloutBuffer), {})
    kind = "replay" if algorithm in _VALUE_BASED else "rollout"
    more = {**(given.get(f"{kind}_buffer_kwargs") or {}), "stretch": stretch}
    return {f"{kind}_buffer_class": buffer, f"{kind}_buffer_kwargs": more}


def _one_backward(trpo: Any) -> Any:
    """TRPO that differentiates the KL by all parameters in one backward pass, where sb3-contrib takes one for each.

    The numbers are the same; every product with the Fisher matrix then runs through one graph. And what is the critic's
    is known by where it is: sb3-contrib leaves every parameter with "value" in its name to it, attention's too.
    """

    class TRPO(trpo):
        def _compute_actor_grad(self, kl: Tensor, objective: Tensor) -> tuple[list[Any], Tensor, Tensor, list[Any]]:
            critic = {id(parameter) for parameter in critic_parameters(self.policy)}
            named = [parameter for parameter in self.policy.parameters() if id(parameter) not in critic]
            of_kl = torch.autograd.grad(kl, named, create_graph=True, allow_unused=True)
            found = [(parameter, grad) for parameter, grad in zip(named, of_kl, strict=True) if grad is not None]
            actor = [parameter for parameter, _ in found]
            of_objective = torch.autograd.grad(objective, actor, retain_graph=True)
            flat = [torch.cat([grad.flatten() for grad in grads]) for grads in (of_objective, [g for _, g in found])]
            return actor, flat[0], flat[1], [parameter.shape for parameter in actor]

    return TRPO


def _masked(envs: Any, config: SB3Config) -> tuple[Any, Sampler | None]:
    """The env with the mask that MaskablePPO asks for, and the law of the reference that the mask is the support of."""
    if config.algorithm != "MaskablePPO":
        return envs, None
    layer = envs
    while layer is not None and not hasattr(layer, "action_masks"):
        layer = getattr(layer, "env", None)
    if layer is not None and not isinstance(layer, VectorActionMask):
        raise InvalidArgumentError(
            f"`envs` must be masked by VectorActionMask, whose mask the policy knows wherever it acts, got "
            f"{type(layer).__name__}: give that to MaskablePPO by VecEnvBridge."
        )
    if config.mask_top_k is not None or config.mask_top_p is not None:
        if layer is not None:
            raise InvalidArgumentError("`envs` must have no mask where mask_top_k or mask_top_p is given, and has one.")
        envs = layer = VectorActionMask(envs, top_k=config.mask_top_k, top_p=config.mask_top_p)
    return envs, None if layer is None else layer.sampler


class SB3Agent(PolicyAgent):
    """An algorithm of Stable-Baselines3 that starts as the reference and pays both halves of the KL.

    Args:
        envs: the token MDP, `config.n_envs` rows in "SameStep" autoreset with dict observations.
        config: the algorithm and its numbers.
        seed: of the prompts, the tokens sampled, the order of minibatches and the weights that are drawn.
        sampler: only the policy's own law: SB3 samples from nothing else.

    Attributes:
        model: SB3's object.
        tokens: what its networks have read to learn. The products of TRPO with the Fisher matrix are not counted.
        deterministic: whether it is certain of every token (DQN, QRDQN).
        policy: the policy, as `lmgym.evaluation.evaluate` takes it; of DQN and QRDQN the greedy one, of MaskablePPO
            that among the tokens of its mask.

    Raises:
        InvalidArgumentError: for a package that is not installed, or an env or sampler that cannot be.
    """

    Config: ClassVar[type[SB3Config]] = SB3Config
    config: SB3Config

    def __init__(
        self, envs: RLHFVectorEnv, config: SB3Config | None = None, *, seed: int = 0, sampler: Sampler | None = None
    ) -> None:
        config = config or SB3Config()
        super().__init__(envs, config, seed=seed, sampler=sampler)
        self._inner = envs.unwrapped
        masked, mask = _masked(envs, config)
        algorithm = algorithm_class(config.algorithm)
        self.deterministic, self._recurrent = config.algorithm in _VALUE_BASED, config.algorithm == "RecurrentPPO"
        self._check(sampler)
        trunk = {
            "features_extractor_class": Trunk,
            "features_extractor_kwargs": {
                "make": partial(make_policy, self._inner, config, stream_seed(seed, WEIGHTS)),
                "heads": not self.deterministic,
                "hidden": self.deterministic or self._recurrent,
                "tokens": self.tokens,
            },
            "net_arch": [],
        }
        arguments = config.arguments(algorithm)
        if config.stretch is not None and config.stretch > 1:
            arguments |= _in_stretches(config.algorithm, config.stretch, arguments)
        if not self.deterministic:
            trunk["ortho_init"] = False  # it would draw the language model anew
        arguments["policy_kwargs"] = {**arguments.get("policy_kwargs", {}), **trunk}
        rate, falling = config.learning_rate, config.lr_schedule == "linear"
        self._randomness: _Randomness | None = None  # None: that of the process is the agent's, now
        with self._own_randomness():
            self.model: Any = algorithm(
                "MultiInputPolicy" if self.deterministic else policy_class(algorithm),
                VecEnvBridge(masked),
                learning_rate=(lambda remaining: rate * max(0.0, remaining)) if falling else rate,
                gamma=self._inner.gamma,
                seed=stream_seed(seed, SB3),
                device=self._inner.engine.lm.device,
                **arguments,
            )
            _Randomness.now().with_numpy(stream_seed(seed, SB3_NUMPY)).put()
        self.model.env.seed_rows(row_seeds(seed, config.n_envs))
        networks = self.model.policy
        if config.algorithm == "TRPO":  # whose optimiser is the critic's: it must not move the policy
            critic = critic_parameters(networks)
            networks.optimizer = networks.optimizer_class(critic, lr=rate, **networks.optimizer_kwargs)
        networks.optimizer.register_step_pre_hook(self._check_gradient)
        self.masters = MasterWeights(networks.optimizer)
        networks.set_training_mode(False)
        self._actor: TrainablePolicy | None = None  # what has a checkpoint of its own
        if self.deterministic or self._recurrent:
            self.policy = PrefixPolicy(self.model, self.tokens)
        else:
            self._actor = actor = networks.features_extractor.policy
            self.policy = actor if mask is None else MaskedPolicy(actor, self._inner.engine, mask)
        task = self._inner.task
        self._kl = PolicyKLCallback(task.kl_coef, task.dense_kl)
        check = partial(check_weights, self.model.policy, config)
        self._report = _Report(task.gamma, config.n_steps * config.n_envs, self.tokens, check)

    def _check_gradient(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """Before SB3 steps: raises `NotFiniteError` for a gradient that would make NaN of the weights."""
        gradients = [x.grad for group in optimizer.param_groups for x in group["params"] if x.grad is not None]
        if not all_finite(gradients):
            diverged("the gradient of the loss is not finite", self.config)

    def _check(self, sampler: Sampler | None) -> None:
        envs, config = self._inner, self.config
        if sampler not in (None, Sampler()):
            raise InvalidArgumentError(f"`sampler` must be the policy's own law, which SB3 samples, got {sampler}.")
        if envs.num_envs != config.n_envs:
            raise InvalidArgumentError(f"`envs` must have n_envs={config.n_envs} rows, got {envs.num_envs}.")
        if self.deterministic and envs.engine.lm.holes:
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

    @num_timesteps.setter
    def num_timesteps(self, steps: int) -> None:
        self.model.num_timesteps = steps

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
        check_weights(self.model.policy, self.config)
        self.model.policy.set_training_mode(False)

    # -- saving and loading ----------------------------------------------------------------------------------------

    def write(self, directory: Path) -> None:
        """Writes weights and optimiser as safetensors and the rest as JSON, into an empty directory.

        `AutoModelForCausalLM` loads a fine-tuned actor. A replay buffer is not written.
        """
        check_saving(self.model.policy, self.model.policy.optimizer, self.config)
        if self._actor is not None:
            self._actor.save(directory)
        else:
            save_model(self.model.policy, str(directory / "policy.safetensors"))
        save_file(_flat(self.model.policy.optimizer.state_dict()["state"]), directory / "optimizer.safetensors")
        state = {
            "num_timesteps": self.num_timesteps,
            "tokens": asdict(self.tokens),
            "config": asdict(self.config),
            "env": self._inner.get_state(),
            "randomness": (self._randomness or _Randomness.now()).as_json(),
            "actions": self.model.action_space.np_random.bit_generator.state,
            "generator": self.generator.get_state().tolist(),
            "seeds": list(self.model.env._seeds),  # of the first reset, where that is still to come
            "updates": self.model._n_updates,
            "episodes": running_episodes(self._inner) if self.model._last_obs is not None else None,
            "report": self._report.get_state(),
            "owed": self._kl.owed.tolist(),
        }
        memory = memory_of(self.model)
        if memory:
            save_file(memory, directory / "memory.safetensors")
        (directory / "state.json").write_text(json.dumps(state))

    def load(self, directory: str | os.PathLike[str]) -> None:
        """Goes on from what `save` wrote: to the same curve, but for DQN and QRDQN, whose replay buffer is empty.

        Raises:
            InvalidArgumentError: for a checkpoint of another algorithm or shape.
        """
        directory = Path(directory)
        state = json.loads((directory / "state.json").read_text())
        for name in ("algorithm", "mask_top_k", "mask_top_p", *PolicyConfig.__dataclass_fields__):
            if state["config"][name] != getattr(self.config, name):
                raise InvalidArgumentError(
                    f"`directory` must hold a checkpoint with {name}={getattr(self.config, name)!r}, got "
                    f"{state['config'][name]!r}."
                )
        if self._actor is not None:
            self._actor.load(directory)
        else:
            load_model(self.model.policy, str(directory / "policy.safetensors"))
        optimizer = self.model.policy.optimizer
        moments = _nested(load_file(directory / "optimizer.safetensors", device=str(self.policy.device)))
        optimizer.load_state_dict({**optimizer.state_dict(), "state": moments})
        self.num_timesteps = state["num_timesteps"]
        self.model._n_updates = state["updates"]
        self.model.env._seeds = state["seeds"]
        self.model.policy.set_training_mode(False)
        self.model.action_space.np_random.bit_generator.state = state["actions"]
        self._randomness = _Randomness.of_json(state["randomness"])
        self.generator.set_state(torch.tensor(state["generator"], dtype=torch.uint8))
        self.tokens.forward, self.tokens.backward = state["tokens"]["forward"], state["tokens"]["backward"]
        self._report.set_state(state["report"])
        self._kl.owed = np.array(state["owed"])
        self.model._last_obs = None  # a first rollout resets
        if state["episodes"] is not None:
            self.model._last_obs, self.model._last_episode_starts = take_up(self._inner, state["episodes"])
        if (directory / "memory.safetensors").is_file():
            remember(self.model, load_file(directory / "memory.safetensors", device=str(self.policy.device)))
        self._inner.set_state(state["env"])

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


# -- metrics -----------------------------------------------------------------------------------------------------------


class _Stop(Exception):
    """The caller wants no further batch."""


class _Report(BaseCallback):
    """Hands over metrics of the episodes that ended, and of the update on them, every `every` env steps.

    Args:
        gamma: of the returns. every: env steps. tokens: what was read. check: raises for weights that are not finite.
    """

    def __init__(self, gamma: float, every: int, tokens: TokenCount, check: Callable[[], None]) -> None:
        super().__init__()
        self.gamma = gamma
        self.every = every
        self.tokens = tokens
        self.check = check
        self.receiver: Callback | None = None
        self.restart()

    def restart(self) -> None:
        """Forgets the episodes in hand."""
        self._rows: list[dict[str, float]] = []
        self._ended: list[dict[str, float]] = []
        self._steps = 0

    def get_state(self) -> dict[str, Any]:
        """The episodes in hand, as JSON values."""
        return {"rows": self._rows, "ended": self._ended, "steps": self._steps}

    def set_state(self, state: dict[str, Any]) -> None:
        """Takes up what `get_state` gave."""
        self._rows = state["rows"]
        self._ended = state["ended"]
        self._steps = state["steps"]

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
        self.check()
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


# -- saving ------------------------------------------------------------------------------------------------------------


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

    def with_numpy(self, seed: int) -> _Randomness:
        """With another stream for numpy: SB3 seeds it as it seeds torch, and both then give the same numbers."""
        return replace(self, numpy=np.random.RandomState(seed).get_state(legacy=False))

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
