"""`python -m agents.worth`: what is labelled, what is measured, what is kept, and what is refused."""

from __future__ import annotations

import itertools
import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import run_command_here
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

from agents.runs import worth_cell
from agents.runs.config import CONF
from agents.runs.defaults import complete_agents
from agents.runs.help_page import worth_help_page
from agents.runs.sweeps import register
from agents.runs.worth_cell import Stopped, World, labels_of, order_agreement, reference_of, run_cell
from agents.runs.worth_plan import Cell, WorthPlan, check_worth, with_lists
from agents.runs.worth_report import summarise, worth_table
from lmgym.errors import InvalidArgumentError, LmGymError
from lmgym.feedback.files import write_records
from lmgym.feedback.records import Ranking, Record
from lmgym.reward_models.config import RewardConfig
from lmgym.reward_models.disagreement import measure_disagreement
from lmgym.reward_models.training import train_reward
from lmgym.tasks import reviews

TINY = (
    *("device=cpu", "total_timesteps=300", "evaluation.samples=2", "evaluation.prompts=6", "agent.batch_size=32"),
    *("seeds=1", "reward.batch_size=4"),
)
DISPUTED = ("choice=[random,disagreement]", "rounds=2", "reward.ensemble=2")


def plan_of(*overrides: str) -> WorthPlan:
    register()
    complete_agents()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("worth", [*TINY, *overrides])
    GlobalHydra.instance().clear()
    from agents.runs.plan import plain

    return check_worth(plain(cfg))


# -- pure functions --------------------------------------------------------------------------------------------------


def test_the_share_of_pairs_in_the_order_of_gold_is_that_of_a_loop() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(0, 4, (20, 5), generator=generator).double()
    gold = torch.randint(0, 4, (20, 5), generator=generator).double()
    gold[3] = 1.0  # tells none apart
    found = order_agreement(scores, gold)
    for x in range(20):
        right = []
        for i, j in itertools.combinations(range(5), 2):
            if gold[x, i] != gold[x, j]:
                better, worse = (i, j) if gold[x, i] > gold[x, j] else (j, i)
                margin = scores[x, better] - scores[x, worse]
                right.append(1.0 if margin > 0 else 0.5 if margin == 0 else 0.0)
        if right:
            assert found[x].item() == pytest.approx(sum(right) / len(right))
        else:
            assert found[x].isnan()
    assert order_agreement(gold, gold).nanmean() == 1
    assert order_agreement(-gold, gold).nanmean() == 0


def test_numbers_of_labels_may_stand_without_brackets() -> None:
    given = ["labels=0,50", "task=reviews", "labels=[1,2]", "labels=7", "choice=random,disagreement"]
    assert with_lists(given) == ["labels=[0,50]", *given[1:4], "choice=[random,disagreement]"]


# -- what is labelled ------------------------------------------------------------------------------------------------


def first_labels(world: World, count: int, seed: int = 0, number: int = 0) -> list[Record]:
    reference = reference_of(world.training(seed))
    return list(itertools.islice(labels_of(world, reference, seed, number), count))


def test_labels_are_the_annotators_rankings_of_completions_of_the_reference() -> None:
    world = World.of(plan_of("feedback.temperature=0.0", "samples=3"))
    records = first_labels(world, 30)
    assert len({record.id for record in records}) == 30
    assert {record.columns["split"] for record in records} == {"train"}
    for record in records:
        assert isinstance(record.judgement, Ranking)
        scores = reviews.gold([str(record.prompt)] * len(record.completions), [str(c.text) for c in record.completions])
        order = [index for tier in record.judgement.tiers for index in tier]
        assert [scores[i] for i in order] == sorted(scores, reverse=True)
    assert records[:20] == first_labels(world, 20)  # fewer labels are the first of more
    assert records[:20] != first_labels(world, 20, seed=1)
    assert records[:20] != first_labels(world, 20, number=1)


def test_every_prompt_is_asked_before_any_is_asked_again() -> None:
    world = World.of(plan_of())
    few = {split: texts[:8] for split, texts in world.task.prompts.items()}
    world = replace(world, task=replace(world.task, prompts=few))
    records = first_labels(world, 40)
    prompts = [record.columns["prompt_index"] for record in records]
    asked_again = next(i for i, prompt in enumerate(prompts) if prompt in prompts[:i])
    assert asked_again >= 7  # a prompt whose two texts are the same is left out
    assert len({record.id for record in records}) == 40
    assert max(prompts.count(prompt) for prompt in set(prompts)) <= 7


