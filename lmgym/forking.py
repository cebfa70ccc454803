"""Forked processes, such as those of Gymnasium's `AsyncVectorEnv`: torch does not survive a fork with several threads.

The threads that torch shares its work out to are not copied by a fork. A child that has torch use them waits for them
for ever. One thread needs no other, which is also what torch's own data loaders have their workers use.
"""

from __future__ import annotations

import functools
import os
import sys
from typing import Any


@functools.cache
def let_forks_use_one_thread() -> None:
    """Has torch use one thread in every process that this one forks from here on; does not load torch."""
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=_use_one_thread)


def _use_one_thread() -> None:
    torch: Any = sys.modules.get("torch")
    if hasattr(torch, "set_num_threads"):  # None, or half imported, has not
        torch.set_num_threads(1)
