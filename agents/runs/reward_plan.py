"""What `python -m agents.reward` is asked to do, checked before torch loads."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agents.runs.config import check_values, validated
from agents.runs.defaults import REWARD_CONFIG, find_types
from agents.runs.directory import CHECKPOINT, CONFIG_FILE, VERSIONS, check_is_run
from agents.runs.recorder import METRICS_FILE
from agents.runs.tasks import full_name
from agents.runs.trackers import TENSORBOARD
from agents.runs.trust import read_config
from lmgym.errors import InvalidArgumentError, check_int
from lmgym.feedback.files import read_records
from lmgym.files import RunFileError
from lmgym.models.names import check_model_name
from lmgym.reward_models.config import RewardConfig

REWARD_DIRECTORY = "reward"  # what `env.reward` takes
MEMBERS = "members"  # finished ones of an ensemble, while others are still learning
PICTURE = "reward.png"
PREDICTIONS = "predictions.jsonl"
REWARD_FILES = (
    CONFIG_FILE,
    VERSIONS,
    METRICS_FILE,
    TENSORBOARD,
    CHECKPOINT,
    MEMBERS,
    REWARD_DIRECTORY,
    "summary.json",
    PREDICTIONS,
    PICTURE,
)
_KEYS = ("task", "preferences", "model", "seed", "reference_samples", "checkpoint_every", "device", "reward")


@dataclass(frozen=True)
class RewardPlan:
    """A config that has been checked; nothing has been loaded yet.

    Attributes:
        task: its whole name, or None. preferences: a file. model: a directory or a hub name; None is the task's.
        reward: the numbers of the training. seed: of all that is drawn.
        reference_samples: of the task, for centring. checkpoint_every: updates, or None. device: where.
    """

    task: str | None
    preferences: str
    model: str | None
    reward: RewardConfig
    seed: int
    reference_samples: int
    checkpoint_every: int | None
    device: str


def check_reward(values: Mapping[str, Any]) -> RewardPlan:
    """Checks a whole config.

    Raises:
        LmGymError: naming the key, what was expected and what came.
    """
    check_values(find_types(REWARD_CONFIG), values["reward"], "reward")
    config = validated(RewardConfig, values["reward"], "reward")
    check_int("seed", values["seed"], 0)
    check_int("reference_samples", values["reference_samples"], 0)
    if values["checkpoint_every"] is not None:
        check_int("checkpoint_every", values["checkpoint_every"], 1)
    task = None if values["task"] is None else full_name(values["task"])
    model = values["model"]
    if task is None and model is None:
        raise InvalidArgumentError(
            "`task` or `model` must be given, which the reward model starts from: task=reviews, or model=DIRECTORY."
        )
    if model is not None:
        check_model_name("model", model)
    if not isinstance(values["device"], str):
        raise InvalidArgumentError(f"`device` must be a name such as 'cpu', got {values['device']!r}.")
    preferences = values["preferences"]
    _check_preferences(preferences, config)
    return RewardPlan(
        task,
        preferences,
        model,
        config,
        values["seed"],
        values["reference_samples"],
        values["checkpoint_every"],
        values["device"],
    )


def _check_preferences(path: object, config: RewardConfig) -> None:
    """Reads a file of feedback through, so that one with a bad record, or with nothing to learn, is refused early."""
    if path is None:
        raise InvalidArgumentError(
            "`preferences` must be a file of feedback, and none is given: preferences=prefs.jsonl. Simulated people "
            "write one by `python -m lmgym.feedback simulate` (docs/feedback.md)."
        )
    if not isinstance(path, str) or not os.path.isfile(path):
        raise InvalidArgumentError(f"`preferences` must be a file, and there is none at {path!r}.")
    kinds = Counter(
        "no judgement" if record.judgement is None else record.judgement.kind
        for record in read_records(path, "preferences")
    )
    wanted = ("ratings", "votes") if config.objective == "regression" else _COMPARING
    if not any(kinds[kind] for kind in wanted):
        found = ", ".join(f"{count:,} {kind}" for kind, count in kinds.most_common()) or "no record"
        raise InvalidArgumentError(
            f"`preferences` must hold judgements of the kinds {', '.join(wanted)} where `reward.objective` is "
            f"{config.objective!r}, got {found}."
        )


_COMPARING = ("ranking", "choice", "ratings", "correction", "votes")


def saved_reward_values(directory: Path) -> dict[str, Any]:
    """The config of a run of this command.

    Raises:
        LmGymError: for a directory that is none.
    """
    check_is_run(directory)
    path = directory / CONFIG_FILE
    values = read_config(path)
    missing = [name for name in _KEYS if name not in values]
    if missing:
        raise RunFileError(
            f"`{directory}` must be a run of agents.reward, and its {CONFIG_FILE} has no {missing[0]!r}: it is of "
            "another command, or damaged."
        )
    return values
