"""What an algorithm of Stable-Baselines3 runs with."""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from agents.policies.choice import PolicyConfig
from agents.sb3.algorithms import CONTRIB, VALUE_BASED, WITHOUT_STRETCHES, Algorithm, algorithm_class
from agents.sb3.arguments import check_kwargs
from lmgym.errors import InvalidArgumentError
from lmgym.ranges import Count, NonNegative, PositiveFraction


@dataclass(frozen=True)
class SB3Config(PolicyConfig):
    """The algorithm and its numbers; None leaves SB3's own default."""

    algorithm: Algorithm = "PPO"
    n_envs: Count = 64  # rows of the env
    n_steps: Count = 32  # steps of every row between two updates; of DQN and QRDQN, between two rows of metrics
    learning_rate: NonNegative = 5e-4
    lr_schedule: Literal["constant", "linear"] = "linear"  # linear ends at 0
    batch_size: Count | None = None  # tokens a minibatch
    n_epochs: Count | None = None  # passes over a rollout
    stretch: Count | None = None  # successive steps of a row that stay together in a minibatch; None, as SB3: 1
    mask_top_k: Count | None = None  # of MaskablePPO: only the reference's k likeliest tokens may be chosen, and EOS
    mask_top_p: PositiveFraction | None = None  # of MaskablePPO: the fewest likeliest tokens with this mass, and EOS
    kwargs: dict[str, Any] = field(default_factory=dict)  # further arguments of the algorithm, by SB3's names

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.stretch is not None and self.algorithm in WITHOUT_STRETCHES:
            raise InvalidArgumentError(f"`stretch` must be None for {self.algorithm}, got {self.stretch}.")
        self._check_mask()
        self._check_kwargs()
        if self.algorithm not in CONTRIB or importlib.util.find_spec("sb3_contrib"):
            self.arguments(algorithm_class(self.algorithm))

    def _check_mask(self) -> None:
        for name in ("mask_top_k", "mask_top_p"):
            if getattr(self, name) is not None and self.algorithm != "MaskablePPO":
                raise InvalidArgumentError(f"`{name}` must be None for {self.algorithm}, got {getattr(self, name)!r}.")
        if self.mask_top_k is not None and self.mask_top_p is not None:
            raise InvalidArgumentError(f"`mask_top_k` must be None beside `mask_top_p`, got {self.mask_top_k!r}.")

    def _check_kwargs(self) -> None:
        if not isinstance(self.kwargs, Mapping):
            raise InvalidArgumentError(f"`kwargs` must be a mapping of names to plain values, got {self.kwargs!r}.")
        if self.algorithm in VALUE_BASED and self.kwargs.get("n_steps", 1) != 1:
            raise InvalidArgumentError(
                f"`kwargs.n_steps` must be 1, for SB3 has no n-step returns of dict observations, got "
                f"{self.kwargs['n_steps']!r}."
            )

    @property
    def num_envs(self) -> int:
        """Rows that the vector env must have."""
        return self.n_envs

    def arguments(self, algorithm: Any) -> dict[str, Any]:
        """Keyword arguments for the class of the algorithm, without those that come from the env.

        Raises:
            InvalidArgumentError: for a setting that the algorithm does not take, or a name in `kwargs`.
        """
        parameters = inspect.signature(algorithm.__init__).parameters
        accepted = [name for name in parameters if name != "self"]
        check_kwargs(self.kwargs, accepted)
        chosen: dict[str, Any] = {"batch_size": self.batch_size, "n_epochs": self.n_epochs}
        for name, value in chosen.items():
            if value is not None and name not in accepted:
                raise InvalidArgumentError(f"`{name}` must be None, for {self.algorithm} has no such, got {value!r}.")
        if self.algorithm not in VALUE_BASED:
            chosen["n_steps"] = self.n_steps
        return {**self.kwargs, **{name: value for name, value in chosen.items() if value is not None}}
