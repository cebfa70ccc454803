"""Random numbers of an agent that draws from the generators of the process, as Stable-Baselines3 does."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class GeneratorStates:
    """The states of the process's generators.

    Attributes:
        numpy: of `numpy.random`.
        torch: of the CPU.
        cuda: of each GPU.
    """

    numpy: Any
    torch: Tensor
    cuda: list[Tensor]

    @classmethod
    def read(cls) -> GeneratorStates:
        """The states now."""
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
        return cls(np.random.get_state(legacy=False), torch.get_rng_state(), cuda)  # noqa: NPY002 - what SB3 draws from

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> GeneratorStates:
        """The states that `as_json` wrote."""
        numpy = values["numpy"]
        key = np.array(numpy["state"]["key"], dtype=np.uint32)
        numpy = {**numpy, "state": {**numpy["state"], "key": key}}
        cuda = [torch.tensor(state, dtype=torch.uint8) for state in values["cuda"]]
        cpu = torch.tensor(values["torch"], dtype=torch.uint8)
        return cls(numpy, cpu, cuda if torch.cuda.is_available() else [])

    def as_json(self) -> dict[str, Any]:
        """The states as JSON values."""
        key = {**self.numpy["state"], "key": self.numpy["state"]["key"].tolist()}
        cuda = [state.tolist() for state in self.cuda]
        return {"numpy": {**self.numpy, "state": key}, "torch": self.torch.tolist(), "cuda": cuda}

    def with_numpy_seed(self, seed: int) -> GeneratorStates:
        """The same with another stream for numpy: SB3 seeds numpy and torch alike, and their numbers are then equal."""
        return replace(self, numpy=np.random.RandomState(seed).get_state(legacy=False))

    def write(self) -> None:
        """Sets the generators of the process to these states."""
        np.random.set_state(self.numpy)  # noqa: NPY002 - what SB3 draws from
        torch.set_rng_state(self.torch)
        if self.cuda:
            torch.cuda.set_rng_state_all(self.cuda)


class OwnGenerators:
    """Lets an agent draw from the generators of the process, and leaves those of everybody else as they were."""

    def __init__(self) -> None:
        self._states: GeneratorStates | None = None  # None: those of the process are the agent's, now

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        """Within the block the generators of the process are the agent's; afterwards they are what they were."""
        outside = GeneratorStates.read()
        python = random.getstate()
        if self._states is not None:
            self._states.write()
        self._states = None
        try:
            yield
        finally:
            self._states = GeneratorStates.read()
            outside.write()
            random.setstate(python)

    def get_state(self) -> GeneratorStates:
        """The states of the agent's generators; within `in_use` too."""
        return self._states or GeneratorStates.read()

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes on from what `get_state` gave, `as_json`."""
        self._states = GeneratorStates.from_json(state)