def test_disagreement_chooses_the_most_disputed_of_the_pool() -> None:
    world = World.of(plan_of(*DISPUTED, "pool=3"))
    reference = reference_of(world.training(0))
    pool = [record.id for record in first_labels(world, 18, number=1)]
    lm: Any = reference.envs.engine.lm
    config = RewardConfig(ensemble=2, batch_size=4)
    ensemble: Any = train_reward(first_labels(world, 10), lm.model, lm.tokenizer, config).reward()
    chosen = list(labels_of(world, reference, 0, 1, ensemble, wanted=6))
    assert len(chosen) == 6
    spreads = measure_disagreement(first_labels(world, 18, number=1), ensemble)
    greatest = sorted(range(18), key=lambda index: -spreads[index])[:6]
    assert [record.id for record in chosen] == [pool[index] for index in greatest]


# -- a run -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with rounds that was stopped in the midst of its third cell, and went on."""
    directory = tmp_path_factory.mktemp("worth") / "run"
    arguments = [*TINY, "labels=[0,8]", "rounds=2", "reward.ensemble=2", f"hydra.run.dir={directory}"]
    train = worth_cell.train
    calls = []

    def train_twice(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == 3:
            raise Stopped
        return train(*args)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(worth_cell, "train", train_twice)
        with pytest.raises(SystemExit) as stopped:
            run_command_here("agents.worth", *arguments)
    assert stopped.value.code == 130
    cells = sorted(path.name for path in (directory / "cells").iterdir())
    assert cells == ["labels0-seed0.json", "labels8-seed0.json"]
    before = (directory / "cells" / "labels8-seed0.json").read_text()
    with pytest.raises(SystemExit, match=f"resume={directory}"):  # nothing is measured again by mistake
        run_command_here("agents.worth", *arguments)
    run_command_here("agents.worth", f"resume={directory}")
    assert (directory / "cells" / "labels8-seed0.json").read_text() == before
    return directory


@pytest.mark.slow
def test_a_run_that_was_stopped_goes_on_with_what_is_left(run: Path) -> None:
    result = json.loads((run / "worth.json").read_text())
    assert [(row["labels"], row["round"]) for row in result["rows"]] == [(0, 1), (8, 1), (8, 2), (None, 1)]
    assert (run / "worth.png").stat().st_size > 10_000
    reference, _, second, gold = result["rows"]
    assert reference["kl"]["mean"] == pytest.approx(0, abs=1e-5)
    assert reference["share"]["mean"] == pytest.approx(0)
    assert reference["reward_reference"] is None
    for name in ("reward_reference", "reward_policy"):
        assert 0 <= second[name]["mean"] <= 1
    assert gold["share"]["mean"] < 1
    rounds = result["cells"][1]["rounds"]
    assert [row["labels"] for row in rounds] == [4, 8]
    assert "gold score" in worth_table(result)


@pytest.mark.slow
def test_a_run_may_go_on_with_other_numbers_of_labels_only(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for override, message in (("total_timesteps=900", "as it was"), ("labels=[1]", "2 at least in each")):
        with pytest.raises(SystemExit, match=message):
            run_command_here("agents.worth", f"resume={run}", override)
    run_command_here("agents.worth", f"resume={run}", "gold=false")  # all is there
    assert None not in [row["labels"] for row in json.loads((run / "worth.json").read_text())["rows"]]
    run_command_here("agents.worth", f"resume={run}", "choice=[random,disagreement]")
    result = json.loads((run / "worth.json").read_text())
    random, chosen = result["cells"][1:]
    assert chosen["choice"] == "disagreement"
    assert chosen["rounds"][0] == random["rounds"][0]  # the first round is the same
    assert chosen["rounds"][1] != random["rounds"][1]
    assert [row["round"] for row in result["differences"]] == [1, 2]
    assert result["differences"][0]["return"]["mean"] == 0


@pytest.mark.slow
def test_the_reference_may_write_in_all_rounds_and_one_policy_is_trained() -> None:
    world = World.of(plan_of("writer=reference", "rounds=3", "labels=[12]"))
    rows = run_cell(world, Cell(12, 0))
    assert ["return" in row for row in rows] == [False, False, True]
    assert all(row["reward"]["reference"] is not None for row in rows)


# -- what is known of the optimum, and what is said ------------------------------------------------------------------


def cell_of(labels: int | None, seed: int, returned: float, bound: float, choice: str = "random") -> dict[str, Any]:
    point = {"mean": returned, "low": returned, "high": returned}
    row = {"round": 1, "return": point, "kl": point, "bound": {**point, "mean": bound}}
    return {"labels": labels, "seed": seed, "choice": choice, "rounds": [row], "seconds": 1.0}


def test_shares_are_of_the_largest_bound_that_any_policy_gives_and_means_over_seeds() -> None:
    plan = plan_of("labels=[0,50]", "seeds=2", "gold=false")
    cells = [cell_of(0, 0, 0.1, 0.9), cell_of(50, 0, 0.6, 1.1), cell_of(0, 1, 0.1, 0.8), cell_of(50, 1, 0.8, 1.0)]
    result = summarise(plan, cells)
    assert result["optimum"] == {"value": 1.1, "reference": pytest.approx(0.1), "upper": None, "method": "samples"}
    share = result["rows"][1]["share"]
    assert share["mean"] == pytest.approx((0.5 + 0.7) / 2)
    assert share["high"] - share["mean"] == pytest.approx(12.7062 * 0.1, rel=1e-4)  # Student, two seeds
    assert "V* >= 1.100" in worth_table(result)


def test_choices_are_compared_seed_by_seed() -> None:
    plan = plan_of("labels=[50]", "seeds=3", "gold=false", *DISPUTED)
    random = [0.1, 0.5, 0.9]
    disputed = [0.3, 0.6, 1.2]  # 0.2, 0.1 and 0.3 above
    cells = [cell_of(50, seed, returned, 1.5) for seed, returned in enumerate(random)]
    cells += [cell_of(50, seed, returned, 1.5, "disagreement") for seed, returned in enumerate(disputed)]
    result = summarise(plan, cells)
    (difference,) = result["differences"]
    assert difference["return"]["mean"] == pytest.approx(0.2)
    half = 4.3027 * 0.1 / math.sqrt(3)  # Student, three pairs: the spread between seeds is not in it
    assert difference["return"]["high"] - difference["return"]["mean"] == pytest.approx(half, rel=1e-4)
    assert [row["choice"] for row in result["rows"]] == ["random", "disagreement"]
    table = worth_table(result)
    assert re.search(r"50 +disagreement +1 ", table)
    assert "Disagreement minus random, seed by seed:" in table


# -- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("labels=[-1]", "`labels`"),
        ("labels=many", "whole numbers"),
        ("labels=[1]", "2 at least"),
        ("samples=1", "`samples`"),
        ("rounds=0", "`rounds`"),
        ("seeds=0", "`seeds`"),
        ("feedback.ask=duel", "`ask`"),
        ("feedback.lapse=2", "lapse"),
        ("reward.objective=regression", "feedback.ask"),
        ("reward.epochs=0", "reward.epochs"),
        ("task=review", "Did you mean 'reviews'"),
        ("choice=disputed", "`choice` must be one of"),
        ("choice=[]", "`choice`"),
        ("choice=disagreement", "`rounds` must be 2 at least"),
        ("writer=nobody", "`writer`"),
        ("pool=1", "`pool`"),
    ],
)
def test_what_cannot_be_is_refused(override: str, message: str) -> None:
    with pytest.raises(LmGymError, match=message):
        plan_of(override)


