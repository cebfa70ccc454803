"""A task: everything that defines one token MDP.

Importing this module, or any task, loads neither torch nor a model: a task holds names until it is asked for its parts.
"""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

from lmgym.data.deferred import DeferredPrompts
from lmgym.data.prompts import PromptIndex, read_prompts
from lmgym.data.rows import check_text
from lmgym.ending import EndRule
from lmgym.errors import (
    InvalidArgumentError,
    check_bool,
    check_choice,
    check_int,
    check_number,
    shorten,
)
from lmgym.models.names import check_model_name
from lmgym.rewards.base import RewardFunction, check_reward_name, import_function, is_import_path, score
from lmgym.rewards.combined import CombinedReward, check_weights
from lmgym.rewards.reading import ModelReward
from lmgym.tasks.stored import StoredOptimum

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from lmgym.models.causal import CausalLM

ON_LONG = ("error", "skip", "truncate_left")  # of prompts with more tokens than they may have
MAX_TOKENS = 2**20  # of a prompt or a response: more than any model reads, and few enough for arrays of them


_solver: Callable[[Task, str], StoredOptimum] | None = None


def solve_with(solver: Callable[[Task, str], StoredOptimum]) -> None:
    """Sets the function that finds an optimum that is not stored. Solvers import tasks, so tasks cannot import them."""
    global _solver
    _solver = solver


