"""Tasks for questions: so small that every batch can be written down, and random, a new one for each seed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from torch import Tensor

from lmgym.models.causal import CausalLM
from lmgym.models.tables import dirichlet_rows, markov_lm
from lmgym.optimum.tree import Tree
from lmgym.tasks.base import Task

SYMBOLS = ["a", "b"]
PROMPTS = ("a", "b")


def make_random_tree(seed: int, *, horizon: int, kl_coef: float) -> Tree:
    """Two prompts with a random reference, and a score from 0 to 1 of every response that is random as well.

    There are 7 responses to a prompt at a horizon of 2, 15 at 3 and 31 at 4.
    """
    rng = np.random.default_rng(seed)
    model = markov_lm(dirichlet_rows(rng, 3, 3, 2.0), SYMBOLS)
    scores: dict[tuple[int, ...], float] = {}

    def pay(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        found = []
        for prompt, response in zip(columns["prompt_ids"], columns["completion_ids"], strict=True):
            key = (*prompt, -1, *response)
            if key not in scores:
                scores[key] = float(rng.uniform())
            found.append(scores[key])
        return found

    return Tree.of(_make_task(model, pay, horizon=horizon, kl_coef=kl_coef))


def score_anew(tree: Tree, scores: Tensor) -> Tree:
    """The responses to the first prompt of a tree, with other scores.

    Args:
        scores: (R / X,) of the responses to that prompt; anything else scores 0.
    """
    lengths = tree.episodes.lengths.tolist()
    keys = [tuple(row[:n]) for row, n in zip(tree.episodes.response_ids.tolist(), lengths, strict=True)]
    paid = dict(zip(keys, scores.tolist(), strict=False))  # those of the first prompt come first

    def pay(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        return [paid.get(tuple(response), 0.0) for response in columns["completion_ids"]]

    return Tree.of(replace(tree.task, reward=pay, prompts={"test": [PROMPTS[0]]}))


def make_binary_tree(
    seed: int, success: Sequence[float], *, horizon: int, kl_coef: float, same_length: bool = False
) -> Tree:
    """Two prompts with a random reference, and a score of 1 for some responses and of 0 for the others.

    Args:
        seed: of the reference, and of which responses score.
        success: of each prompt, the probability with which the reference scores, at least.
        horizon: T. kl_coef: price of a nat.
        same_length: all responses have T tokens.
    """
    rng = np.random.default_rng(seed)
    model = markov_lm(dirichlet_rows(rng, 3, 3, 2.0), SYMBOLS)
    shape: dict[str, Any] = {
        "horizon": horizon,
        "kl_coef": kl_coef,
        "min_new_tokens": horizon - 1 if same_length else 0,
    }
    unpaid = Tree.of(_make_task(model, lambda prompts, completions, **_: [0.0] * len(prompts), **shape))
    probs = unpaid.responses.add_up(unpaid.reference).exp()
    episodes = unpaid.episodes
    best = set()
    for x, (prompt, wanted) in enumerate(zip(unpaid.prompts, success, strict=True)):
        mass = 0.0
        for i in rng.permutation(probs.shape[1]):
            if mass >= wanted:
                break
            if mass + float(probs[x, i]) > min(2 * wanted, 0.95):
                continue  # it would be far easier than wanted
            row = x * probs.shape[1] + int(i)
            best.add((*prompt, -1, *episodes.response_ids[row, : int(episodes.lengths[row])].tolist()))
            mass += float(probs[x, i])

    def pay(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        pairs = zip(columns["prompt_ids"], columns["completion_ids"], strict=True)
        return [float((*prompt, -1, *response) in best) for prompt, response in pairs]

    return Tree.of(_make_task(model, pay, **shape))


def make_uneven_tree(seed: int, *, horizon: int, kl_coef: float, token_by_token: bool) -> Tree:
    """Two prompts with a random reference, of which the second is worth 1 more; all responses have T tokens.

    Args:
        seed: of the reference and of the scores.
        horizon: T. kl_coef: price of a nat.
        token_by_token: a score is the sum of what each token earns at its position, and otherwise random for each
            response. Its spread is about the same: 0.3 among responses that are equally likely.
    """
    rng = np.random.default_rng(seed)
    model = markov_lm(dirichlet_rows(rng, 3, 3, 2.0), SYMBOLS)
    earned: dict[tuple[int, ...], float] = {}

    def draw(*key: int) -> float:
        if key not in earned:
            earned[key] = float(rng.uniform())
        return earned[key]

    def pay(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        found = []
        for prompt, response in zip(columns["prompt_ids"], columns["completion_ids"], strict=True):
            if token_by_token:
                tokens = [draw(*prompt, -1, t, token) for t, token in enumerate(response)]
                score = sum(tokens) / horizon**0.5
            else:
                score = draw(*prompt, -1, *response)
            found.append(score + firsts.index(tuple(prompt)))
        return found

    firsts = [tuple(model.encode(prompt)) for prompt in PROMPTS]
    return Tree.of(_make_task(model, pay, horizon=horizon, kl_coef=kl_coef, min_new_tokens=horizon - 1))


def _make_task(model: CausalLM, reward: Any, *, horizon: int, kl_coef: float, min_new_tokens: int = 0) -> Task:
    return Task(
        name="random",
        model=model,
        reward=reward,
        prompts={"test": list(PROMPTS)},
        kl_coef=kl_coef,
        max_new_tokens=horizon,
        min_new_tokens=min_new_tokens,
    )
