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
from lmgym.errors import InvalidArgumentError, check_bool, check_choice, check_int
from lmgym.feedback.simulation import Annotators
from lmgym.files import RunFileError
from lmgym.reward_models.config import RewardConfig

RESULT = "worth.json"
PICTURE = "worth.png"
WORTH_FILES = (CONFIG_FILE, VERSIONS, CELLS, RESULT, PICTURE)
CHANGEABLE = ("labels", "choice", "seeds", "gold", "device", "resume", "trust")  # where a run goes on
RANDOM = "random"
DISAGREEMENT = "disagreement"
CHOICES = (RANDOM, DISAGREEMENT)
POLICY = "policy"
WRITERS = (POLICY, "reference")
_LISTS = ("labels", "choice")  # keys whose values may be several, with commas between them
MIN_LABELS = 2  # one prompt to learn from, and one that is held out


@dataclass(frozen=True)
class Cell:
    """One policy of the table.

    Attributes:
        labels: that its reward model learns from; 0 is the reference, and None a policy trained on the hidden score.
        seed: of all that is drawn. choice: what is labelled, one of `CHOICES`.
    """

    labels: int | None
    seed: int
    choice: str = RANDOM

    @property
    def name(self) -> str:
        """Of its file."""
        words = ["gold" if self.labels is None else f"labels{self.labels}"]
        if self.choice != RANDOM:
            words.append(self.choice)
        return "-".join([*words, f"seed{self.seed}"])


@dataclass(frozen=True)
class WorthPlan:
    """A config that has been checked; nothing has been loaded yet.

    Attributes:
        training: of every policy, with the task's own reward. reward: of every reward model. people: who judge.
        labels: how many, ascending. gold: whether a policy is trained on the hidden score, too. seeds: of each.
        samples: completions of a prompt that are judged together. rounds: of labels, equal shares.
        choices: what is labelled, of `CHOICES`. writer: of later rounds, one of `WRITERS`.
        pool: candidates for each label that is chosen by disagreement.
    """

    training: Plan
    reward: RewardConfig
    people: Annotators
    labels: tuple[int, ...]
    gold: bool
    seeds: tuple[int, ...]
    samples: int
    rounds: int
    choices: tuple[str, ...]
    writer: str
    pool: int

    def cells(self) -> list[Cell]:
        """All that is to be measured, seed by seed, so that a run that is stopped has whole curves."""
        cells = []
        for seed in self.seeds:
            for labels in self.labels:
                choices = self.choices if labels else (RANDOM,)
                cells += [Cell(labels, seed, choice) for choice in choices]
            if self.gold:
                cells.append(Cell(None, seed))
        return cells


def check_worth(values: Mapping[str, Any]) -> WorthPlan:
    """Checks a whole config.

    Raises:
        LmGymError: naming the key, what was expected and what came.
    """
    check_values(find_types(REWARD_CONFIG), values["reward"], "reward")
    reward = validated(RewardConfig, values["reward"], "reward")
    people = validated(Annotators, values["feedback"], "feedback")
    for name, low in (("seed", 0), ("seeds", 1), ("samples", 2), ("rounds", 1), ("pool", 2)):
        check_int(name, values[name], low)
    check_bool("gold", values["gold"])
    labels = _check_labels(values["labels"], values["rounds"])
    check_choice("writer", values["writer"], WRITERS)
    choices = _check_choices(values["choice"], values["rounds"], reward.ensemble)
    if reward.objective == "regression" and people.ask != "rating":
        raise InvalidArgumentError(
            f"`feedback.ask` must be 'rating' where `reward.objective` is 'regression', got {people.ask!r}."
        )
    training = check({**values, "seeds": 1, "checkpoint_every": values["total_timesteps"]})
    seeds = tuple(range(values["seed"], values["seed"] + values["seeds"]))
    return WorthPlan(
        training,
        reward,
        people,
        labels,
        values["gold"],
        seeds,
        values["samples"],
        values["rounds"],
        choices,
        values["writer"],
        values["pool"],
    )


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


def _check_choices(choice: object, rounds: int, ensemble: int) -> tuple[str, ...]:
    names = [choice] if isinstance(choice, str) else choice
    if not isinstance(names, Sequence) or not names:
        raise InvalidArgumentError(f"`choice` must be {' or '.join(CHOICES)}, or both, got {choice!r}.")
    for name in names:
        check_choice("choice", name, CHOICES)
    if DISAGREEMENT in names:
        because = f"where `choice` is {DISAGREEMENT!r}"
        if rounds < 2:
            raise InvalidArgumentError(
                f"`rounds` must be 2 at least {because}: the first has no reward models yet that could disagree, got "
                f"{rounds}."
            )
        if ensemble < 2:
            raise InvalidArgumentError(
                f"`reward.ensemble` must be 2 at least {because}: these reward models disagree, got {ensemble}."
            )
    return tuple(name for name in CHOICES if name in names)


def with_lists(arguments: Sequence[str]) -> list[str]:
    """Arguments in which `labels=0,50` stands for a list, which Hydra writes `labels=[0,50]`."""
    lists = []
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if name in _LISTS and equals and "," in value and not value.startswith("["):
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
                f"`{key}` must be as it was when the run began: with `resume`, only {', '.join(CHANGEABLE[:5])} may "
                "change."
            )
        values[key] = yaml.safe_load(value)
    return values
