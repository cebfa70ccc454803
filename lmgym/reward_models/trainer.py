"""Training through `transformers.Trainer`: its mixed precision, accumulation, processes, checkpoints and resume."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from lmgym.errors import InvalidArgumentError, check_finite
from lmgym.reward_models.batches import Examples, ForwardSampler, collate, warm_up_cosine
from lmgym.reward_models.config import RewardConfig
from lmgym.reward_models.examples import Batch, Example
from lmgym.reward_models.measures import accuracy_of_prompts
from lmgym.reward_models.processes import gather, mean_of_sums
from lmgym.reward_models.scorer import Scorer, loss_weight, objective_loss

WATCH_FILE = "held_out.pt"  # in a checkpoint of Trainer's: what `Watch` knows
_EVALUATION_ROWS = 256  # sequences a forward

Progress = Callable[[int, dict[str, float]], bool | None]


@dataclass
class Watch:
    """What training has seen of the held-out prompts.

    Attributes:
        best_loss: the lowest so far. best_update: when it was. looks_since: that were no better.
        best_weights: of all that learns, at that time; None before the first look.
        stopped_early: whether training has ended for that.
    """

    best_loss: float = float("inf")
    best_update: int = 0
    looks_since: int = 0
    best_weights: dict[str, Tensor] | None = None
    stopped_early: bool = False


@dataclass
class Checkpoints:
    """When training saves, and how it goes on.

    Attributes:
        save: takes the directory of a checkpoint of Trainer's, which is removed afterwards, and the number of updates.
        every: updates between checkpoints; None saves only where training is stopped.
        resume: a directory that `save` was given; None begins.
    """

    save: Callable[[Path, int], None]
    every: int | None = None
    resume: Path | None = None


@dataclass
class Fit:
    """What is trained, and on what.

    Attributes:
        scorer: changed in place. config: its numbers. train, held_out: examples.
        generator: CPU generator of the order of the prompts.
        progress: called after every update with its number and metrics; training stops where it returns False.
        checkpoints: None saves nothing.
        watch: what has been seen of the held-out prompts.
    """

    scorer: Scorer
    config: RewardConfig
    train: Sequence[Example]
    held_out: Sequence[Example]
    generator: torch.Generator
    progress: Progress | None = None
    checkpoints: Checkpoints | None = None
    watch: Watch = field(default_factory=Watch)
    stopped: bool = False  # by `progress`


def fit(task: Fit) -> None:
    """Trains. The global generators of Python, NumPy and torch, which Trainer seeds, are as they were afterwards.

    Raises:
        InvalidArgumentError: where the package accelerate is missing, or the numbers do not go together.
        NotFiniteError: where training diverges.
    """
    with preserved_generators(), tempfile.TemporaryDirectory() as scratch:
        trainer = RewardTrainer(task, _arguments(task, scratch))
        resume = None if task.checkpoints is None else task.checkpoints.resume
        if resume is not None:
            task.watch = Watch(**torch.load(resume / WATCH_FILE, weights_only=True))
        trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    if task.watch.best_weights is not None and not task.stopped:
        task.scorer.load_state_dict(task.watch.best_weights, strict=False)


def _arguments(task: Fit, scratch: str) -> TrainingArguments:
    config = task.config
    try:
        return TrainingArguments(
            output_dir=scratch,
            num_train_epochs=config.epochs,
            gradient_accumulation_steps=1,  # `RewardTrainer` knows how many processes there are
            max_grad_norm=config.max_grad_norm,
            bf16=config.precision == "bfloat16",
            fp16=config.precision == "float16",
            use_cpu=next(task.scorer.parameters()).device.type == "cpu",
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            ddp_find_unused_parameters=False,  # there are none, and `tie_log_odds` is not used in the forward
            remove_unused_columns=False,
        )
    except ImportError as error:
        raise InvalidArgumentError(
            f"A reward model is trained by transformers.Trainer, which needs the package accelerate: {error}"
        ) from error
    except ValueError as error:
        raise InvalidArgumentError(f"`precision` cannot be {config.precision!r} on this machine: {error}") from error


class RewardTrainer(Trainer):
    """Trainer with the batches, the loss, the optimiser and the schedule of a reward model.

    Args:
        task: what is trained. args: of Trainer.
    """

    def __init__(self, task: Fit, args: TrainingArguments) -> None:
        self.task = task
        self.metrics: dict[str, float] = {}  # sums over the forwards of an update
        self.lr = 0.0  # of the update
        config = task.config
        world = args.world_size
        forwards = -(-config.batch_size // (config.micro_batch_size or config.batch_size))
        forwards += -forwards % world  # as many for each process
        args.gradient_accumulation_steps = forwards // world
        args._n_gpu = min(args.n_gpu, 1)  # several GPUs in one process would split lists that cannot be split
        self.sampler = ForwardSampler(
            [example.length for example in task.train],
            [loss_weight(len(example.sequences), config) for example in task.train],
            batch_size=config.batch_size,
            forwards=forwards,
            epochs=config.epochs,
            generator=task.generator,
            rank=args.process_index,
            world=world,
        )
        super().__init__(task.scorer, args, train_dataset=Examples(task.train), callbacks=[_Observer(self)])
        self.remove_callback(PrinterCallback)

    def get_train_dataloader(self) -> DataLoader[Any]:
        """The forwards of this process."""
        return DataLoader(self.train_dataset, batch_sampler=self.sampler, collate_fn=collate)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """AdamW over everything that learns."""
        if self.optimizer is None:  # type: ignore[has-type]
            learns = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
            config = self.task.config
            self.optimizer = torch.optim.AdamW(learns, lr=config.lr, weight_decay=config.weight_decay)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Linear warm-up, then a cosine to 0."""
        if self.lr_scheduler is None:  # type: ignore[has-type]
            warm_up = self.task.config.warm_up
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
                self.optimizer if optimizer is None else optimizer,
                lambda step: warm_up_cosine(step, num_training_steps, warm_up),
            )
        return self.lr_scheduler

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        """The loss of a forward, times its share of the update."""
        batch: Batch = inputs["batch"]
        scores = model(batch.sequences)
        loss = objective_loss(scores.float(), batch, self.task.config, self.task.scorer.tie_log_odds)
        self._note(loss, scores.detach().float(), batch)
        return loss * batch.share

    def _note(self, loss: Tensor, scores: Tensor, batch: Batch) -> None:
        """Adds the metrics of a forward to those of its update."""
        part = batch.share / self.args.gradient_accumulation_steps
        self.lr = self.optimizer.param_groups[0]["lr"]
        found = {"train/loss": float(loss.detach()) * part}
        accuracy = mean_accuracy(scores, [example for example in batch.examples if example.tiers])
        if accuracy is not None:
            found["train/accuracy"] = accuracy * part
        for name, value in found.items():
            self.metrics[name] = self.metrics.get(name, 0.0) + value


