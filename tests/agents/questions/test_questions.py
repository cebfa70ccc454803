"""The questions: pages that are made of their data, rules that can say no, and templates without a typed number."""

from __future__ import annotations

import copy
import json
import re
import shutil
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import run_command_here

from agents.exact import TableEstimators, exact_gradient, expected_update, make_table_agent
from agents.questions.page import INDEX, fill_template, render_index, render_page
from agents.questions.protocol import list_questions, load_protocol, template_of
from agents.questions.run import PAGES, answer_question, measure_question, read_seeds
from agents.questions.tasks import make_binary_tree, make_random_tree, score_anew
from agents.runs.config import CONF
from agents.runs.help_page import study_help_page
from lmgym.errors import InvalidArgumentError, UnknownNameError
from studies import best_of_n, dpo_ppo, entropy, over_optimisation, ppo_details, ratio
from studies.kl_estimator import METHODS, KLAgent

QUESTIONS = list_questions()


def data_of(question: str) -> dict[str, Any]:
    data: dict[str, Any] = json.loads((PAGES / f"{question}.json").read_text(encoding="utf-8"))
    return data


@pytest.mark.parametrize("question", QUESTIONS)
def test_the_page_is_that_of_its_data(question: str) -> None:
    page = (PAGES / f"{question}.md").read_text(encoding="utf-8")
    same = page == render_page(question, load_protocol(question), data_of(question))
    assert same, f"python -m agents.study question={question} redraw=true"


def test_the_page_of_all_questions_is_that_of_their_data() -> None:
    same = (PAGES / INDEX).read_text(encoding="utf-8") == render_index(PAGES)
    assert same, "python -m agents.study question=kl-estimator redraw=true"


@pytest.mark.parametrize("question", QUESTIONS)
def test_ten_seeds_in_under_twenty_minutes(question: str) -> None:
    data = data_of(question)
    assert data["seeds"] == list(load_protocol(question).seeds)
    assert len(data["seeds"]) >= 10
    assert data["seconds"] < 20 * 60


@pytest.mark.parametrize("question", QUESTIONS)
def test_no_result_is_typed_into_a_template(question: str) -> None:
    prose = re.sub(r"\(https?://[^)]*\)|`[^`]*`|95 % interval", "", template_of(question))
    assert not re.findall(r"\d\.\d|\d ?%|\d+ (?:nats|percent|times)", prose)


def test_a_template_has_a_text_for_every_name_and_a_name_for_every_text() -> None:
    assert fill_template("{{ a }} and {{b}}", {"a": "1", "b": "2"}) == "1 and 2"
    for names in ({"a": "1"}, {"a": "1", "b": "2", "c": "3"}):
        with pytest.raises(InvalidArgumentError, match="must have the names"):
            fill_template("{{ a }} and {{b}}", names)


def test_the_rule_of_the_kl_says_no() -> None:
    found = data_of("kl-estimator")["found"]
    judge = load_protocol("kl-estimator").judge
    claims = judge(found).claims
    assert "k1 in the reward" in claims[0]
    assert "k3 in the loss" not in claims[0]
    other = copy.deepcopy(found)
    other["methods"]["k1 in the reward"]["on-policy"][3]["gap"] = 0.02  # on one task
    for end in other["methods"]["k3 in the loss"]["on-policy"]:
        end["gap"] = 0.005
    changed = judge(other).claims
    assert "k1 in the reward" not in changed[0]
    assert "k3 in the loss" in changed[0]


def test_the_rule_of_the_normalisation_says_no() -> None:
    found = data_of("grpo-normalisation")["found"]
    judge = load_protocol("grpo-normalisation").judge
    other = copy.deepcopy(found)
    for ends in other["kinds"].values():
        for end in ends["group mean / deviation"]:
            end["weights"] = [0.9, 0.9]
    assert judge(found).claims[2].endswith("yes.")
    assert judge(other).claims[2].endswith("no.")


