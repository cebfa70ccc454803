"""Does the agent over-optimise its reward? The task is `reviews` with a reward model that learned from few rankings.

All but the reward is the same as in `reviews`, the gold score included. The reward models differ in how many rankings
they learned from: the first so many of the same ones (Gao et al. 2023, arXiv 2210.10760). A policy that is trained on
one raises the score. The gold score stops rising long before that; the fewer the rankings, the earlier.
"""

from __future__ import annotations

import functools
import os

from lmgym.tasks import Task, register_task, reviews
from lmgym.tasks.stored import ARTEFACTS

SETTINGS = (25, 200, 2000)  # rankings: the task of n rankings is `proxy-n`


def proxy(rankings: int) -> Task:
    """The built-in task with the reward model of so many rankings."""
    return Task(
        name=f"proxy-{rankings}",
        model=os.path.join(ARTEFACTS, "reviews", "reference"),
        reward=os.path.join(ARTEFACTS, "proxy", f"reward-{rankings}"),
        gold=reviews.gold,
        prompts={"train": reviews.prompts("train"), "test": reviews.prompts("test")},
        kl_coef=0.05,
        max_new_tokens=reviews.MAX_NEW_TOKENS,
        max_prompt_tokens=reviews.MAX_PROMPT_TOKENS,
    )


for _rankings in SETTINGS:
    register_task(f"proxy-{_rankings}", functools.partial(proxy, _rankings))