@dataclass(frozen=True, kw_only=True)
class Task:
    """One token MDP (docs/mdp.md).

    Attributes:
        name: of the task, as in `gym.make("lmgym/RLHF-v0", task=name)`.
        model: the reference. A local directory or hub name of a Hugging Face causal LM; or a loaded one; or a function
            without arguments that makes one, and returns the same one at every call.
        reward: gives the score at the end. A directory or hub name of a sequence-classification model; or an import
            path `package.module:function`; or a callable with TRL's reward-function signature; or a list of these,
            which pays their weighted sum.
        reward_weights: of a list of rewards, in their order; None is 1 each.
        prompts: texts by split. Rows, data sets and files of them are read at once (`lmgym.data.prompts.read_prompts`);
            the reward gets the other columns of a row. A `DeferredPrompts` is read when it is first needed.
        kl_coef: price of a nat of KL(pi || pi_ref), in units of the score. 0 never runs the reference.
        max_new_tokens: T, the horizon, in tokens.
        gold: the true reward that `reward` approximates; it is reported and never paid. None where there is none.
        gamma: discount a token.
        temperature: divides the reference's logits: pi_ref is its distribution at that temperature.
        min_new_tokens: an EOS among the first `min_new_tokens` tokens is a token like the rest: it does not end.
        missing_eos_penalty: subtracted from the score of a response without an EOS.
        dense_kl: pays the reference's log-prob at every step; else the last reward pays the sum over the episode.
        truncate: reports the length limit as `truncated` (an ablation); else both ends are `terminated`.
        max_prompt_tokens: P, tokens; None is the longest prompt of any split.
        on_long: of prompts with more tokens than that, or than the model has positions for beside a response: "error",
            "skip" (leaves them out) or "truncate_left" (keeps the end of each).
        optima: what is known of V*, by split; empty where nothing is known.
    """

    name: str
    model: str | CausalLM | Callable[[], CausalLM]
    reward: str | RewardFunction | Sequence[str | RewardFunction]
    prompts: Mapping[str, Sequence[str]]
    kl_coef: float
    max_new_tokens: int
    reward_weights: Sequence[float] | None = None
    gold: RewardFunction | None = None
    gamma: float = 1.0
    temperature: float = 1.0
    min_new_tokens: int = 0
    missing_eos_penalty: float = 0.0
    dense_kl: bool = True
    truncate: bool = False
    max_prompt_tokens: int | None = None
    on_long: str = "error"
    optima: Mapping[str, StoredOptimum] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_number("kl_coef", self.kl_coef, 0)
        check_number("gamma", self.gamma, 0, 1)
        check_number("temperature", self.temperature, 0, open_low=True)
        check_int("max_new_tokens", self.max_new_tokens, 1)
        check_int("min_new_tokens", self.min_new_tokens, 0, self.max_new_tokens - 1)
        check_number("missing_eos_penalty", self.missing_eos_penalty, 0)
        check_bool("dense_kl", self.dense_kl)
        check_bool("truncate", self.truncate)
        check_choice("on_long", self.on_long, ON_LONG)
        if self.max_prompt_tokens is not None:
            check_int("max_prompt_tokens", self.max_prompt_tokens, 1)
        for limit in ("max_new_tokens", "max_prompt_tokens"):
            if (getattr(self, limit) or 0) > MAX_TOKENS:
                raise InvalidArgumentError(
                    f"`{limit}` must be at most {MAX_TOKENS}, got {shorten(getattr(self, limit))}."
                )
        self._check_rewards()
        if not callable(self.model) and not hasattr(self.model, "tokenizer"):
            check_model_name("model", self.model)
        if not isinstance(self.prompts, Mapping) or not self.prompts:
            raise InvalidArgumentError(f"`prompts` must have at least one split, got {self.prompts!r}.")
        if isinstance(self.prompts, DeferredPrompts):
            object.__setattr__(self, "prompts", self.prompts.of_model(self.model, load_tokenizer_of))
            return
        read = {split: self._read(split, texts) for split, texts in self.prompts.items()}
        object.__setattr__(self, "prompts", read)

    def __repr__(self) -> str:
        splits = describe_prompts(self.prompts)
        known = self.optima.get("test")
        optimum = "" if known is None else f", V* {known.describe()}"
        return (
            f"Task({self.name!r}: prompts {splits}; max_new_tokens={self.max_new_tokens}, kl_coef={self.kl_coef:g}, "
            f"gamma={self.gamma:g}{optimum})"
        )

    def optimum(self, split: str = "test") -> StoredOptimum:
        """What V* is on a split: stored, or solved now; where neither can be, at least so much.

        Solving takes seconds where there are few responses, and sampling longer; `lmgym.optimum` has more ways.

        Args:
            split: which of the prompts V* is the mean over.

        Raises:
            UnknownNameError: for a split that there is not.
            InvalidArgumentError: at `kl_coef=0`; and where no way leads to it (`lmgym.optimum.find.find_optimum`).
        """
        assert _solver is not None
        return _solver(self, split)

    def _check_rewards(self) -> None:
        if isinstance(self.reward, (list, tuple)):
            rewards = tuple(os.fspath(r) if isinstance(r, os.PathLike) else r for r in self.reward)
            object.__setattr__(self, "reward", rewards)
            check_weights(rewards, self.reward_weights)
            for reward in rewards:
                check_reward_name(reward)
            return
        if self.reward_weights is not None:
            raise InvalidArgumentError(
                f"`reward_weights` must be None where `reward` is no list, got {self.reward_weights!r}."
            )
        if isinstance(self.reward, os.PathLike):
            object.__setattr__(self, "reward", os.fspath(self.reward))
        check_reward_name(self.reward)

    def _read(self, split: str, texts: object) -> Sequence[str]:
        """The prompts of a split; as they are where they are texts."""
        argument = f"prompts[{split!r}]"
        if isinstance(texts, (list, tuple)) and texts and all(isinstance(text, str) for text in texts):
            for index, text in enumerate(texts):
                check_text(argument, text, f"item {index}")
            return texts
        return read_prompts(texts, argument, functools.cache(lambda: load_tokenizer_of(self.model)))

    def reference(self, device: str = "auto", dtype: str = "float32") -> CausalLM:
        """The frozen supervised model, loaded once however many ask for it.

        A `CausalLM` stays as it is, but for a copy on another device or in half precision where that is named.
        """
        from lmgym.models.causal import CausalLM
        from lmgym.models.sharing import as_named, load_causal_lm, temper, to_device

        if isinstance(self.model, CausalLM):
            lm = as_named(self.model, device, dtype)
        else:
            model = self.model
            lm = to_device(model(), device, dtype) if callable(model) else load_causal_lm(model, device, dtype)
        return temper(lm, self.temperature)

    def end_rule(self, lm: CausalLM, device: torch.device | str = "cpu") -> EndRule[Tensor]:
        """When responses end, over the tokens of the reference `lm`; the table of EOS tokens is on `device`."""
        return EndRule(lm.eos_table.to(device), self.min_new_tokens, self.max_new_tokens)

    def reward_function(self, device: str = "auto") -> RewardFunction:
        """What is paid at the end; a reward model is loaded once however many ask for it, always in float32."""
        if isinstance(self.reward, (list, tuple)):
            return CombinedReward([_load_reward(reward, device) for reward in self.reward], self.reward_weights)
        return _load_reward(cast("str | RewardFunction", self.reward), device)

    def texts_of(self, prompt_ids: Iterable[Sequence[int]], lm: CausalLM) -> list[str]:
        """The texts of prompts that are given as token ids, with the columns of their rows where they are the task's.

        A prompt from elsewhere has the same columns, and None in each.

        Args:
            prompt_ids: of each prompt. lm: the reference.

        Raises:
            InvalidArgumentError: for ids that two rows with other columns share, where nothing says which is meant.
        """
        index = self.prompt_index(lm)
        return [index.find(ids, lm.decode_prompt) for ids in prompt_ids]

    def prompt_index(self, lm: CausalLM) -> PromptIndex:
        """What finds the prompts of all splits by their token ids."""
        encoded = [zip(lm.encode_all(tuple(texts)), texts, strict=True) for texts in self.prompts.values()]
        return PromptIndex(itertools.chain(*encoded))

    def validate(self) -> None:
        """Checks what can only be known with the parts loaded: prompts encode and fit, and scores are finite.

        Raises:
            LmGymError: naming the first thing that is wrong.
        """
        lm = self.reference()
        limit = self.max_prompt_tokens if self.on_long == "error" else None
        for split, texts in self.prompts.items():
            for text in texts:
                ids = lm.encode(text)
                if not ids or (limit is not None and len(ids) > limit):
                    raise InvalidArgumentError(
                        f"`prompts[{split!r}]` must have 1 to {self.max_prompt_tokens} tokens each, "
                        f"and {text!r} has {len(ids)}."
                    )
        first = next(iter(self.prompts.values()))[0]
        for reward in (self.reward_function(), self.gold):
            if reward is not None:
                eos = sorted(lm.eos_token_ids)[:1]
                score(reward, [first], [""], prompt_ids=[lm.encode(first)], completion_ids=[eos])


