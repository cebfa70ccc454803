"""Reward models learned from rankings, as in InstructGPT (Ouyang et al. 2022, section 3.5).

Shapes: B prompts, K ranked completions each, L columns of tokens, V vocabulary.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

from lmgym.errors import InvalidArgumentError, check_finite, check_int, check_number
from lmgym.models.activations import fuse_activations
from lmgym.models.positions import max_positions
from lmgym.rewards.sequence import sequence_logits

_BUCKET_BATCHES = 16  # batches that are sorted by length together
_WEIGHT_DECAY = 0.01
_MAX_GRAD_NORM = 1.0
_WARM_UP = 0.05  # share of the updates


@dataclass(frozen=True)
class RankedTexts:
    """What training reads: completions of prompts, and an order of them without ties.

    Attributes:
        prompts: (B,) texts. completions: (B, K) texts, the responses to each prompt. ranking: (B, K) indices into the
            completions, best first.
    """

    prompts: Sequence[str]
    completions: Sequence[Sequence[str]]
    ranking: Sequence[Sequence[int]]


def kwise_loss(scores: Tensor, ranking: Tensor) -> Tensor:
    """Loss of a ranking: the mean over its K(K-1)/2 pairs of -log sigmoid(r_better - r_worse).

    Equation 1 of Ouyang et al. 2022. All pairs of a prompt sit in one batch, so a completion is one row of one forward
    however many pairs it is in.

    Args:
        scores: (B, K) rewards.
        ranking: (B, K) int64, indices best first.

    Returns:
        Scalar, nats; log 2 when all scores are equal.

    Raises:
        InvalidArgumentError: If the shapes differ, or K < 2.
    """
    return -F.logsigmoid(_margins(scores, ranking)).mean()


def ranking_accuracy(scores: Tensor, ranking: Tensor) -> float:
    """Share of the pairs that the scores order as the ranking does; a tie counts one half.

    Args:
        scores: (B, K) rewards.
        ranking: (B, K) int64, indices best first.

    Returns:
        A number in [0, 1]; chance is 0.5.
    """
    return float((_margins(scores, ranking).sign() + 1).mean() / 2)


def _margins(scores: Tensor, ranking: Tensor) -> Tensor:
    """r_better - r_worse of every pair, (B, K(K-1)/2)."""
    if scores.ndim != 2 or scores.shape != ranking.shape or scores.shape[1] < 2:
        raise InvalidArgumentError(
            "`scores` and `ranking` must both have shape (B, K) with K >= 2, "
            f"got {tuple(scores.shape)} and {tuple(ranking.shape)}."
        )
    best_first = scores.gather(1, ranking)
    better, worse = torch.triu_indices(scores.shape[1], scores.shape[1], offset=1, device=scores.device)
    return best_first[:, better] - best_first[:, worse]


def reward_model_from(causal_lm: Any, generator: torch.Generator) -> Any:
    """Makes a reward model out of a language model: its trunk with a scalar head instead of the LM head.

    Args:
        causal_lm: A Hugging Face causal LM whose config has a pad token other than its EOS.
        generator: Draws the head, from N(0, 1/(D+1)) with D the width of the trunk (Stiennon et al. 2020).

    Returns:
        A Hugging Face sequence-classification model with one label, the trunk copied.

    Raises:
        InvalidArgumentError: If the config has no pad token, or EOS is it.
    """
    config = copy.deepcopy(causal_lm.config)
    pad = config.pad_token_id
    eos = config.eos_token_id
    if pad is None or pad == eos:  # lmgym would read it all the same, and transformers' own forward would not
        raise InvalidArgumentError(
            "`pad_token_id` must be set and differ from EOS, or the end of a response is invisible to transformers; "
            f"got {pad}, EOS {eos}."
        )
    config.num_labels = 1
    with torch.random.fork_rng(devices=[]):  # the weights drawn here are all replaced below
        model = AutoModelForSequenceClassification.from_config(config, trust_remote_code=False)
    model.base_model.load_state_dict(causal_lm.base_model.state_dict())
    head = _score_head(model)
    with torch.no_grad():
        head.weight.normal_(std=1 / math.sqrt(head.in_features + 1), generator=generator)
    return fuse_activations(model).to(causal_lm.device).eval()


def train_reward_model(
    model: Any,
    tokenizer: Any,
    rankings: RankedTexts,
    *,
    epochs: int,
    learning_rate: float,
    batch_size: int,
    generator: torch.Generator,
    progress: Callable[[dict[str, float]], None] | None = None,
) -> dict[str, float]:
    """Trains a reward model on rankings; the K completions of a prompt always share one forward.

    AdamW, linear warm-up, cosine decay to zero, gradients clipped at norm 1, dropout off.

    Args:
        model: A sequence-classification model with one label; changed in place.
        tokenizer: Its tokenizer.
        rankings: B prompts with K completions each. `prompt + completion` is what the model reads, EOS included where
            the response has one.
        epochs: Passes over the prompts.
        learning_rate: Peak learning rate.
        batch_size: Prompts an update; a forward has K times as many rows.
        generator: CPU generator that shuffles the prompts.
        progress: Called after every update with its `loss` (nats a pair) and `accuracy`.

    Returns:
        `loss` (nats a pair) and `accuracy` on the rankings as given, means over the last epoch.

    Raises:
        InvalidArgumentError: If a setting is out of range, there is no prompt, or a text does not fit the model.
    """
    check_int("epochs", epochs, 1)
    check_int("batch_size", batch_size, 1)
    check_number("learning_rate", learning_rate, 0, open_low=True)
    if not rankings.prompts:
        raise InvalidArgumentError("`rankings` must hold at least one prompt, got none.")
    sequences = [
        encode(model, tokenizer, [prompt + completion for completion in completions])
        for prompt, completions in zip(rankings.prompts, rankings.completions, strict=True)
    ]
    ranking = torch.tensor([list(order) for order in rankings.ranking])
    lengths = [max(map(len, completions)) for completions in sequences]
    updates = epochs * math.ceil(len(sequences) / batch_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=_WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: warm_up_cosine(step, updates, _WARM_UP))
    model.eval()
    totals = {"loss": 0.0, "accuracy": 0.0}
    for _ in range(epochs):
        totals = dict.fromkeys(totals, 0.0)
        for batch in bucketed_batches(lengths, batch_size, generator):
            rows = [sequence for prompt in batch for sequence in sequences[prompt]]
            metrics = _update(model, rows, ranking[batch], optimizer)
            schedule.step()
            totals = {name: totals[name] + metrics[name] * len(batch) / len(sequences) for name in totals}
            if progress is not None:
                progress(metrics)
    return totals


def _update(
    model: Any, rows: Sequence[Sequence[int]], ranking: Tensor, optimizer: torch.optim.Optimizer
) -> dict[str, float]:
    """One step of the optimiser on B prompts.

    Args:
        model: changed in place.
        rows: B * K sequences of tokens, prompt by prompt.
        ranking: (B, K).
        optimizer: of the model's weights.

    Returns:
        `loss` and `accuracy` before the step.
    """
    scores = _forward(model, rows).view(len(ranking), -1)  # (B*K,) -> (B, K)
    ranking = ranking.to(scores.device)
    loss = kwise_loss(scores, ranking)
    optimizer.zero_grad()
    loss.backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), _MAX_GRAD_NORM)
    check_finite("loss", loss.item())
    check_finite("norm of the gradient", norm.item())
    optimizer.step()
    return {"loss": loss.item(), "accuracy": ranking_accuracy(scores.detach(), ranking)}


@torch.no_grad()
def normalise(model: Any, mean: float, std: float) -> None:
    """Absorbs (score - mean) / std into the weights of a reward model, in place.

    The checkpoint itself is then centred: whoever loads it needs no statistics beside it. The head has no bias, so the
    shift goes into the bias of the final LayerNorm: moving it by c * w / |w|^2 moves every score w . h by exactly c.

    Args:
        model: A sequence-classification model with one label.
        mean: Mean of its scores on reference responses.
        std: Their standard deviation, > 0.

    Raises:
        InvalidArgumentError: If neither the head nor the final norm has a bias to put the shift in.
    """
    check_number("mean", mean, -math.inf)
    check_number("std", std, 0, open_low=True)
    head = _score_head(model)
    norm = _final_norm(model)
    if head.bias is None and getattr(norm, "bias", None) is None:
        raise InvalidArgumentError(
            "`model` must have a bias in its score head or its final norm to be centred, "
            f"and {type(model).__name__} has none."
        )
    head.weight /= std
    if head.bias is not None:
        head.bias.copy_((head.bias - mean) / std)
    else:
        w = head.weight[0]
        norm.bias -= (mean / std) * w / w.dot(w)


@torch.no_grad()
def score_texts(model: Any, tokenizer: Any, texts: Sequence[str], batch_size: int = 256) -> Tensor:
    """Scores of texts under a reward model.

    Args:
        model: A sequence-classification model with one label.
        tokenizer: Its tokenizer.
        texts: N texts, prompt + completion, EOS included where the response has one.
        batch_size: Rows a forward; texts of like length share one.

    Returns:
        (N,) float32 on the CPU.
    """
    model.eval()
    sequences = encode(model, tokenizer, texts)
    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
    scores = torch.empty(len(sequences))
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        scores[rows] = _forward(model, [sequences[i] for i in rows]).cpu().float()
    return scores


def encode(model: Any, tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of texts, checked to fit the model.

    Raises:
        InvalidArgumentError: If a text has no token or more than the model has positions.
    """
    sequences: list[list[int]] = tokenizer(list(texts))["input_ids"]
    limit = max_positions(model)
    for text, ids in zip(texts, sequences, strict=True):
        if not ids or (limit is not None and len(ids) > limit):
            most = "" if limit is None else f" to {limit}"
            raise InvalidArgumentError(f"`texts` must have 1{most} tokens each, got {len(ids)} in {text!r}.")
    return sequences


