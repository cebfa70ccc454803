"""What `python -m agents.reward` does: begins a run or goes on with one, trains, measures and writes the model."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from agents.checkpoint import Manifest, replacing
from agents.runs.command_line import shell_command
from agents.runs.directory import (
    CHECKPOINT,
    changes_since,
    empty_again,
    new_run,
    read_checkpoint,
    resumed_run,
)
from agents.runs.inputs import notes_of
from agents.runs.launch import joined_processes
from agents.runs.recorder import Recorder
from agents.runs.report import write_json
from agents.runs.reward_plan import (
    MEMBERS,
    REWARD_DIRECTORY,
    REWARD_FILES,
    RewardPlan,
    check_reward,
    saved_reward_values,
)
from agents.runs.run import versions
from agents.runs.signals import Interrupt
from agents.runs.tasks import full_name
from lmgym.errors import InvalidArgumentError
from lmgym.files import RunFileError, remove

if TYPE_CHECKING:
    from agents.distributed import Processes
    from lmgym.reward_models.training import Lesson, Member


def begin_reward(cfg: DictConfig, directory: Path) -> int:
    """A new run; returns its exit code.

    Raises:
        LmGymError: for a config that cannot be, or a directory that holds a run; no file is left.
    """
    with empty_again(directory):
        values = plain_values(cfg)
        plan = check_reward(values)
        with new_run(directory, values, REWARD_FILES):
            write_json(directory / "versions.json", versions())
            return RewardRun(plan, directory, notes_of(values)).train()


def plain_values(cfg: DictConfig) -> dict[str, Any]:
    """The values of the composed config of a new run, the task by its whole name."""
    values: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True)  # type: ignore[assignment]
    values.pop("resume")
    if values["task"] is not None:
        values["task"] = full_name(values["task"])
    return values


def go_on_with_reward(directory: Path, overrides: Sequence[str]) -> int:
    """A run that goes on; returns its exit code.

    Raises:
        LmGymError: for one that cannot.
    """
    changed = [override for override in overrides if not override.startswith("resume=")]
    if changed:
        raise InvalidArgumentError(f"`{changed[0]}` must be left out with `resume`: a run goes on as it began.")
    values = saved_reward_values(directory)
    with resumed_run(directory, REWARD_FILES):
        notes = notes_of(values)
        manifest = read_checkpoint(directory)
        if manifest.notes.get("finished"):
            raise InvalidArgumentError(
                f"`resume` must be a run that has not ended, and {directory} has: {directory / REWARD_DIRECTORY} is "
                "its reward model."
            )
        difference = changes_since(directory, manifest, notes)
        if difference is not None:
            raise RunFileError(f"{difference} Put back what was there, or begin a new run.")
        return RewardRun(check_reward(values), directory, notes).train(manifest)


class RewardRun:
    """One run: its plan, its directory, and what its checkpoints carry.

    Args:
        plan: what to do. directory: of the run. notes: of its config, as `notes_of` gives them.
    """

    def __init__(self, plan: RewardPlan, directory: Path, notes: Mapping[str, Any]) -> None:
        self.plan = plan
        self.directory = directory
        self.notes = notes
        self._started = time.perf_counter()
        self._seconds = 0.0  # of earlier processes

    def train(self, manifest: Manifest | None = None) -> int:
        """Trains, measures, writes and reports; returns the exit code, 130 after Ctrl-C.

        Args:
            manifest: of the checkpoint that it goes on from; None begins.
        """
        from agents.distributed import ProcessLostError
        from agents.runs.reward_report import gold_scores_of, write_reward
        from lmgym.reward_models.training import finish

        done: Mapping[str, Any] = {"member": 0, "updates": 0, "seconds": 0.0} if manifest is None else manifest.notes
        self._seconds = done["seconds"]
        command = shell_command("agents.reward", f"resume={self.directory}")
        try:
            with joined_processes(self.plan.device) as processes:
                lesson = prepare(self.plan)
                if manifest is None and processes.count > 1:
                    self._save(0, None, 0)  # what goes on from it, should a process be lost
                gold = gold_scores_of(self.plan, lesson)
                updates = self.plan.reward.updates(len(lesson.train))
                total = updates * self.plan.reward.ensemble
                position = done["member"] * updates + done["updates"]
                with (
                    Recorder(self.directory, total, None if manifest is None else position, unit="update") as recorder,
                    Interrupt() as stop,
                ):
                    members = self._members(lesson, recorder, stop, processes, manifest)
            if members is None:
                print(f"Stopped. Go on with: {command}")
                return 130
            result = finish(lesson, members, reference_texts(self.plan, lesson))
            write_reward(self.plan, result, gold, self.directory, self.seconds())
            with replacing(self.directory / CHECKPOINT, {**self.notes, "finished": True}):
                pass  # its weights are in the reward model now
            remove(self.directory / MEMBERS)
        except ProcessLostError as error:
            raise ProcessLostError(f"{error} What the last checkpoint holds goes on with: {command}") from error
        except KeyboardInterrupt:
            print(f"\nStopped at once. A checkpoint, if there is one, goes on with: {command}", file=sys.stderr)
            raise
        return 0

    def seconds(self) -> float:
        """That training has taken, in all processes of the run."""
        return self._seconds + time.perf_counter() - self._started

    def _members(
        self, lesson: Lesson, recorder: Recorder, stop: Interrupt, processes: Processes, done: Manifest | None
    ) -> list[Member] | None:
        """The trained members, the finished ones from their files; None where training was stopped."""
        from agents.distributed import naming_the_lost
        from lmgym.reward_models.trainer import Checkpoints
        from lmgym.reward_models.training import train_member

        updates = self.plan.reward.updates(len(lesson.train))
        device = lesson.model.device
        first = 0 if done is None else done.notes["member"]
        members = [load_member(self.directory / MEMBERS / str(number), device) for number in range(first)]
        for number in range(first, self.plan.reward.ensemble):
            source = None if done is None or number > first else resumable(self.directory)
            checkpoints = Checkpoints(partial(self._save, number), self.plan.checkpoint_every, source)

            def after_update(update: int, metrics: dict[str, float], before: int = number * updates) -> bool:
                recorder.record(before + update, metrics)
                return not stop.asked

            with naming_the_lost(processes, among_others=True):
                member = train_member(lesson, number, after_update, checkpoints)
            if member.stopped:
                return None
            members.append(member)
            save_member(member, self.directory / MEMBERS / str(number))  # the last too: what follows takes a while
            self._save(number + 1, None, 0)
            if not processes.all_agree(not stop.asked):
                return None
        return members

    def _save(self, number: int, source: Path | None, updates: int) -> None:
        """Makes what Trainer has saved the run's checkpoint.

        Args:
            number: of the member that is learning. source: a directory of Trainer's; None before its first update.
            updates: of this member.
        """
        notes = {**self.notes, "member": number, "updates": updates, "seconds": self.seconds()}
        with replacing(self.directory / CHECKPOINT, notes) as scratch:
            if source is not None:
                shutil.copytree(source, scratch, dirs_exist_ok=True)


def train_along(plan: RewardPlan, processes: Processes, directory: Path | None) -> None:
    """What the other processes of a run do: they train the same members to the same weights, and write nothing.

    Args:
        plan: what to do. processes: all of the run. directory: of a run that goes on; None is a new one.
    """
    from agents.distributed import naming_the_lost
    from lmgym.reward_models.trainer import Checkpoints
    from lmgym.reward_models.training import train_member

    lesson = prepare(plan)
    first = 0 if directory is None else read_checkpoint(directory).notes["member"]
    for number in range(first, plan.reward.ensemble):
        source = None if directory is None or number > first else resumable(directory)
        with naming_the_lost(processes, among_others=True):
            member = train_member(lesson, number, None, Checkpoints(_write_nothing, plan.checkpoint_every, source))
        if member.stopped or not processes.all_agree(True):
            return


def _write_nothing(source: Path, updates: int) -> None:
    """The first process writes."""


def resumable(directory: Path) -> Path | None:
    """The checkpoint of a run, where it was saved within the training of a member; None between two."""
    checkpoint = directory / CHECKPOINT
    return checkpoint if (checkpoint / "trainer_state.json").is_file() else None


def prepare(plan: RewardPlan) -> Lesson:
    """Loads the model to start from and reads the feedback.

    Raises:
        LmGymError: for either that cannot be.
    """
    from lmgym.models.sharing import resolve_device
    from lmgym.reward_models.saving import load_start
    from lmgym.reward_models.starting import check_reference
    from lmgym.reward_models.training import prepare_lesson
    from lmgym.tasks import make_task

    resolve_device(plan.device)
    if plan.model is None:
        assert plan.task is not None
        reference = make_task(plan.task).reference(plan.device)
        model = reference.model
        tokenizer = reference.tokenizer
        check_reference(plan.task, reference, "task=reviews, or model=DIRECTORY")
    else:
        model, tokenizer = load_start(plan.model, plan.device)
    return prepare_lesson(plan.preferences, model, tokenizer, plan.reward, plan.seed)


def reference_texts(plan: RewardPlan, lesson: Lesson) -> list[str] | None:
    """Samples of the task's reference on its training prompts; None where those of the feedback are to do."""
    if plan.task is None or not plan.reference_samples or not plan.reward.centre:
        return None
    from agents.runs.completions import sample_texts

    return sample_texts(plan.task, plan.reference_samples, plan.seed, plan.device, lesson.tokenizer)


def save_member(member: Member, directory: Path) -> None:
    """Writes a trained member of an ensemble whose others are still to be trained."""
    from lmgym.models.loading import quiet_loading

    watch = {name: value for name, value in vars(member.watch).items() if name != "best_weights"}
    with replacing(directory, {"watch": watch}) as scratch, quiet_loading():
        member.model.save_pretrained(scratch)


def load_member(directory: Path, device: Any) -> Member:
    """The member that `save_member` wrote, on a device."""
    from transformers import AutoModelForSequenceClassification

    from agents.checkpoint import verify
    from lmgym.models.loading import quiet_loading
    from lmgym.reward_models.trainer import Watch
    from lmgym.reward_models.training import Member

    manifest = verify(directory)
    with quiet_loading():
        model = AutoModelForSequenceClassification.from_pretrained(directory, trust_remote_code=False)
    return Member(model.to(device).eval(), Watch(**manifest.notes["watch"]))
