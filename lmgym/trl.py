"""A task for TRL's trainers: a data set of prompts and a reward function. TRL itself is not needed.

Shapes: B completions.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

from lmgym.rewards.base import bind_tokenizer, score
from lmgym.tasks.base import Task, check_split
from lmgym.tasks.registry import make_task

TRLReward = Callable[..., list[float]]


def as_trl(task: str | Task, *, split: str = "train", device: str = "auto") -> tuple[Any, TRLReward]:
    """The prompts and the reward of a task, for TRL's `GRPOTrainer` and other trainers of its signature.

    The trainer loads the reference and its tokenizer: `task.reference().model` and `.tokenizer`. TRL estimates the KL
    in its own way and multiplies it by `beta`; `lmgym.evaluation.evaluate` grades what it learned by J.

    Args:
        task: a name, or a Task.
        split: which of its prompts.
        device: of a reward model.

    Returns:
        The prompts, a `datasets.Dataset` where that package is installed, else a list of dicts: "prompt" and the other
        columns of each. And the reward, a function of prompts and completions (B texts), of TRL's `completion_ids`
        (EOS included) where it has them, and of all columns; it returns B floats, a missing-EOS penalty subtracted.

    Raises:
        UnknownNameError: for an unknown name.
    """
    task = make_task(task)
    check_split(task, split)
    lm = task.reference(device)
    reward = bind_tokenizer(task.reward_function(device), lm.tokenizer)

    def compute_scores(
        prompts: Sequence[str], completions: Sequence[str], completion_ids: Any = None, **columns: Any
    ) -> list[float]:
        """Scores B completions as the task does."""
        prompts = list(prompts)
        completions = list(completions)
        prompt_ids = lm.encode_all(tuple(prompts))
        if completion_ids is None:
            texts = zip(prompts, prompt_ids, completions, strict=True)
            completion_ids = [lm.encode_response(*one) + sorted(lm.eos_token_ids)[:1] for one in texts]
        given = {"prompt_ids": prompt_ids, "completion_ids": [[int(i) for i in ids] for ids in completion_ids]}
        scores = score(reward, prompts, completions, **{**columns, **given})
        ended = [bool(ids) and ids[-1] in lm.eos_token_ids for ids in given["completion_ids"]]
        return [x - task.missing_eos_penalty * (not end) for x, end in zip(scores, ended, strict=True)]

    compute_scores.__name__ = task.name.replace("-", "_")  # what TRL logs it as
    rows = [prompt.row() if hasattr(prompt, "row") else {"prompt": prompt} for prompt in task.prompts[split]]
    if importlib.util.find_spec("datasets") is None:
        return rows, compute_scores
    import datasets

    return datasets.Dataset.from_list(rows), compute_scores
