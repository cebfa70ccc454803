"""The proxy tasks: reward models that learned from few rankings, against the gold score."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from builders.completions import gold_scores, sample_completions
from lmgym.rewards.classifier import ClassifierReward, load_reward_model
from lmgym.tasks import make_task, reviews
from lmgym.tasks.proxy import SETTINGS
from lmgym.tasks.stored import ARTEFACTS

ROOT = Path(__file__).parents[2]
SHIPPED = Path(ARTEFACTS) / "proxy"


def figures(name: str) -> list[float]:
    """A row of the card's table, a number for each proxy."""
    card = (SHIPPED / "README.md").read_text(encoding="utf-8")
    (cells,) = re.findall(rf"^\| {name} \| (.+) \|$", card, re.MULTILINE)
    return [float(cell) for cell in cells.split("|")]


@pytest.mark.parametrize("rankings", SETTINGS)
def test_all_but_the_reward_is_that_of_reviews(rankings: int) -> None:
    task = make_task(f"proxy-{rankings}")
    other = make_task("reviews")
    task.validate()
    assert Path(str(task.reward)).name == f"reward-{rankings}"
    assert task.gold is reviews.gold
    assert task.kl_coef == 0.05
    for name in ("model", "prompts", "gamma", "max_new_tokens", "max_prompt_tokens", "min_new_tokens", "dense_kl"):
        assert getattr(task, name) == getattr(other, name), name


def test_the_task_is_made_without_torch() -> None:
    code = (
        "import sys; from lmgym.tasks import make_task\n"
        f"[make_task(f'proxy-{{n}}') for n in {SETTINGS}]\n"
        "print(sorted({'torch', 'transformers', 'tokenizers'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.slow
def test_the_shipped_proxies_are_worse_the_fewer_rankings_they_learned_from() -> None:
    lm = make_task("reviews").reference("cpu")
    models: list[ClassifierReward] = [load_reward_model(str(SHIPPED / f"reward-{n}"), "cpu") for n in SETTINGS]
    assert {parameter.dtype for model in models for parameter in model.model.parameters()} == {torch.float32}
    prompts = list(reviews.prompts("test"))[:128]
    completions = sample_completions(lm, prompts, 4, torch.Generator().manual_seed(0))
    gold = gold_scores(prompts, completions).ravel()
    texts = [text for several in completions for text in several]
    scores = [model([prompt for prompt in prompts for _ in range(4)], texts) for model in models]
    correlation = [float(np.corrcoef(found, gold)[0, 1]) for found in scores]
    assert correlation == sorted(correlation)
    assert correlation[0] < 0.7 < 0.8 < correlation[-1]
    assert figures("correlation with gold") == pytest.approx(correlation, abs=0.08)  # a standard error is 0.03 or less
    for found in scores:
        assert np.mean(found) == pytest.approx(0, abs=0.2)
        assert np.std(found) == pytest.approx(1, abs=0.15)


def test_the_card_shows_the_gap_that_selection_opens() -> None:
    chosen_for, worth = (
        np.array(figures(f"{kind} mean of each prompt's best completion by the learned score"))
        for kind in ("score", "gold")
    )
    gap = chosen_for - worth
    assert gap[0] == max(gap)
    assert (gap > 0).all()
    for name in ("correlation with gold", "ranking accuracy on test prompts"):
        assert figures(name) == sorted(figures(name))


def test_the_shipped_files_are_small() -> None:
    for rankings in SETTINGS:
        files = list((SHIPPED / f"reward-{rankings}").iterdir())
        assert {"config.json", "model.safetensors", "tokenizer.json"} <= {file.name for file in files}
        assert sum(file.stat().st_size for file in files) < 700_000
