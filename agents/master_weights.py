"""Float32 copies of half-precision weights, which an optimiser steps in their place.

A weight of 0.02 in bfloat16 has neighbours at a distance of 1.2e-4. A step of 1e-6 is rounded away, every time. The
master copy in float32 adds such steps up, and the weight follows it once they amount to half of that distance.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

HALF = (torch.bfloat16, torch.float16)
_SAVED_AS = "master"  # beside an optimiser's moments


class MasterWeights:
    """Has an optimiser step float32 copies of its half-precision weights, and copies them back after each step.

    The copies are part of the optimiser's `state_dict`. Its `zero_grad` does not reach the weights: their gradients are
    dropped after every step. A weight that something else has changed since the last step goes on from its new value.

    Args:
        optimizer: before its first step; its parameter groups get the copies. Nothing changes for float32 weights.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._masters: dict[nn.Parameter, nn.Parameter] = {}
        for group in optimizer.param_groups:
            for i, weight in enumerate(group["params"]):
                if weight.dtype in HALF:
                    master = nn.Parameter(weight.detach().float())
                    self._masters[weight] = master
                    group["params"][i] = master
        if self._masters:
            optimizer.register_step_pre_hook(self._before_step)
            optimizer.register_step_post_hook(self._after_step)
            optimizer.register_state_dict_post_hook(self._add_to_state)
            optimizer.register_load_state_dict_pre_hook(self._take_from_state)

    def of(self, weights: Sequence[nn.Parameter]) -> list[nn.Parameter]:
        """What the optimiser steps for each weight: its copy, or the weight itself where it is in float32."""
        self._refresh()
        return [self._masters.get(weight, weight) for weight in weights]

    @torch.no_grad()
    def copy_back(self) -> None:
        """Rounds every copy to its weight."""
        for weight, master in self._masters.items():
            weight.copy_(master)

    @torch.no_grad()
    def _refresh(self) -> None:
        """Takes over weights that are no longer their copies rounded."""
        for weight, master in self._masters.items():
            changed = master.to(weight.dtype) != weight
            master.copy_(torch.where(changed, weight.float(), master))

    def _before_step(self, *_: Any) -> None:
        self._refresh()
        for weight, master in self._masters.items():
            master.grad = None if weight.grad is None else weight.grad.float()

    def _after_step(self, *_: Any) -> None:
        self.copy_back()
        for weight, master in self._masters.items():
            weight.grad = None
            master.grad = None

    def _add_to_state(self, optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        masters = set(self._masters.values())
        state = dict(state_dict["state"])
        for i, parameter in enumerate(_parameters(optimizer)):
            if parameter in masters:
                state[i] = {**state.get(i, {}), _SAVED_AS: parameter.detach()}
        return {**state_dict, "state": state}

    @torch.no_grad()
    def _take_from_state(self, optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        parameters = _parameters(optimizer)
        state: dict[int, dict[str, Any]] = {}
        for i, saved in state_dict["state"].items():
            moments = dict(saved)
            master: Tensor | None = moments.pop(_SAVED_AS, None)
            if master is not None:
                parameters[i].copy_(master)
            if moments:
                state[i] = moments
        return {**state_dict, "state": state}


def _parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    """What an optimiser steps, in the order of its `state_dict`."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
