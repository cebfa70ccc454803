"""A plan: a config that has been checked, and the agent and env that it describes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from omegaconf import DictConfig, OmegaConf

from agents.faults.config import FaultConfig
from agents.remote.config import EngineConfig, check_suits
from agents.runs.config import check_values, validated
from agents.runs.defaults import find_defaults, find_types
from agents.runs.directory import CONFIG_FILE, read_values
from agents.runs.sources import find_parameters
from agents.runs.tasks import full_name
from agents.runs.trackers import TrackerConfig, find_tracker
from agents.runs.trust import import_installed, needed_trust
from agents.sb3.arguments import check_kwargs
from lmgym.envs.settings import Settings
from lmgym.errors import InvalidArgumentError, LmGymError, check_int, unknown_name
from lmgym.files import RunFileError
from lmgym.ranges import Count, Positive

if TYPE_CHECKING:
    from agents.agent import Agent, AgentConfig
    from agents.distributed import Processes

# What `env` takes: all that an environment does but the task and the device, which are keys of their own, and what
# training has no use for.
_NOT_IN_ENV = {"task", "device", "obs_format", "text_info", "render_mode"}
SB3_AGENT = "agents.sb3.agent.SB3Agent"
ENV_KEYS = tuple(field.name for field in fields(Settings) if field.name not in _NOT_IN_ENV)


@dataclass(frozen=True)
class EvaluationConfig:
    """How a policy is graded, before, after and along the way."""

    split: str = "test"
    samples: Count | None = None  # episodes a prompt; null is as many as make 4,096 in all
    prompts: Count | None = None  # how many prompts; null is all of the split
    every: Count | None = None  # env steps between gradings along the way; null is none
    samples_along: Count | None = None  # episodes a prompt of each of those; null is as many as make 1,024 in all


@dataclass(frozen=True)
class Budget:
    """What ends a run before `total_timesteps`, after the batch that reaches it; None ends nothing."""

    forward_tokens: Count | None = None
    seconds: Positive | None = None

    def is_spent(self, forward_tokens: int, seconds: float) -> bool:
        """Whether a run that has come so far is at its end."""
        spent = self.forward_tokens is not None and forward_tokens >= self.forward_tokens
        return spent or (self.seconds is not None and seconds >= self.seconds)


@dataclass(frozen=True)
class Plan:
    """A config that has been checked: nothing has been loaded yet, and nothing in it can be of a wrong type."""

    settings: dict[str, Any]
    agent_class: type[Agent]
    agent_config: AgentConfig
    sampler: Any
    evaluation: EvaluationConfig
    total_timesteps: int
    seed: int
    checkpoint_every: int
    budget: Budget = Budget()
    tracker: TrackerConfig = field(default_factory=TrackerConfig)
    trust: tuple[str, ...] = ()  # modules that have to be named again when it is resumed or graded
    faults: FaultConfig = field(default_factory=FaultConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)


def plain(cfg: DictConfig | dict[str, Any]) -> dict[str, Any]:
    """The values of a composed config, interpolations resolved, and the task by its whole name; plain ones as they are.

    Raises:
        LmGymError: for a task that does not exist.
    """
    if not isinstance(cfg, DictConfig):
        return cfg
    values: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True)  # type: ignore[assignment]
    values["task"] = full_name(values["task"])
    return values


def check(cfg: DictConfig | dict[str, Any]) -> Plan:
    """Checks a whole config. One that was read from a run directory goes through `import_installed` first.

    Raises:
        LmGymError: naming the key, what was expected and what came.
    """
    values = plain(cfg)
    settings = check_values_of_run(values)
    agent = dict(values["agent"])
    target = agent.pop("_target_")
    import agents.agent  # from here on torch is loaded

    try:
        agent_class: Any = hydra.utils.get_class(target)
    except (ImportError, ValueError) as error:
        raise InvalidArgumentError(f"`agent._target_` must be a class that can be imported: {error}") from error
    if not (isinstance(agent_class, type) and issubclass(agent_class, agents.agent.Agent)):
        raise InvalidArgumentError(f"`agent._target_` must be an agent (`agents.agent.Agent`), got {target!r}.")
    agent_config = validated(agent_class.Config, agent, "agent")
    faults = FaultConfig.of(values)
    check_faults(faults, agent_class, agent_config)
    from lmgym.models.sampling import Sampler
    from lmgym.models.sharing import resolve_device

    sampler = validated(Sampler, values["sampler"], "sampler")
    engine = _engine(values)
    check_suits(engine, agent_class, agent_config, sampler, faults)
    resolve_device(settings["device"])
    return Plan(
        settings,
        agent_class,
        agent_config,
        sampler,
        validated(EvaluationConfig, values["evaluation"], "evaluation"),
        values["total_timesteps"],
        values["seed"],
        values["checkpoint_every"],
        _budget(values),
        find_tracker(values),
        needed_trust(values),
        faults,
        engine,
    )


def check_values_of_run(values: Mapping[str, Any]) -> dict[str, Any]:
    """Checks what can be checked of a whole config without loading torch; returns the keyword arguments of the env.

    Raises:
        LmGymError: naming the key, what was expected and what came.
    """
    evaluation = validated(EvaluationConfig, values["evaluation"], "evaluation")
    for name in ("total_timesteps", "checkpoint_every"):
        check_int(name, values[name], 1)
    check_int("seed", values["seed"], 0)
    check_int("seeds", values.get("seeds", 1), 1)
    on = FaultConfig.of(values).on
    if on and values.get("seeds", 1) > 1:
        raise InvalidArgumentError(f"`{on[0]}` must be null where `seeds` is above 1. Or: -m seed=0,1,2.")
    if _budget(values) != Budget() and values.get("seeds", 1) > 1:
        raise InvalidArgumentError("`budget` must be null where `seeds` is above 1: all seeds take total_timesteps.")
    if _engine(values).url is not None and values.get("seeds", 1) > 1:
        raise InvalidArgumentError("`engine.url` must be null where `seeds` is above 1. Or: -m seed=0,1,2.")
    find_tracker(values)
    settings = check_env(values, evaluation.split)
    agent = dict(values["agent"])
    if "_target_" not in agent:
        raise InvalidArgumentError("`agent` must be one of the files in conf/agent, got one without a `_target_`.")
    target = agent.pop("_target_")
    check_values({name: field.type for name, field in find_defaults(target).items()}, agent, "agent")
    check_values(find_types("lmgym.models.sampling.Sampler"), values["sampler"], "sampler")
    check_algorithm(target, agent)
    return settings


def check_faults(faults: FaultConfig, agent_class: type[Agent], agent_config: AgentConfig) -> None:
    """Raises `InvalidArgumentError` where an agent cannot be wrong as a config asks; nothing is loaded for it."""
    if not faults.on:
        return
    from agents.on_policy import OnPolicyAgent

    if not issubclass(agent_class, OnPolicyAgent):
        raise InvalidArgumentError(
            f"`{faults.on[0]}` must be null for an agent that does not learn from its own episodes in the loop of "
            f"lmgym, such as {agent_class.__name__}."
        )
    if faults.critic_values is None:
        return
    agent: Any = object.__new__(agent_class)  # which loads nothing, and knows whether it has a critic by its config
    agent.config = agent_config
    if not agent.uses_critic or agent_class.estimates is not OnPolicyAgent.estimates:
        raise InvalidArgumentError(
            f"`critic_values` must be null for an agent without a critic of states, such as {agent_class.__name__}."
        )


def _budget(values: Mapping[str, Any]) -> Budget:
    """What else ends a run; nothing in the config of an older one."""
    return validated(Budget, values.get("budget") or {}, "budget")


def _engine(values: Mapping[str, Any]) -> EngineConfig:
    """What samples the batches; the run itself in the config of an older one."""
    return validated(EngineConfig, values.get("engine") or {}, "engine")


def check_algorithm(target: str, agent: Mapping[str, Any]) -> None:
    """Checks the names of `agent.kwargs` that an algorithm of Stable-Baselines3 is given, without loading it.

    Args:
        target: import path of the agent's class. agent: its numbers.

    Raises:
        LmGymError: naming the key.
    """
    kwargs = agent.get("kwargs")
    if target != SB3_AGENT or not isinstance(kwargs, Mapping):
        return
    for package in ("stable_baselines3", "sb3_contrib"):
        parameters = find_parameters(package, str(agent.get("algorithm")))
        if parameters is not None:
            check_kwargs(kwargs, parameters, "agent.kwargs")


def check_env(values: Mapping[str, Any], graded_split: str) -> dict[str, Any]:
    """The keyword arguments of the env.

    Args:
        values: of a whole config. graded_split: the split that the run is graded on.

    Raises:
        LmGymError: naming the key, what was expected and what came.
    """
    task = full_name(values["task"])
    env = values["env"]
    if not isinstance(env, Mapping):
        raise InvalidArgumentError(f"`env` must be names with values, got {env!r}. A task is chosen by task=NAME.")
    for name in env:
        if name not in ENV_KEYS:
            raise unknown_name(f"env.{name}", name, ENV_KEYS)
    settings = {"task": task, **env, "device": values["device"]}
    try:
        for split in {env.get("split", "train"), graded_split}:
            Settings.of({**settings, "split": split}).resolve()
    except LmGymError as error:
        raise InvalidArgumentError(f"In `env`: {error}") from error
    return settings


def saved_config(directory: Path, trusted: Sequence[str] = ()) -> dict[str, Any]:
    """The config of a run directory, the code that it names imported.

    Args:
        directory: of the run.
        trusted: modules that it may name although they are not installed, as the user has said.

    Raises:
        LmGymError: if it is none, is damaged, or names other code.
    """
    values = read_values(directory)
    import_installed(values, directory, trusted)
    return values


def check_saved(directory: Path, values: dict[str, Any]) -> Plan:
    """Checks the config of a run directory, with what the command line has changed in it.

    Raises:
        RunFileError: as `check`, and naming the file.
    """
    try:
        return check(values)
    except LmGymError as error:
        raise RunFileError(f"{error}\n(That is of {directory / CONFIG_FILE} and the command line.)") from error


def build(plan: Plan, processes: Processes | None = None) -> Agent:
    """The agent in its env: loads the models.

    Args:
        plan: what to build. processes: that are to train the agent together; None is this one alone.

    Raises:
        InvalidArgumentError: for an agent that several processes cannot train.
    """
    import gymnasium as gym

    from agents.runs.sharing import check_shareable, share

    if processes is not None:
        check_shareable(plan.agent_class, plan.agent_config, processes.count)
        if plan.engine.url is not None and processes.count > 1:
            raise InvalidArgumentError("`engine.url` must be null where several processes train an agent.")
    rows = plan.agent_config.num_envs
    group = plan.agent_config.responses
    envs: Any = gym.make_vec(
        "lmgym/RLHF-v0", num_envs=rows, group_size=group, autoreset_mode="SameStep", **plan.settings
    )
    agent: Any = plan.agent_class(envs, plan.agent_config, seed=plan.seed, sampler=plan.sampler)
    if plan.faults.on:
        from agents.faults.make import add_faults

        add_faults(agent, plan.faults, plan.seed)
    if processes is not None and processes.count > 1:
        share(agent, processes)
    return agent
