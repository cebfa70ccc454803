"""An agent, or its policy, out of a run directory: `load_policy("runs/...")`, of every kind of checkpoint."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from agents.agent import Agent, PolicyAgent
from agents.runs.directory import CHECKPOINT, CONFIG_FILE, read_checkpoint
from agents.runs.plan import build, check_saved, saved_config
from agents.runs.trust import trusted_modules
from lmgym.errors import InvalidArgumentError
from lmgym.models.policy import Policy


def load_agent(
    run: str | os.PathLike[str], *, device: str | None = None, trust: str | Sequence[str] | None = None
) -> Agent:
    """The agent of a run as its newest checkpoint has it, with its env in `envs` and its sampler in `sampler`.

    None of the run's own code is executed: see `agents.runs.trust`.

    Args:
        run: the run directory, or the checkpoint in it. Nothing there is changed.
        device: instead of the one that it was trained on.
        trust: modules that its config names and that are not installed, such as "my_rewards".

    Raises:
        LmGymError: naming what is missing or damaged, or code that is not trusted.
    """
    directory = Path(run)
    if directory.name == CHECKPOINT and not (directory / CONFIG_FILE).is_file():
        directory = directory.parent
    values = saved_config(directory, trusted_modules(trust))
    if device is not None:
        values["device"] = device
    agent = build(check_saved(directory, values))
    read_checkpoint(directory, agent.load)
    return agent


def load_policy(
    run: str | os.PathLike[str], *, device: str | None = None, trust: str | Sequence[str] | None = None
) -> Policy:
    """The policy of a run: what `lmgym.evaluation.evaluate` and `lmgym.rollout.collect` take.

    It is the whole policy, whatever it is made of: fine-tuned weights, an adapter, a network on top of the reference,
    one of Stable-Baselines3's, or one that is derived from the task. A sampler is no part of it: pass `load_agent`'s.

    Args:
        run, device, trust: as for `load_agent`.

    Raises:
        LmGymError: as `load_agent`; and for best of n, which chooses whole responses.
    """
    agent = load_agent(run, device=device, trust=trust)
    if not isinstance(agent, PolicyAgent):
        raise InvalidArgumentError(
            f"`run` must be of an agent that chooses token by token, got {type(agent).__name__}, which chooses whole "
            "responses: load_agent(...) has its `predict` and `evaluate`."
        )
    return agent.policy
