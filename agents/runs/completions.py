"""What `python -m agents.sample` does: has policies write completions of a task's prompts, for people to judge."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agents.runs.config import CONF
from agents.runs.directory import CONFIG_FILE, read_checkpoint
from agents.runs.plan import Plan, build, check, check_saved, saved_config
from agents.runs.tasks import full_name
from agents.runs.trust import read_config
from lmgym.errors import InvalidArgumentError, unknown_name
from lmgym.feedback.records import Completion, Record, Skip
from lmgym.feedback.rendering import render_completion
from lmgym.ranges import Count, CountOrZero, check_fields

if TYPE_CHECKING:
    from agents.agent import Agent
    from lmgym.envs.prompts import Prompt
    from lmgym.envs.vector import RLHFVectorEnv
    from lmgym.models.sampling import Sampler

DEFAULT_TASK = "reviews"
BEST_OF_N = "best_of_n"
BATCH_SIZE = 256  # episodes that are sampled at once


@dataclass(frozen=True)
class Request:
    """What is to be written.

    Attributes:
        task: by name; None is that of the first run among the policies, or `reviews`.
        policies: agents by name ("best_of_n:16" chooses among 16), or run directories.
        sampler: how agents draw tokens, given a policy's logits; a run draws as it was trained.
        samples: completions a prompt, of each policy.
        prompts: how many prompts, the first of the split; None is all.
        split: of the task's prompts. seed: of the tokens drawn. device: where.
    """

    policies: Sequence[str]
    sampler: Mapping[str, Any]
    task: str | None = None
    samples: Count = 4
    prompts: Count | None = None
    split: str = "train"
    seed: CountOrZero = 0
    device: str = "auto"

    def __post_init__(self) -> None:
        check_fields(self)
        if not self.policies:
            raise InvalidArgumentError("`policies` must name an agent or a run directory at least, got none.")
        for name in self.policies:
            check_policy(name)


def check_policy(name: object) -> None:
    """Raises `InvalidArgumentError` for what names neither an agent nor a run directory."""
    if not isinstance(name, str):
        raise InvalidArgumentError(f"`policies` must be names of agents or run directories, got {name!r}.")
    if is_run(name):
        return
    agent, colon, number = name.partition(":")
    known = sorted(path.stem for path in (CONF / "agent").glob("*.yaml"))
    if "/" in name or Path(name).exists():
        raise InvalidArgumentError(f"`policies` must be agents or run directories, and {name!r} has no {CONFIG_FILE}.")
    if agent not in known:
        raise unknown_name("policies", agent, known)
    if colon and not (agent == BEST_OF_N and number.isdigit() and int(number) > 0):
        raise InvalidArgumentError(f"`policies` must be a name alone, or {BEST_OF_N}:16, got {name!r}.")


def is_run(name: str) -> bool:
    """Whether a name is that of a run directory."""
    return (Path(name) / CONFIG_FILE).is_file()


def check_sampler(values: dict[str, Any], is_given: bool) -> None:
    """Raises `InvalidArgumentError` where a sampler is given for a run."""
    policies = values["policies"]
    runs = [name for name in ([policies] if isinstance(policies, str) else policies) if is_run(str(name))]
    if is_given and runs:
        raise InvalidArgumentError(
            f"`sampler` must be left out where `policies` has a run, which draws as it was trained: {runs[0]}."
        )


# -- who writes ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Writer:
    """A policy that writes completions.

    Attributes:
        name: as it was given. task: the name of its task.
        agent: what chooses. envs: the MDP that it acts in, on the prompts wanted.
    """

    name: str
    task: str
    agent: Agent
    envs: RLHFVectorEnv


def load_writers(request: Request, trusted: Sequence[str] = ()) -> list[Writer]:
    """The policies of a request, all on one task's prompts.

    Args:
        request: what is to be written. trusted: modules that the runs among the policies may name.

    Raises:
        LmGymError: for a run that is damaged, or whose prompts are not those of the others.
    """
    saved = {name: saved_config(Path(name), trusted) for name in request.policies if is_run(name)}
    for values in saved.values():
        values["device"] = request.device
    tasks = [request.task, *(values["task"] for values in saved.values()), DEFAULT_TASK]
    task = full_name(next(name for name in tasks if name is not None))
    plans = {}
    for name in request.policies:
        plans[name] = check_saved(Path(name), saved[name]) if name in saved else check(_values(request, name, task))
    writers = [_load_writer(name, plan, request.split, is_saved=name in saved) for name, plan in plans.items()]
    for writer in writers:
        if _texts(writer, request) != _texts(writers[0], request):
            raise InvalidArgumentError(
                f"`policies` must answer the same prompts, and {writer.name!r} ({writer.task}) has others than "
                f"{writers[0].name!r} ({writers[0].task})."
            )
    return writers


def _values(request: Request, name: str, task: str) -> dict[str, Any]:
    """The config of a run that would train an agent, which then stays as it is at first."""
    agent, _, number = name.partition(":")
    values = read_config(CONF / "agent" / f"{agent}.yaml")
    if number:
        values["n"] = int(number)
    return {
        "task": task,
        "seed": request.seed,
        "device": request.device,
        "total_timesteps": 1,
        "checkpoint_every": 1,
        "env": {"split": request.split},
        "agent": values,
        "sampler": dict(request.sampler),
        "evaluation": {"split": request.split},
    }


def _load_writer(name: str, plan: Plan, split: str, *, is_saved: bool) -> Writer:
    import gymnasium as gym

    agent = build(plan)
    if is_saved:
        read_checkpoint(Path(name), agent.load)
    envs: Any = gym.make_vec("lmgym/RLHF-v0", num_envs=1, **{**plan.settings, "split": split})
    return Writer(name, str(plan.settings["task"]), agent, envs.unwrapped)


def prompts_of(envs: RLHFVectorEnv, request: Request) -> list[Prompt]:
    """The prompts of a request: the first of the split."""
    available = envs.engine.prompts
    count = len(available) if request.prompts is None else min(request.prompts, len(available))
    return [available[i] for i in range(count)]


def _texts(writer: Writer, request: Request) -> list[str]:
    return [prompt.text for prompt in prompts_of(writer.envs, request)]


# -- what they write -------------------------------------------------------------------------------------------------


def write_completions(
    request: Request,
    writers: Sequence[Writer],
    progress: Callable[[int], object] | None = None,
    order: Sequence[int] | None = None,
) -> Iterator[Record]:
    """Yields a record a prompt, its completions those of one policy after the other, each text once.

    Args:
        request: what is to be written. writers: its policies.
        progress: called with the number of completions of every batch that has been sampled.
        order: of the prompts, as indices; None is as they stand.

    Yields:
        Records without a judgement, whose columns have the prompt's own, its index, and the names of task and split. A
        prompt that got one text alone is left out: there is nothing to choose.
    """
    from agents.seeds import COMPLETIONS, torch_generator

    generators = [torch_generator(request.seed, COMPLETIONS, i) for i in range(len(writers))]
    prompts = prompts_of(writers[0].envs, request)
    chosen = range(len(prompts)) if order is None else order
    size = max(1, BATCH_SIZE // request.samples)
    for start in range(0, len(chosen), size):
        rows = chosen[start : start + size]
        written: list[list[Completion]] = [[] for _ in rows]
        for writer, generator in zip(writers, generators, strict=True):
            for found, more in zip(written, _write(writer, rows, request.samples, generator), strict=True):
                found += more
            if progress is not None:
                progress(len(rows) * request.samples)
        for row, completions in zip(rows, written, strict=True):
            different = {completion.text: completion for completion in reversed(completions)}  # the first of each text
            if len(different) > 1:
                yield _record(prompts[row], tuple(reversed(different.values())), writers[0].task, request.split)


def _record(prompt: Prompt, completions: tuple[Completion, ...], task: str, split: str) -> Record:
    columns = {**getattr(prompt.text, "columns", {}), "task": task, "split": split, "prompt_index": prompt.index}
    return Record(str(prompt.text), completions, id=f"{task}-{split}-{prompt.index}", columns=columns)


def _write(writer: Writer, rows: Sequence[int], samples: int, generator: Any) -> list[list[Completion]]:
    """Completions of some prompts by one policy, `samples` each."""
    prompts = [writer.envs.engine.prompts[row] for row in rows]
    repeated = [prompt for prompt in prompts for _ in range(samples)]
    episodes = writer.agent.respond(writer.envs, repeated, generator=generator)
    responses = [
        ids[chosen].tolist() for ids, chosen in zip(episodes.response_ids, episodes.response_mask, strict=True)
    ]
    texts = writer.envs.engine.lm.completions([prompt.ids for prompt in repeated], responses)
    end = writer.envs.engine.end_rule
    sampler = in_words(writer.agent.sampler)
    written = []
    for text, response, log_prob in zip(texts, responses, episodes.log_probs.sum(1).tolist(), strict=True):
        ended = bool(end.is_end_by_eos(response[-1], len(response) - 1))
        known = log_prob if writer.agent.knows_log_probs else None
        written.append(Completion(text, policy=writer.name, sampler=sampler, log_prob=known, ended=ended))
    return [written[i : i + samples] for i in range(0, len(written), samples)]


def in_words(sampler: Sampler) -> str:
    """The numbers of a sampler that are not those of the policy's own distribution: "temperature=0.7, top_p=0.9"."""
    changed = [f"{f.name}={getattr(sampler, f.name)}" for f in fields(sampler) if getattr(sampler, f.name) != f.default]
    return ", ".join(changed) or "temperature=1"


