"""What a command settles with the machine it runs on, before torch loads: threads, terminal, plots, other processes."""

from __future__ import annotations

import codecs
import os
import sys
from typing import NoReturn

from agents.runs.launch import launched_count

PLAIN = "lmgym.plain"
_LOOKALIKES = {"±": "+-", "≥": ">=", "≤": "<=", "…": "...", "█": "#"}
_SIZES = {  # and the process's number among so many; Slurm sets its own for what srun starts, not in a batch script
    "WORLD_SIZE": "RANK",
    "OMPI_COMM_WORLD_SIZE": "OMPI_COMM_WORLD_RANK",
    "PMI_SIZE": "PMI_RANK",
    "SLURM_STEP_NUM_TASKS": "SLURM_PROCID",
}


def prepare_process(*, shared: bool = False) -> None:
    """To be called by every command first; a second call changes nothing.

    OpenMP's threads sleep while they wait, unless the environment says otherwise: by default they spin, which on a
    machine shared with other work makes two threads several times slower than one. Pictures are files: the backend of a
    notebook, which its shell commands inherit, need not be there. What a terminal lacks is shown in plainer characters.

    Args:
        shared: whether torchrun and accelerate may start the command in several processes.
    """
    if not (shared and launched_count() > 1):
        refuse_ranks()
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ["MPLBACKEND"] = "agg"
    codecs.register_error(PLAIN, plain)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors=PLAIN)


def plain(error: UnicodeError) -> tuple[str, int]:
    """A codec's error handler: "+-" for a plus-minus sign that an encoding lacks, an escape for any other character."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end]
    shown = [_LOOKALIKES.get(x) or x.encode("ascii", "backslashreplace").decode("ascii") for x in text]
    return "".join(shown), error.end


def refuse_ranks() -> None:
    """Ends the process where it is one of several that torchrun, accelerate, mpirun or srun has started.

    Each would train the same run into the same directory. The first of them says so in a line, the others nothing.
    """
    for size, rank in _SIZES.items():
        if os.environ.get(size, "1").isdigit() and int(os.environ.get(size, "1")) > 1:
            _refuse(f"{size}={os.environ[size]}", os.environ.get(rank, "0"))


def _refuse(found: str, rank: str) -> NoReturn:
    if rank != "0":
        sys.exit(1)
    sys.exit(
        f"This command is one process, and this is one of several ({found}): start it with python instead of torchrun, "
        "accelerate launch or mpirun, or with srun -n 1. Several runs side by side: -m seed=0,1 hydra/launcher=joblib."
    )