class _Observer(TrainerCallback):
    """Reports updates, looks at the held-out prompts, and has Trainer save and stop."""

    def __init__(self, trainer: RewardTrainer) -> None:
        self._trainer = trainer
        self._task = trainer.task
        updates = trainer.sampler.updates
        self._every = self._task.config.eval_every or max(1, updates // 10)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        sampler = self._trainer.sampler
        sampler.epoch = state.global_step // sampler.updates

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        step = state.global_step
        world = self._trainer.args.world_size
        metrics = mean_of_sums(gather(dict(self._trainer.metrics), world))
        self._trainer.metrics.clear()
        check_finite("loss", metrics["train/loss"])
        metrics["train/lr"] = self._trainer.lr
        is_last = step == state.max_steps
        if self._task.held_out and (step % self._every == 0 or is_last):
            metrics |= self._look(step)
        goes_on = self._task.progress is None or self._task.progress(step, metrics) is not False
        self._task.stopped = not all(gather(goes_on, world)) and not is_last
        patience = self._task.config.patience
        watch = self._task.watch
        watch.stopped_early = bool(patience) and watch.looks_since >= patience and not is_last
        if watch.stopped_early or self._task.stopped:
            control.should_training_stop = True
        checkpoints = self._task.checkpoints
        if checkpoints is not None:
            due = checkpoints.every is not None and step % checkpoints.every == 0
            control.should_save = self._task.stopped or (due and not is_last)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        directory = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero and self._task.checkpoints is not None:
            torch.save(vars(self._task.watch), directory / WATCH_FILE)
            self._task.checkpoints.save(directory, state.global_step)
        shutil.rmtree(directory, ignore_errors=True)

    def _look(self, step: int) -> dict[str, float]:
        """Loss and accuracy on the held-out prompts; keeps the weights where the loss is the lowest."""
        args = self._trainer.args
        loss, accuracy = held_out_metrics(self._task, args.process_index, args.world_size)
        watch = self._task.watch
        watch.looks_since += 1
        if loss < watch.best_loss:
            watch.best_loss = loss
            watch.best_update = step
            watch.looks_since = 0
            learns = {name for name, x in self._task.scorer.named_parameters() if x.requires_grad}
            state = self._task.scorer.state_dict()
            watch.best_weights = {name: x.detach().cpu().clone() for name, x in state.items() if name in learns}
        found = {"eval/loss": loss}
        return found if accuracy is None else {**found, "eval/accuracy": accuracy}


@torch.no_grad()
def held_out_metrics(task: Fit, rank: int, world: int) -> tuple[float, float | None]:
    """Mean loss and accuracy on the held-out prompts, the accuracy None where nothing is compared.

    Args:
        task: has the prompts. rank, world: this process and how many there are, each of which scores its share.
    """
    sequences = [sequence for example in task.held_out for sequence in example.sequences]
    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
    own = order[rank::world]
    scores = torch.zeros(len(sequences))
    for start in range(0, len(own), _EVALUATION_ROWS):
        rows = own[start : start + _EVALUATION_ROWS]
        scores[rows] = task.scorer([sequences[i] for i in rows]).float().cpu()
    scores = torch.stack(gather(scores, world)).sum(0)
    ties = task.scorer.tie_log_odds
    log_odds = None if ties is None else ties.detach().cpu()
    loss = float(objective_loss(scores, Batch(task.held_out), task.config, log_odds))
    return loss, mean_accuracy(scores, task.held_out)


def mean_accuracy(scores: Tensor, examples: Sequence[Example]) -> float | None:
    """The mean over prompts of the share of their pairs that scores order as they were judged; None without pairs."""
    accuracy = accuracy_of_prompts(scores.cpu(), examples)
    return float(accuracy.mean()) if len(accuracy) else None


@contextlib.contextmanager
def preserved_generators() -> Iterator[None]:
    """Restores the global generators of Python, NumPy and torch, the GPUs' included, after the block."""
    python = random.getstate()
    numpy = np.random.get_state()  # noqa: NPY002 - Trainer seeds it
    variables = set(os.environ)
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)  # noqa: NPY002
            for name in set(os.environ) - variables:
                if name.startswith("ACCELERATE_"):
                    del os.environ[name]  # it would hold for the next training too