def test_the_rule_of_the_ratio_says_no() -> None:
    found = data_of("ratio")["found"]
    judge = load_protocol("ratio").judge
    other = copy.deepcopy(found)
    other["methods"]["response"]["8"][2]["bias"] = 1e-3  # on one task
    for numbers in other["methods"]["token, clipped (PPO)"]["4"]:
        numbers["bias"] = 0.1
    assert "*response*" in judge(found).claims[0]
    assert "(PPO)" in judge(found).claims[5]
    assert "with no method" in judge(other).claims[0]
    assert "(PPO)" not in judge(other).claims[5]


def test_the_rule_of_the_critics_says_no() -> None:
    found = data_of("critics")["found"]
    judge = load_protocol("critics").judge
    other = copy.deepcopy(found)
    kind = "random scores"
    other["kinds"][kind]["estimators"][3]["28"]["exact critic, lambda 0.95"]["bias"] = 1e-3  # on one task
    for runs in other["kinds"][kind]["runs"]:
        runs["exact critic, lambda 0"]["gaps"][-1] = 0.3
    assert "exact critic, lambda 0.95" in judge(found).claims[0]
    assert "exact critic, lambda 0.95" not in judge(other).claims[0]
    assert "an exact critic beats" in judge(found).short
    assert "none beats" in judge(other).short


def test_the_rule_of_the_entropy_says_no() -> None:
    found = data_of("entropy")["found"]
    judge = load_protocol("entropy").judge
    other = copy.deepcopy(found)
    other["tasks"][3]["runs"]["no KL"]["end"] = 0.99  # on one task
    for task in other["tasks"]:
        task["runs"]["no KL"]["line"]["error"] = -0.05
    assert "pi\\* on every task" in judge(found).claims[0]
    assert "pi\\* on some tasks" in judge(other).claims[0]
    assert "misses the best score" in judge(found).short
    assert "predicts the best score" in judge(other).short


def test_the_rule_of_best_of_n_says_no() -> None:
    found = data_of("best-of-n")["found"]
    judge = load_protocol("best-of-n").judge
    other = copy.deepcopy(found)
    other["kinds"]["two scores"]["4"][2] = {"kl": 3.0, "share": 0.9}  # on one task
    assert judge(found).claims[0].endswith("yes.")
    assert judge(other).claims[0].endswith("no.")
    assert judge(other).claims[4] != judge(found).claims[4]


def test_the_rule_of_dpo_and_ppo_says_no() -> None:
    found = data_of("dpo-ppo")["found"]
    judge = load_protocol("dpo-ppo").judge
    other = copy.deepcopy(found)
    other["fixed_points"]["mixture"]["DPO"]["gap"][3] = 0.02  # on one task
    for learner in ("PPO, simple", "DPO, simple"):
        other["learners"][learner] = found["learners"]["PPO"]
    assert "with DPO, and" in judge(found).claims[0]
    assert "with none, and" in judge(other).claims[0]
    assert judge(found).claims[6].startswith("With a reward of the form of the score it leaves less with pairs")
    assert "less with none, and more with none" in judge(other).claims[6]


def test_the_rule_of_the_details_says_no() -> None:
    found = data_of("ppo-details")["found"]
    judge = load_protocol("ppo-details").judge
    other = copy.deepcopy(found)
    for rates in other["tasks"].values():
        for runs in rates.values():
            runs["1 epoch"] = [run + 0.06 + 0.001 * i for i, run in enumerate(runs["base"])]
            runs["lambda 1"] = [run + 0.04 + 0.001 * i for i, run in enumerate(runs["base"])]  # too little to matter
    claims = judge(other).claims
    assert "*1 epoch*" in claims[0]
    assert "*1 epoch*" in claims[4]
    assert "*lambda 1*" in claims[3]
    assert "*1 epoch*" not in judge(found).claims[0]


