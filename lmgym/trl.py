"""A task as TRL's trainers take one: a data set of prompts, and a reward function. TRL itself is not needed.

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
    """The prompts of a task, and what it pays at the end, for TRL's `GRPOTrainer` and others of its signature.

    The reference and its tokenizer are the trainer's to load: `task.reference().model` and `.tokenizer`. TRL estimates
    the KL in its own way and weighs it by `beta`; `lmgym.evaluation.evaluate` grades what it learned by J.

    Args:
        task: a name, or a Task. split: which of its prompts. device: of a reward model.

    Returns:
        A `datasets.Dataset` where that package is installed, else a list of dicts: "prompt", and the further columns
        of the prompts. And the reward: of prompts and completions (B texts), TRL's `completion_ids` (the EOS included)
        where it gives them, and all columns, it makes B floats; a missing-EOS penalty is taken off.

    Raises:
        UnknownNameError: for a name that is none.
    """
    task = make_task(task)
    check_split(task, split)
    lm = task.reference(device)
    reward = bind_tokenizer(task.reward_function(device), lm.tokenizer)

    def pay(
        prompts: Sequence[str], completions: Sequence[str], completion_ids: Any = None, **columns: Any
    ) -> list[float]:
        """B scores."""
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

    pay.__name__ = task.name.replace("-", "_")  # what TRL logs it as
    rows = [prompt.row() if hasattr(prompt, "row") else {"prompt": prompt} for prompt in task.prompts[split]]
    if importlib.util.find_spec("datasets") is None:
        return rows, pay
    import datasets

    return datasets.Dataset.from_list(rows), pay
