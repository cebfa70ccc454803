"""Evaluation along the way: a learning curve of J on held-out prompts, and when a task counts as solved."""

from __future__ import annotations

import contextlib
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from agents.runs.grading import grade, graded_envs, graded_task, samples_for
from agents.runs.plan import Plan
from agents.runs.recorder import Recorder, read_rows

if TYPE_CHECKING:
    from agents.agent import Agent
    from lmgym.intervals import Interval
    from lmgym.tasks import StoredOptimum

GRADED = "eval/return"  # the metric that every grading has
EPISODES_ALONG = 1024  # of a grading along the way, all prompts together
SOLVED = (0.5, 0.8, 0.9, 0.95)  # shares of the gain


class Along:
    """Grades an agent on the held-out split every so many env steps while it trains.

    Every grading draws the same numbers, so that two of them differ by what was learned between them. Training does
    not notice: the generators of the process and the tokens that the agent has counted are afterwards what they were.
    The last grading is not among them, for a run that ends is graded anyway.

    Args:
        plan: of the run; `evaluation.every` is not null.
        agent: what is graded.
        recorder: where the rows go. Rows that are there already, of a run that goes on, are not written again.
    """

    def __init__(self, plan: Plan, agent: Agent, recorder: Recorder) -> None:
        from lmgym.optimum import find_known

        assert plan.evaluation.every is not None
        self._plan = plan
        self._agent = agent
        self._recorder = recorder
        self._every = plan.evaluation.every
        self._graded_at = max((row["step"] for row in read_rows(recorder.path) if GRADED in row), default=0)
        self._envs = graded_envs(plan)
        self._samples = plan.evaluation.samples_along
        if self._samples is None:  # at least two, so that an interval is of these prompts
            self._samples = max(2, samples_for(plan, self._envs, EPISODES_ALONG))
        known = find_known(graded_task(plan), plan.evaluation.split)
        self._optimum = known if known is not None and known.value > known.reference else None

    def is_due(self, step: int) -> bool:
        """Whether a multiple of `every` has been reached since the last grading, and the run goes on from here."""
        return step // self._every > self._graded_at // self._every and step < self._plan.total_timesteps

    def grade(self, step: int, seconds: float) -> None:
        """Grades the agent as it is now, and writes the row.

        Args:
            step: env steps so far. seconds: of training so far.
        """
        with _unnoticed(self._agent):
            evaluation = grade(self._plan, self._agent, envs=self._envs, samples=self._samples, progress=False)
        metrics = dict(evaluation.metrics)
        if self._optimum is not None:
            metrics["normalised"] = share_of(metrics["return"], self._optimum)
        values: dict[str, float] = {}
        for name, interval in metrics.items():
            values |= {f"eval/{name}": interval.mean}
            values |= {f"eval/{name}/low": interval.low, f"eval/{name}/high": interval.high}
        self._recorder.record(step, values | self._agent.tokens.metrics(), seconds=seconds)
        self._graded_at = step


def share_of(value: Interval, optimum: StoredOptimum) -> Interval:
    """The share of the gain on the scale of a known optimum."""
    from lmgym.scores import normalised, reference_return

    return normalised(value, reference_return(optimum), optimum)


@contextlib.contextmanager
def _unnoticed(agent: Agent) -> Iterator[None]:
    """Puts back what a grading may move: the process's generators (of a reward, or of SB3), and the count of tokens."""
    from agents.sb3.randomness import GeneratorStates

    generators = GeneratorStates.read()
    python = random.getstate()
    forward = agent.tokens.forward
    backward = agent.tokens.backward
    try:
        yield
    finally:
        agent.tokens.forward = forward
        agent.tokens.backward = backward
        random.setstate(python)
        generators.write()


def solved_at(rows: Sequence[Mapping[str, Any]], summary: Mapping[str, Any]) -> dict[str, Any] | None:
    """When each share of the gain was reached first, by the gradings along the way and the last one.

    Args:
        rows: of `metrics.jsonl`. summary: of the run.

    Returns:
        By share, such as "0.9": `step`, `seconds` of training and `forward_tokens`, or None where it was not reached.
        None where there were no gradings along the way, or V* is not known.
    """
    scale = summary["optimum"]
    graded = [row for row in rows if row.get(GRADED) is not None]
    if not graded or scale["value"] is None:
        return None
    points = [(row[GRADED], row["step"], row["time"], row.get("cost/forward_tokens")) for row in graded]
    last = [summary[name] for name in ("total_timesteps", "train_seconds", "forward_tokens")]
    points.append((summary["after"]["return"]["mean"], *last))
    gain = scale["value"] - scale["reference"]["mean"]
    found: dict[str, Any] = {}
    for level in SOLVED:
        found[f"{level:g}"] = None
        for value, step, seconds, tokens in points:
            if math.isfinite(value) and value - scale["reference"]["mean"] >= level * gain:
                found[f"{level:g}"] = {"step": step, "seconds": seconds, "forward_tokens": tokens}
                break
    return found
