"""When a run saves its agent, and what it says of it."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agents.checkpoint import newest, read_manifest, replacing
from agents.runs.clock import Clock
from agents.runs.cost import Cost, PeakMemory, highest
from agents.runs.directory import CHECKPOINT, read_checkpoint
from agents.runs.plan import Budget
from agents.runs.recorder import Recorder
from agents.runs.signals import Interrupt
from lmgym.errors import LmGymError, NotFiniteError

if TYPE_CHECKING:
    from agents.agent import Agent, Callback
    from agents.runs.along import Along


class Saver:
    """Trains an agent, and saves it every so many env steps, at the end, and where training fails.

    A grading along the way is on the clock of nobody, and comes before the checkpoint of its step: a run that goes on
    from there has its row.

    Args:
        agent: what is trained.
        directory: of the run.
        every: env steps between checkpoints.
        notes: that each checkpoint carries (`agents.runs.inputs.notes_of`).
        go_on: the command by which the run goes on.
        budget: what ends training early, if anything.
        clock: of training; one of its own if None. memory: of training; likewise.
    """

    def __init__(
        self,
        agent: Agent,
        directory: Path,
        every: int,
        notes: Mapping[str, Any],
        go_on: str,
        budget: Budget | None = None,
        clock: Clock | None = None,
        memory: PeakMemory | None = None,
    ) -> None:
        self.agent = agent
        self.directory = directory
        self.every = every
        self.notes = notes
        self.go_on = go_on
        self.budget = budget or Budget()
        self._clock = clock or Clock()
        self._memory = memory or PeakMemory()
        self._before: Cost | None = None  # what other processes have spent on the run
        self._saved_at = 0
        self._is_recorded = True

    def load(self) -> None:
        """Has the agent go on from the newest checkpoint.

        Raises:
            LmGymError: as `read_checkpoint`.
        """
        manifest = read_checkpoint(self.directory, self.agent.load)
        peak = manifest.notes.get("peak_memory_bytes")
        self._before = Cost(float(manifest.notes.get("train_seconds", 0.0)), peak)
        self._saved_at = self.agent.num_timesteps

    def learn(self, total_timesteps: int, recorder: Recorder, stop: Interrupt, along: Along | None = None) -> Cost:
        """Trains until the budget is spent or a stop is asked for.

        Args:
            total_timesteps: of the whole run. recorder: of its metrics. stop: asks for the stop.
            along: grades the agent along the way.

        Returns:
            What training has taken, in all processes of the run.
        """
        try:
            callback = self.start(recorder, stop, along)
            if self.agent.processes.all_agree(not self.is_spent()):
                self.agent.learn(total_timesteps, callback)
            return self.save()
        except NotFiniteError as error:  # what training had reached is worth nothing
            steps = self._steps_of_checkpoint()
            kept = "" if steps is None else f" The checkpoint of {steps:,} tokens stays as it was."
            raise NotFiniteError(f"{error}{kept}") from error
        except Exception as error:
            self._rescue(error)
            raise

    def start(self, recorder: Recorder, stop: Interrupt, along: Along | None = None) -> Callback:
        """What the agent is to call after every batch, from now on; the arguments are those of `learn`."""
        self._clock.start()
        self._memory.start()
        if not self.is_spent():  # where the end of the run was here, and is farther off now
            self._grade(along, self.agent.num_timesteps)
        return partial(self._after_batch, recorder, stop, along)

    def seconds(self) -> float:
        """The seconds that training has taken so far, in all processes of the run."""
        before = 0.0 if self._before is None else self._before.seconds
        return before + self._clock.seconds()

    def cost(self) -> Cost:
        """What training has taken so far, in all processes of the run."""
        peak = self._memory.read()
        return Cost(self.seconds(), peak if self._before is None else highest(self._before.peak_memory_bytes, peak))

    def is_spent(self) -> bool:
        """Whether the budget is spent."""
        return self.budget.is_spent(self.agent.tokens.forward, self.seconds())

    def _grade(self, along: Along | None, step: int) -> None:
        if along is not None and along.is_due(step):
            with self._clock.stopped(), self._memory.paused():
                along.grade(step, self.seconds())

    def what_is_saved(self) -> str:
        """A sentence for somebody whose run has ended early."""
        steps = self._steps_of_checkpoint()
        if steps is None:
            return "Nothing was saved: the run had no checkpoint yet."
        return f"The checkpoint is of {steps:,} tokens. Go on with: {self.go_on}"

    def _steps_of_checkpoint(self) -> int | None:
        path = newest(self.directory / CHECKPOINT)
        return None if path is None else int(read_manifest(path).notes.get("num_timesteps", self._saved_at))

    def _after_batch(
        self, recorder: Recorder, stop: Interrupt, along: Along | None, step: int, metrics: dict[str, float]
    ) -> bool:
        self._is_recorded = False
        recorder.record(step, metrics)
        self._is_recorded = True
        is_spent = self.is_spent()
        if not is_spent:
            self._grade(along, step)
        if step - self._saved_at >= self.every:
            self.save()
        return not (stop.asked or is_spent)

    def save(self) -> Cost:
        """Writes a checkpoint; returns what training has taken so far."""
        cost = self.cost()
        steps = self.agent.num_timesteps
        spent = {"train_seconds": cost.seconds, "peak_memory_bytes": cost.peak_memory_bytes}
        notes = {**self.notes, **spent, "num_timesteps": steps}
        with replacing(self.directory / CHECKPOINT, notes) as scratch:
            self.agent.write(scratch)
        self._saved_at = steps
        return cost

    def _rescue(self, error: Exception) -> None:
        """Saves what training had reached before it failed, unless that is already done or cannot be gone on from.

        A batch whose row is not recorded would be missing from the curve. In the midst of an update the weights are
        those of no batch: where lmgym itself has found them wrong the last checkpoint stays, and else they are better
        than nothing.
        """
        print(f"\nTraining failed after {self.agent.num_timesteps:,} tokens.", file=sys.stderr)
        self.save_before(error)
        print(self.what_is_saved(), file=sys.stderr)

    def save_before(self, error: Exception) -> None:
        """Saves what training had reached before an error, where that is right; says so where it is not all of it."""
        is_whole = self.agent.at_rest
        is_usable = self._is_recorded and (is_whole or not isinstance(error, LmGymError))
        if is_usable and self.agent.num_timesteps > self._saved_at:
            try:
                self.save()
            except Exception as second:
                print(f"It could not be saved: {type(second).__name__}: {second}", file=sys.stderr)
            else:
                if not is_whole:
                    print("That was within an update: the curve will not be that of an unbroken run.", file=sys.stderr)
