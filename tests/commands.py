"""The commands, within the process of the tests: Python and torch are not started anew for each."""

from __future__ import annotations

import importlib
import sys

import pytest
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig


def run_command_here(module: str, *arguments: str) -> None:
    """Does what `python -m <module> <arguments>` does, and leaves nothing of Hydra."""
    command = importlib.import_module(module)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sys, "argv", [module, *arguments])
        patched.setenv("HYDRA_FULL_ERROR", "1")
        try:
            command.main()
        finally:
            GlobalHydra.instance().clear()
            HydraConfig.instance().cfg = None
