"""The keyword arguments of `gym.make("lmgym/RLHF-v0", ...)`, checked before anything loads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from lmgym.errors import InvalidArgumentError, check_bool, check_choice, unknown_keyword
from lmgym.tasks.base import Task, check_split
from lmgym.tasks.registry import make_task

if TYPE_CHECKING:
    from lmgym.models.causal import CausalLM

OBS_FORMATS = ("dict", "flat")
RENDER_MODES = ("ansi", "human", "rgb_array")
PROMPT_ORDERS = ("shuffle", "sequential")
DTYPES = ("float32", "bfloat16", "float16")
_TASK_ARGUMENTS = (
    *("model", "reward", "prompts", "kl_coef", "gamma", "temperature", "max_new_tokens", "min_new_tokens"),
    *("missing_eos_penalty", "dense_kl", "truncate", "reward_weights", "max_prompt_tokens", "on_long"),
)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The keyword arguments of every environment. All but live objects are JSON values, so that a spec round-trips.

    Attributes:
        task: name of a registered task, or a `lmgym.tasks.Task`.
        split: which of the task's prompts.
        model: replaces the task's reference: directory or hub name of a Hugging Face causal LM, or a `CausalLM`.
        reward: replaces its reward: directory or hub name of a sequence-classification model, an import path
            `package.module:function`, or a callable with TRL's reward-function signature; or a list of such.
        reward_weights: of a list of rewards, whose weighted sum is the score; None is 1 each.
        prompts: replaces its prompts: a list of texts or rows, a data set, or a file of them; the reward is given the
            other columns of a row (`lmgym.data.prompts.read_prompts`). Of a task on a data set of the hub also a
            directory with the files of that data set.
        max_prompt_tokens: P, the prompt columns of an observation; None is as many as the longest prompt has.
        on_long: replaces what becomes of prompts with more tokens than that, or than the model has positions for beside
            a response: "error", "skip" (leaves them out) or "truncate_left" (keeps the end of each).
        kl_coef: replaces its price of a nat. 0 never runs the reference.
        gamma: replaces its discount.
        temperature: replaces what the reference's logits are divided by, and with them those of a policy made from it.
        max_new_tokens: replaces its horizon T.
        min_new_tokens: an EOS among the first `min_new_tokens` tokens does not end the episode.
        missing_eos_penalty: taken off the score of a response without an EOS.
        dense_kl: False adds the reference's log-prob of the whole episode to the last reward.
        truncate: True reports the length limit as `truncated`.
        obs_format: "dict" (`input_ids`, `attention_mask`) or "flat" (one array, -1 where there is no token).
        text_info: False leaves the texts out of `info`, for code that takes numbers only.
        prompt_order: "shuffle" (without replacement, in a new order each epoch) or "sequential".
        device: "auto", "cpu", "cuda", ... of the reference and the reward model.
        dtype: of the reference: "float32", "bfloat16" or "float16".
        render_mode: None, "ansi", "human" or "rgb_array".
    """

    task: str | Task = "reviews"
    split: str = "train"
    model: str | CausalLM | None = None
    reward: str | Callable[..., Any] | Sequence[str | Callable[..., Any]] | None = None
    reward_weights: Sequence[float] | None = None
    prompts: str | Sequence[str] | None = None
    max_prompt_tokens: int | None = None
    on_long: str | None = None
    kl_coef: float | None = None
    gamma: float | None = None
    temperature: float | None = None
    max_new_tokens: int | None = None
    min_new_tokens: int | None = None
    missing_eos_penalty: float | None = None
    dense_kl: bool | None = None
    truncate: bool | None = None
    obs_format: str = "dict"
    text_info: bool = True
    prompt_order: str = "shuffle"
    device: str = "auto"
    dtype: str = "float32"
    render_mode: str | None = None

    def __post_init__(self) -> None:
        check_choice("obs_format", self.obs_format, OBS_FORMATS)
        check_bool("text_info", self.text_info)
        check_choice("prompt_order", self.prompt_order, PROMPT_ORDERS)
        check_choice("dtype", self.dtype, DTYPES)
        if not isinstance(self.device, str):
            raise InvalidArgumentError(f"`device` must be 'auto' or the name of a torch device, got {self.device!r}.")
        if self.render_mode is not None:
            check_choice("render_mode", self.render_mode, RENDER_MODES)

    @classmethod
    def of(cls, kwargs: dict[str, Any], of: str = "RLHFEnv") -> Settings:
        """Builds settings from the keyword arguments of an environment.

        Args:
            kwargs: by name. of: the class of the environment.

        Raises:
            UnknownKeywordError: for a name that is none of these, with the nearest one.
        """
        known = [f.name for f in fields(cls)]
        for name in kwargs:
            if name not in known:
                raise unknown_keyword(f"{of}.__init__", name, known)
        return cls(**kwargs)

    def resolve(self) -> Task:
        """The task with the values that were given here; checks every value and loads nothing.

        Raises:
            LmGymError: for a value that cannot be.
        """
        task = make_task(self.task, **{name: getattr(self, name) for name in _TASK_ARGUMENTS})
        check_split(task, self.split)
        return task
