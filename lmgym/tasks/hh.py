"""Can the agent be helpful and harmless? On public checkpoints: a chat model answers people who ask, or provoke.

The prompts are the dialogues of Anthropic's `hh-rlhf` (Bai et al. 2022, arXiv 2204.05862), `helpful-base` and
`harmless-base`, up to where the last answer is due. The policy is `Qwen/Qwen2.5-0.5B-Instruct`, and reads them in its
chat template. The score is the mean of two reward models of Rewards-in-Context (Yang et al. 2024, arXiv 2402.10207):
of helpfulness, and of harmlessness. They read the dialogue as the data set writes it.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from lmgym.data.conversations import Messages, is_conversation, reply_of
from lmgym.data.deferred import DeferredPrompts
from lmgym.data.rows import check_text, column
from lmgym.data.sets import read_split
from lmgym.errors import InvalidArgumentError
from lmgym.rewards.reading import ModelReward
from lmgym.tasks import Task, register_task

if TYPE_CHECKING:
    from lmgym.rewards.classifier import ClassifierReward

DATA = "Anthropic/hh-rlhf"
FOLDERS = ("helpful-base", "harmless-base")
REWARDS = ("Ray2333/gpt2-large-helpful-reward_model", "Ray2333/gpt2-large-harmless-reward_model")
_TURN = re.compile(r"\n\n(Human|Assistant):")
_SPEAKERS = {"user": "Human", "assistant": "Assistant"}
_ROLES = {speaker: role for role, speaker in _SPEAKERS.items()}


def read_dialogues(source: str, split: str) -> list[dict[str, Any]]:
    """Rows with the messages before the last answer as prompt, each dialogue once.

    Args:
        source: directory or hub name of the data set. split: "train" or "test".
    """
    found: dict[str, dict[str, Any]] = {}
    for folder in FOLDERS:
        for row in read_split(source, folder, split, "chosen"):
            text = check_text("prompts", column("prompts", row, "chosen"), row.location)
            messages = parse_dialogue(text)
            if messages:
                found.setdefault(write_dialogue(messages), {"prompt": messages})
    return list(found.values())


def parse_dialogue(text: str) -> list[dict[str, str]]:
    r"""The messages before the last answer of "\n\nHuman: ...\n\nAssistant: ..."; none of what is no dialogue."""
    before, *parts = _TURN.split(text)
    turns = [{"role": _ROLES[parts[i]], "content": parts[i + 1].strip()} for i in range(0, len(parts), 2)]
    asked = turns[:-1]
    roles = [turn["role"] for turn in turns]
    takes_turns = roles == ["user", "assistant"] * (len(roles) // 2)
    is_whole = not before.strip() and all(turn["content"] for turn in asked)
    return asked if turns and takes_turns and is_whole else []


def write_dialogue(messages: Messages) -> str:
    """A conversation as the data set writes it, up to where the answer is due; system messages are left out."""
    turns = [f"\n\n{_SPEAKERS[m['role']]}: {m['content']}" for m in messages if m["role"] in _SPEAKERS]
    return "".join([*turns, "\n\nAssistant:"])


class DialogueScore:
    """The score of a reward model that reads a conversation as `hh-rlhf` writes it."""

    def __init__(self, classifier: ClassifierReward) -> None:
        self._classifier = classifier

    def __call__(self, prompts: list[Any], completions: list[Any], **columns: Any) -> list[float]:
        """B scores of conversations and the answers to them."""
        for prompt in prompts:
            if not is_conversation(prompt):
                raise InvalidArgumentError(f"`prompts` of this task must be conversations, got {prompt!r}.")
        asked = [write_dialogue(prompt) for prompt in prompts]
        return self._classifier(asked, [f" {reply_of(completion).strip()}" for completion in completions])


PROMPTS = DeferredPrompts(DATA, ("train", "test"), read_dialogues)


def hh() -> Task:
    """The task; it holds names, and downloads nothing."""
    return Task(
        name="hh",
        model="Qwen/Qwen2.5-0.5B-Instruct",
        reward=[ModelReward(name, DialogueScore) for name in REWARDS],
        reward_weights=(0.5, 0.5),
        prompts=PROMPTS,
        kl_coef=0.1,
        max_new_tokens=128,
        max_prompt_tokens=512,
        on_long="skip",
    )


register_task("hh", hh, on_hub=True)
