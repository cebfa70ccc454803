"""Reward models of `reviews`: rankings by simulated annotators, training, and what is measured.

Shapes: B prompts, K completions of each.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from builders.completions import gold_scores, join_texts, sample_completions
from builders.models import EOS
from lmgym.feedback.annotators import plackett_luce_ranking, true_ranking
from lmgym.feedback.records import Completion, Ranking, Record
from lmgym.models.causal import CausalLM
from lmgym.reward_models.config import RewardConfig
from lmgym.reward_models.scorer import score_texts
from lmgym.reward_models.starting import reward_model_from
from lmgym.reward_models.training import fit_model, prepare_lesson
from lmgym.rewards.normalisation import normalise
from lmgym.rewards.ranking import ranking_accuracy
from lmgym.tasks import reviews


def collect_rankings(
    reference: CausalLM,
    size: int,
    settings: dict[str, Any],
    prompt_seed: int,
    annotator_seed: int,
    generator: torch.Generator,
) -> tuple[list[Record], float]:
    """Has simulated annotators rank completions of fresh prompts.

    Args:
        reference: samples the completions.
        size: B.
        settings: of the reward model.
        prompt_seed: of the prompts.
        annotator_seed: of the annotators' errors.
        generator: of the completions.

    Returns:
        The rankings, and the share of their pairs that the annotators order as the gold score does.
    """
    prompts = draw_training_prompts(np.random.default_rng(prompt_seed), size)
    completions = sample_completions(reference, prompts, settings["ranked"], generator)
    gold = gold_scores(prompts, completions)
    ranking = plackett_luce_ranking(gold, settings["temperature"], np.random.default_rng(annotator_seed))
    agreement = ranking_accuracy(torch.from_numpy(gold), torch.from_numpy(ranking))
    records = [
        Record(prompt, tuple(map(Completion, texts)), Ranking.of_order(order))
        for prompt, texts, order in zip(prompts, completions, ranking.tolist(), strict=True)
    ]
    return records, agreement


def learn_reward_model(
    reference: CausalLM,
    records: Sequence[Record],
    settings: dict[str, Any],
    generator: torch.Generator,
    name: str,
    visible: bool,
) -> tuple[Any, float]:
    """Trains a reward model on rankings, as `python -m agents.reward` does.

    Args:
        reference: its trunk is what the reward model starts from.
        records: what it learns from; nothing is held out, for there is no end of fresh ones to measure it on.
        settings: of the reward model.
        generator: draws its head and the order of the prompts.
        name: beside the progress bar.
        visible: whether there is a progress bar, on a terminal.

    Returns:
        The model, and its accuracy on the rankings in the last epoch.
    """
    config = RewardConfig(
        epochs=settings["epochs"], batch_size=settings["batch_size"], lr=settings["learning_rate"], held_out=0
    )
    model = reward_model_from(reference.model, generator)
    lesson = prepare_lesson(records, model, reference.tokenizer, config)
    accuracies: list[float] = []
    hidden = None if visible else True  # None: hidden unless on a terminal
    with tqdm(total=config.updates(len(records)), unit="update", desc=name, disable=hidden) as bar:

        def progress(_: int, metrics: dict[str, float]) -> None:
            shown = {key.removeprefix("train/"): f"{value:.3f}" for key, value in metrics.items()}
            bar.set_postfix(shown, refresh=False)
            bar.update()
            accuracies.append(metrics["train/accuracy"])

        member = fit_model(model, lesson, generator, progress)
    last = accuracies[-len(accuracies) // config.epochs :]
    return member.model, float(np.mean(last))


def standardise(model: Any, tokenizer: Any, texts: Sequence[str]) -> None:
    """Shifts and scales a reward model, inside its weights, to mean 0 and standard deviation 1 on the texts."""
    scores = score_texts(model, tokenizer, texts).double()
    normalise(model, float(scores.mean()), float(scores.std()))


def measure_reward_model(
    model: Any, tokenizer: Any, prompts: Sequence[str], completions: Sequence[Sequence[str]]
) -> dict[str, float]:
    """Compares a reward model with the gold score on completions (B, K) of the reference."""
    gold = gold_scores(prompts, completions)
    scores = score_texts(model, tokenizer, join_texts(prompts, completions)).view(gold.shape)
    learned = scores.double().numpy()
    lengths = [len(text.split()) for texts in completions for text in texts]
    ended = [text.endswith(EOS) for texts in completions for text in texts]
    best = learned.argmax(1)[:, None]
    return {
        "accuracy": ranking_accuracy(scores, torch.from_numpy(true_ranking(gold))),
        "correlation": float(np.corrcoef(learned.ravel(), gold.ravel())[0, 1]),
        "score_mean": learned.mean(),
        "score_std": learned.std(),
        "gold_mean": gold.mean(),
        "gold_std": gold.std(),
        "gold_std_of_a_prompt": gold.std(axis=1).mean(),
        "best_score": learned.max(axis=1).mean(),
        "best_gold": np.take_along_axis(gold, best, axis=1).mean(),
        "length": float(np.mean(lengths)),
        "ended": float(np.mean(ended)),
    }


def draw_training_prompts(rng: np.random.Generator, size: int) -> list[str]:
    """Fresh prompts of the grammar, none of them a test prompt."""
    held_out = set(reviews.prompts("test"))
    prompts: list[str] = []
    while len(prompts) < size:
        prompt = reviews.sample_prompt(rng)
        if prompt not in held_out:
            prompts.append(prompt)
    return prompts