def test_disagreement_needs_reward_models_that_can_disagree() -> None:
    with pytest.raises(LmGymError, match="`reward.ensemble` must be 2 at least .* got 1"):
        plan_of("choice=[random,disagreement]", "rounds=2")


@pytest.mark.parametrize("module", ["agents.worth", "agents.reward"])
def test_a_task_whose_reference_cannot_become_a_reward_model_is_refused_first(module: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    arguments = [*TINY] if module == "agents.worth" else ["device=cpu", f"preferences={tmp_path / 'prefs.jsonl'}"]
    write_records(tmp_path / "prefs.jsonl", [Record("p", (" a", " b"), Ranking(((0,), (1,))))])
    with pytest.raises(SystemExit, match="reference .* 'keyword-8': task=reviews.*MarkovLM is none"):
        run_command_here(module, "task=keyword-8", *arguments, f"hydra.run.dir={run}")
    assert not run.exists()


def test_completions_that_are_always_the_same_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World.of(plan_of())
    monkeypatch.setattr(worth_cell, "write_completions", lambda *args, **kwargs: iter(()))
    with pytest.raises(InvalidArgumentError, match="the same"):
        first_labels(world, 1)


def test_cells_are_named_and_ordered_by_seed() -> None:
    cells = plan_of("labels=[50,0]", "seeds=2").cells()
    assert [cell.name for cell in cells[:3]] == ["labels0-seed0", "labels50-seed0", "gold-seed0"]
    assert cells[3] == Cell(0, 1)


def test_help_lists_every_key() -> None:
    page = worth_help_page(CONF)
    for word in ("labels", "feedback:", "tie_threshold", "rounds", "total_timesteps", "plackett_luce", "rloo"):
        assert word in page
