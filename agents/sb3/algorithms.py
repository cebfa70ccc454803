"""The algorithms of Stable-Baselines3 and sb3-contrib by name, with the changes that a language model needs.

Shapes: A parameters of the actor, one after the other.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from agents.sb3.buffers import Stretches, StretchReplayBuffer, StretchRolloutBuffer
from agents.sb3.network import critic_parameters
from lmgym.errors import InvalidArgumentError

Algorithm = Literal["PPO", "A2C", "DQN", "TRPO", "QRDQN", "MaskablePPO", "RecurrentPPO"]
CONTRIB = ("TRPO", "QRDQN", "MaskablePPO", "RecurrentPPO")
VALUE_BASED = ("DQN", "QRDQN")
WITHOUT_STRETCHES = ("A2C", "RecurrentPPO")  # A2C has no minibatches; those of RecurrentPPO are whole sequences


def algorithm_class(name: Algorithm) -> Any:
    """The class of an algorithm.

    Raises:
        InvalidArgumentError: if the package that it needs is not installed; the message names the package.
    """
    package = "sb3_contrib" if name in CONTRIB else "stable_baselines3"
    distribution = "sb3-contrib" if name in CONTRIB else "stable_baselines3"
    try:
        found = getattr(importlib.import_module(package), name)
    except ModuleNotFoundError as error:
        raise InvalidArgumentError(
            f"`algorithm` must be one that is installed, got {name!r}: it needs the package {distribution} "
            f"(pip install {distribution})."
        ) from error
    return with_one_backward(found) if name == "TRPO" else found


def buffer_arguments(algorithm: Algorithm, stretch: int, given: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of an algorithm that give it a buffer whose minibatches are stretches.

    Args:
        algorithm: its name.
        stretch: successive steps of a row that stay together.
        given: the other arguments; those for the buffer are kept.
    """
    buffer: Any = StretchReplayBuffer if algorithm in VALUE_BASED else StretchRolloutBuffer
    if algorithm == "MaskablePPO":
        from sb3_contrib.common.maskable.buffers import MaskableDictRolloutBuffer

        buffer = type("StretchMaskableRolloutBuffer", (Stretches, MaskableDictRolloutBuffer), {})
    kind = "replay" if algorithm in VALUE_BASED else "rollout"
    more = {**(given.get(f"{kind}_buffer_kwargs") or {}), "stretch": stretch}
    return {f"{kind}_buffer_class": buffer, f"{kind}_buffer_kwargs": more}


def with_one_backward(trpo: Any) -> Any:
    """TRPO with the gradient of the KL from one backward pass; sb3-contrib takes a pass for each parameter.

    The numbers are the same, and every product with the Fisher matrix then runs through one graph. The parameters of
    the critic are those of its module. sb3-contrib takes every parameter with "value" in its name for the critic's,
    those of attention included.
    """

    class TRPO(trpo):
        def _compute_actor_grad(self, kl: Tensor, objective: Tensor) -> tuple[list[Any], Tensor, Tensor, list[Any]]:
            """The actor's parameters, the gradient (A,) of the objective and of the KL, and the parameters' shapes."""
            critic = {id(parameter) for parameter in critic_parameters(self.policy)}
            candidates = [parameter for parameter in self.policy.parameters() if id(parameter) not in critic]
            kl_gradients = torch.autograd.grad(kl, candidates, create_graph=True, allow_unused=True)
            actor: list[Any] = []
            used_kl_gradients: list[Tensor] = []
            for parameter, gradient in zip(candidates, kl_gradients, strict=True):
                if gradient is not None:
                    actor.append(parameter)
                    used_kl_gradients.append(gradient)
            objective_gradients = torch.autograd.grad(objective, actor, retain_graph=True)
            shapes = [parameter.shape for parameter in actor]
            return actor, _flatten(objective_gradients), _flatten(used_kl_gradients), shapes

    return TRPO


def _flatten(gradients: Sequence[Tensor]) -> Tensor:
    """(A,) the gradients, one after the other."""
    return torch.cat([gradient.flatten() for gradient in gradients])
