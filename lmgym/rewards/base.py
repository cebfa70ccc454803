"""What a reward function is, where one comes from, and the check on what it returns."""

from __future__ import annotations

import importlib
import math
import numbers
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol, cast

from lmgym.errors import InvalidArgumentError, RewardError
from lmgym.models.names import check_model_name

SAME_SCORE = 1e-4  # how far apart two scores of one response may be, relative and absolute


class RewardFunction(Protocol):
    """The signature of TRL's reward functions, so that those plug in unchanged.

    `prompts[i] + completions[i]` is the text of episode i. `columns` holds per-episode lists: `prompt_ids` and
    `completion_ids` (token ids, the EOS included where there is one). Returns one finite float an episode.

    A reward may have `score_range(prompt_ids, max_new_tokens) -> (low, high)`, what no score of a response to this
    prompt is below, and above. Evaluations then say how much a score may hold that they have not seen (docs/trust.md).
    """

    def __call__(self, prompts: list[str], completions: list[str], **columns: Any) -> Sequence[float]:
        """One finite score an episode."""


def check_reward_name(name: object) -> None:
    """Raises unless `name` is a callable, an import path `package.module:function`, a directory or a hub name."""
    if callable(name):
        return
    if isinstance(name, str) and ":" in name and not os.path.exists(name):
        module, _, function = name.partition(":")
        if not module or not function:
            raise InvalidArgumentError(f"`reward` must be an import path 'package.module:function', got {name!r}.")
        return
    check_model_name("reward", name)


def import_function(path: str) -> RewardFunction:
    """Imports a reward function from `package.module:function`.

    Raises:
        InvalidArgumentError: if the module or the function is not there, or is not callable.
    """
    module_name, _, name = path.partition(":")
    try:
        function = getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError) as error:
        raise InvalidArgumentError(
            f"`reward` must be an import path 'package.module:function', got {path!r}: {error}."
        ) from error
    if not callable(function):
        raise InvalidArgumentError(f"`reward` must name a callable, and {path!r} is a {type(function).__name__}.")
    return cast(RewardFunction, function)


def score_range(reward: object, prompts: Iterable[Sequence[int]], max_new_tokens: int) -> tuple[float, float] | None:
    """What no score of a response to any of these prompts is below, and above; None where the reward does not say.

    Args:
        reward: with or without a method `score_range`. prompts: token ids. max_new_tokens: of a response.

    Raises:
        RewardError: for a range that is none.
    """
    of_prompt = getattr(reward, "score_range", None)
    if of_prompt is None:
        return None
    ranges = [of_prompt(ids, max_new_tokens) for ids in prompts]
    low = min(float(bounds[0]) for bounds in ranges)
    high = max(float(bounds[1]) for bounds in ranges)
    if not (math.isfinite(low) and math.isfinite(high) and low <= high):
        raise RewardError(f"`score_range` must give two finite numbers, the lower one first, got {(low, high)}.")
    return low, high


def score(
    reward: Callable[..., Sequence[float]], prompts: list[str], completions: list[str], **columns: Any
) -> list[float]:
    """Calls a reward function and holds it to its contract.

    Raises:
        RewardError: if it returns another number of scores, or one that is not a finite number.
    """
    returned: Any = reward(prompts=prompts, completions=completions, **columns)
    scores = returned.tolist() if hasattr(returned, "tolist") else returned
    if not isinstance(scores, Sequence) or isinstance(scores, str):
        raise RewardError(
            f"The reward function must return {len(completions)} scores, one a completion, and returned {returned!r}."
        )
    if len(scores) != len(completions):
        raise RewardError(
            f"The reward function must return {len(completions)} scores, one a completion, and returned {len(scores)}."
        )
    for i, x in enumerate(scores):
        if not isinstance(x, numbers.Real) or not math.isfinite(x):
            raise RewardError(
                f"The reward function must return finite numbers, and returned {x!r} for completion {completions[i]!r}."
            )
    return [float(x) for x in scores]


def remove_noise(reward: RewardFunction) -> RewardFunction:
    """What a reward pays on average: its `expected`, and the `expected` of that where noise lies on noise.

    A reward without a callable `expected` is taken as it is. Whether it then gives one response the same score each
    time is for `scores_agree` to say.
    """
    inside = getattr(reward, "expected", None)
    while callable(inside) and inside is not reward:
        reward = inside
        inside = getattr(reward, "expected", None)
    return reward


def bind_tokenizer(reward: RewardFunction, tokenizer: Any) -> RewardFunction:
    """The reward for responses of a policy with this tokenizer: what its `for_tokenizer` gives, where it has one."""
    bind = getattr(reward, "for_tokenizer", None)
    return reward if bind is None else cast(RewardFunction, bind(tokenizer))


STOCHASTIC = (
    "the reward gave one response two scores, so that exp(score / kl_coef) would count its noise as gain: give it an "
    "attribute `expected`, the reward that it pays on average (as `lmgym.rewards.noise.NoisyReward` has)"
)
"""Why there is no bound on V* from the scores of a reward whose mean is not known."""


def scores_agree(first: Sequence[float], second: Sequence[float]) -> bool:
    """Whether two calls with the same episodes gave the same scores, but for the round-off of a GPU."""
    pairs = zip(first, second, strict=True)
    return all(math.isclose(a, b, rel_tol=SAME_SCORE, abs_tol=SAME_SCORE) for a, b in pairs)
