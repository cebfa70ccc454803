"""Where the gap of a run's policy comes from: what `python -m agents.anatomy run=DIRECTORY` measures."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agents.runs.anatomy_picture import PICTURE, draw_anatomy
from agents.runs.anatomy_report import anatomy_table, examples_table
from agents.runs.config import validated
from agents.runs.directory import read_checkpoint, read_values
from agents.runs.grading import EVALUATION_EPISODES, graded_task
from agents.runs.plan import EvaluationConfig, Plan, build, check_saved, saved_config
from agents.runs.report import write_json
from lmgym.errors import InvalidArgumentError
from lmgym.files import read_json

if TYPE_CHECKING:
    from agents.agent import PolicyAgent
    from lmgym.episodes import Episodes
    from lmgym.tasks import Task

ANATOMY_FILE = "anatomy.json"
EXAMPLES = 8  # responses whose tokens are shown with their shares
MAX_ENTRIES = 1 << 28  # probabilities of sampled tokens: with a large vocabulary there are fewer episodes
MIN_SAMPLES = 8  # episodes a prompt, all the same


def read_or_measure(directory: Path, trusted: Sequence[str] = (), *, learning: bool = True) -> dict[str, Any] | None:
    """The anatomy of a run as plain numbers, as `anatomy.json` has it; measured and written where that is not there.

    Reading takes milliseconds. Measuring loads the checkpoint: the gap and the examples take 1 to 5 seconds of one
    core, more where episodes are sampled from a large vocabulary; the critic, the policy class and the estimator take 1
    to 20 more on tasks with up to 40,000 responses, and nothing on others (docs/anatomy.md).

    Args:
        directory: of the run; of its files nothing but `anatomy.json` is written. trusted: as for `saved_config`.
        learning: whether the critic, the policy class and the estimator are wanted.

    Returns:
        None of a run that cannot be taken apart: pi* is not known token by token, or the agent has no policy.

    Raises:
        LmGymError: naming the file of the run that is missing or damaged.
    """
    path = directory / ANATOMY_FILE
    manifest = read_checkpoint(directory)
    if path.is_file():
        found: dict[str, Any] = read_json(path)
        graded = asdict(validated(EvaluationConfig, read_values(directory)["evaluation"], "evaluation"))
        is_enough = found.get("learning") or not learning
        if is_enough and (found.get("checkpoint"), found.get("evaluation")) == (manifest.serial, graded):
            return found
    agent, plan = load(directory, {}, trusted)
    try:
        found = measure(plan, agent, read_checkpoint(directory).serial, learning=learning)
    except InvalidArgumentError:
        return None
    write_json(path, found)
    return found


def dissect_run(directory: Path, changed: Mapping[str, Any], trusted: Sequence[str]) -> float:
    """Takes a run apart, prints and draws what it finds, and returns V* - J.

    Args:
        directory: of the run; of its files nothing but `anatomy.json` and `anatomy.png` is written.
        changed: what `evaluation` has instead of what it was trained with, None for the same.
        trusted: as for `saved_config`.

    Raises:
        LmGymError: naming the file of the run that is missing or damaged, or why it cannot be taken apart.
    """
    agent, plan = load(directory, changed, trusted)
    found = measure(plan, agent, read_checkpoint(directory).serial)
    print(f"{anatomy_table(found)}\n\n{examples_table(found['examples'], sys.stdout.isatty())}")
    try:
        write_json(directory / ANATOMY_FILE, found)
        draw_anatomy(found, directory / PICTURE)
    except OSError as error:  # the tables are of use without
        print(f"{error.filename} could not be written: {error.strerror}", file=sys.stderr)
    else:
        print(f"\n{directory / PICTURE}")
    return float(found["gap"]["gap"]["mean"])


def load(directory: Path, changed: Mapping[str, Any], trusted: Sequence[str]) -> tuple[Any, Plan]:
    """The agent of a run as its newest checkpoint has it, and its plan.

    Args:
        directory: of the run. changed: what `evaluation` has instead of what it was trained with, None for the same.
        trusted: as for `saved_config`.

    Raises:
        LmGymError: naming the file of the run that is missing or damaged.
    """
    saved = saved_config(directory, trusted)
    saved["evaluation"] |= {name: value for name, value in changed.items() if value is not None}
    plan = check_saved(directory, saved)
    agent = build(plan)
    read_checkpoint(directory, agent.load)
    return agent, plan


def measure(plan: Plan, agent: Any, checkpoint: int, *, learning: bool = True) -> dict[str, Any]:
    """Takes the gap of an agent apart, on the prompts that its run is graded on.

    Args:
        plan: of the run. agent: as a checkpoint has it. checkpoint: the serial number of that.
        learning: whether the critic, the policy class and the estimator are wanted.

    Returns:
        `gap` (`GapAnatomy`), `critic` (`CriticError`), `policy_class` and `estimator`
        (`agents.runs.anatomy_learning`), each of the last three None where `unknown` says why; `examples`, responses
        with the share of every token; and what they are of.

    Raises:
        InvalidArgumentError: where pi* is not known token by token, and of an agent without a policy.
    """
    from agents.agent import PolicyAgent

    if not isinstance(agent, PolicyAgent):
        raise InvalidArgumentError(
            f"`run` must be of an agent that chooses token by token, got {agent.name}, which chooses whole responses."
        )
    task = graded_task(plan)
    split = plan.evaluation.split
    return {
        "agent": agent.name,
        "task": plan.settings["task"],
        "seed": plan.seed,
        "evaluation": asdict(plan.evaluation),
        "step": agent.num_timesteps,
        "checkpoint": checkpoint,
        "learning": learning,
        **_measure_gap(plan, agent, task, split),
        **_measure_learning(plan, agent, task, split, learning),
    }


def _measure_gap(plan: Plan, agent: PolicyAgent, task: Task, split: str) -> dict[str, Any]:
    """The gap and the examples."""
    import gymnasium as gym

    from agents.seeds import EVALUATION, torch_generator
    from lmgym import collect
    from lmgym.optimum.anatomy import dissect_episodes, dissect_exactly, gaps_of_episodes, solve_for_tokens

    found = dissect_exactly(agent.policy, task, split, sampler=plan.sampler)
    optimum = solve_for_tokens(task, split)
    assert optimum.policy is not None
    envs: Any = gym.make_vec("lmgym/RLHF-v0", num_envs=1, **_settings(plan, agent, task, split))
    prompts = len(envs.engine.prompts)
    samples = 1 if found is not None else _count_samples(plan, task, prompts)
    wanted = [envs.engine.prompts[i] for i in range(prompts) for _ in range(samples)]
    episodes = collect(envs, agent.policy, wanted, plan.sampler, torch_generator(plan.seed, EVALUATION))
    if found is None:
        found = dissect_episodes(episodes, agent.policy, optimum, task, sampler=plan.sampler)
    few = episodes[list(range(0, len(episodes), samples))[:EXAMPLES]]
    gaps = gaps_of_episodes(few, agent.policy, optimum.policy, task, plan.sampler)
    return {"gap": asdict(found), "examples": _show(few, gaps, envs.engine.lm)}


def _settings(plan: Plan, agent: PolicyAgent, task: Task, split: str) -> dict[str, Any]:
    """Keyword arguments of an env of the prompts that are graded."""
    own: dict[str, Any] = {name: plan.settings[name] for name in ("device", "dtype") if name in plan.settings}
    width = agent.envs.unwrapped.engine.width
    return {"task": task, "split": split, "max_prompt_tokens": width, **own}


def _count_samples(plan: Plan, task: Task, prompts: int) -> int:
    """How many episodes of each prompt are looked at."""
    if plan.evaluation.samples is not None:
        return max(plan.evaluation.samples, 2)
    vocabulary = task.reference("cpu").vocab_size
    affordable = MAX_ENTRIES // (task.max_new_tokens * vocabulary)
    return max(math.ceil(min(EVALUATION_EPISODES, affordable) / prompts), MIN_SAMPLES)


def _show(episodes: Episodes, gaps: Any, lm: Any) -> list[dict[str, Any]]:
    """Responses token by token, each with its share of the gap and its probability under the policy and under pi*."""
    examples = []
    for i in range(len(episodes)):
        prompt = episodes.prompt_ids[i][episodes.prompt_mask[i]].tolist()
        response = episodes.response_ids[i][episodes.response_mask[i]].tolist()
        columns = (gaps.shares[i], gaps.log_probs[i].exp(), gaps.optimal_log_probs[i].exp())
        numbers = zip(lm.pieces(prompt, response), *(x.tolist() for x in columns), strict=False)
        tokens = [dict(zip(("token", "share", "probability", "optimal"), row, strict=True)) for row in numbers]
        example = {"prompt": lm.decode_prompt(prompt), "score": episodes.scores[i].item(), "tokens": tokens}
        examples.append(example)
    return examples


def _measure_learning(plan: Plan, agent: PolicyAgent, task: Task, split: str, wanted: bool) -> dict[str, Any]:
    """What of the gap the critic, the policy class and the estimator explain, where that can be known."""
    unknown: dict[str, str] = {}
    found: dict[str, Any] = {"critic": None, "policy_class": None, "estimator": None, "unknown": unknown}
    reason = _why_unknown(plan, agent, task, split) if wanted else "It was not asked for."
    if reason is not None:
        unknown.update(dict.fromkeys(("critic", "policy_class", "estimator"), reason))
        return found
    import gymnasium as gym

    from agents.on_policy import OnPolicyAgent
    from agents.runs.anatomy_learning import Known, measure_class, measure_critic, measure_estimator
    from lmgym.optimum.tree import Tree

    known = Known.of(Tree.of(task, split), agent.policy, plan.sampler)  # type: ignore[arg-type]
    found["policy_class"] = measure_class(known)
    if not isinstance(agent, OnPolicyAgent):
        unknown.update(
            dict.fromkeys(("critic", "estimator"), "The agent is none of lmgym's that learn from their own responses.")
        )
        return found
    if agent.uses_critic:
        found["critic"] = measure_critic(known)
    else:
        unknown["critic"] = "The agent has no critic."
    if type(agent).update is not OnPolicyAgent.update:
        unknown["estimator"] = "The agent's step is not along the gradient of a loss."
        return found
    rows: dict[str, Any] = {"num_envs": agent.config.num_envs, "group_size": agent.config.responses}
    settings = _settings(plan, agent, task, split)
    envs: Any = gym.make_vec("lmgym/RLHF-v0", autoreset_mode="SameStep", **rows, **settings)
    found["estimator"] = measure_estimator(agent, envs, known, plan.seed)
    return found


def _why_unknown(plan: Plan, agent: PolicyAgent, task: Task, split: str) -> str | None:
    """Why nothing is known of what an agent learns by, or None."""
    from agents.policies.actor_critic import TrainablePolicy
    from lmgym.optimum.anatomy.find import is_small
    from lmgym.optimum.exact import MAX_RESPONSES

    checks: list[tuple[bool, Callable[[], str]]] = [
        (not is_small(task, split), lambda: f"The task has more than {MAX_RESPONSES:,} responses to its prompts."),
        (not isinstance(agent.policy, TrainablePolicy), lambda: "The agent has no policy of lmgym's that learns."),
        (plan.sampler.is_greedy(task.max_new_tokens - 1), lambda: "The policy is certain of every token."),
    ]
    return next((tell() for fails, tell in checks if fails), None)
