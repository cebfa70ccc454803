"""One policy of `python -m agents.worth`: labels, reward models, training, and what came of it.

Shapes: X prompts, S samples of each; N completions.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from agents.algorithms.reference import Reference
from agents.runs.completions import Request, Writer, write_completions
from agents.runs.grading import grade
from agents.runs.plan import Plan, build
from agents.runs.worth_plan import DISAGREEMENT, POLICY, Cell, WorthPlan
from agents.seeds import JUDGES, LABELS, stream_seed
from lmgym.envs.settings import Settings
from lmgym.errors import InvalidArgumentError
from lmgym.feedback.records import Record
from lmgym.feedback.scoring import score_records
from lmgym.reward_models.disagreement import measure_disagreement, most_disputed
from lmgym.reward_models.training import RewardResult, train_reward
from lmgym.tasks import Task

if TYPE_CHECKING:
    from agents.agent import Agent
    from lmgym.evaluation import Evaluation

METRICS = ("return", "score", "kl", "length")


class Stopped(Exception):
    """A stop was asked for in the midst of a cell."""


@dataclass(frozen=True)
class World:
    """The task as it is here: what is paid is the hidden score, which the annotators feel.

    Attributes:
        plan: what was asked for. task: with the hidden score as its reward. keep_going: False where a stop is asked.
    """

    plan: WorthPlan
    task: Task
    keep_going: Callable[[], bool]

    @classmethod
    def of(cls, plan: WorthPlan, keep_going: Callable[[], bool] = lambda: True) -> World:
        """The world of a plan."""
        settings = plan.training.settings
        own = Settings.of({**settings, "split": plan.training.evaluation.split}).resolve()
        return cls(plan, own if own.gold is None else replace(own, reward=own.gold, gold=None, optima={}), keep_going)

    def training(self, seed: int, reward: Any = None) -> Plan:
        """The training of a policy with a seed, against the hidden score or another reward."""
        task = self.task if reward is None else replace(self.task, reward=reward, reward_weights=None, optima={})
        training = self.plan.training
        return replace(training, settings={**training.settings, "task": task}, seed=seed)


def run_cell(world: World, cell: Cell) -> list[dict[str, Any]]:
    """What is measured of a cell: a row a round, the last one with what the other rounds lead to.

    Raises:
        Stopped: where a stop was asked for.
    """
    plan = world.training(cell.seed)
    if cell.labels is None:
        return [{"round": 1, **measured(grade(plan, train(world, plan)))}]
    reference = reference_of(plan)
    if cell.labels == 0:
        return [{"round": 1, **measured(grade(plan, reference))}]
    rows: list[dict[str, Any]] = []
    writer: Agent = reference
    records: list[Record] = []
    ensemble = None  # of the round before, where it chooses what is labelled
    for number in range(world.plan.rounds):
        wanted = cell.labels * (number + 1) // world.plan.rounds - len(records)
        records += itertools.islice(labels_of(world, writer, cell.seed, number, ensemble, wanted), wanted)
        result = learn_reward(world, reference, records, cell.seed)
        reward = result.reward()
        if cell.choice == DISAGREEMENT:
            ensemble = reward
        paid = world.training(cell.seed, reward)
        row: dict[str, Any] = {"round": number + 1, "labels": len(records)}
        policy = None
        if world.plan.writer == POLICY or number + 1 == world.plan.rounds:
            policy = writer = train(world, paid)
            row |= measured(grade(plan, policy))
        rows.append({**row, "reward": reward_measures(world, paid, result, reference, policy)})
    return rows


def reference_of(plan: Plan) -> Reference:
    """The task's reference, which learns nothing."""
    import gymnasium as gym

    envs: Any = gym.make_vec("lmgym/RLHF-v0", num_envs=1, **plan.settings)
    return Reference(envs.unwrapped, seed=plan.seed)


