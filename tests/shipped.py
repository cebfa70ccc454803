"""What the checkout ships, found by looking: who adds an agent or a task adds its tests, and edits no list of them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from hydra.utils import get_class
from omegaconf import OmegaConf

from agents.fixed import FixedAgent
from agents.on_policy import OnPolicyAgent
from agents.supervised import SupervisedAgent

CONF = Path(__file__).parents[1] / "conf" / "agent"
AGENTS = tuple(sorted(path.stem for path in CONF.glob("*.yaml")))  # what `agent=` takes


def class_of(agent: str) -> Any:
    """The class that conf/agent names."""
    return get_class(OmegaConf.load(CONF / f"{agent}.yaml")._target_)


def agents_of(kind: type) -> dict[str, Any]:
    """Name and class of the agents of a kind."""
    return {agent: class_of(agent) for agent in AGENTS if issubclass(class_of(agent), kind)}


def fields_of(agent: type[Any], settings: dict[str, Any]) -> dict[str, Any]:
    """Those of some settings that the config of an agent has."""
    names = {field.name for field in dataclasses.fields(agent.Config)}
    return {name: value for name, value in settings.items() if name in names}


ON_POLICY = agents_of(OnPolicyAgent)
SUPERVISED = agents_of(SupervisedAgent)
FIXED = agents_of(FixedAgent)
SB3 = tuple(agent for agent in AGENTS if agent.startswith("sb3_"))
