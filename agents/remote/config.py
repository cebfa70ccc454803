"""The engine of a run, and what a run must be for one; nothing here loads torch."""

from __future__ import annotations

import urllib.parse
from dataclasses import dataclass
from typing import Any

from lmgym.errors import InvalidArgumentError
from lmgym.ranges import Positive, check_fields


@dataclass(frozen=True)
class EngineConfig:
    """Another process that samples the batches of a run."""

    url: str | None = None  # such as http://127.0.0.1:8000; None samples here
    weights: str | None = None  # a directory that both see, by which weights go; None is one of this machine's own
    check: bool = True  # refuses an engine that does not sample from the weights that it is sent
    timeout: Positive = 600.0  # seconds that an answer may take

    def __post_init__(self) -> None:
        check_fields(self)
        if self.url is not None:
            check_url(self.url)


def check_suits(config: EngineConfig, agent_class: type[Any], agent_config: Any, sampler: Any, faults: Any) -> None:
    """Checks that a run can have an engine; nothing is loaded for it.

    Args:
        config: the engine. agent_class, agent_config: of the agent. sampler: of the run. faults: that are on.

    Raises:
        InvalidArgumentError: for a run that cannot.
    """
    if config.url is None:
        return
    from agents.on_policy import OnPolicyAgent

    if not issubclass(agent_class, OnPolicyAgent):
        raise InvalidArgumentError(
            "`engine.url` must be null for an agent that does not learn from its own episodes in the loop of lmgym, "
            f"such as {agent_class.__name__}."
        )
    if not agent_config.recompute_log_probs:
        raise InvalidArgumentError(
            "`agent.recompute_log_probs` must be true where an engine samples: its log-probs are not the trainer's."
        )
    if agent_config.collect != "episodes":
        raise InvalidArgumentError(
            "`agent.collect` must be 'episodes' where an engine samples, which gives whole ones."
        )
    if sampler.is_greedy(0):
        raise InvalidArgumentError(
            "`sampler` must draw every token where an engine samples: no policy, temperature, top_k or top_p of it may "
            "be greedy."
        )
    if faults.sampler_mismatch is not None:
        raise InvalidArgumentError(
            "`sampler_mismatch` must be null where an engine samples: start one that is wrong, as docs/engine.md says."
        )


def check_url(url: str) -> None:
    """Raises `InvalidArgumentError` for what is no address of an engine."""
    parts = urllib.parse.urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        raise InvalidArgumentError(f"`engine.url` must be an address such as http://127.0.0.1:8000, got {url!r}.")