def labels_of(
    world: World, agent: Agent, seed: int, number: int, ensemble: Any = None, wanted: int = 0
) -> Iterator[Record]:
    """Yields judgements of new completions, by simulated annotators who feel the hidden score.

    Every prompt is asked before any is asked again, in an order of the seed's own. So fewer labels of a seed are the
    first ones of more. With an ensemble the order is another: of the first `pool` times `wanted` records, those about
    which it disagrees most come first. Without one there is no end.

    Args:
        world: with the plan. agent: who writes. seed: of the cell. number: of the round, from 0.
        ensemble: of reward models that choose what is judged; None judges all as it comes.
        wanted: how many judgements are to be taken.

    Raises:
        InvalidArgumentError: where all completions of a prompt are always the same text.
    """
    plan = world.plan
    name = str(plan.training.settings["task"])
    envs: Any = agent.envs.unwrapped
    writer = Writer(f"round-{number}", name, agent, envs)
    people = replace(plan.people, seed=stream_seed(seed, JUDGES, number))
    records = _completions(plan, writer, seed, number)
    if ensemble is not None:
        candidates = list(itertools.islice(records, plan.pool * wanted))
        spreads = measure_disagreement(candidates, ensemble)
        records = (candidates[index] for index in most_disputed(spreads, wanted))
    yield from people.judge(score_records(records, name))


def _completions(plan: WorthPlan, writer: Writer, seed: int, number: int) -> Iterator[Record]:
    """Yields records without a judgement and without end, pass after pass over the prompts."""
    rng = np.random.default_rng(stream_seed(seed, LABELS, number))
    for turn in itertools.count():
        order = rng.permutation(len(writer.envs.engine.prompts)).tolist()
        request = Request(
            ["reference"],  # not read here: the writer is at hand
            {},
            writer.task,
            plan.samples,
            split=writer.envs.engine.split,
            seed=int(rng.integers(2**32)),
        )
        wrote = False
        for record in write_completions(request, [writer], order=order):
            wrote = True
            yield replace(record, id=f"{record.id}-{number}-{turn}")
        if not wrote:
            raise InvalidArgumentError(
                f"`samples` must give texts to choose from, and the {plan.samples} of every prompt are the same."
            )


def learn_reward(world: World, reference: Agent, records: list[Record], seed: int) -> RewardResult:
    """A reward model, from the task's reference and from records."""
    envs: Any = reference.envs.unwrapped
    lm = envs.engine.lm

    def after_update(update: int, metrics: dict[str, float]) -> bool:
        return world.keep_going()

    result = train_reward(records, lm.model, lm.tokenizer, world.plan.reward, seed=seed, progress=after_update)
    if any(member.stopped for member in result.members):
        raise Stopped
    return result


def train(world: World, plan: Plan) -> Agent:
    """A policy that has been trained."""
    agent = build(plan)
    agent.learn(plan.total_timesteps, lambda step, metrics: world.keep_going())
    if not world.keep_going():
        raise Stopped
    return agent


def measured(evaluation: Evaluation) -> dict[str, Any]:
    """A grading by the hidden score, as plain numbers; `bound` is what V* is at least."""
    numbers = {name: interval for name, interval in evaluation.metrics.items() if name in METRICS}
    row: dict[str, Any] = {name: asdict(interval) for name, interval in numbers.items()}
    row["bound"] = None if evaluation.bound is None else asdict(evaluation.bound)
    return row


def reward_measures(
    world: World, paid: Plan, result: RewardResult, reference: Agent, policy: Agent | None
) -> dict[str, float | None]:
    """How a reward model orders completions of new prompts, of the reference and of the policy trained against it."""
    with_gold = replace(paid.settings["task"], gold=world.task.reward_function(paid.settings["device"]))
    plan = replace(paid, settings={**paid.settings, "task": with_gold})
    graded = {"reference": grade(plan, reference)}
    row: dict[str, float | None] = {"people": None if result.measures is None else result.measures.accuracy.mean}
    if policy is not None:
        graded["policy"] = grade(plan, policy)
        row["score"] = graded["policy"].metrics["score"].mean
    for name, evaluation in graded.items():
        episodes = evaluation.episodes
        assert episodes.gold_scores is not None
        count = len(episodes.prompt_index.unique())
        agreement = order_agreement(episodes.scores.view(count, -1), episodes.gold_scores.view(count, -1))
        row[name] = agreement.nanmean().item() if bool(agreement.isfinite().any()) else None
    return row


def order_agreement(scores: Tensor, gold: Tensor) -> Tensor:
    """(X,) share of each prompt's pairs that (X, S) scores order as gold does; NaN where gold tells none apart.

    Equal scores of two completions that gold tells apart count half.
    """
    first, second = torch.triu_indices(scores.shape[1], scores.shape[1], offset=1)
    signs = (scores[:, first] - scores[:, second]).sign()
    wanted = (gold[:, first] - gold[:, second]).sign()
    right = (signs * wanted + 1) / 2
    return torch.where(wanted != 0, right, torch.nan).double().nanmean(1)
