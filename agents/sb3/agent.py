"""`SB3Agent`: an algorithm of Stable-Baselines3 or sb3-contrib on the token MDP, as an agent.

The env that it steps is in `lmgym.sb3`, the network that it trains in `agents.sb3.network`, and the policies that act
without SB3 in `agents.sb3.prefix` and `agents.sb3.masks`.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from agents.agent import Callback, PolicyAgent
from agents.finite import all_finite, check_saving, check_weights, diverged
from agents.master_weights import MasterWeights
from agents.policies.actor_critic import TrainablePolicy
from agents.policies.choice import PolicyConfig, make_policy
from agents.sb3.algorithms import VALUE_BASED, algorithm_class, buffer_arguments
from agents.sb3.buffers import load_replay, save_replay
from agents.sb3.config import SB3Config
from agents.sb3.episodes import describe_episodes, lstm_states, restore_episodes, restore_lstm_states
from agents.sb3.masks import MaskedPolicy, mask_envs
from agents.sb3.metrics import MetricsCallback, RolloutCallback, TrainingStopped
from agents.sb3.network import Trunk, critic_parameters, policy_class
from agents.sb3.prefix import PrefixPolicy
from agents.sb3.randomness import GeneratorStates, OwnGenerators
from agents.seeds import SB3, SB3_NUMPY, WEIGHTS, row_seeds, stream_seed
from lmgym.envs.vector import RLHFVectorEnv
from lmgym.errors import InvalidArgumentError
from lmgym.models.sampling import Sampler
from lmgym.sb3 import PolicyKLCallback, VecEnvBridge


class SB3Agent(PolicyAgent):
    """An algorithm of Stable-Baselines3 that starts as the reference and has both halves of the KL in its rewards.

    Args:
        envs: the token MDP, `config.n_envs` rows in "SameStep" autoreset with dict observations.
        config: the algorithm and its numbers.
        seed: of the prompts, the tokens sampled, the order of minibatches and the weights that are drawn.
        sampler: only the policy's own distribution: SB3 samples from nothing else.

    Attributes:
        model: SB3's object.
        at_rest: False while the weights change. Where the collecting of a rollout fails, the agent is at rest, and
            `save` writes the state before that rollout.
        tokens: what its networks have read to learn. The products of TRPO with the Fisher matrix are not counted.
        deterministic: whether it is certain of every token (DQN, QRDQN).
        policy: the policy, as `lmgym.evaluation.evaluate` takes it; of DQN and QRDQN the greedy one, of MaskablePPO
            that on the tokens of its mask.

    Raises:
        InvalidArgumentError: for a package that is not installed, or an env or sampler that does not fit.
    """

    Config: ClassVar[type[SB3Config]] = SB3Config
    config: SB3Config

    def __init__(
        self, envs: RLHFVectorEnv, config: SB3Config | None = None, *, seed: int = 0, sampler: Sampler | None = None
    ) -> None:
        super().__init__(envs, config, seed=seed, sampler=sampler)
        self._inner = envs.unwrapped
        self.deterministic = self.config.algorithm in VALUE_BASED
        masked, mask = mask_envs(envs, self.config)
        algorithm = algorithm_class(self.config.algorithm)
        self._check(sampler)
        self._generators = OwnGenerators()
        self.model: Any = self._make_model(algorithm, masked, seed)
        self.model.train = partial(self._change_weights, self.model.train)
        networks = self.model.policy
        if self.config.algorithm == "TRPO":  # its optimiser is the critic's, and must not move the policy
            critic = critic_parameters(networks)
            rate = self.config.learning_rate
            networks.optimizer = networks.optimizer_class(critic, lr=rate, **networks.optimizer_kwargs)
        networks.optimizer.register_step_pre_hook(self._check_gradient)
        self.masters = MasterWeights(networks.optimizer)
        networks.set_training_mode(False)
        self._before_rollout: dict[str, Any] | None = None  # the state there, while a rollout is collected
        self._actor: TrainablePolicy | None = None  # the part that writes a checkpoint of its own
        if self._has_own_network():
            self.policy = PrefixPolicy(self.model, self.tokens)
        else:
            actor = networks.features_extractor.policy
            self._actor = actor
            self.policy = actor if mask is None else MaskedPolicy(actor, self._inner.engine, mask)
        task = self._inner.task
        self._kl = PolicyKLCallback(task.kl_coef, task.dense_kl)
        check = partial(check_weights, networks, self.config)
        self._metrics = MetricsCallback(task.gamma, self.config.n_steps * self.config.n_envs, self.tokens, check)
        self._notes = RolloutCallback(self._note_state, self._forget_state)

    def _check(self, sampler: Sampler | None) -> None:
        if sampler not in (None, Sampler()):
            raise InvalidArgumentError(
                f"`sampler` must be the policy's own distribution, which SB3 samples, got {sampler}."
            )
        if self._inner.num_envs != self.config.n_envs:
            raise InvalidArgumentError(
                f"`envs` must have n_envs={self.config.n_envs} rows, got {self._inner.num_envs}."
            )
        if self.deterministic and self._inner.engine.lm.holes:
            raise InvalidArgumentError(
                f"`algorithm` must be one that learns a policy, got {self.config.algorithm!r}: it would explore ids "
                "that the tokenizer lacks."
            )

    def _has_own_network(self) -> bool:
        """Whether the algorithm acts by a network of SB3 on the trunk (Q, or an LSTM), and not by the trunk alone."""
        return self.deterministic or self.config.algorithm == "RecurrentPPO"

    def _make_model(self, algorithm: Any, envs: Any, seed: int) -> Any:
        """SB3's object, with a language model as its network and streams of random numbers of its own."""
        config = self.config
        arguments = config.arguments(algorithm)
        if config.stretch is not None and config.stretch > 1:
            arguments |= buffer_arguments(config.algorithm, config.stretch, arguments)
        trunk: dict[str, Any] = {
            "features_extractor_class": Trunk,
            "features_extractor_kwargs": {
                "make": partial(make_policy, self._inner, config, stream_seed(seed, WEIGHTS)),
                "heads": not self.deterministic,
                "hidden": self._has_own_network(),
                "tokens": self.tokens,
            },
            "net_arch": [],
        }
        if not self.deterministic:
            trunk["ortho_init"] = False  # it would draw the weights of the language model anew
        arguments["policy_kwargs"] = {**arguments.get("policy_kwargs", {}), **trunk}
        rate = config.learning_rate
        falls = config.lr_schedule == "linear"
        with self._generators.in_use():
            model = algorithm(
                "MultiInputPolicy" if self.deterministic else policy_class(algorithm),
                VecEnvBridge(envs),
                learning_rate=(lambda remaining: rate * max(0.0, remaining)) if falls else rate,
                gamma=self._inner.gamma,
                seed=stream_seed(seed, SB3),
                device=self._inner.engine.lm.device,
                **arguments,
            )
            GeneratorStates.read().with_numpy_seed(stream_seed(seed, SB3_NUMPY)).write()
        model.env.seed_rows(row_seeds(seed, config.n_envs))
        return model

    def _change_weights(self, train: Callable[..., None], *args: Any, **kwargs: Any) -> None:
        """SB3's own `train`: where it fails, the agent is not at rest."""
        self.at_rest = False
        train(*args, **kwargs)
        self.at_rest = True

    def _check_gradient(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """Before SB3 steps: raises `NotFiniteError` for a gradient that would make NaN of the weights."""
        gradients = [x.grad for group in optimizer.param_groups for x in group["params"] if x.grad is not None]
        if not all_finite(gradients):
            diverged("the gradient of the loss is not finite", self.config)

    @property
    def name(self) -> str:
        """What a report calls it."""
        return f"SB3 {self.config.algorithm}"

    @property
    def num_timesteps(self) -> int:
        """Env steps (tokens) so far; those of an unfinished rollout do not count."""
        steps = self.model.num_timesteps if self._before_rollout is None else self._before_rollout["num_timesteps"]
        return int(steps)

    @num_timesteps.setter
    def num_timesteps(self, steps: int) -> None:
        self.model.num_timesteps = steps

    def learn(self, total_timesteps: int, callback: Callback | None = None) -> None:
        """Trains until `total_timesteps` env steps have been taken in all; the last rollout is finished.

        Args:
            total_timesteps: of the whole run, steps before a resume included.
            callback: gets (num_timesteps, metrics) after every rollout and its update; training stops if it returns
                False.
        """
        remaining = total_timesteps - self.num_timesteps
        if remaining <= 0:
            return
        self._metrics.receiver = callback
        # TRPO differentiates twice, and the fused kernels of attention cannot.
        kernels = sdpa_kernel(SDPBackend.MATH) if self.config.algorithm == "TRPO" else contextlib.nullcontext()
        callbacks = [self._kl, self._metrics, self._notes]
        with self._generators.in_use(), kernels, contextlib.suppress(TrainingStopped):
            self.model.learn(remaining, callbacks, log_interval=None, reset_num_timesteps=False)
        check_weights(self.model.policy, self.config)
        self.model.policy.set_training_mode(False)

    # -- saving and loading ----------------------------------------------------------------------------------------

    def _note_state(self) -> None:
        """Before a rollout: `save` writes this state until the rollout is whole."""
        # A target network that moves by parts while a rollout is collected would move twice.
        if not self.deterministic or self.model.tau == 1:
            self._before_rollout = self._state()

    def _forget_state(self) -> None:
        self._before_rollout = None

    def _state(self) -> dict[str, Any]:
        """What changes from rollout to rollout, but for the weights, their optimiser and what a replay buffer holds.

        Tensors, arrays, the generators' states, and JSON values.
        """
        model = self.model
        state = {
            "num_timesteps": int(model.num_timesteps),
            "tokens": asdict(self.tokens),
            "config": asdict(self.config),
            "env": self._inner.streams(),
            "randomness": self._generators.get_state(),
            "actions": model.action_space.np_random.bit_generator.state,
            "generator": self.generator.get_state().tolist(),
            "seeds": list(model.env._seeds),  # of the first reset, where that is still to come
            "updates": model._n_updates,
            "episodes": describe_episodes(self._inner) if model._last_obs is not None else None,
            "report": self._metrics.get_state(),
            "owed": self._kl.owed.tolist(),
            "memory": lstm_states(model),
        }
        if self.deterministic:
            state["replay_position"] = model.replay_buffer.pos
            state["replay_size"] = model.replay_buffer.size()
            state["calls"] = model._n_calls  # they decide when the target network is updated
            state["exploration_rate"] = model.exploration_rate
        return state

    def write(self, directory: Path) -> None:
        """Writes the weights, the optimiser and a replay buffer as safetensors, and the rest as JSON.

        `AutoModelForCausalLM` loads a fine-tuned actor.
        """
        model = self.model
        check_saving(model.policy, model.policy.optimizer, self.config)
        if self._actor is not None:
            self._actor.save(directory)
        else:
            save_model(model.policy, str(directory / "policy.safetensors"))
        save_file(_flatten_moments(model.policy.optimizer.state_dict()["state"]), directory / "optimizer.safetensors")
        state = dict(self._before_rollout or self._state())
        memory = state.pop("memory")
        state["randomness"] = state["randomness"].as_json()
        if self.deterministic:
            # An unfinished rollout may have overwritten the oldest steps; a run that resumes overwrites the same.
            save_replay(model.replay_buffer, directory / "replay.safetensors", state.pop("replay_size"))
        if memory:
            save_file(memory, directory / "memory.safetensors")
        (directory / "state.json").write_text(json.dumps(state, default=np.ndarray.tolist))

    def load(self, directory: str | os.PathLike[str]) -> None:
        """Goes on from what `save` wrote, to the same curve as if there had been no break.

        Raises:
            InvalidArgumentError: for a checkpoint of another algorithm or shape.
        """
        directory = Path(directory)
        state = json.loads((directory / "state.json").read_text())
        self._check_same_shape(state["config"])
        device = str(self.policy.device)
        model = self.model
        if self._actor is not None:
            self._actor.load(directory)
        else:
            load_model(model.policy, str(directory / "policy.safetensors"))
        optimizer = model.policy.optimizer
        moments = _nest_moments(load_file(directory / "optimizer.safetensors", device=device))
        optimizer.load_state_dict({**optimizer.state_dict(), "state": moments})
        if self.deterministic:
            load_replay(model.replay_buffer, directory / "replay.safetensors", state["replay_position"])
            model._n_calls = state["calls"]
            model.exploration_rate = state["exploration_rate"]
        self._forget_state()
        self.at_rest = True
        self.num_timesteps = state["num_timesteps"]
        model._n_updates = state["updates"]
        model.env._seeds = state["seeds"]
        model.policy.set_training_mode(False)
        model.action_space.np_random.bit_generator.state = state["actions"]
        self._generators.set_state(state["randomness"])
        self.generator.set_state(torch.tensor(state["generator"], dtype=torch.uint8))
        self.tokens.forward = state["tokens"]["forward"]
        self.tokens.backward = state["tokens"]["backward"]
        self._metrics.set_state(state["report"])
        self._kl.owed = np.array(state["owed"])
        model._last_obs = None  # the first rollout then resets
        if state["episodes"] is not None:
            model._last_obs, model._last_episode_starts = restore_episodes(self._inner, state["episodes"])
        if (directory / "memory.safetensors").is_file():
            restore_lstm_states(model, load_file(directory / "memory.safetensors", device=device))
        self._inner.set_state(state["env"])

    def _check_same_shape(self, saved: Mapping[str, Any]) -> None:
        """Raises `InvalidArgumentError` for the config of a checkpoint whose weights do not fit."""
        for name in ("algorithm", "mask_top_k", "mask_top_p", *PolicyConfig.__dataclass_fields__):
            if saved[name] != getattr(self.config, name):
                raise InvalidArgumentError(
                    f"`directory` must hold a checkpoint with {name}={getattr(self.config, name)!r}, got "
                    f"{saved[name]!r}."
                )


def _flatten_moments(state: dict[int, dict[str, Any]]) -> dict[str, Tensor]:
    """An optimiser's state, one dict a parameter, as named tensors."""
    return {f"{i}.{name}": torch.as_tensor(x).contiguous() for i, row in state.items() for name, x in row.items()}


def _nest_moments(tensors: dict[str, Tensor]) -> dict[int, dict[str, Tensor]]:
    """The state of an optimiser that `_flatten_moments` flattened."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        index, name = key.split(".")
        state.setdefault(int(index), {})[name] = tensor
    return state
