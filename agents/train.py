"""Trains an agent on a task: `python -m agents.train task=keyword-8 agent=ppo seed=1`.

A run directory holds `config.yaml`, `versions.json`, `metrics.jsonl`, TensorBoard files, `checkpoint/` (the actor loads
with `AutoModelForCausalLM`), `summary.json`, `samples.json` and `curves.png`. Ctrl-C leaves a checkpoint, and
`resume=<run directory>` goes on from it to the same curve.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import math
import platform
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it without a word, until there is something to take back

import hydra
import yaml
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

import lmgym
from agents.runs.command_line import run_command, shell_command
from agents.runs.config import validated
from agents.runs.directory import (
    CONFIG_FILE,
    changes_since,
    empty_again,
    new_run,
    read_checkpoint,
    read_values,
    resumed_run,
    write_config,
)
from agents.runs.help_page import help_page
from agents.runs.inputs import notes_of
from agents.runs.picture import curves
from agents.runs.recorder import METRICS_FILE, Recorder, grading_bar, read_rows
from agents.runs.report import samples_table, table, write_json
from agents.runs.saving import Saver
from agents.runs.signals import Interrupt, Stoppable
from agents.runs.surroundings import prepare_process
from agents.runs.sweeps import given, register
from agents.runs.trust import import_installed, needed_trust, trust_argument, trusted_modules
from lmgym.envs.settings import Settings
from lmgym.errors import InvalidArgumentError, LmGymError, check_int
from lmgym.files import RunFileError, read_json

if TYPE_CHECKING:
    from agents.agent import Agent, AgentConfig
    from lmgym.evaluation import Evaluation
    from lmgym.intervals import Interval
    from lmgym.tasks import StoredOptimum, Task

register()
EVALUATION_EPISODES = 4096
_FEW_RESPONSES = 100_000  # that may be written down after a run
CONF = Path(__file__).parents[1] / "conf"
RESUMABLE = ("total_timesteps", "checkpoint_every")  # and evaluation.*
PACKAGES = ("torch", "transformers", "gymnasium", "numpy", "hydra-core", "tokenizers")


@dataclass(frozen=True)
class EvaluationConfig:
    """How a policy is graded, before and after."""

    split: str = "test"
    samples: int | None = None  # episodes a prompt; null is as many as make 4,096 in all
    prompts: int | None = None  # how many prompts; null is all of the split

    def __post_init__(self) -> None:
        for name in ("samples", "prompts"):
            if getattr(self, name) is not None:
                check_int(f"evaluation.{name}", getattr(self, name), 1)


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
    trust: tuple[str, ...] = ()  # modules that have to be named again when it is resumed or graded


def plain(cfg: DictConfig) -> dict[str, Any]:
    """The values of a composed config, interpolations resolved."""
    return OmegaConf.to_container(cfg, resolve=True)  # type: ignore[return-value]


def check(cfg: DictConfig | dict[str, Any]) -> Plan:
    """Checks a whole config. One that was read from a run directory goes through `import_installed` first.

    Raises:
        LmGymError: naming the key, what was expected and what came.
    """
    values: dict[str, Any] = plain(cfg) if isinstance(cfg, DictConfig) else cfg
    evaluation = validated(EvaluationConfig, values["evaluation"], "evaluation")
    for name in ("total_timesteps", "checkpoint_every"):
        check_int(name, values[name], 1)
    check_int("seed", values["seed"], 0)
    settings = {**values["task"], "device": values["device"]}
    try:
        for split in {settings["split"], evaluation.split}:
            Settings.of({**settings, "split": split}).resolve()
    except LmGymError as error:
        raise InvalidArgumentError(f"In `task`: {error}") from error
    agent = dict(values["agent"])  # from here on torch is loaded
    import agents.agent

    if "_target_" not in agent:
        raise InvalidArgumentError("`agent` must be one of the files in conf/agent, got one without a `_target_`.")
    target = agent.pop("_target_")
    try:
        agent_class: Any = hydra.utils.get_class(target)
    except (ImportError, ValueError) as error:
        raise InvalidArgumentError(f"`agent._target_` must be a class that can be imported: {error}") from error
    if not (isinstance(agent_class, type) and issubclass(agent_class, agents.agent.Agent)):
        raise InvalidArgumentError(f"`agent._target_` must be an agent (`agents.agent.Agent`), got {target!r}.")
    agent_config = validated(agent_class.Config, agent, "agent")
    from lmgym.models.sampling import Sampler
    from lmgym.models.sharing import resolve_device

    sampler = validated(Sampler, values["sampler"], "sampler")
    resolve_device(settings["device"])
    return Plan(
        settings,
        agent_class,
        agent_config,
        sampler,
        evaluation,
        values["total_timesteps"],
        values["seed"],
        values["checkpoint_every"],
        needed_trust(values),
    )


def build(plan: Plan) -> Agent:
    """The agent in its env: loads the models."""
    import gymnasium as gym

    rows = plan.agent_config.num_envs
    group = plan.agent_config.responses
    envs: Any = gym.make_vec(
        "lmgym/RLHF-v0", num_envs=rows, group_size=group, autoreset_mode="SameStep", **plan.settings
    )
    return plan.agent_class(envs, plan.agent_config, seed=plan.seed, sampler=plan.sampler)


def grade(plan: Plan, agent: Agent) -> Evaluation:
    """Evaluates an agent under the plan's sampler on the split that is held out.

    Every call draws the same numbers, those of the run's seed: before and after training share
    them, and runs of other seeds have others, so that a mean over seeds has no error that is common to all.
    """
    import gymnasium as gym

    from agents.seeds import EVALUATION, torch_generator

    envs: Any = gym.make_vec("lmgym/RLHF-v0", num_envs=1, **{**plan.settings, "split": plan.evaluation.split})
    config, generator = plan.evaluation, torch_generator(plan.seed, EVALUATION)
    samples = config.samples or math.ceil(EVALUATION_EPISODES / (config.prompts or len(envs.engine.prompts)))
    count = min(config.prompts or len(envs.engine.prompts), len(envs.engine.prompts))
    with grading_bar(count * samples) as bar:
        return agent.evaluate(
            envs,
            samples=samples,
            prompts=config.prompts,
            sampler=plan.sampler,
            generator=generator,
            progress=bar.update,
        )


def summarise(plan: Plan, before: Evaluation, after: Evaluation, train_seconds: float, agent: Agent) -> dict[str, Any]:
    """`summary.json`: metrics before and after, what is known of the optimum, the share of the gain, and the cost."""
    from lmgym.evaluation import as_json
    from lmgym.scores import normalised

    scale = _scale(plan, before, after)
    optimum = scale.optimum
    rows = {}
    for name, evaluation in (("before", before), ("after", after)):
        rows[name] = as_json(evaluation.metrics)
        share = None if optimum is None else normalised(evaluation.metrics["return"], scale.reference, optimum)
        rows[name]["normalised"] = None if share is None else vars(share)
    return {
        **rows,
        "optimum": {
            "reference": vars(scale.reference),
            "lower": None if scale.lower is None else vars(scale.lower),
            "upper": None if scale.upper is None else vars(scale.upper),
            "value": None if optimum is None else optimum.value,
            "unknown": scale.unknown,
            "method": None if optimum is None else optimum.method,
            "assumption": None if optimum is None else optimum.assumption or None,
            "best_response": _best_response(plan, agent),
        },
        "train_seconds": train_seconds,
        "total_timesteps": agent.num_timesteps,
        "forward_tokens": agent.tokens.forward,
        "backward_tokens": agent.tokens.backward,
        "agent": agent.name,
        "task": plan.settings["task"],
        "replaced": _replaced(plan.settings),
        "seed": plan.seed,
    }


def _replaced(settings: dict[str, Any]) -> dict[str, str]:
    """What stands in place of the task's own model, reward and prompts, in words."""
    replaced = {}
    for name in ("model", "reward", "prompts"):
        value = settings.get(name)
        if value is not None:
            replaced[name] = value if isinstance(value, str) else f"({len(value)} given)"
    return replaced


