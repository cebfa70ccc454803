"""Algorithms and commands: what is run from the checkout. `load_policy("runs/...")` takes a policy out of a run."""

from typing import Any

__all__ = ["load_agent", "load_policy"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'agents' has no attribute {name!r}")
    from agents.runs import loading  # torch loads here

    return getattr(loading, name)
