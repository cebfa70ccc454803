"""When a run saves its agent, and what it says of it."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agents.checkpoint import newest, read_manifest, replacing
from agents.runs.directory import CHECKPOINT, read_checkpoint
from agents.runs.recorder import Recorder
from agents.runs.signals import Interrupt
from lmgym.errors import LmGymError, NotFiniteError

if TYPE_CHECKING:
    from agents.agent import Agent, Callback


class Saver:
    """Trains an agent, and saves it every so many env steps, at the end, and where training fails.

    Args:
        agent: what is trained.
        directory: of the run.
        every: env steps between checkpoints.
        notes: that each checkpoint carries (`agents.runs.inputs.notes_of`).
        go_on: the command by which the run goes on.
    """

    def __init__(self, agent: Agent, directory: Path, every: int, notes: Mapping[str, Any], go_on: str) -> None:
        self.agent = agent
        self.directory = directory
        self.every = every
        self.notes = notes
        self.go_on = go_on
        self._seconds = 0.0
        self._started = time.perf_counter()
        self._saved_at = 0
        self._is_recorded = True

    def load(self) -> None:
        """Has the agent go on from the newest checkpoint.

        Raises:
            LmGymError: as `read_checkpoint`.
        """
        manifest = read_checkpoint(self.directory, self.agent.load)
        self._seconds = float(manifest.notes.get("train_seconds", 0.0))
        self._saved_at = self.agent.num_timesteps

    def learn(self, total_timesteps: int, recorder: Recorder, stop: Interrupt) -> float:
        """Trains until the budget is spent or a stop is asked for.

        Returns:
            The seconds that training has taken, in all processes of the run.
        """
        try:
            self.agent.learn(total_timesteps, self.start(recorder, stop))
            return self.save()
        except NotFiniteError as error:  # what training had reached is worth nothing
            steps = self._steps_of_checkpoint()
            kept = "" if steps is None else f" The checkpoint of {steps:,} tokens stays as it was."
            raise NotFiniteError(f"{error}{kept}") from error
        except Exception as error:
            self._rescue(error)
            raise

    def start(self, recorder: Recorder, stop: Interrupt) -> Callback:
        """What the agent is to call after every batch, from now on."""
        self._started = time.perf_counter()
        return partial(self._after_batch, recorder, stop)

    def what_is_saved(self) -> str:
        """A sentence for somebody whose run has ended early."""
        steps = self._steps_of_checkpoint()
        if steps is None:
            return "Nothing was saved: the run had no checkpoint yet."
        return f"The checkpoint is of {steps:,} tokens. Go on with: {self.go_on}"

    def _steps_of_checkpoint(self) -> int | None:
        path = newest(self.directory / CHECKPOINT)
        return None if path is None else int(read_manifest(path).notes.get("num_timesteps", self._saved_at))

    def _after_batch(self, recorder: Recorder, stop: Interrupt, step: int, metrics: dict[str, float]) -> bool:
        self._is_recorded = False
        recorder.record(step, metrics)
        self._is_recorded = True
        if step - self._saved_at >= self.every:
            self.save()
        return not stop.asked

    def save(self) -> float:
        """Writes a checkpoint; returns the seconds that training has taken so far."""
        seconds = self._seconds + time.perf_counter() - self._started
        steps = self.agent.num_timesteps
        notes = {**self.notes, "train_seconds": seconds, "num_timesteps": steps}
        with replacing(self.directory / CHECKPOINT, notes) as scratch:
            self.agent.write(scratch)
        self._saved_at = steps
        return seconds

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
