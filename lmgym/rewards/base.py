"""Reward functions: their protocol, how they are imported, and the check on what they return."""

from __future__ import annotations

import importlib
import math
import numbers
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol, TypeGuard, cast

from lmgym.errors import InvalidArgumentError, RewardError, shorten
from lmgym.models.names import check_model_name
from lmgym.rewards.calling import call
from lmgym.rewards.members import is_ensemble, read_members
from lmgym.rewards.methods import check_methods

MAX_SCORE = 3.4e38
BEYOND_FLOAT32 = " Agents compute in float32, which ends at 3.4e38: scale the scores down."
MAX_NOISE_LAYERS = 100
SCORE_TOLERANCE = 1e-4  # between two scores of one response, relative and absolute


class RewardFunction(Protocol):
    """The signature of TRL's reward functions, so that those plug in unchanged.

    `prompts[i] + completions[i]` is the text of episode i. `columns` holds per-episode lists: `prompt_ids` and
    `completion_ids` (token ids, the EOS included where there is one), and every other column of the prompts' rows.
    Returns one finite float an episode: a list, an array or a tensor. It may be an async function. It gets copies of
    its arguments, and may change them.

    A reward may have `score_range(prompt_ids, max_new_tokens) -> (low, high)`, bounds on the score of any response to
    this prompt. Evaluations then bound what their samples may have missed (docs/trust.md).
    """

    def __call__(self, prompts: list[str], completions: list[str], **columns: Any) -> Sequence[float]:
        """One finite score an episode."""


def check_reward_name(name: object) -> None:
    """Raises unless `name` is a callable, an import path `package.module:function`, a directory or a hub name."""
    if callable(name):
        check_methods(name)
        remove_noise(cast(RewardFunction, name))
        return
    if is_import_path(name):
        module, _, function = name.partition(":")
        if not module or not function:
            raise InvalidArgumentError(f"`reward` must be an import path 'package.module:function', got {name!r}.")
        return
    if is_ensemble(name):
        read_members(cast(str, name))
        return
    check_model_name("reward", name)


def is_import_path(name: object) -> TypeGuard[str]:
    """Whether a reward is named by an import path `package.module:function`, and not by a directory or a hub name."""
    return isinstance(name, str) and ":" in name and not os.path.exists(name)


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
    check_methods(function)
    return cast(RewardFunction, function)


def score_range(reward: object, prompts: Iterable[Sequence[int]], max_new_tokens: int) -> tuple[float, float] | None:
    """Bounds on the scores of all responses to these prompts; None where the reward has no `score_range`.

    Args:
        reward: with or without a method `score_range`.
        prompts: token ids.
        max_new_tokens: of a response.

    Raises:
        RewardError: for a range that is not two finite numbers, the lower one first.
    """
    of_prompt = getattr(reward, "score_range", None)
    if of_prompt is None:
        return None
    ranges = [of_prompt(ids, max_new_tokens) for ids in prompts]
    if any(bounds is None for bounds in ranges):
        return None
    low = min(float(bounds[0]) for bounds in ranges)
    high = max(float(bounds[1]) for bounds in ranges)
    if not (math.isfinite(low) and math.isfinite(high) and low <= high):
        raise RewardError(f"`score_range` must give two finite numbers, the lower one first, got {(low, high)}.")
    return low, high


def score(
    reward: Callable[..., Sequence[float]], prompts: list[str], completions: list[str], **columns: Any
) -> list[float]:
    """Calls a reward function and checks what it returns.

    It also gets the columns of the prompts' rows (`lmgym.rewards.calling`).

    Raises:
        RewardError: if it returns another number of scores, or one that is not a finite number.
    """
    scores: list[float] = []
    for i, x in enumerate(scores_or_none(reward, prompts, completions, columns)):
        if x is None:
            raise RewardError(
                f"The reward function must return finite numbers, and returned None for completion {completions[i]!r}. "
                "None, which says that a reward does not apply, is for a list of rewards, of which another one applies."
            )
        scores.append(x)
    return scores


def scores_or_none(
    reward: Callable[..., Sequence[float | None]],
    prompts: list[str],
    completions: list[str],
    columns: dict[str, Any],
) -> list[float | None]:
    """The scores as `score` returns them, and None where the reward says that it does not apply to an episode.

    Raises:
        RewardError: if it returns another number of scores, or what is neither None nor a finite number.
    """
    returned = call(reward, prompts, completions, columns)
    scores = _as_numbers(returned)
    if not isinstance(scores, Sequence) or isinstance(scores, (str, bytes)):
        raise RewardError(
            f"The reward function must return {len(completions)} scores, one a completion, and returned {returned!r}."
        )
    if len(scores) != len(completions):
        raise RewardError(
            f"The reward function must return {len(completions)} scores, one a completion, and returned {len(scores)}."
        )
    return [_check_score(x, completion) for x, completion in zip(scores, completions, strict=True)]


def _check_score(x: Any, completion: str) -> float | None:
    """A score as a float; None stays None."""
    number = _as_numbers(x)
    if number is not x and isinstance(number, list) and len(number) == 1:
        number = number[0]  # a tensor of one number
    if number is None:
        return None
    if not isinstance(number, numbers.Real) or not abs(cast(float, number)) <= MAX_SCORE:
        beyond = BEYOND_FLOAT32 if isinstance(number, numbers.Real) and abs(cast(float, number)) < math.inf else ""
        raise RewardError(
            f"The reward function must return finite numbers, and returned {shorten(x)} for completion "
            f"{completion!r}.{beyond}"
        )
    return float(number)


def _as_numbers(x: Any) -> Any:
    """A tensor or array as a list or a number; anything else as it is."""
    if not hasattr(x, "tolist"):
        return x
    try:
        return x.tolist()
    except Exception as error:  # such as a tensor on the device "meta", which holds no numbers
        raise RewardError(f"The reward function must return numbers, and returned {x!r}: {error}.") from error


def remove_noise(reward: RewardFunction) -> RewardFunction:
    """The reward without its noise: its `expected`, and the `expected` of that where there is noise on noise.

    A reward without a callable `expected` is returned as it is. Whether it gives one response the same score each time
    is checked by `scores_agree`.

    Raises:
        InvalidArgumentError: where one `expected` leads to another without end.
    """
    for _ in range(MAX_NOISE_LAYERS):
        inside = getattr(reward, "expected", None)
        if not callable(inside) or inside is reward:
            return reward
        reward = inside
    raise InvalidArgumentError(
        f"`reward.expected` must lead to a reward without noise, and {MAX_NOISE_LAYERS} of them in a row lead to "
        "another."
    )


def bind_tokenizer(reward: RewardFunction, tokenizer: Any) -> RewardFunction:
    """The reward for responses of a policy with this tokenizer: the result of its `for_tokenizer`, if it has one."""
    bind = getattr(reward, "for_tokenizer", None)
    return reward if bind is None else cast(RewardFunction, bind(tokenizer))


STOCHASTIC = (
    "the reward gave one response two scores, so that exp(score / kl_coef) would count its noise as gain: give it an "
    "attribute `expected`, the reward that it pays on average (as `lmgym.rewards.noise.NoisyReward` has)"
)
"""Why there is no bound on V* from the scores of a reward whose mean is not known."""


def scores_agree(first: Sequence[float], second: Sequence[float]) -> bool:
    """Whether two calls with the same episodes gave the same scores, up to the round-off of a GPU."""
    pairs = zip(first, second, strict=True)
    return all(math.isclose(a, b, rel_tol=SCORE_TOLERANCE, abs_tol=SCORE_TOLERANCE) for a, b in pairs)
