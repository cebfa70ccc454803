"""Forked processes, such as those of Gymnasium's `AsyncVectorEnv`: torch does not survive a fork with several threads.

A fork does not copy the threads that torch divides its work between, and a child in which torch uses them waits for
ever. With one thread torch needs no others; the workers of torch's own data loaders run so too.
"""

from __future__ import annotations

import functools
import os
import sys
from typing import Any


@functools.cache
def let_forks_use_one_thread() -> None:
    """Makes torch use one thread in every process that this one forks from now on; does not load torch."""
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=_use_one_thread)


def _use_one_thread() -> None:
    torch: Any = sys.modules.get("torch")
    if hasattr(torch, "set_num_threads"):  # None, or half imported, has not
        torch.set_num_threads(1)
