"""Float32 copies of half-precision weights, which an optimiser steps instead of them.

A weight of 0.02 in bfloat16 has neighbours at a distance of 1.2e-4. A step of 1e-6 is rounded away, every time. The
master copy in float32 adds such steps up, and the weight follows it once they amount to half of that distance.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
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
        self._written = _writes(self._masters)
        if self._masters:
            optimizer.register_step_pre_hook(self._before_step)
            optimizer.register_step_post_hook(self._after_step)
            optimizer.register_state_dict_post_hook(self._add_to_state)
            optimizer.register_load_state_dict_pre_hook(self.take_from_state)

    def of(self, weights: Sequence[nn.Parameter]) -> list[nn.Parameter]:
        """What the optimiser steps for each weight: its copy, or the weight itself where it is in float32."""
        self._refresh()
        return [self._masters.get(weight, weight) for weight in weights]

    @torch.no_grad()
    def copy_back(self) -> None:
        """Rounds every copy to its weight."""
        if self._masters:
            torch._foreach_copy_(list(self._masters), list(self._masters.values()))
            self._written = _writes(self._masters)

    @torch.no_grad()
    def _refresh(self) -> None:
        """Takes over weights that are no longer their copies rounded."""
        if not self._masters or self._is_fresh():
            return
        for weight, master in self._masters.items():
            changed = master.to(weight.dtype) != weight
            master.copy_(torch.where(changed, weight.float(), master))
        self._written = _writes(self._masters)

    def _is_fresh(self) -> bool:
        """Whether nothing has written to a weight since it was its copy rounded, by what torch counts of writes.

        To compare the numbers would read every weight and every copy in each step. Writes through `.data` are not
        counted.
        """
        return self._written == _writes(self._masters)

    @torch.no_grad()
    def _before_step(self, *_: Any) -> None:
        self._refresh()
        stepped = [weight for weight in self._masters if weight.grad is not None]
        gradients = [torch.empty_like(self._masters[weight]) for weight in stepped]
        if stepped:
            torch._foreach_copy_(gradients, [grad for weight in stepped if (grad := weight.grad) is not None])
        for master in self._masters.values():
            master.grad = None
        for weight, gradient in zip(stepped, gradients, strict=True):
            self._masters[weight].grad = gradient

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
    def take_from_state(self, optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Takes the copies out of a `state_dict` that is about to be loaded; returns the rest of it."""
        parameters = _parameters(optimizer)
        self._written = []  # the weights may be those of another time
        state: dict[int, dict[str, Any]] = {}
        for i, saved in state_dict["state"].items():
            moments = dict(saved)
            master: Tensor | None = moments.pop(_SAVED_AS, None)
            if master is not None:
                parameters[i].copy_(master)
            if moments:
                state[i] = moments
        return {**state_dict, "state": state}


def _writes(weights: Iterable[Tensor]) -> list[tuple[int, int]]:
    """Where weights are, and how often each has been written to."""
    return [(weight.data_ptr(), weight._version) for weight in weights]


def _parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    """What an optimiser steps, in the order of its `state_dict`."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