# -- samples of a reference ------------------------------------------------------------------------------------------


def sample_texts(task: str, count: int, seed: int, device: str, tokenizer: Any) -> list[str]:
    """Whole texts, prompt and completion, of the reference of a task on its training prompts.

    Args:
        task: by its whole name. count: how many at least, as many of each prompt; of the first prompts alone where
            there are more. seed: of the tokens drawn. device: where. tokenizer: whose EOS ends a text that ended.
    """
    from agents.seeds import REFERENCE_SAMPLES, torch_generator

    request = Request(["reference"], read_config(CONF / "sampler" / "policy.yaml"), task, device=device, seed=seed)
    (writer,) = load_writers(request)
    prompts = min(count, len(writer.envs.engine.prompts))
    samples = -(-count // prompts)
    generator = torch_generator(seed, REFERENCE_SAMPLES)
    size = max(1, BATCH_SIZE // samples)
    texts = []
    for start in range(0, prompts, size):
        rows = range(start, min(start + size, prompts))
        for row, completions in zip(rows, _write(writer, rows, samples, generator), strict=True):
            record = Record(str(writer.envs.engine.prompts[row].text), tuple(completions), Skip())
            for completion in completions:
                rendered = render_completion("prompts", record, completion, tokenizer, f"prompt {row}")
                texts.append(f"{record.prompt}{rendered.text}")
    return texts
