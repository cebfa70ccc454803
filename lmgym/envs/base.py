"""What the environments have in common, and the engine of an environment under any wrappers."""

from __future__ import annotations

from typing import Any

from gymnasium import spaces

from lmgym.envs.engine import Engine
from lmgym.envs.token_ids import decode_ids, name_actions
from lmgym.errors import InvalidArgumentError
from lmgym.models.policy import CausalPolicy
from lmgym.tasks.base import Task


class EngineBacked:
    """What every environment over an engine says of itself."""

    _engine: Engine

    @property
    def engine(self) -> Engine:
        """The MDP itself: what the whole-episode path and the wrappers use, such as `reference_logits()`."""
        return self._engine

    def get_action_meanings(self) -> list[str]:
        """V texts: what each action, a token id, says (the name is that of Gymnasium's Atari environments)."""
        return name_actions(self._engine.lm)

    def decode(self, ids: Any) -> str:
        """The text of a token id, of several (n,), or of one row's observation; special tokens by their names."""
        return decode_ids(self._engine.lm, ids)

    @property
    def task(self) -> Task:
        """The MDP, as resolved from the arguments."""
        return self._engine.task

    @property
    def kl_coef(self) -> float:
        """Price of a nat, in units of the score."""
        return self._engine.task.kl_coef

    @property
    def dense_kl(self) -> bool:
        """Whether every token is charged its KL; if not, the last one is charged that of the whole episode."""
        return self._engine.task.dense_kl

    @property
    def gamma(self) -> float:
        """Discount a token, which agents read."""
        return self._engine.task.gamma

    def reference_policy(self) -> CausalPolicy:
        """The reference as a policy, with the env's own weights: what training starts from, and J_ref is the J of."""
        return CausalPolicy(self._engine.lm)

    @property
    def tokenizer(self) -> Any:
        """The reference's Hugging Face tokenizer."""
        return self._engine.lm.tokenizer


class SharedAttributes:
    """The attributes of a vector env whose rows share everything they have."""

    num_envs: int

    def call(self, name: str, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """An attribute, or what a method returns, once a row; the method is called once, because rows share it."""
        found = getattr(self, name)
        return (found(*args, **kwargs) if callable(found) else found,) * self.num_envs

    def get_attr(self, name: str) -> tuple[Any, ...]:
        """An attribute of the env, once a row."""
        return (getattr(self, name),) * self.num_envs

    def set_attr(self, name: str, values: Any) -> None:
        """Sets an attribute of the env: one value, or N equal ones (rows share everything they have)."""
        values = list(values) if isinstance(values, (list, tuple)) else [values] * self.num_envs
        if len(values) != self.num_envs or any(value != values[0] for value in values):
            raise InvalidArgumentError(f"`values` must be one value or {self.num_envs} equal ones, got {values!r}.")
        setattr(self, name, values[0])


def engine_of(env: Any) -> Engine:
    """The engine of a wrapped environment, single or vector.

    Raises:
        InvalidArgumentError: for an environment that is not of lmgym.
    """
    if not isinstance(env.unwrapped, EngineBacked):
        raise InvalidArgumentError(
            f"`env` must be an environment of lmgym, got {env.unwrapped}. Of a vector of single ones, wrap these."
        )
    return env.unwrapped.engine


def stepping_engine_of(env: Any) -> Engine:
    """The engine of a wrapped environment whose reference runs at every step.

    Raises:
        InvalidArgumentError: for any other environment (a bandit, `kl_coef=0`, `dense_kl=False`).
    """
    engine = engine_of(env)
    base = env.unwrapped
    actions = getattr(base, "single_action_space", base.action_space)
    if not isinstance(actions, spaces.Discrete):
        raise InvalidArgumentError(f"`env` must take one token a step, got one with the actions {actions}.")
    engine.stepping_reader()
    return engine