def test_the_rule_of_over_optimisation_says_no() -> None:
    found = data_of("over-optimisation")["found"]
    judge = load_protocol("over-optimisation").judge
    other = copy.deepcopy(found)
    for ways in other["proxies"].values():
        for rows in ways.values():
            for i, row in enumerate(rows):  # what the form of best-of-n gives, with a peak
                row["proxy"] = row["gold"] = [
                    0.6 * d - (0.2 + 0.001 * i) * d * d for d in over_optimisation.distances()
                ]
    claims = judge(other).claims
    assert "along best-of-n: yes; along the best policies: yes" in claims[0]
    assert "along best-of-n: yes" not in judge(found).claims[0]
    assert "rises for no proxy along both" in claims[1]
    assert "each time: no" in claims[2]
    assert claims[-1].endswith("nearer to d (a - b d).")


def test_the_best_of_n_is_the_mean_over_all_ways_to_draw_n() -> None:
    generator = torch.Generator().manual_seed(0)
    proxy, gold = torch.rand(2, 2, 7, generator=generator, dtype=torch.float64)
    best = [
        [gold[x, max(ways, key=lambda i, x=x: proxy[x, i].item())] for ways in combinations(range(7), 3)]
        for x in (0, 1)
    ]
    expected = torch.tensor(best).mean() - gold.mean()
    assert over_optimisation.best_of(proxy, gold, 3)["gold"] == pytest.approx(expected.item())
    tilted = over_optimisation.tilt_to(proxy, proxy, 0.5)["proxy"]
    assert over_optimisation.best_of(proxy, proxy, 1)["proxy"] == pytest.approx(0)
    assert 0 < tilted < (proxy.amax(1).mean() - proxy.mean()).item()


def test_the_head_of_values_starts_as_a_detail_says() -> None:
    head = torch.nn.Linear(4, 1)
    torch.nn.init.zeros_(head.weight)
    torch.nn.init.zeros_(head.bias)
    ppo_details.set_value_head(head, "zero", 0.7, 0)
    assert head(torch.ones(4)).item() == 0
    ppo_details.set_value_head(head, "reference", 0.7, 0)
    assert head(torch.ones(4)).item() == pytest.approx(0.7)
    ppo_details.set_value_head(head, "random", 0.7, 0)
    assert 0 < head.weight.abs().max() <= 0.5


def test_the_table_of_dpo_is_the_reference_at_first_and_the_rewards_of_pi_star_give_it() -> None:
    for kind in ("any", "simple"):
        tasks = dpo_ppo.make_tasks([0, 1], kind)
        assert torch.allclose(dpo_ppo.policy_of(tasks, "DPO", tasks.table), tasks.reference, rtol=0, atol=1e-9)
        assert torch.allclose(tasks.reference.exp().sum(1), torch.ones(2, dtype=torch.float64))
        assert torch.allclose(dpo_ppo.policy_of(tasks, "PPO", tasks.scores), tasks.optimum, rtol=0, atol=1e-9)
        for row, tree in enumerate(tasks.trees):
            anew = score_anew(tree, tasks.scores[row])
            exact = anew.responses.add_up(anew.solve_levels().log_probs)[0]
            assert torch.allclose(tasks.optimum[row], exact, rtol=0, atol=1e-5)


def test_the_interval_of_a_median_has_it_in_at_least_95_percent_of_samples() -> None:
    samples = np.random.default_rng(0).normal(size=(2000, 20))
    intervals = [dpo_ppo.around(row) for row in samples]
    hits = np.mean([interval.low < 0 < interval.high for interval in intervals])
    assert 0.95 < hits < 0.975
    few = dpo_ppo.around([3.0, 1.0, 2.0])
    assert (few.low, few.mean, few.high) == (1.0, 2.0, 3.0)


