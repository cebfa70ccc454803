"""What a reward model's run says of it: summary, card, table, and the scores of what was held out."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agents.runs.recorder import METRICS_FILE, read_rows
from agents.runs.report import write_json
from agents.runs.reward_picture import draw_reward
from agents.runs.reward_plan import PICTURE, PREDICTIONS, REWARD_DIRECTORY, RewardPlan
from lmgym.files import write_atomically

if TYPE_CHECKING:
    from torch import Tensor

    from lmgym.reward_models.examples import Example
    from lmgym.reward_models.training import Lesson, RewardResult


def gold_scores_of(plan: RewardPlan, lesson: Lesson) -> Tensor | None:
    """(N,) scores of the held-out completions by the task's hidden reward; None where there is no task.

    That is its gold reward, or its reward where it has none.

    Raises:
        LmGymError: for completions that are none of the task's.
    """
    if plan.task is None or not lesson.held_out:
        return None
    import torch

    from lmgym.feedback.scoring import score_records

    records = [example.record for example in lesson.held_out]
    return torch.tensor([score for _, scores in score_records(records, plan.task) for score in scores])


def write_reward(plan: RewardPlan, result: RewardResult, gold: Tensor | None, directory: Path, seconds: float) -> None:
    """Writes the model with its card, the summary, the predictions and the picture, and prints the table.

    Args:
        plan: of the run. result: what came of it. gold: as `gold_scores_of`. directory: of the run.
        seconds: that it has taken.
    """
    from lmgym.reward_models.saving import save_result

    summary = summarise(plan, result, gold, seconds)
    save_result(result, directory / REWARD_DIRECTORY, card_text(summary))
    write_json(directory / "summary.json", summary)
    _write_predictions(directory / PREDICTIONS, result, gold)
    if summary["held_out"] is not None:
        draw_reward(read_rows(directory / METRICS_FILE), summary, directory / PICTURE)
        print(f"\n{directory / PICTURE}")
    print(f"\n{reward_table(summary)}\n\nPay its score: env.reward={directory / REWARD_DIRECTORY}")


# -- the numbers -----------------------------------------------------------------------------------------------------


def summarise(plan: RewardPlan, result: RewardResult, gold: Tensor | None, seconds: float) -> dict[str, Any]:
    """`summary.json`."""
    lesson = result.lesson
    members = [
        {
            "best_update": member.watch.best_update,
            "stopped_early": member.watch.stopped_early,
            "reference_mean": mean,
            "reference_std": std,
        }
        for member, mean, std in zip(result.members, result.means, result.stds, strict=True)
    ]
    return {
        "task": plan.task,
        "model": plan.model or f"the reference of {plan.task}",
        "preferences": plan.preferences,
        "seed": plan.seed,
        "reward": asdict(plan.reward),
        "parameters": sum(parameter.numel() for parameter in result.models[0].parameters()),
        "feedback": lesson.counts(),
        "updates": plan.reward.updates(len(lesson.train)),
        "members": members,
        "held_out": None if result.measures is None else asdict(result.measures),
        "gold": None if gold is None else _compare_with_gold(result, gold),
        "train_seconds": seconds,
    }


def _compare_with_gold(result: RewardResult, gold: Tensor) -> dict[str, Any]:
    """How the model, and the people, order the held-out completions that gold tells apart."""
    from lmgym.reward_models.measures import accuracy_of_prompts, correlation, measure, share_interval

    held_out = result.lesson.held_out
    by_gold = _ranked_by(gold, held_out)
    measures = measure(result.held_out_scores, by_gold)
    people = accuracy_of_prompts(gold, held_out)
    return {
        "accuracy": None if measures is None else asdict(measures.accuracy),
        "by_gap": [] if measures is None else [asdict(part) for part in measures.by_strength],
        "of_people": asdict(share_interval(people)) if len(people) else None,
        "correlation": correlation(result.held_out_scores, gold),
    }


def _ranked_by(scores: Tensor, examples: Sequence[Example]) -> list[Example]:
    """Examples whose judgements are what scores would have said; each pair as strong as its difference."""
    ranked = []
    start = 0
    for example in examples:
        own = scores[start : start + len(example.sequences)].tolist()
        start += len(own)
        order = sorted(range(len(own)), key=lambda i: -own[i])
        tiers: list[list[int]] = []
        for index in order:
            if tiers and own[tiers[-1][0]] == own[index]:
                tiers[-1].append(index)
            else:
                tiers.append([index])
        gaps = [own[order[i]] - own[order[j]] for i in range(len(own)) for j in range(i + 1, len(own))]
        ranked.append(replace(example, tiers=tiers if gaps else (), strengths=tuple(gaps)))
    return ranked


def _write_predictions(path: Path, result: RewardResult, gold: Tensor | None) -> None:
    """A line a held-out judgement: the texts, their scores, the ranking and the gold scores."""
    lines = []
    start = 0
    for example in result.lesson.held_out:
        end = start + len(example.sequences)
        row = {
            "id": example.record.id,
            "prompt": example.prompt,
            "completions": [completion.text for completion in example.record.completions],
            "tiers": example.tiers,
            "scores": result.held_out_scores[start:end].tolist(),
        }
        if gold is not None:
            row["gold"] = gold[start:end].tolist()
        lines.append(json.dumps(row, ensure_ascii=False))
        start = end
    write_atomically(path, "".join(f"{line}\n" for line in lines))


# -- in words --------------------------------------------------------------------------------------------------------


def reward_table(summary: Mapping[str, Any]) -> str:
    """What the run prints at its end."""
    rows = _facts(summary)
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def _facts(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What was measured, by name."""
    feedback = summary["feedback"]
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in feedback["judgements"].items())
    unused = f"; {feedback['unused']:,} records say nothing" if feedback["unused"] else ""
    rows = [("feedback", f"{kinds} on {feedback['prompts']:,} prompts{unused}")]
    held_out = summary["held_out"]
    if held_out is None:
        rows.append(("held-out accuracy", "nothing was held out"))
    else:
        rows.append(
            (
                "held-out accuracy",
                f"{percent(held_out['accuracy'])} of {held_out['pairs']:,} pairs on {held_out['prompts']:,} prompts",
            )
        )
        rows.append(("calibration error", f"{held_out['calibration_error']:.3f} (0 is calibrated)"))
    gold = summary["gold"]
    if gold is not None and gold["accuracy"] is not None:
        rows.append(("agreement with gold", f"{percent(gold['accuracy'])}, correlation {gold['correlation']:.2f}"))
        if gold["of_people"] is not None:
            rows.append(("people with gold", percent(gold["of_people"])))
    rows.append(("training", _training(summary)))
    return rows


