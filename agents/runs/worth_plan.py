"""What `python -m agents.worth` is asked to do, checked before torch loads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from agents.runs.config import check_values, validated
from agents.runs.defaults import REWARD_CONFIG, find_types
from agents.runs.directory import CELLS, CONFIG_FILE, VERSIONS, check_is_run
from agents.runs.plan import Plan, check
from agents.runs.trust import import_installed, read_config
from lmgym.errors import InvalidArgumentError, check_bool, check_int
from lmgym.feedback.simulation import Annotators
from lmgym.files import RunFileError
from lmgym.reward_models.config import RewardConfig

RESULT = "worth.json"
PICTURE = "worth.png"
WORTH_FILES = (CONFIG_FILE, VERSIONS, CELLS, RESULT, PICTURE)
CHANGEABLE = ("labels", "seeds", "gold", "device", "resume", "trust")  # where a run goes on
MIN_LABELS = 2  # one prompt to learn from, and one that is held out


@dataclass(frozen=True)
class Cell:
    """One policy of the table.

    Attributes:
        labels: that its reward model learns from; 0 is the reference, and None a policy trained on the hidden score.
        seed: of all that is drawn.
    """

    labels: int | None
    seed: int

    @property
    def name(self) -> str:
        """Of its file."""
        return f"{'gold' if self.labels is None else f'labels{self.labels}'}-seed{self.seed}"


@dataclass(frozen=True)
class WorthPlan:
    """A config that has been checked; nothing has been loaded yet.

    Attributes:
        training: of every policy, with the task's own reward. reward: of every reward model. people: who judge.
        labels: how many, ascending. gold: whether a policy is trained on the hidden score, too. seeds: of each.
        samples: completions of a prompt that are judged together. rounds: of labels, equal shares.
    """

    training: Plan
    reward: RewardConfig
    people: Annotators
    labels: tuple[int, ...]
    gold: bool
    seeds: tuple[int, ...]
    samples: int
    rounds: int

    def cells(self) -> list[Cell]:
        """All that is to be measured, seed by seed, so that a run that is stopped has whole curves."""
        kinds: list[int | None] = [*self.labels]
        if self.gold:
            kinds.append(None)
        return [Cell(labels, seed) for seed in self.seeds for labels in kinds]


def check_worth(values: Mapping[str, Any]) -> WorthPlan:
    """Checks a whole config.

    Raises:
        LmGymError: naming the key, what was expected and what came.
    """
    check_values(find_types(REWARD_CONFIG), values["reward"], "reward")
    reward = validated(RewardConfig, values["reward"], "reward")
    people = validated(Annotators, values["feedback"], "feedback")
    for name, low in (("seed", 0), ("seeds", 1), ("samples", 2), ("rounds", 1)):
        check_int(name, values[name], low)
    check_bool("gold", values["gold"])
    labels = _check_labels(values["labels"], values["rounds"])
    if reward.objective == "regression" and people.ask != "rating":
        raise InvalidArgumentError(
            f"`feedback.ask` must be 'rating' where `reward.objective` is 'regression', got {people.ask!r}."
        )
    training = check({**values, "seeds": 1, "checkpoint_every": values["total_timesteps"]})
    seeds = tuple(range(values["seed"], values["seed"] + values["seeds"]))
    return WorthPlan(training, reward, people, labels, values["gold"], seeds, values["samples"], values["rounds"])


def _check_labels(labels: object, rounds: int) -> tuple[int, ...]:
    numbers = [labels] if isinstance(labels, int) else labels
    if not isinstance(numbers, Sequence) or isinstance(numbers, str) or not numbers:
        raise InvalidArgumentError(f"`labels` must be whole numbers such as 0,50,200, got {labels!r}.")
    for number in numbers:
        check_int("labels", number, 0)
        if 0 < number < MIN_LABELS * rounds:
            raise InvalidArgumentError(
                f"`labels` must be 0, or {MIN_LABELS} at least in each of `rounds`={rounds}, got {number}."
            )
    return tuple(sorted(set(numbers)))


def with_list(arguments: Sequence[str], key: str) -> list[str]:
    """Arguments in which `labels=0,50` stands for a list, which Hydra writes `labels=[0,50]`."""
    lists = []
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if name == key and equals and "," in value and not value.startswith("["):
            argument = f"{name}=[{value}]"
        lists.append(argument)
    return lists


def saved_worth_values(directory: Path, overrides: Sequence[str], trusted: Sequence[str]) -> dict[str, Any]:
    """The config of a run that goes on, with what is to change in it.

    Args:
        directory: of the run. overrides: `key=value` each. trusted: modules that the config may import.

    Raises:
        LmGymError: for a directory that is no run of this command, and for another key.
    """
    check_is_run(directory)
    values = read_config(directory / CONFIG_FILE)
    if "labels" not in values or "feedback" not in values:
        raise RunFileError(f"`{directory}` must be a run of agents.worth, and its {CONFIG_FILE} is of another command.")
    import_installed(values, directory, trusted)
    for override in overrides:
        key, _, value = override.partition("=")
        if key not in CHANGEABLE:
            raise InvalidArgumentError(
                f"`{key}` must be as it was when the run began: with `resume`, only {', '.join(CHANGEABLE[:4])} may "
                "change."
            )
        values[key] = yaml.safe_load(value)
    return values