def test_labels_are_drawn_as_often_as_they_should_be() -> None:
    tasks = dpo_ppo.make_tasks([0], "any")
    generator = torch.Generator().manual_seed(0)
    drawn = dpo_ppo.draw_labels(tasks, tasks.reference, 40_000, 0.0, [generator]) / 40_000
    rates = dpo_ppo.label_rates(tasks, tasks.reference)
    assert rates.sum().item() == pytest.approx(1)
    assert ((drawn - rates).abs() < 4.5 * (rates / 40_000).sqrt() + 1e-4).all()


def test_the_best_score_at_a_kl_is_that_of_a_tilted_reference() -> None:
    reference = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64).log()
    scores = torch.tensor([1.0, 0.5, 0.0], dtype=torch.float64)
    expected = (reference + 1.7 * scores).log_softmax(-1)
    found = best_of_n.tilt(reference, scores, best_of_n.divergence(expected, reference))
    assert torch.allclose(found, expected, rtol=0, atol=1e-9)


def test_the_command_makes_the_page_of_the_data_that_are_there(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgumentError, match="`redraw` must be false where there are no data yet"):
        answer_question("kl-estimator", output=str(tmp_path), redraw=True)
    shutil.copy(PAGES / "kl-estimator.json", tmp_path)
    run_command_here("agents.study", "question=kl-estimator", "redraw=true", f"output={tmp_path}")
    assert (tmp_path / "kl-estimator.md").read_bytes() == (PAGES / "kl-estimator.md").read_bytes()
    assert (tmp_path / "kl-estimator-gaps.png").stat().st_size > 10_000
    assert "grpo" not in (tmp_path / INDEX).read_text(encoding="utf-8")  # of which there are no data


# One will do where the rule is of every task by itself; more where they cost no more.
OTHER_SEEDS = {"kl-estimator": [100], "dpo-ppo": range(100, 120), "ppo-details": range(10, 20)}
# `make test-questions`
MINUTES = ("critics", "dpo-ppo", "entropy", "kl-estimator", "over-optimisation", "ppo-details", "ratio")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("question", "seeds"),
    [
        *((q, range(100, 102)) for q in QUESTIONS if q not in MINUTES),
        *(pytest.param(q, OTHER_SEEDS.get(q, range(100, 104)), marks=pytest.mark.minutes) for q in QUESTIONS),
    ],
)
def test_other_tasks_give_the_same_verdict(question: str, seeds: Sequence[int]) -> None:
    protocol = load_protocol(question)
    found = measure_question(question, seeds)["found"]
    assert protocol.judge(found).short == protocol.judge(data_of(question)["found"]).short


@pytest.mark.parametrize(("seeds", "expected"), [(3, [0, 1, 2]), ("10-12", [10, 11, 12]), ([4, 7], [4, 7])])
def test_seeds_are_a_number_a_range_or_a_list(seeds: Any, expected: list[int]) -> None:
    assert read_seeds(seeds) == expected


@pytest.mark.parametrize("seeds", [1, "a few", [3], "5-5", [3, 3], None])
def test_other_seeds_are_refused(seeds: Any) -> None:
    with pytest.raises(InvalidArgumentError, match="`seeds` must be two or more"):
        read_seeds(seeds)


def test_the_help_page_has_every_key_and_every_question() -> None:
    page = study_help_page(CONF)
    for name in ("question", "seeds", "redraw", "output"):
        assert re.search(rf"^ +{name}: .*# \w", page, re.MULTILINE), name
    for question in list_questions():
        assert re.search(rf"^ +{question} +\w", page, re.MULTILINE), question


@pytest.mark.parametrize("seed", ["x", 1.5, -1])
def test_a_seed_is_a_whole_number(seed: Any) -> None:
    with pytest.raises(InvalidArgumentError, match="`seeds` must be an int >= 0"):
        read_seeds([3, seed])


