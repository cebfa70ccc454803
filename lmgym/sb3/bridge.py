"""The token MDP as Stable-Baselines3 steps it.

Shapes: N rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import numpy as np
import numpy.typing as npt
from gymnasium.vector import AutoresetMode, VectorEnv
from stable_baselines3.common.vec_env import VecEnv

from lmgym.errors import InvalidArgumentError


class VecEnvBridge(VecEnv):
    """A vector env of the token MDP as Stable-Baselines3's `VecEnv`: what `DummyVecEnv` makes of single envs.

    Args:
        envs: `gym.make_vec(..., autoreset_mode="SameStep")`, or a wrapper around it.

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

    def seed_rows(self, seeds: Sequence[int]) -> None:
        """Gives each row its own seed (N,) for the next reset, where `seed` gives row i the seed + i."""
        if len(seeds) != self.num_envs:
            raise InvalidArgumentError(f"`seeds` must be {self.num_envs} ints, got {len(seeds)} of them.")
        self._seeds = list(seeds)

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
        """Takes the actions of the next step."""
        self._actions = actions

    def step_wait(self) -> tuple[Any, npt.NDArray[np.float32], npt.NDArray[np.bool_], list[dict[str, Any]]]:
        """Steps. A row that ended is reset, and its info holds its last observation."""
        observation, rewards, terminated, truncated, infos = self.envs.step(self._actions)
        rows = _by_row(infos, self.num_envs)
        for i, row in enumerate(rows):
            if "final_obs" in row:
                end = row.pop("final_obs")
                info = row.pop("final_info")
                self.reset_infos[i] = dict(row)
                row |= {**info, "terminal_observation": end}
            row["TimeLimit.truncated"] = bool(truncated[i] and not terminated[i])
        return observation, rewards.astype(np.float32), terminated | truncated, rows

    def action_masks(self) -> npt.NDArray[np.bool_]:
        """(N, V) bool: the tokens that a wrapper allows, or else all that the tokenizer has."""
        for layer in self._layers():
            if hasattr(layer, "action_masks"):
                return np.asarray(layer.action_masks())
        return np.repeat(cast(Any, self.envs.unwrapped).engine.is_legal[None], self.num_envs, axis=0)

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
        """An attribute of the env, or of a wrapper, repeated for each row: the rows share it."""
        return [self._find(attr_name)] * len(list(self._get_indices(indices)))

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        """Sets an attribute of the env, for all rows: they share it."""
        if len(list(self._get_indices(indices))) != self.num_envs:
            raise InvalidArgumentError(f"`indices` must be all rows, which share {attr_name!r}, got {indices!r}.")
        setattr(self.envs.unwrapped, attr_name, value)

    def env_method(self, method_name: str, *method_args: Any, indices: Any = None, **method_kwargs: Any) -> list[Any]:
        """Calls a method once. Of an array of N entries each row gets its own; of anything else, every row the same."""
        result = self.action_masks() if method_name == "action_masks" else None
        if result is None:
            result = self._find(method_name)(*method_args, **method_kwargs)
        each = isinstance(result, (np.ndarray, list, tuple)) and len(result) == self.num_envs
        return [result[i] if each else result for i in self._get_indices(indices)]

    def env_is_wrapped(self, wrapper_class: Any, indices: Any = None) -> list[bool]:
        """For each row, whether the env is wrapped by that class."""
        return [any(isinstance(layer, wrapper_class) for layer in self._layers())] * len(
            list(self._get_indices(indices))
        )

    def get_images(self) -> Any:
        """A picture a row, with `render_mode="rgb_array"`."""
        return self.envs.render()

    def close(self) -> None:
        """Closes the vector env."""
        self.envs.close()


def _by_row(infos: Mapping[str, Any], rows: int) -> list[dict[str, Any]]:
    """Infos of a vector env (arrays, with a mask beside each) as one dict of plain values a row."""
    result: list[dict[str, Any]] = [{} for _ in range(rows)]
    for name, values in infos.items():
        if name.startswith("_"):
            continue
        column = _by_row(values, rows) if isinstance(values, dict) else values
        for i in np.flatnonzero(infos[f"_{name}"]):
            result[i][name] = column[i]
    return result
