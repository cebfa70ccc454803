"""Moves models that an optimiser step does not read to the host's memory while it runs: the reference, reward models.

What the policy reads stays where it is: the reference's own weights under an adapter (`policy="lora"`), and a reference
that a residual is added to.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from agents.policies.actor_critic import TrainablePolicy
from lmgym.envs.mdp import TokenMDP
from lmgym.errors import InvalidArgumentError
from lmgym.rewards.probe import find_leaves


def check_offload(device: torch.device) -> None:
    """Raises `InvalidArgumentError` where the models are in the host's memory already."""
    if device.type != "cuda":
        raise InvalidArgumentError(
            f"`offload` must be False where the models are on {device.type!r}, got True: it moves them from a GPU to "
            "the CPU."
        )


def find_idle(mdp: TokenMDP, policy: TrainablePolicy, reads_reference: bool = False) -> list[Tensor]:
    """Weights of the reference and of reward models that optimiser steps do not read, each once.

    Args:
        mdp: has the models. policy: what learns.
        reads_reference: whether the loss of the algorithm reads the reference.

    Raises:
        InvalidArgumentError: where the models are in the host's memory already.
    """
    check_offload(policy.device)
    busy = list(policy.models())
    rewards = [*find_leaves(mdp.reward), *find_leaves(mdp.task.gold)]
    models = [model for reward in rewards if isinstance(model := getattr(reward, "model", None), nn.Module)]
    (busy if reads_reference else models).append(mdp.lm.model)
    used = {x.untyped_storage().data_ptr() for x in _tensors(busy)}
    here = [x for x in _tensors(models) if x.device.type == policy.device.type]
    return [x for x in here if x.untyped_storage().data_ptr() not in used]


def _tensors(models: Iterable[nn.Module]) -> list[Tensor]:
    """Parameters and buffers of some models, each once."""
    found = {id(x): x for model in models for x in (*model.parameters(), *model.buffers())}
    return list(found.values())


def count_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the numbers in some tensors."""
    return sum(x.nbytes for x in tensors)


@contextmanager
def offloaded(tensors: Iterable[Tensor]) -> Iterator[None]:
    """A block in which tensors lie in the host's memory; afterwards they are where they were.

    A tensor stays the same Python object, so that whoever holds it finds it on the other device.
    """
    homes = [(x, x.device) for x in tensors]
    for x, _ in homes:
        x.data = move_out(x.data)
    if any(home.type == "cuda" for _, home in homes):
        torch.cuda.synchronize()  # nobody may write to the copies before they are whole
    try:
        yield
    finally:
        for x, home in homes:
            x.data = move_back(x.data, home)


def move_out(x: Tensor) -> Tensor:
    """A copy in the host's memory, pinned where it comes from a GPU, for the way back."""
    copied = torch.empty_like(x, device="cpu", pin_memory=x.is_cuda)
    return copied.copy_(x, non_blocking=True)


def move_back(x: Tensor, home: torch.device) -> Tensor:
    """A copy on the device that it came from."""
    return x.to(home, non_blocking=True)