def _graded(plan: Plan) -> Task:
    """The task, with the prompts alone that are graded: V* is of those."""
    split, count = plan.evaluation.split, plan.evaluation.prompts
    settings = Settings.of({**plan.settings, "split": split})
    task = settings.resolve()
    if settings.on_long != "error":
        from lmgym.envs.fitting import fit_prompts

        task = fit_prompts(task, task.reference("cpu"), settings.on_long)
    if count is not None and count < len(task.prompts[split]):
        task = replace(task, prompts={split: task.prompts[split][:count]}, optima={})
    return task


def _best_response(plan: Plan, agent: Agent) -> float | None:
    """What the policy can earn at most, where it is certain of every token and that can be found out."""
    from lmgym.optimum import best_response

    task = _graded(plan)
    if not (agent.deterministic or plan.sampler.is_greedy(task.max_new_tokens - 1)):
        return None
    try:
        return best_response(task, split=plan.evaluation.split, limit=_FEW_RESPONSES).mean().item()
    except InvalidArgumentError:
        return None


@dataclass(frozen=True)
class Scale:
    """What a run is graded against: the two ends of the scale on which the reference is 0 and the optimum 1.

    Attributes:
        reference: J_ref, exact or stored; where neither is known, as this run measured it before training.
        lower: V* is at least that. upper: at most. None where nothing is known.
        unknown: why there is no lower bound, or None.
        optimum: the same as numbers; None where V* is not known to be above the reference.
    """

    reference: Interval
    lower: Interval | None
    upper: Interval | None
    unknown: str | None
    optimum: StoredOptimum | None


