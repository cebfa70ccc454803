"""Writes docs/tasks.md from the task files and what is stored of their optima: `python -m builders.cards`."""

from __future__ import annotations

import argparse
import itertools
import textwrap
from pathlib import Path

from lmgym.files import write_atomically
from lmgym.tasks import StoredOptimum, Task, registered_tasks

PAGE = Path(__file__).parent.parent / "docs" / "tasks.md"
_HEAD = """# The tasks

In `keyword-8` a response that contains "a b" pays 1. The reference earns J_ref = 0.0200, and no policy can
earn more than V* = 0.6087. A policy that earns 0.58 has a normalised return of (0.58 - 0.02) / (0.6087 - 0.02) = 0.95.

Every task is a knob on one difficulty, in several settings. Its optimum is stored with it: V*, the best return that any
policy can have, and J_ref, the return of the reference. So the normalised return (J - J_ref) / (V* - J_ref) is 0 for
the reference and 1 for the optimum on every task. [The optimum](optimum.md) says how V* is found.

```python
import gymnasium as gym, lmgym

print(lmgym.suite())                                      # a table of all tasks
print(lmgym.make_task("rare-2").optimum("test"))          # stored, or solved now: of a task of your own as well
env = gym.make("lmgym/Keyword-8-v0")                      # or gym.make("lmgym/RLHF-v0", task="keyword-8")
```

`python -m agents.train task=keyword-32` trains on a setting. Names and versions are stable: a change of the reference,
the reward, the prompts or the ends of episodes makes a new version. `lmgym.register_task(name, build)` adds a task of
your own to `gym.make` and to the suite, and `lmgym.testing.check_task(name)` runs the checks that these tasks pass.

All numbers are of the test split, in units of the score; T is in tokens. `python -m builders.optima` derives every V*
again and compares it with the stored one. `python -m builders.cards` writes this page from the task files.

`imdb`, `tldr`, `hh` and `gsm8k` are on [public checkpoints](hub.md). No optimum of theirs is known.
"""
_COLUMNS = (
    "| task | id | T | V | prompts | `kl_coef` | `gamma` | J_ref | V* | by |\n|---|---|---|---|---|---|---|---|---|---|"
)


def page() -> str:
    """The whole page."""
    return "\n".join([_HEAD, *sections().values()])


def sections() -> dict[str, str]:
    """What the page says of the tasks of each family."""
    found = {}
    known = [registered for registered in registered_tasks().values() if not registered.on_hub]
    for family, group in itertools.groupby(known, lambda task: task.name.partition("-")[0]):
        settings = list(group)
        tasks = [registered.task() for registered in settings]
        rows = [_row(registered.env_id, task) for registered, task in zip(settings, tasks, strict=True)]
        notes = [note for task in tasks for note in _note(task)]
        found[family] = "\n".join([f"## {family}\n", settings[0].description, "", _COLUMNS, *rows, *notes, ""])
    return found


def _row(env_id: str, task: Task) -> str:
    train = len(task.prompts["train"])
    test = len(task.prompts["test"])
    cells = [
        f"`{task.name}`",
        f"`{env_id}`",
        str(task.max_new_tokens),
        f"{task.reference('cpu').vocab_size:,}",
        str(test) if task.prompts["train"] == task.prompts["test"] else f"{train:,} + {test:,}",
        f"{task.kl_coef:g}",
        f"{task.gamma:g}",
        *_optimum(task.optima.get("test")),
    ]
    return f"| {' | '.join(cells)} |"


def _note(task: Task) -> list[str]:
    """What the upper bound assumes, as a paragraph; nothing where the optimum is exact."""
    known = task.optima.get("test")
    if known is None or not known.assumption:
        return []
    text = (
        f"`{task.name}`: the bounds are {100 * known.width:.1f} % of the gain apart. The upper one assumes this: "
        f"{known.assumption}."
    )
    return ["", *textwrap.wrap(text, 120, break_on_hyphens=False, break_long_words=False)]


def _optimum(known: StoredOptimum | None) -> tuple[str, str, str]:
    if known is None:
        return "", "", ""
    if known.exact:
        best = f"{known.value:.4f}"
    elif known.upper is None:
        best = f">= {known.lower:.3f}"
    else:
        best = f"{known.lower:.3f} to {known.upper:.3f}"
    reference = f"{known.reference:.4f}"
    if known.reference_half_width:
        reference += f" ± {known.reference_half_width:.4f}"
    return reference, best, known.method


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()  # it takes no argument, and says so
    write_atomically(PAGE, page())
    print(PAGE)
