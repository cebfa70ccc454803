"""Captures functions as CUDA graphs: one launch, where the kernels of a model are hundreds.

A graph replays its kernels on the addresses that it was captured with. Without a GPU a captured function is simply
called, so that tests can run everything (`CAPTURED_DEVICES`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Run = Callable[[], tuple[Tensor, ...]]

CAPTURED_DEVICES = {"cuda"}  # where functions run as graphs
_WARM_UPS = 3  # runs before a capture: libraries choose their kernels in the first


def is_captured(device: torch.device) -> bool:
    """Whether functions on a device run as graphs."""
    return device.type in CAPTURED_DEVICES


class GraphPool:
    """Captures functions on tensors that stay where they are; what they need besides shares its memory."""

    def __init__(self, device: torch.device) -> None:
        self._is_cuda = device.type == "cuda"
        self._pool = torch.cuda.graph_pool_handle() if self._is_cuda else None

    def capture(self, run: Run, state: Sequence[Tensor]) -> Run:
        """The function as one launch; its outputs are written over by the next launch of any function of the pool.

        Args:
            run: what is captured.
            state: what it reads and writes; it is as before when the function has been captured.
        """
        if not self._is_cuda:
            return run
        before = [x.clone() for x in state]

        def run_and_restore() -> None:
            run()
            for x, old in zip(state, before, strict=True):
                x.copy_(old)

        _warm_up(run_and_restore)
        return self._record(run)

    def capture_pair(self, first: Run, second: Run) -> tuple[Run, Run]:
        """Two functions as one launch each, of which the second goes on from what the first has computed.

        No other function of the pool may be launched between the two. Runs before the capture change what they write.
        """
        if not self._is_cuda:
            return first, second

        def run_both() -> None:
            first()
            second()

        _warm_up(run_both)
        return self._record(first), self._record(second)

    def _record(self, run: Run) -> Run:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            outputs = run()

        def replay() -> tuple[Tensor, ...]:
            graph.replay()
            return outputs

        return replay


def _warm_up(run: Callable[[], None]) -> None:
    """Runs a function a few times, on another stream than that of the work around it, as a capture does."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(_WARM_UPS):
            run()
    torch.cuda.current_stream().wait_stream(side)