def _scale(plan: Plan, before: Evaluation, after: Evaluation) -> Scale:
    """What is known of J_ref and V* on the prompts graded: stored, solved, or from the samples at hand."""
    from lmgym.intervals import Interval
    from lmgym.optimum import find_known
    from lmgym.scores import reference_return
    from lmgym.tasks import StoredOptimum

    task, split = _graded(plan), plan.evaluation.split
    stored = find_known(task, split)
    if stored is not None:
        lower, upper = (None if v is None else Interval.point(v) for v in (stored.lower, stored.upper))
        optimum = stored if stored.value > stored.reference else None
        return Scale(reference_return(stored), lower, upper, None, optimum)
    reference = before.metrics["return"]
    bounds = [e.bound for e in (before, after) if e.bound is not None]
    if not bounds:
        return Scale(reference, None, None, before.no_bound, None)
    lower = max(bounds, key=lambda bound: bound.mean)
    optimum = None
    if lower.mean > reference.high:  # a gain that is not noise
        half_width = reference.high - reference.mean
        optimum = StoredOptimum("samples", lower.mean, lower.mean, None, reference.mean, half_width)
    return Scale(reference, lower, None, None, optimum)


def response_of(episodes: Any, row: int) -> list[int]:
    """Token ids of a response."""
    return episodes.response_ids[row][episodes.response_mask[row]].tolist()


def samples(lm: Any, before: Evaluation, after: Evaluation, count: int = 10) -> list[dict[str, Any]]:
    """The first response to each of a few prompts, before training and after; of prompts where they differ, if any."""
    every = len(before.episodes) // max(1, len(before.episodes.prompt_index.unique()))
    firsts = range(0, len(before.episodes), every)
    changed = [i for i in firsts if response_of(before.episodes, i) != response_of(after.episodes, i)]
    same = [i for i in firsts if i not in changed]
    rows = []
    for i in sorted([*changed, *same][:count]):
        row: dict[str, Any] = {}
        for name, episodes in (("before", before.episodes), ("after", after.episodes)):
            prompt = episodes.prompt_ids[i][episodes.prompt_mask[i]].tolist()
            response = response_of(episodes, i)
            row["prompt"] = lm.decode_prompt(prompt)
            row[name] = lm.completions([prompt], [response])[0]
            row[f"{name}_score"] = episodes.scores[i].item()
        rows.append(row)
    return rows


def train(plan: Plan, directory: Path, resume: bool, notes: dict[str, Any] | None = None) -> int:
    """Trains, evaluates and reports; returns the exit code, 130 after Ctrl-C.

    Args:
        plan: what to do. directory: of the run. resume: goes on from its checkpoint.
        notes: that its checkpoints carry, as `notes_of` gives them of its config; None reads that there.
    """
    from agents.algorithms.reference import Reference

    agent = build(plan)
    if notes is None:
        notes = notes_of(read_values(directory)) if (directory / CONFIG_FILE).is_file() else {}
    command = shell_command("agents.train", f"resume={directory}") + trust_argument(plan.trust)
    saver = Saver(agent, directory, plan.checkpoint_every, notes, command)
    if resume:
        saver.load()
    try:
        before = grade(plan, Reference(agent.envs))
        total = max(plan.total_timesteps, agent.num_timesteps)  # the last batch of a run may pass its end
        with (
            Recorder(directory, total, agent.num_timesteps if resume else None) as recorder,
            Interrupt() as stop,
        ):
            train_seconds = saver.learn(plan.total_timesteps, recorder, stop)
        if stop.asked and agent.num_timesteps < plan.total_timesteps:
            print(f"Stopped after {agent.num_timesteps:,} tokens. Go on with: {command}")
            return 130
        after = grade(plan, agent)
        summary = summarise(plan, before, after, train_seconds, agent)
        rows = samples(agent.envs.engine.lm, before, after)
        write_json(directory / "summary.json", summary)
        write_json(directory / "samples.json", rows)
        curves(directory / METRICS_FILE, summary, directory / "curves.png")
    except KeyboardInterrupt:
        print(f"\nStopped at once. {saver.what_is_saved()}", file=sys.stderr)
        raise
    print(f"\n{samples_table(rows)}\n\n{table(summary)}\n\n{directory / 'curves.png'}")
    return 0