def _load_reward(reward: str | RewardFunction, device: str) -> RewardFunction:
    if isinstance(reward, ModelReward):
        return reward.load(device)
    if callable(reward):
        return reward
    if is_import_path(reward):
        return import_function(reward)
    from lmgym.rewards.classifier import load_reward_model
    from lmgym.rewards.ensemble import load_ensemble
    from lmgym.rewards.members import is_ensemble

    return load_ensemble(reward, device) if is_ensemble(reward) else load_reward_model(reward, device)


def describe_prompts(prompts: Mapping[str, Sequence[str]]) -> str:
    """How many prompts each split has; of a data set that may not have been read, its name."""
    if isinstance(prompts, DeferredPrompts):
        return f"of {prompts.source}"
    return ", ".join(f"{len(texts):,} {split}" for split, texts in prompts.items())


def load_tokenizer_of(model: object) -> Any:
    """The tokenizer of a reference that is named, loaded, or made by a function; no weights of a named one."""
    if not isinstance(model, (str, os.PathLike)):
        return model().tokenizer if callable(model) else getattr(model, "tokenizer", None)
    check_model_name("model", model)
    from lmgym.models.adapters import tokenizer_source
    from lmgym.models.loading import load_tokenizer

    return load_tokenizer("model", tokenizer_source("model", os.fspath(model)))


def check_split(task: Task, split: str) -> None:
    """Raises `UnknownNameError` unless the task has this split."""
    check_choice("split", split, task.prompts)
