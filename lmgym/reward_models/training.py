"""Learns a reward model from records of feedback: `train_reward`, and the steps that it consists of."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lmgym.errors import InvalidArgumentError, NotFiniteError, check_int
from lmgym.models.positions import max_positions
from lmgym.reward_models.config import RewardConfig
from lmgym.reward_models.examples import Example, encode_texts, read_examples, split_by_prompt
from lmgym.reward_models.measures import Measures, measure
from lmgym.reward_models.scorer import Scorer, score_sequences
from lmgym.reward_models.starting import add_adapter, check_start, starting_model
from lmgym.reward_models.trainer import Checkpoints, Fit, Progress, Watch, fit
from lmgym.rewards.classifier import ClassifierReward
from lmgym.rewards.ensemble import EnsembleReward
from lmgym.rewards.normalisation import normalise

_SPLIT = 0  # streams of random numbers, of a seed
_MEMBERS = 1


@dataclass(frozen=True)
class Lesson:
    """What is to be learned, and from what.

    Attributes:
        model: that every reward model starts from. tokenizer: its own. config: the numbers. seed: of all that is drawn.
        train, held_out: examples; no prompt is in both.
        unused: records that say nothing to the objective, such as skips.
    """

    model: Any
    tokenizer: Any
    config: RewardConfig
    seed: int
    train: Sequence[Example]
    held_out: Sequence[Example]
    unused: int

    def counts(self) -> dict[str, Any]:
        """How many prompts, judgements and pairs there are."""
        both = [*self.train, *self.held_out]
        return {
            "prompts": len({example.prompt for example in both}),
            "held_out_prompts": len({example.prompt for example in self.held_out}),
            "judgements": dict(Counter(example.kind for example in both)),
            "unused": self.unused,
            "pairs": sum(len(example.strengths) for example in self.train),
            "held_out_pairs": sum(len(example.strengths) for example in self.held_out),
        }


@dataclass(frozen=True)
class Member:
    """A reward model that has been trained.

    Attributes:
        model: in eval mode, in float32. watch: what was seen of the held-out prompts.
        stopped: by `progress`, so that it is not what training would have come to.
    """

    model: Any
    watch: Watch
    stopped: bool = False


@dataclass(frozen=True)
class RewardResult:
    """Reward models that were trained alike, and how good they are.

    Attributes:
        members: one, or those of an ensemble. lesson: what they learned.
        held_out_scores: (N,) of the completions of the held-out examples, centred and not scaled; of an ensemble the
            lowest where that is its score, and else the mean.
        measures: of these; None where nothing is held out or compared.
        means, stds: of each member's scores on the reference samples, before they were centred.
    """

    members: tuple[Member, ...]
    lesson: Lesson
    held_out_scores: Tensor
    measures: Measures | None
    means: tuple[float, ...]
    stds: tuple[float, ...]

    @property
    def models(self) -> tuple[Any, ...]:
        """The trained Hugging Face models."""
        return tuple(member.model for member in self.members)

    def reward(self) -> ClassifierReward | EnsembleReward:
        """A reward function, which environments and tasks take."""
        rewards = [ClassifierReward(model, self.lesson.tokenizer) for model in self.models]
        return rewards[0] if len(rewards) == 1 else EnsembleReward(rewards, self.lesson.config.ensemble_score)


def train_reward(
    records: object,
    model: Any,
    tokenizer: Any,
    config: RewardConfig | None = None,
    *,
    seed: int = 0,
    reference_texts: Sequence[str] | None = None,
    progress: Progress | None = None,
) -> RewardResult:
    """Learns a reward model from feedback.

        from lmgym.reward_models.config import RewardConfig
        from lmgym.reward_models.training import train_reward

        lm = lmgym.make_task("reviews").reference()
        result = train_reward("prefs.jsonl", lm.model, lm.tokenizer, RewardConfig(batch_size=32), seed=1)
        print(result.measures.accuracy)  # on held-out prompts, with its interval
        env = gym.make("lmgym/RLHF-v0", task="reviews", reward=result.reward())

    Args:
        records: feedback: a file, rows, or `lmgym.feedback.records.Record`s, in any layout (docs/feedback.md).
        model: a Hugging Face causal LM, whose trunk gets a scalar head, or a sequence-classification model with one
            label. It is not changed; training runs on its device.
        tokenizer: of the model.
        config: the numbers; None is `RewardConfig()`.
        seed: of the held-out prompts, the head and the order of the examples. No global generator is read or seeded.
        reference_texts: prompt + completion each, on which the mean score becomes 0; None takes all completions that
            were learned from.
        progress: called after every update with its number, from 1, and a dict of metrics: `train/loss` (nats),
            `train/accuracy`, `train/lr`, and now and then `eval/loss` and `eval/accuracy` on the held-out prompts.

    Returns:
        The model and its measures. `result.reward()` is a reward function.

    Raises:
        InvalidArgumentError: for feedback that cannot be read or learned from, and for a model of another kind.
        NotFiniteError: where training diverges.
    """
    lesson = prepare_lesson(records, model, tokenizer, config or RewardConfig(), seed)
    members = [train_member(lesson, number, progress) for number in range(lesson.config.ensemble)]
    return finish(lesson, members, reference_texts)


def prepare_lesson(records: object, model: Any, tokenizer: Any, config: RewardConfig, seed: int = 0) -> Lesson:
    """Reads the feedback and chooses what is held out; the arguments are those of `train_reward`."""
    check_int("seed", seed, 0)
    check_start(model, tokenizer)
    read = read_examples(records, tokenizer, max_positions(model))
    used = [example for example in read.examples if is_usable(example, config)]
    if not used:
        wanted = "rates" if config.objective == "regression" else "compares"
        raise InvalidArgumentError(
            f"`preferences` must hold at least one judgement that {wanted}, which `objective` {config.objective!r} "
            f"learns from, got none in {read.records:,} records."
        )
    if config.objective == "regression":
        used = _standardised(used)
    train, held_out = split_by_prompt(used, config.held_out, generator_of(seed, _SPLIT))
    return Lesson(model, tokenizer, config, seed, train, held_out, read.records - len(used))


def is_usable(example: Example, config: RewardConfig) -> bool:
    """Whether an objective learns from an example."""
    return example.ratings is not None if config.objective == "regression" else bool(example.tiers)


def _standardised(examples: Sequence[Example]) -> list[Example]:
    """The same with ratings of mean 0 and standard deviation 1, so that no learning rate depends on their scale."""
    kinds = sorted({example.kind for example in examples})
    if len(kinds) > 1:
        raise InvalidArgumentError(
            f"`objective` must not be 'regression' where numbers are on scales of their own, got {' and '.join(kinds)}."
        )
    numbers = np.concatenate([example.ratings or () for example in examples])
    mean = float(numbers.mean())
    std = float(numbers.std())
    if std == 0:
        raise InvalidArgumentError(f"`preferences` must hold ratings that differ, got {len(numbers)} of {mean:g}.")
    return [
        replace(example, ratings=tuple((number - mean) / std for number in example.ratings or ()))
        for example in examples
    ]


def train_member(
    lesson: Lesson, number: int = 0, progress: Progress | None = None, checkpoints: Checkpoints | None = None
) -> Member:
    """Trains one reward model.

    Args:
        lesson: what is learned. number: of the model in an ensemble; each has a head and an order of its own.
        progress: as for `train_reward`; training stops, with a checkpoint, where it returns False.
        checkpoints: where training saves and from where it goes on.

    Raises:
        NotFiniteError: where training diverges.
    """
    generator = generator_of(lesson.seed, _MEMBERS, number)
    model = starting_model(lesson.model, lesson.tokenizer, generator)
    return fit_model(model, lesson, generator, progress, checkpoints)


def fit_model(
    model: Any,
    lesson: Lesson,
    generator: torch.Generator,
    progress: Progress | None = None,
    checkpoints: Checkpoints | None = None,
) -> Member:
    """Trains a reward model in place: `train_member` from a given start and with a given generator of the order."""
    config = lesson.config
    adapted = None
    if config.lora_rank is not None:
        adapted = add_adapter(model, config.lora_rank, config.lora_alpha, generator)
    scorer = Scorer(model, learns_ties=config.ties == "davidson")
    task = Fit(scorer, config, lesson.train, lesson.held_out, generator, progress, checkpoints)
    fit(task)
    trained = model if adapted is None or task.stopped else adapted.merge_and_unload()
    if not all(bool(weight.isfinite().all()) for weight in trained.parameters()):
        raise NotFiniteError("Training has diverged: weights are not finite. Try a lower learning rate.")
    return Member(trained.eval(), task.watch, task.stopped)


def finish(lesson: Lesson, members: Sequence[Member], reference_texts: Sequence[str] | None = None) -> RewardResult:
    """Measures trained models on what was held out, then centres their scores, in their weights or their config.

    Args:
        lesson: what they learned. members: the models. reference_texts: as for `train_reward`.
    """
    held_out = [sequence for example in lesson.held_out for sequence in example.sequences]
    if reference_texts is None:
        reference = [sequence for example in lesson.train for sequence in example.sequences]
    else:
        reference = [tuple(ids) for ids in encode_texts(lesson.tokenizer, reference_texts)]
    scores = []
    means = []
    stds = []
    for member in members:
        raw = score_sequences(member.model, held_out)
        mean, std = _centre(member.model, reference, lesson.config)
        scores.append(raw - mean)
        means.append(mean)
        stds.append(std)
    paid = torch.stack(scores)
    together = paid.amin(0) if lesson.config.ensemble_score == "minimum" else paid.mean(0)
    measures = measure(together, lesson.held_out)
    return RewardResult(tuple(members), lesson, together, measures, tuple(means), tuple(stds))


def _centre(model: Any, reference: Sequence[Sequence[int]], config: RewardConfig) -> tuple[float, float]:
    """Mean and standard deviation of the scores of reference samples, which become 0 (and 1) where that is asked."""
    scores = score_sequences(model, reference).double()
    mean = float(scores.mean())
    std = float(scores.std()) if len(scores) > 1 else math.nan
    if config.scale and not std > 0:
        raise InvalidArgumentError(f"`scale` must be false where all reference samples score alike, got {mean:g}.")
    if config.centre:
        normalise(model, mean, std if config.scale else 1.0)
    return mean, std


def generator_of(seed: int, *stream: int) -> torch.Generator:
    """A generator with a stream of its own."""
    derived = np.random.SeedSequence(seed, spawn_key=stream).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(derived >> np.uint64(1)))
