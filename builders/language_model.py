"""Trains a causal LM on whole texts, every token of them.

Shapes: B sequences a batch, L columns, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from agents.finite import GRAD_NORM
from agents.update import clip_gradients, sum_gradients
from lmgym.errors import InvalidArgumentError, check_finite, check_int, check_number
from lmgym.models.padding import pad_right
from lmgym.reward_models.batches import bucketed_batches, warm_up_cosine

IGNORED = -100  # the target of a padding column


def train_sft(
    model: Any,
    sequences: Sequence[Sequence[int]],
    *,
    epochs: int,
    learning_rate: float,
    batch_size: int,
    generator: torch.Generator,
    warm_up: float = 0.05,
    weight_decay: float = 0.01,
    max_grad_norm: float = 1.0,
    progress: bool = True,
) -> dict[str, float]:
    """Trains a causal LM to predict each token of the sequences from those before it.

    Args:
        model: A Hugging Face causal LM; changed in place. Dropout is off.
        sequences: Token ids, EOS last; at least two tokens each.
        epochs: Passes over the sequences.
        learning_rate: Peak learning rate of AdamW: linear warm-up, then cosine to zero.
        batch_size: Sequences an update.
        generator: CPU generator that shuffles the sequences.
        warm_up: Share of the updates over which the learning rate rises.
        weight_decay: Decay of AdamW.
        max_grad_norm: Gradients with a larger norm are scaled down to it.
        progress: Whether to show a bar (on a terminal).

    Returns:
        `loss` in nats a token and `perplexity`, means over the last epoch.
    """
    check_int("epochs", epochs, 1)
    check_int("batch_size", batch_size, 1)
    check_number("learning_rate", learning_rate, 0, open_low=True)
    lengths = _checked_lengths(sequences)
    updates = epochs * math.ceil(len(sequences) / batch_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: warm_up_cosine(step, updates, warm_up))
    model.eval()

    nats = 0.0
    tokens = 0
    hidden = None if progress else True  # None: hidden unless on a terminal
    with tqdm(total=epochs * sum(lengths), unit="tok", unit_scale=True, desc="sft", disable=hidden) as bar:
        for _ in range(epochs):
            nats = 0.0
            tokens = 0
            for batch in bucketed_batches(lengths, batch_size, generator):
                # 1. one forward over the batch; the loss is the mean over its tokens
                total, count = negative_log_likelihood(model, [sequences[i] for i in batch])
                loss = total / count

                # 2. one step of AdamW
                norm = sum_gradients([(loss, {})], model.parameters())[GRAD_NORM].item()
                check_finite("loss", loss.item())
                check_finite("norm of the gradient", norm)
                clip_gradients(model.parameters(), norm, max_grad_norm)
                optimizer.step()
                schedule.step()

                # 3. report
                nats += total.item()
                tokens += count
                bar.set_postfix(loss=f"{loss.item():.3f}", perplexity=f"{math.exp(loss.item()):.2f}", refresh=False)
                bar.update(sum(lengths[i] for i in batch))
    return {"loss": nats / tokens, "perplexity": math.exp(nats / tokens)}


@torch.no_grad()
def perplexity(model: Any, sequences: Sequence[Sequence[int]], batch_size: int = 256) -> float:
    """exp of the mean surprise, in nats, of every token but the first of each sequence.

    Args:
        model: A Hugging Face causal LM.
        sequences: Token ids, at least two each.
        batch_size: Sequences a forward.

    Returns:
        A number >= 1; V for a model that knows nothing.
    """
    _checked_lengths(sequences)
    model.eval()
    ordered = sorted(sequences, key=len)
    parts = [
        negative_log_likelihood(model, ordered[start : start + batch_size])
        for start in range(0, len(ordered), batch_size)
    ]
    return math.exp(sum(total.item() for total, _ in parts) / sum(count for _, count in parts))


def negative_log_likelihood(model: Any, sequences: Sequence[Sequence[int]]) -> tuple[Tensor, int]:
    """Summed -log p of every token given those before it, over a batch.

    Causal attention makes right padding invisible to the tokens before it, so the attention mask is all ones (the model
    then runs its fastest kernel); padding columns are left out of the sum.

    Returns:
        A scalar in nats, differentiable, and the number of tokens predicted.
    """
    ids, mask = pad_right(sequences, pad_token_id=0)
    targets = ids.masked_fill(~mask, IGNORED)[:, 1:].to(model.device)
    ids = ids.to(model.device)
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[:, :-1]  # (B, L-1, V)
    total = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED, reduction="sum")
    return total, int(mask[:, 1:].sum())


def _checked_lengths(sequences: Sequence[Sequence[int]]) -> list[int]:
    lengths = [len(sequence) for sequence in sequences]
    if not lengths or min(lengths) < 2:
        raise InvalidArgumentError(
            f"`sequences` must hold at least one sequence and two tokens in each, got lengths {lengths[:8]}."
        )
    return lengths