def versions() -> dict[str, str]:
    """What ran: Python and the packages that matter."""
    found = {"python": platform.python_version(), "lmgym": lmgym.__version__}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # on the path, and not installed
            found[name] = importlib.metadata.version(name)
    return found


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


def with_overrides(values: dict[str, Any], overrides: list[str]) -> dict[str, Any]:
    """The config of a run that goes on, with what may change then.

    Args:
        values: of its config.yaml. overrides: `key=value` each, as on the command line.

    Raises:
        InvalidArgumentError: if another key is to change.
    """
    values = {**values, "evaluation": dict(values["evaluation"])}
    for override in overrides:
        key, _, value = override.partition("=")
        if key in ("resume", "trust"):
            continue
        if key not in RESUMABLE and not key.startswith("evaluation."):
            raise InvalidArgumentError(
                f"`{key}` must be as it was when the run began: with `resume`, only {', '.join(RESUMABLE)} and "
                "evaluation.* may change."
            )
        section = values["evaluation"] if key.startswith("evaluation.") else values
        section[key.removeprefix("evaluation.")] = yaml.safe_load(value)
    return values


def begin(cfg: DictConfig, directory: Path) -> int:
    """A new run; returns its exit code.

    Raises:
        LmGymError: for a config that cannot be, or a directory that holds a run; nothing is left behind.
    """
    with empty_again(directory):
        values = plain(cfg)
        plan = check(values)
        with new_run(directory, values):
            write_json(directory / "versions.json", versions())
            return train(plan, directory, resume=False, notes=notes_of(values))


def go_on(directory: Path, overrides: list[str], trusted: Sequence[str]) -> int:
    """A run that goes on; returns its exit code.

    Args:
        directory: of the run. overrides: as for `with_overrides`. trusted: as for `saved_config`.

    Raises:
        LmGymError: for one that cannot.
    """
    with resumed_run(directory):
        saved = saved_config(directory, trusted)
        values = with_overrides(saved, overrides)
        notes = notes_of(saved)
        changed = changes_since(directory, read_checkpoint(directory), notes)
        if (directory / METRICS_FILE).exists():
            read_rows(directory / METRICS_FILE)  # a damaged row is named before anything loads
        if changed is not None:
            raise RunFileError(f"{changed} Put back what was there, or begin a new run.")
        plan = check_saved(directory, values)
        write_config(directory, values)
        return train(plan, directory, resume=True, notes=notes)


def output_directory() -> str:
    """Where Hydra puts this run: as it is, for Hydra has written it into its config as if "${" were its own."""
    return str(OmegaConf.to_container(HydraConfig.get().runtime, resolve=False)["output_dir"])  # type: ignore[call-overload, index]


def refuse(error: LmGymError, directory: Path) -> NoReturn:
    """Ends a run that cannot be, in a line; of a multirun that run alone."""
    if HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN:
        print(f"{directory.name}: {error}", file=sys.stderr, flush=True)
        raise error
    sys.exit(str(error))


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="train")
def main(cfg: DictConfig) -> float:
    """Hydra's entry: checks, then trains.

    Returns:
        J of the trained policy, which sweepers such as Optuna's maximise.
    """
    prepare_process()  # of a process of its own, which a launcher may have made
    resume = cfg.resume is not None
    directory = Path(cfg.resume if resume else output_directory())
    try:
        with Stoppable():
            if resume:
                overrides = given(HydraConfig.get()) if HydraConfig.initialized() else []
                code = go_on(directory, overrides, trusted_modules(cfg.get("trust")))
            else:
                code = begin(cfg, directory)
    except KeyboardInterrupt:
        code = 130
    except LmGymError as error:
        refuse(error, directory)
    if code:
        sys.exit(code)
    return float(read_json(directory / "summary.json")["after"]["return"]["mean"])


if __name__ == "__main__":
    from agents.train import main  # under its own name, by which processes of a multirun find what they run

    if {"--help", "-h"} & set(sys.argv[1:]):
        print(help_page(CONF, sys.argv[1:]))
    else:
        run_command(main)
