"""What torchrun and `accelerate launch` have started: how many processes, and which of them this is."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from datetime import timedelta
from typing import TYPE_CHECKING

from lmgym.errors import InvalidArgumentError

if TYPE_CHECKING:
    from agents.distributed import Processes

_SHARDING = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_MEGATRON_LM")
_PATIENCE = timedelta(hours=6)  # how long one may wait for another: the first grades the policy while the others wait


def launched_count() -> int:
    """How many processes a launcher has started for this run; 1 of a command by itself."""
    size = os.environ.get("WORLD_SIZE", "1")
    return int(size) if size.isdigit() else 1


def launched_rank() -> int:
    """The number of this process among them, from 0."""
    return int(os.environ.get("RANK", "0")) if launched_count() > 1 else 0


def check_one_run(seeds: int, *, is_multirun: bool) -> None:
    """Raises `InvalidArgumentError` where several processes are to train several runs, or to shard their weights.

    The first process says so, and the others end without a word.
    """
    if launched_count() == 1:
        return
    sharding = [name for name in _SHARDING if os.environ.get(name, "").lower() in ("1", "true")]
    if launched_rank() and (sharding or seeds != 1 or is_multirun):
        sys.exit(1)
    if sharding:
        raise InvalidArgumentError(
            f"`accelerate launch` must be without sharding, and {sharding[0]} is set: every process holds the whole "
            "model. Give it --multi_gpu, or take torchrun."
        )
    if seeds != 1 or is_multirun:
        raise InvalidArgumentError(
            f"`seeds` must be 1, and -m left out, where {launched_count()} processes train one run together."
        )


@contextlib.contextmanager
def joined_processes(device: str) -> Iterator[Processes]:
    """Meets the other processes of the run, until the block ends; a command by itself meets none.

    Accelerate chooses how they talk, and the GPU of each.

    Args:
        device: the name of the device that each is to train on.
    """
    from agents.distributed import Processes

    if launched_count() == 1:
        yield Processes()
        return
    import torch
    from accelerate import PartialState

    on_cpu = device == "cpu" or not torch.cuda.is_available()
    state = PartialState(cpu=on_cpu, timeout=_PATIENCE)
    try:
        yield Processes(state.process_index, state.num_processes)
    finally:
        with contextlib.suppress(RuntimeError):  # of a group that has lost one
            state.destroy_process_group()
