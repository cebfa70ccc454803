"""Can the agent sum up a post? On public checkpoints: Pythia 1B writes the TL;DR of posts on Reddit.

Policy and reward model are those of "The N+ implementation details of RLHF with PPO" (Huang et al. 2024, arXiv
2403.17031; vwxyzjn/summarize_from_feedback_details), which TRL's example of PPO uses as well. The settings are theirs:
a temperature of 0.7, up to 53 tokens, and 1 less for a summary without an EOS. Posts with more than 512 tokens are left
out.
"""

from __future__ import annotations

from lmgym.data.deferred import DeferredPrompts
from lmgym.data.rows import column
from lmgym.data.sets import read_split
from lmgym.tasks import Task, register_task

DATA = "trl-lib/tldr"
CHECKPOINT = "cleanrl/EleutherAI_pythia-1b-deduped__{}__tldr"


def read_posts(source: str, split: str) -> list[dict[str, str]]:
    """Rows with a post as the prompt: `SUBREDDIT: r/...`, `TITLE: ...`, `POST: ...` and `TL;DR:`.

    Args:
        source: directory or hub name of the data set. split: "train", "validation" or "test".
    """
    return [{"prompt": column("prompts", row, "prompt")} for row in read_split(source, "data", split, "prompt")]


PROMPTS = DeferredPrompts(DATA, ("train", "validation", "test"), read_posts)


def tldr() -> Task:
    """The task; it holds names, and downloads nothing."""
    return Task(
        name="tldr",
        model=CHECKPOINT.format("sft"),
        reward=CHECKPOINT.format("reward"),
        prompts=PROMPTS,
        kl_coef=0.05,
        max_new_tokens=53,
        temperature=0.7,
        missing_eos_penalty=1.0,
        max_prompt_tokens=512,
        on_long="skip",
    )


register_task("tldr", tldr, on_hub=True)
