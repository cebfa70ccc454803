"""How a run is graded: its policy on the held-out prompts, against the reference and the optimum."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from agents.runs.cost import Cost
from agents.runs.plan import Plan
from agents.runs.recorder import grading_bar
from lmgym.envs.settings import Settings
from lmgym.errors import InvalidArgumentError

if TYPE_CHECKING:
    from agents.agent import Agent
    from lmgym.evaluation import Evaluation
    from lmgym.intervals import Interval
    from lmgym.tasks import StoredOptimum, Task

EVALUATION_EPISODES = 4096
MAX_ENUMERATED_RESPONSES = 100_000


def grade(
    plan: Plan, agent: Agent, *, envs: Any = None, samples: int | None = None, progress: bool = True
) -> Evaluation:
    """Evaluates an agent under the plan's sampler on the split that is held out.

    Every call draws the same numbers, those of the run's seed: before and after training share them, and runs of other
    seeds have others, so that a mean over seeds has no error that is common to all.

    Args:
        plan: of the run. agent: what is graded.
        envs: as `graded_envs` gives them, where several gradings share them.
        samples: episodes a prompt; None is as the plan says.
        progress: False shows no bar.
    """
    from agents.seeds import EVALUATION, torch_generator

    config = plan.evaluation
    envs = envs or graded_envs(plan)
    available = len(envs.engine.prompts)
    samples = samples or config.samples or samples_for(plan, envs, EVALUATION_EPISODES)
    with grading_bar(min(config.prompts or available, available) * samples, progress) as bar:
        return agent.evaluate(
            envs,
            samples=samples,
            prompts=config.prompts,
            sampler=plan.sampler,
            generator=torch_generator(plan.seed, EVALUATION),
            progress=bar.update,
        )


def graded_envs(plan: Plan) -> Any:
    """The MDP on the split that is held out."""
    import gymnasium as gym

    return gym.make_vec("lmgym/RLHF-v0", num_envs=1, **{**plan.settings, "split": plan.evaluation.split})


def samples_for(plan: Plan, envs: Any, episodes: int) -> int:
    """Episodes a prompt that make so many in all, or a few more."""
    return math.ceil(episodes / (plan.evaluation.prompts or len(envs.engine.prompts)))


def summarise(plan: Plan, before: Evaluation, after: Evaluation, cost: Cost, agent: Agent) -> dict[str, Any]:
    """`summary.json`: metrics before and after, what is known of the optimum, the share of the gain, and the cost."""
    from lmgym.evaluation import as_json
    from lmgym.scores import normalised

    scale = find_scale(plan, before, after)
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
            "best_response": find_best_response(plan, agent),
        },
        "solved_at": None,  # `agents.runs.along.solved_at`, of a run that was graded along the way
        "train_seconds": cost.seconds,
        "peak_memory_bytes": cost.peak_memory_bytes,
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


def graded_task(plan: Plan) -> Task:
    """The task, with the prompts alone that are graded: V* is of those."""
    split = plan.evaluation.split
    count = plan.evaluation.prompts
    settings = Settings.of({**plan.settings, "split": split})
    task = settings.resolve()
    if task.on_long != "error":
        from lmgym.envs.fitting import fit_prompts

        task = fit_prompts(task, task.reference(settings.device, settings.dtype), tell=False)  # the envs' own copy
    if count is not None and count < len(task.prompts[split]):
        task = replace(task, prompts={split: task.prompts[split][:count]}, optima={})
    return task


def find_best_response(plan: Plan, agent: Agent) -> float | None:
    """What the policy can earn at most, where it is certain of every token and that can be found out."""
    from lmgym.optimum import best_response

    task = graded_task(plan)
    if not (agent.deterministic or plan.sampler.is_greedy(task.max_new_tokens - 1)):
        return None
    try:
        return best_response(task, split=plan.evaluation.split, limit=MAX_ENUMERATED_RESPONSES).mean().item()
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


def find_scale(plan: Plan, before: Evaluation, after: Evaluation) -> Scale:
    """What is known of J_ref and V* on the prompts graded: stored, solved, or from the samples at hand."""
    from lmgym.intervals import Interval
    from lmgym.optimum import find_known
    from lmgym.scores import reference_return
    from lmgym.tasks import StoredOptimum

    task = graded_task(plan)
    split = plan.evaluation.split
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
