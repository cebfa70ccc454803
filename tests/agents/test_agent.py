"""The contract: everything that conf/agent names is an agent, and commands need to know nothing else of it."""

from __future__ import annotations

import dataclasses
import inspect

import pytest
from shipped import AGENTS, class_of

from agents.agent import Agent, AgentConfig


@pytest.mark.parametrize("name", AGENTS)
def test_what_conf_agent_names_is_an_agent(name: str) -> None:
    kind = class_of(name)
    assert issubclass(kind, Agent)
    assert issubclass(kind.Config, AgentConfig)
    assert dataclasses.is_dataclass(kind.Config)
    assert not inspect.isabstract(kind)


@pytest.mark.parametrize("name", AGENTS)
def test_an_agent_takes_the_arguments_of_the_contract(name: str) -> None:
    for method in ("__init__", "learn", "predict", "evaluate", "save", "write", "load"):
        promised = inspect.signature(getattr(Agent, method)).parameters
        taken = inspect.signature(getattr(class_of(name), method)).parameters
        assert list(taken) == list(promised), method