def bucketed_batches(lengths: Sequence[int], batch_size: int, generator: torch.Generator) -> Iterator[list[int]]:
    """Yields the indices 0..B-1 once, shuffled, in batches whose members are of like length: less padding."""
    order: list[int] = torch.randperm(len(lengths), generator=generator).tolist()
    window = _BUCKET_BATCHES * batch_size
    batches: list[list[int]] = []
    for start in range(0, len(order), window):
        bucket = sorted(order[start : start + window], key=lambda i: lengths[i])
        batches += [bucket[i : i + batch_size] for i in range(0, len(bucket), batch_size)]
    for i in torch.randperm(len(batches), generator=generator).tolist():
        yield batches[i]


def warm_up_cosine(step: int, total: int, warm_up: float) -> float:
    """Factor of the learning rate at update `step` of `total`: linear up over the share `warm_up`, then cosine to 0."""
    rise = warm_up * total
    if step < rise:
        return (step + 1) / (rise + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(total - rise, 1)))


def _forward(model: Any, sequences: Sequence[Sequence[int]]) -> Tensor:
    """(n,) scores of n sequences."""
    return sequence_logits(model, sequences)[:, 0]


def _score_head(model: Any) -> nn.Linear:
    head = getattr(model, "score", None) or getattr(model, "classifier", None)
    if not isinstance(head, nn.Linear) or head.out_features != 1:
        raise InvalidArgumentError(f"`model` must have a scalar linear head, and {type(model).__name__} has {head}.")
    return head


def _final_norm(model: Any) -> Any:
    names = ("ln_f", "final_layer_norm", "norm")
    return next((norm for name in names if (norm := getattr(model.base_model, name, None)) is not None), None)