def test_an_unknown_question_is_refused() -> None:
    with pytest.raises(UnknownNameError, match="kl-estimator"):
        load_protocol("kl-estimater")
    with pytest.raises(InvalidArgumentError, match="`question` must be one of"):
        answer_question(None)


# -- the losses and tasks of the protocols ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_three_ways_to_pay_the_kl_go_along_the_gradient_of_j(name: str) -> None:
    tree = make_random_tree(0, horizon=3, kl_coef=0.2)
    agent = make_table_agent(KLAgent, tree, group_size=2, batch_size=2, **METHODS[name])
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in agent.policy.policy_parameters():
            parameter += 0.7 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    cosine = torch.cosine_similarity(expected_update(agent, tree), exact_gradient(agent, tree), 0).item()
    right = ("k1 in the reward", "whole-response k2 in the loss", "exact in both")
    assert (cosine > 1 - 1e-9) == (name in right)


@pytest.mark.parametrize("name", ratio.METHODS)
def test_every_ratio_is_right_on_fresh_samples_and_that_of_the_response_on_stale_ones(name: str) -> None:
    tree = make_random_tree(0, horizon=3, kl_coef=0.2)
    agent = ratio.make_agent(tree, name, 16)
    gradient = exact_gradient(agent, tree)
    stale = expected_update(agent, tree, ratio.sampler(tree, agent, 0))
    assert torch.allclose(expected_update(agent, tree), gradient, rtol=0, atol=1e-9)
    assert torch.allclose(stale, gradient, rtol=0, atol=1e-9) == (name == "response")


def test_a_line_is_found_where_it_holds_and_its_ceiling_where_it_does_not() -> None:
    entropies = np.linspace(1.0, 0.1, 30)
    found = entropy.fit_line(entropies, 1.4 - 0.5 * np.exp(entropies), 10)
    assert found == pytest.approx({"a": 0.5, "b": 1.4, "explained": 1.0, "whole": 1.0, "error": -0.1})


def test_the_limit_of_the_optimum_is_the_reference_among_right_responses() -> None:
    cheap = entropy.make_tree(3, 0.01)
    expected = entropy.describe(cheap, cheap.solve_levels().log_probs)
    limit = entropy.find_limit(entropy.make_tree(3, 0.0))
    assert limit["score"] == pytest.approx(expected["score"], abs=1e-9)
    assert limit["entropy"] == pytest.approx(expected["entropy"], abs=1e-9)


def test_plain_steps_go_along_the_gradient_and_natural_ones_to_the_optimum(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(entropy, "STEPS", 30)
    monkeypatch.setattr(entropy, "NATURAL_RATE", 0.3)
    tree = make_binary_tree(3, (0.1, 0.3), horizon=3, kl_coef=1.0, same_length=True)
    end = entropy.follow(tree, entropy.Flow(with_kl=True, is_natural=True))[-1]
    assert end["value"] == pytest.approx(tree.solve().value, abs=1e-6)
    monkeypatch.setattr(entropy, "STEPS", 1)
    monkeypatch.setattr(entropy, "PLAIN_RATE", 1e-6)
    start, after = entropy.follow(tree, entropy.Flow(with_kl=True))
    square = TableEstimators(tree, tree.reference).gradient.square().sum().item()
    rise = (after["value"] - start["value"]) / 1e-6
    assert rise == pytest.approx(len(tree.prompts) * square, rel=1e-4)  # steps add prompts up, and J is their mean


def test_a_task_of_mixed_difficulty_has_a_hard_prompt_and_an_easy_one() -> None:
    for seed in range(3):
        tree = make_binary_tree(seed, (0.05, 0.7), horizon=3, kl_coef=1.0, same_length=True)
        hard, easy = (tree.responses.add_up(tree.reference).exp() * tree.scores).sum(1).tolist()
        assert 0.05 <= hard < 0.2
        assert 0.7 <= easy <= 0.95
        assert tree.episodes.lengths.unique().tolist() == [3]