def _training(summary: Mapping[str, Any]) -> str:
    members = summary["members"]
    best = ", ".join(str(member["best_update"] or summary["updates"]) for member in members)
    early = sum(member["stopped_early"] for member in members)
    stopped = f", {early} stopped early" if early else ""
    several = f" of {len(members)} models" if len(members) > 1 else ""
    return f"{summary['updates']:,} updates{several}{stopped}, best at {best}; {summary['train_seconds']:.0f} s"


def percent(interval: Mapping[str, float]) -> str:
    """`69 % [55, 79]`, of shares."""
    return f"{100 * interval['mean']:.1f} % [{100 * interval['low']:.1f}, {100 * interval['high']:.1f}]"


def card_text(summary: Mapping[str, Any]) -> str:
    """The model card: what it is for, what it learned from, how good it is, and how to use it."""
    table = "\n".join(f"| {name} | {value} |" for name, value in _facts(summary))
    settings = "\n".join(f"{name}: {json.dumps(value)}" for name, value in summary["reward"].items())
    means = ", ".join(f"{member['reference_mean']:.4g}" for member in summary["members"])
    stds = ", ".join(f"{member['reference_std']:.4g}" for member in summary["members"])
    shift = _shift_in_words(summary["reward"], means, stds)
    task = f"task={summary['task']} " if summary["task"] else ""
    return f"""---
library_name: transformers
pipeline_tag: text-classification
tags: [reward-model, rlhf, lmgym]
---

# A reward model

It reads a prompt with a completion and gives one number: the higher, the better people like the completion. It started
from {summary["model"]} and learned from `{summary["preferences"]}`.

| | |
|---|---|
{table}

The accuracy is on prompts that training has not seen, the mean over prompts of the share of pairs that are ordered as
people did, with its 95 % interval. Half would be chance. Ties are left out.

{shift}

## Use

```
python -m agents.train {task}env.reward=DIRECTORY
```

`DIRECTORY` is the one of this card. In Python, `lmgym.rewards.classifier.load_reward_model(DIRECTORY)`, or
`lmgym.rewards.ensemble.load_ensemble` of several models.

A policy that is trained against it will find what it gets wrong: keep an eye on a gold score, or on fresh judgements of
what the policy writes.

## Training

`python -m agents.reward` of lmgym, seed {summary["seed"]}, with

```yaml
{settings}
```
"""


def _shift_in_words(config: Mapping[str, Any], means: str, stds: str) -> str:
    if not config["centre"]:
        return f"On reference samples its scores have the mean {means} and the standard deviation {stds}."
    scaled = " and their standard deviation 1" if config["scale"] else ""
    before = f"before, it was {means} with a standard deviation of {stds}."
    return f"The mean of its scores on reference samples is 0{scaled}; {before}"
