"""Every response of a tiny task: against plain Python over prefixes, sampling, finite differences and optimisation."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TinyProblem, gpt2, table_reward, word_count, word_tokenizer
from scipy.optimize import minimize
from scipy.special import log_softmax, softmax
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

import lmgym.optimum.tree.responses
from lmgym.envs.vector import RLHFVectorEnv
from lmgym.episodes import Episodes
from lmgym.errors import InvalidArgumentError, LmGymError, UnknownNameError
from lmgym.kl import discounted_return, token_rewards
from lmgym.models.causal import CausalLM, freeze
from lmgym.models.policy import CausalPolicy
from lmgym.optimum.tree import EpisodeLogits, Tree, TreePolicy, make_episode_logits, solve_tree
from lmgym.rewards.noise import NoisyReward
from lmgym.rollout import collect, collect_steps

EOS = 1
T = 3
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "dear": {"kl_coef": 2.0},
    "cheap": {"kl_coef": 0.05},
    "discounted": {"gamma": 0.95},
    "short-sighted": {"gamma": 0.5, "kl_coef": 1.0},
    "blind": {"gamma": 0.0},
    "late EOS": {"min_new_tokens": 1, "gamma": 0.95},
    "EOS only at the horizon": {"min_new_tokens": 2, "gamma": 0.5},
    "EOS wanted": {"missing_eos_penalty": 1.5},
    "all at once": {"min_new_tokens": 1, "missing_eos_penalty": 0.7, "gamma": 0.5, "truncate": True},
}
LATE: dict[str, dict[str, Any]] = {
    "plain": {},
    "discounted": {"gamma": 0.95},
    "short-sighted": {"gamma": 0.5, "kl_coef": 1.0},
    "all at once": {"gamma": 0.8, "kl_coef": 0.6, "min_new_tokens": 1, "missing_eos_penalty": 0.7},
    "far-off": {"gamma": 0.01},
    "blind": {"gamma": 0.0},
    "blind and dear": {"gamma": 0.0, "kl_coef": 3.0},
}
PROBLEM = TinyProblem(horizon=T)
for _lm in (PROBLEM.lm, PROBLEM.other):
    with torch.no_grad():  # responses of all lengths: the EOS is likelier than most tokens
        _lm.model.transformer.ln_f.bias += 0.5 * _lm.model.lm_head.weight[EOS]
SPLIT = "train"


def tiny_task(**changes: Any) -> Any:
    """A task over 6 tokens and 3 prompts, with at most 3 tokens a response."""
    return replace(PROBLEM.task, **changes)


@cache
def tiny_tree(**changes: Any) -> Tree:
    return Tree.of(tiny_task(**changes), SPLIT)


# --- the same in plain Python ------------------------------------------------------------------------------------


@cache
def next_probs(lm: CausalLM, prompt: str, prefix: tuple[int, ...]) -> list[float]:
    """The probabilities after a prefix, from a forward of its own."""
    ids = [*lm.tokenizer(prompt)["input_ids"], *prefix]
    with torch.no_grad():
        logits = lm.model(input_ids=torch.tensor([ids])).logits[0, -1].double()
    return [math.exp(x - logits.logsumexp(0)) for x in logits]


def ends(task: Any, response: tuple[int, ...]) -> bool:
    position = len(response) - 1
    eos = response[-1] in task.model.eos_token_ids
    return (eos and position >= task.min_new_tokens) or position == task.max_new_tokens - 1


def score_of(task: Any, prompt: str, response: tuple[int, ...]) -> float:
    (paid,) = table_reward([prompt], [""], [list(response)])
    return paid - task.missing_eos_penalty * (response[-1] not in task.model.eos_token_ids)


def soft_value(task: Any, prompt: str, prefix: tuple[int, ...] = ()) -> float:
    """V(s) = beta log sum_a pi_ref exp(Q / beta)."""
    total = 0.0
    for a, p in enumerate(next_probs(task.model, prompt, prefix)):
        longer = (*prefix, a)
        ended = ends(task, longer)
        q = score_of(task, prompt, longer) if ended else task.gamma * soft_value(task, prompt, longer)
        total += p * math.exp(q / task.kl_coef)
    return task.kl_coef * math.log(total)


def all_responses(task: Any, prefix: tuple[int, ...] = ()) -> Iterator[tuple[int, ...]]:
    for a in range(6):
        longer = (*prefix, a)
        if ends(task, longer):
            yield longer
        else:
            yield from all_responses(task, longer)


def slow_returns(task: Any, lm: CausalLM, prompt: str) -> dict[tuple[int, ...], tuple[float, float, float]]:
    """Probability, discounted return and log pi / pi_ref of each response of a policy."""
    result = {}
    for response in all_responses(task):
        probability = 1.0
        ratio = 0.0
        paid = 0.0
        for t, a in enumerate(response):
            p, q = (next_probs(m, prompt, response[:t])[a] for m in (lm, task.model))
            probability *= p
            ratio += math.log(p / q)
            paid -= task.gamma**t * task.kl_coef * math.log(p / q)
        last = task.gamma ** (len(response) - 1)
        if not task.dense_kl:
            paid = -last * task.kl_coef * ratio
        result[response] = probability, paid + last * score_of(task, prompt, response), ratio
    return result


def rows_of(tree: Tree, prompt: int) -> dict[tuple[int, ...], int]:
    """The place of each response of a prompt among the episodes."""
    episodes = tree.episodes
    rows = (episodes.prompt_index == prompt).nonzero().squeeze(1).tolist()
    return {tuple(episodes.response_ids[i][episodes.response_mask[i]].tolist()): i for i in rows}


def with_logits(policy: Any, logits: Tensor) -> TreePolicy:
    """The softmax policy of other logits after every prefix."""
    changed = copy.copy(policy)
    changed.log_probs = logits
    return changed


# --- the responses -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_every_response_is_there_once_with_its_score_and_log_probs(case: dict[str, Any]) -> None:
    task = tiny_task(**case)
    tree = tiny_tree(**case)
    episodes = tree.episodes
    for i, prompt in enumerate(PROBLEM.prompts):
        rows = rows_of(tree, i)
        assert set(rows) == set(all_responses(task))
        assert len(rows) == int((episodes.prompt_index == i).sum())
        for response, row in rows.items():
            assert episodes.scores[row] == pytest.approx(score_of(task, prompt, response), abs=1e-6)
            assert tree.scores.flatten()[row] == pytest.approx(score_of(task, prompt, response), abs=1e-12)
            expected = [math.log(next_probs(PROBLEM.lm, prompt, response[:t])[a]) for t, a in enumerate(response)]
            found = episodes.ref_log_probs[row]
            assert found.tolist() == pytest.approx(expected + [0.0] * (T - len(response)), abs=2e-5)
            ids = episodes.prompt_ids[row][episodes.prompt_mask[row]].tolist()
            assert ids == PROBLEM.lm.encode(prompt)
    assert torch.equal(episodes.log_probs, episodes.ref_log_probs)
    assert episodes.terminated.all()
    assert episodes.prompt_mask[:, -1].all()


def test_it_is_what_the_env_pays() -> None:
    """Every response replayed through the env: scores, masks, log-probs and returns of the reference."""
    task = tiny_task(min_new_tokens=1, missing_eos_penalty=0.7, gamma=0.9, gold=word_count)
    tree = Tree.of(task, SPLIT)
    envs = RLHFVectorEnv(1, task=task, device="cpu")
    prompts = [envs.engine.prompts[int(i)] for i in tree.episodes.prompt_index]
    replay = envs.replay(prompts, tree.episodes.response_ids.numpy())
    assert torch.equal(torch.from_numpy(replay.response_mask), tree.episodes.response_mask)
    paid = discounted_return(task.kl_coef * tree.episodes.ref_log_probs, 0.9)
    paid += 0.9 ** (tree.episodes.lengths - 1) * tree.episodes.scores
    assert paid.tolist() == pytest.approx(replay.outcomes.discounted_returns, abs=2e-5)
    assert tree.episodes.scores.tolist() == pytest.approx(replay.outcomes.scores, abs=1e-6)
    assert tree.episodes.gold_scores is not None
    assert tree.episodes.gold_scores.tolist() == pytest.approx(replay.outcomes.gold_scores)


def test_more_responses_than_the_limit_are_refused_and_counted() -> None:
    count = 3 * (1 + 5 + 25 * 6)
    with pytest.raises(InvalidArgumentError, match=f"`limit` must be .* 3 prompts have {count} of at most 3 tokens"):
        Tree.of(tiny_task(), SPLIT, limit=count - 1)
    assert len(Tree.of(tiny_task(), SPLIT, limit=count).episodes) == count
    with pytest.raises(InvalidArgumentError, match="3,935,340,288 of at most 12 tokens each; got 2,000,000."):
        solve_tree(tiny_task(max_new_tokens=12, min_new_tokens=8), SPLIT)
    with pytest.raises(InvalidArgumentError, match=r"about 10\^3891 of at most 5000"):
        solve_tree(tiny_task(max_new_tokens=5000, min_new_tokens=4999), SPLIT)


def test_a_split_that_is_not_there_and_a_free_kl_are_refused() -> None:
    with pytest.raises(UnknownNameError, match="`split`"):
        solve_tree(tiny_task())
    with pytest.raises(InvalidArgumentError, match="`kl_coef` must be > 0"):
        solve_tree(tiny_task(kl_coef=0.0), SPLIT, limit=1)  # said before anything is written down
    with pytest.raises(InvalidArgumentError, match="`kl_coef` must be > 0"):
        tiny_tree(kl_coef=0.0).solve()


# --- the optimum -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_optimum_is_that_of_the_recursion_over_prefixes(case: dict[str, Any]) -> None:
    task = tiny_task(**case)
    optimum = tiny_tree(**case).solve()
    assert optimum.values.tolist() == pytest.approx([soft_value(task, p) for p in PROBLEM.prompts], abs=1e-5)
    for i, prompt in enumerate(PROBLEM.prompts):
        expected = sum(p * r for p, r, _ in slow_returns(task, PROBLEM.lm, prompt).values())
        assert optimum.references[i] == pytest.approx(expected, abs=1e-5)
    assert optimum.value > optimum.reference + 1e-3
    assert (optimum.method, optimum.exact, optimum.lower, optimum.upper) == ("tree", True, *[optimum.value] * 2)


@pytest.mark.parametrize("kl_coef", [0.05, 0.4, 2.0])
def test_undiscounted_it_is_the_log_mean_exp_of_the_score(kl_coef: float) -> None:
    found = tiny_tree(kl_coef=kl_coef).solve().values
    for i, prompt in enumerate(PROBLEM.prompts):
        log_probs = PROBLEM.token_log_probs(PROBLEM.lm, prompt).sum(1)
        value = kl_coef * (log_probs + PROBLEM.scores(prompt) / kl_coef).logsumexp(0)
        assert found[i] == pytest.approx(value.item(), abs=1e-5)


@pytest.mark.parametrize("case", [*CASES.values(), *({"dense_kl": False, **case} for case in LATE.values())], ids=str)
def test_no_policy_beats_the_optimum_and_pi_star_attains_it(case: dict[str, Any]) -> None:
    tree = tiny_tree(**case)
    optimum = tree.solve()
    best = tree.evaluate(make_episode_logits(optimum.policy))
    torch.testing.assert_close(best.returns, optimum.values, rtol=0, atol=1e-9)
    reference = tree.evaluate(make_episode_logits(PROBLEM.lm))
    torch.testing.assert_close(reference.returns, optimum.references, rtol=0, atol=1e-6)
    assert (reference.returns < optimum.values + 1e-9).all()
    assert (tree.evaluate(make_episode_logits(PROBLEM.other)).returns < optimum.values - 1e-3).all()
    generator = torch.Generator().manual_seed(0)
    for scale in (1e-3, 0.1, 0.1, 1.0, 1.0, 5.0):
        noise = torch.randn(optimum.policy.log_probs.shape, generator=generator, dtype=torch.float64)
        perturbed = with_logits(optimum.policy, optimum.policy.log_probs + scale * noise)
        assert (tree.evaluate(make_episode_logits(perturbed)).returns < optimum.values + 1e-9).all()


@pytest.mark.parametrize("dense_kl", [True, False])
def test_undiscounted_the_gap_is_the_kl_to_pi_star(dense_kl: bool) -> None:
    """V* - J(pi) = kl_coef * KL(pi || pi*), whatever the time of payment."""
    tree = tiny_tree(dense_kl=dense_kl)
    optimum = tree.solve()
    optimal = tree.evaluate(make_episode_logits(optimum.policy)).log_probs.view(3, -1)
    found = tree.evaluate(make_episode_logits(PROBLEM.other))
    log_probs = found.log_probs.view(3, -1)
    gap = PROBLEM.kl_coef * (log_probs.exp() * (log_probs - optimal)).sum(1)
    torch.testing.assert_close(optimum.values - found.returns, gap, rtol=0, atol=1e-10)
    assert (gap > 0.01).all()


@pytest.mark.parametrize("case", LATE.values(), ids=LATE)
def test_a_late_payment_is_solved_by_numerical_optimisation_too(case: dict[str, Any]) -> None:
    """J is concave in the distribution over whole responses: ascent from the reference finds its one maximum."""
    task = tiny_task(dense_kl=False, **case)
    tree = tiny_tree(dense_kl=False, **case)
    optimum = tree.solve()
    found = tree.evaluate(make_episode_logits(optimum.policy)).log_probs.view(3, -1).exp()
    for i, prompt in enumerate(PROBLEM.prompts[:2]):
        slow = slow_returns(task, PROBLEM.lm, prompt)
        order = sorted(slow, key=rows_of(tree, i).__getitem__)
        log_ref = np.log([slow[y][0] for y in order])
        scores = np.array([score_of(task, prompt, y) for y in order])
        weight = np.array([task.gamma ** (len(y) - 1) for y in order])
        scale = np.exp(-0.5 * log_ref)  # of the logits: what is rare moves as easily as the rest

        def cost(x: Any, log_ref: Any = log_ref, scores: Any = scores, weight: Any = weight, scale: Any = scale) -> Any:
            """-J of softmax(log_ref + scale x), and its gradient."""
            log_probs = log_softmax(log_ref + scale * x)
            p = np.exp(log_probs)
            paid = weight * (scores - task.kl_coef * (log_probs - log_ref))
            slope = paid - weight * task.kl_coef
            return -(p @ paid), -scale * p * (slope - p @ slope)

        options = {"maxiter": 2000, "maxfun": 5000, "ftol": 0.0, "gtol": 1e-8}
        ascent = minimize(cost, np.zeros(len(order)), jac=True, method="L-BFGS-B", options=options)
        assert optimum.values[i] == pytest.approx(-ascent.fun, abs=1e-5)
        if task.gamma > 0:  # else anything that is late is as good as anything else
            assert np.abs(found[i].numpy() - softmax(log_ref + scale * ascent.x)).max() < 2e-3


def test_when_the_kl_is_paid_matters_only_below_gamma_1() -> None:
    now, late = (tiny_tree(dense_kl=dense).solve() for dense in (True, False))
    torch.testing.assert_close(now.values, late.values, rtol=0, atol=1e-9)
    torch.testing.assert_close(now.policy.log_probs, late.policy.log_probs, rtol=0, atol=1e-9)


def test_a_late_discounted_kl_can_be_earned() -> None:
    """It is no divergence: what is taken from short responses is paid back in full, and long ones pay a fraction."""
    late, now = (tiny_tree(dense_kl=dense, gamma=0.5, kl_coef=200.0).solve() for dense in (False, True))
    assert late.value > 2  # and no score is above 1
    assert now.value < 1


def test_a_noisy_reward_counts_as_expected() -> None:
    def noisy(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        return [math.inf for _ in prompts]

    noisy.expected = table_reward  # type: ignore[attr-defined]
    found = solve_tree(tiny_task(reward=noisy), SPLIT)
    assert torch.equal(found.values, tiny_tree().solve().values)


def test_noise_whose_mean_is_not_known_has_no_optimum_to_find() -> None:
    noise = NoisyReward(table_reward, 0.1)
    layered = NoisyReward(noise, 0.1)
    hidden = functools.partial(noise)
    assert torch.equal(solve_tree(tiny_task(reward=layered), SPLIT).values, tiny_tree().solve().values)
    with pytest.raises(InvalidArgumentError, match="`reward` must have no noise .* gave one response two scores"):
        solve_tree(tiny_task(reward=hidden), SPLIT)


# --- what a wrong solver would get wrong -------------------------------------------------------------------------


def test_the_kl_is_a_price_not_a_prize() -> None:
    """V* falls with the price, from the best score to the reference's own; a dear KL keeps pi* at the reference."""
    prices = [1e-3, 0.05, 0.4, 2.0, 1e3]
    for case in ({}, {"gamma": 0.5}):
        optima = [tiny_tree(kl_coef=price, **case).solve() for price in prices]
        for dearer, cheaper in zip(optima[1:], optima, strict=False):
            assert (dearer.values < cheaper.values).all()
        tree = tiny_tree(kl_coef=1e3, **case)
        best = (tree.scores * tree._discounts).amax(1)
        assert (optima[0].values <= best).all()
        torch.testing.assert_close(optima[0].values, best, rtol=0, atol=0.02)
        assert (tree.evaluate(make_episode_logits(optima[-1].policy)).kl < 1e-6).all()
        torch.testing.assert_close(optima[-1].values, optima[-1].references, rtol=0, atol=1e-3)
    paid = [tiny_tree(kl_coef=price).evaluate(make_episode_logits(PROBLEM.other)).returns for price in prices]
    assert all((dearer < cheaper).all() for dearer, cheaper in zip(paid[1:], paid, strict=False))
    best_score = tiny_tree().evaluate(make_episode_logits(tiny_tree().solve().policy)).score
    assert (best_score > tiny_tree().evaluate(make_episode_logits(PROBLEM.lm)).score + 0.05).all()


def two_token_tree(reward: Callable[..., list[float]], **changes: Any) -> Tree:
    return Tree.of(tiny_task(reward=reward, max_new_tokens=2, kl_coef=0.5, **changes), SPLIT)


def test_the_eos_itself_is_paid_for() -> None:
    """A score for stopping at once: V* = beta log(1 + p_eos (e^(1 / beta) - 1)), and the KL is that of the EOS."""
    tree = two_token_tree(lambda completion_ids, **_: [float(ids == [EOS]) for ids in completion_ids])
    optimum = tree.solve()
    found = tree.evaluate(make_episode_logits(optimum.policy))
    for i, prompt in enumerate(PROBLEM.prompts):
        p = next_probs(PROBLEM.lm, prompt, ())[EOS]
        value = 0.5 * math.log(1 + p * (math.exp(2) - 1))
        optimal = p * math.exp((1 - value) / 0.5)
        assert optimum.values[i] == pytest.approx(value, abs=1e-5)
        assert found.score[i] == pytest.approx(optimal, abs=1e-5)
        kl = optimal * math.log(optimal / p) + (1 - optimal) * math.log((1 - optimal) / (1 - p))
        assert found.kl[i] == pytest.approx(kl, abs=1e-5)


def test_gamma_discounts_the_future_only() -> None:
    """The score of the first token is whole, that of the second is worth gamma, and so is its KL."""
    now = two_token_tree(lambda completion_ids, **_: [float(ids == [EOS]) for ids in completion_ids], gamma=0.25)
    for i, prompt in enumerate(PROBLEM.prompts):
        p = next_probs(PROBLEM.lm, prompt, ())[EOS]
        assert now.solve().values[i] == pytest.approx(0.5 * math.log(1 + p * (math.exp(2) - 1)), abs=1e-5)
        assert now.solve().references[i] == pytest.approx(p, abs=1e-5)
    then = two_token_tree(lambda completion_ids, **_: [float(len(ids) == 2) for ids in completion_ids], gamma=0.25)
    for i, prompt in enumerate(PROBLEM.prompts):
        p = next_probs(PROBLEM.lm, prompt, ())[EOS]
        value = 0.5 * math.log(p + (1 - p) * math.exp(0.25 / 0.5))
        assert then.solve().values[i] == pytest.approx(value, abs=1e-5)
        assert then.solve().references[i] == pytest.approx(0.25 * (1 - p), abs=1e-5)


def test_an_eos_before_its_time_does_not_end() -> None:
    reward = lambda completion_ids, **_: [float(ids[0] == EOS) for ids in completion_ids]  # noqa: E731
    tree = two_token_tree(reward, min_new_tokens=1)
    assert tree.episodes.lengths.tolist() == [2] * 3 * 36
    for i, prompt in enumerate(PROBLEM.prompts):
        p = next_probs(PROBLEM.lm, prompt, ())[EOS]
        assert tree.solve().values[i] == pytest.approx(0.5 * math.log(1 + p * (math.exp(2) - 1)), abs=1e-5)


def test_several_eos_all_end() -> None:
    model = gpt2(6, n_positions=16, scale=0.4)
    model.generation_config.eos_token_id = [EOS, 4]
    task = tiny_task(model=CausalLM(freeze(model), word_tokenizer(["x", "y", "z"])), missing_eos_penalty=0.8, gamma=0.9)
    tree = Tree.of(task, SPLIT)
    assert len(tree.episodes) == 3 * (2 + 4 * 2 + 16 * 6) == 3 * len(list(all_responses(task)))
    assert tree.solve().values.tolist() == pytest.approx([soft_value(task, p) for p in PROBLEM.prompts], abs=1e-5)


def test_ids_that_are_no_token_are_no_actions() -> None:
    vocabulary = {"<eos>": 1, "x": 3, "y": 4, "z": 5}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="x"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    lm = CausalLM(PROBLEM.lm.model, PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>"))
    assert lm.holes == [0, 2]
    tree = Tree.of(tiny_task(model=lm, max_new_tokens=2), SPLIT)
    assert len(tree.episodes) == 3 * (1 + 3 * 4)
    optimum = tree.solve()
    for i, prompt in enumerate(PROBLEM.prompts):
        total = 0.0
        for response in [(1,), *((a, b) for a in (3, 4, 5) for b in (1, 3, 4, 5))]:
            p = 1.0
            for t, a in enumerate(response):
                probs = next_probs(PROBLEM.lm, prompt, response[:t])
                p *= probs[a] / sum(probs[b] for b in (1, 3, 4, 5))
            total += p * math.exp(score_of(tree.task, prompt, response) / PROBLEM.kl_coef)
        assert optimum.values[i] == pytest.approx(PROBLEM.kl_coef * math.log(total), abs=1e-5)
    assert (tree.evaluate(make_episode_logits(lm)).kl.abs() < 1e-9).all()
    unmasked = PROBLEM.lm
    with pytest.raises(LmGymError, match="must sum to 1"):
        tree.evaluate(make_episode_logits(unmasked))


def test_where_all_must_have_ended_the_tree_stops() -> None:
    """A vocabulary of nothing but EOS has one response to a prompt."""
    backend = Tokenizer(models.WordLevel({"<eos>": 0}, unk_token="<eos>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")
    lm = CausalLM(freeze(gpt2(1, n_positions=16)), tokenizer)
    lm.encode_all = lambda texts: [[0]]  # type: ignore[method-assign]
    reward = lambda completion_ids, **_: [0.7 for _ in completion_ids]  # noqa: E731
    task = tiny_task(model=lm, prompts={"train": ["x"]}, max_new_tokens=5, min_new_tokens=1, reward=reward, gamma=0.5)
    tree = Tree.of(task, SPLIT)
    assert tree.episodes.response_mask.tolist() == [[True, True, False, False, False]]
    for dense in (True, False):
        tree.task = replace(task, dense_kl=dense)
        assert tree.solve().values.tolist() == pytest.approx([0.35], abs=1e-9)


# --- any policy -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dense_kl", [True, False])
@pytest.mark.parametrize("gamma", [1.0, 0.95, 0.5, 0.0])
@pytest.mark.parametrize("kl_coef", [0.4, 0.0])
def test_a_policy_is_worth_what_plain_python_says(gamma: float, kl_coef: float, dense_kl: bool) -> None:
    changes = {"gamma": gamma, "dense_kl": dense_kl, "kl_coef": kl_coef, "missing_eos_penalty": 0.3}
    task = tiny_task(**changes)
    tree = tiny_tree(**changes)
    found = tree.evaluate(make_episode_logits(PROBLEM.other))
    distribution: dict[float, float] = {}
    for i, prompt in enumerate(PROBLEM.prompts):
        slow = slow_returns(task, PROBLEM.other, prompt)
        assert found.returns[i] == pytest.approx(sum(p * r for p, r, _ in slow.values()), abs=1e-5)
        assert found.kl[i] == pytest.approx(sum(p * ratio for p, _, ratio in slow.values()), abs=1e-5)
        assert found.entropy[i] == pytest.approx(-sum(p * math.log(p) for p, _, _ in slow.values()), abs=1e-5)
        scores = {y: score_of(task, prompt, y) for y in slow}
        assert found.score[i] == pytest.approx(sum(slow[y][0] * s for y, s in scores.items()), abs=1e-5)
        for y, row in rows_of(tree, i).items():
            assert found.log_probs[row] == pytest.approx(math.log(slow[y][0]), abs=1e-4)
            distribution[scores[y]] = distribution.get(scores[y], 0.0) + slow[y][0] / 3
    values, probs = found.score_distribution
    assert values.tolist() == pytest.approx(sorted(distribution))
    assert probs.tolist() == pytest.approx([distribution[s] for s in sorted(distribution)], abs=1e-5)
    assert float(values @ probs) == pytest.approx(found.metrics["score"], abs=1e-9)
    assert found.metrics["return"] == found.value == found.returns.mean().item()


def test_the_reference_pays_nothing() -> None:
    for case in ({}, {"gamma": 0.5}, {"gamma": 0.5, "dense_kl": False}):
        tree = tiny_tree(**case)
        for read_logits in (make_episode_logits(PROBLEM.lm), make_episode_logits(CausalPolicy(PROBLEM.lm))):
            found = tree.evaluate(read_logits)
            torch.testing.assert_close(found.kl, torch.zeros(3, dtype=torch.float64), rtol=0, atol=1e-6)
            torch.testing.assert_close(found.returns, tree.solve().references, rtol=0, atol=1e-6)
        assert found.log_probs.view(3, -1).exp().sum(1).tolist() == pytest.approx([1, 1, 1])


def test_stepping_a_model_and_reading_it_give_the_same_logits() -> None:
    tree = tiny_tree()
    read, stepped = (
        tree.evaluate(read_logits)
        for read_logits in (make_episode_logits(PROBLEM.other), make_episode_logits(CausalPolicy(PROBLEM.other)))
    )
    torch.testing.assert_close(read.log_probs, stepped.log_probs, rtol=0, atol=1e-4)


def test_chunks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    tree = tiny_tree(gamma=0.9)
    calls = []
    table = torch.randn((6, 6), generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()

    def read_logits(episodes: Episodes) -> Tensor:
        calls.append(len(episodes))
        return previous_token_logits(table)(episodes)

    whole = tree.evaluate(read_logits)
    value, gradient = tree.gradient(read_logits, [table])
    assert calls == [75, 75]
    for rows, logits in ((7, 2**22), (4096, 6 * 6 * 4)):
        monkeypatch.setattr(lmgym.optimum.tree.responses, "MAX_ROWS_AT_ONCE", rows)
        monkeypatch.setattr(lmgym.optimum.tree.responses, "MAX_LOGITS_AT_ONCE", logits)
        calls.clear()
        parts = tree.evaluate(read_logits)
        part_value, part_gradient = tree.gradient(read_logits, [table])
        assert len(calls) > 20
        assert max(calls) <= 7
        torch.testing.assert_close(parts.log_probs, whole.log_probs)
        torch.testing.assert_close(parts.returns, whole.returns)
        assert part_value == pytest.approx(value, abs=1e-12)
        torch.testing.assert_close(part_gradient, gradient)
        torch.testing.assert_close(Tree.of(tree.task, SPLIT).episodes.ref_log_probs, tree.episodes.ref_log_probs)


def test_a_policy_without_support_somewhere_is_still_graded() -> None:
    """Never an x, by a logit of -inf: finite numbers, for none of them is asked of what never happens."""
    tree = tiny_tree()

    def read_logits(episodes: Episodes) -> Tensor:
        logits = make_episode_logits(PROBLEM.other)(episodes).clone()
        logits[:, 3] = -torch.inf
        return logits

    found = tree.evaluate(read_logits)
    assert torch.stack([found.returns, found.kl, found.entropy]).isfinite().all()
    has_x = (tree.episodes.response_ids == 3).any(1) & tree.episodes.response_mask.any(1)
    assert found.log_probs[has_x].exp().sum() == 0
    assert found.log_probs.exp().sum() == pytest.approx(3)
    assert (found.returns < tree.solve().values).all()


def test_where_the_reference_never_goes_costs_all_there_is_unless_it_is_free() -> None:
    for kl_coef in (0.4, 0.0):
        tree = Tree.of(tiny_task(kl_coef=kl_coef), SPLIT)
        read_logits = make_episode_logits(PROBLEM.other)
        before = tree.evaluate(read_logits)
        tree.reference[0][1, 0, 3] = -torch.inf
        found = tree.evaluate(read_logits)
        assert found.kl.isinf().tolist() == [False, True, False]
        assert found.returns[1] == (before.returns[1] if kl_coef == 0 else -torch.inf)
        if kl_coef > 0:  # and pi* stays away
            optimum = tree.solve()
            assert optimum.policy.log_probs[1, 3] == -torch.inf
            best = tree.evaluate(make_episode_logits(optimum.policy))
            torch.testing.assert_close(best.returns, optimum.values, rtol=0, atol=1e-9)


def test_logits_that_are_none_are_refused() -> None:
    tree = tiny_tree()
    rows = {"nan": torch.nan, "nothing": -torch.inf}
    for fill in rows.values():
        with pytest.raises(LmGymError, match="must sum to 1"):
            tree.evaluate(lambda episodes, fill=fill: torch.full((episodes.num_tokens, 6), fill))
    with pytest.raises(InvalidArgumentError, match=r"must give one row of logits .* \(225, 6\), got \(225, 5\)"):
        tree.evaluate(lambda episodes: torch.zeros((episodes.num_tokens, 5)))


# --- against samples ---------------------------------------------------------------------------------------------


SAMPLED: list[dict[str, Any]] = [
    {},
    {"gamma": 0.5},
    {"gamma": 0.8, "min_new_tokens": 1, "missing_eos_penalty": 0.5},
    {"gamma": 0.5, "dense_kl": False},
]


def assert_near(samples: Tensor, expected: float) -> None:
    """Within four standard errors."""
    error = samples.double().std().item() / len(samples) ** 0.5
    assert abs(samples.double().mean().item() - expected) < 4 * error + 1e-6


def rollouts(tree: Tree, policy: Any, samples: int, seed: int) -> Episodes:
    envs = RLHFVectorEnv(1, task=tree.task, split=SPLIT, device="cpu")
    prompts = [envs.engine.prompts[i] for i in range(3) for _ in range(samples)]
    return collect(envs, policy, prompts, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("case", SAMPLED, ids=str)
def test_samples_of_a_policy_agree(case: dict[str, Any]) -> None:
    tree = tiny_tree(**case)
    episodes = rollouts(tree, CausalPolicy(PROBLEM.other), 400, 0)
    exact = tree.evaluate(make_episode_logits(PROBLEM.other))
    returns = discounted_return(token_rewards(episodes, tree.task.kl_coef, dense=tree.task.dense_kl), tree.task.gamma)
    for i in range(3):
        mine = episodes.prompt_index == i
        assert_near(returns[mine], exact.returns[i].item())
        assert_near(episodes.scores[mine], exact.score[i].item())
        assert_near((episodes.log_probs - episodes.ref_log_probs)[mine].sum(1), exact.kl[i].item())
        assert_near(-episodes.log_probs[mine].sum(1), exact.entropy[i].item())


@pytest.mark.parametrize("case", SAMPLED, ids=str)
def test_pi_star_earns_the_optimum_in_the_env(case: dict[str, Any]) -> None:
    tree = tiny_tree(**case)
    optimum = tree.solve()
    episodes = rollouts(tree, optimum.policy, 400, 1)
    rewards = token_rewards(episodes, tree.task.kl_coef, dense=tree.task.dense_kl)
    returns = discounted_return(rewards, tree.task.gamma)
    values = optimum.values[episodes.prompt_index].float()
    for i in range(3):
        assert_near(returns[episodes.prompt_index == i], optimum.values[i].item())
    if not case:  # every episode of pi* earns the same: its score less the price of its log-ratio
        torch.testing.assert_close(returns, values, rtol=0, atol=1e-5)
    assert episodes.values is not None
    torch.testing.assert_close(episodes.values[:, 0], values)
    for t in range(1, T):  # V(s) is what is still to come
        alive = episodes.response_mask[:, t]
        to_go = (rewards[:, t:] * tree.task.gamma ** torch.arange(T - t)).sum(1)
        assert_near((to_go - episodes.values[:, t])[alive], 0.0)


def test_pi_star_steps_through_any_env() -> None:
    """Row by row, refilled and ended at different times, and with rows that go on after their end."""
    tree = tiny_tree(kl_coef=2.0)
    optimum = tree.solve()
    envs = RLHFVectorEnv(4, task=tree.task, split=SPLIT, device="cpu", autoreset_mode="SameStep")
    envs.reset(seed=0)
    episodes = collect_steps(envs, optimum.policy, 40, generator=torch.Generator().manual_seed(0))
    returns = token_rewards(episodes, tree.task.kl_coef).sum(1)
    assert (returns.double().unsqueeze(1) - optimum.values).abs().amin(1).max() < 1e-5
    assert len(episodes.lengths.unique()) > 1


def test_rows_restart_and_leave_on_their_own() -> None:
    policy = tiny_tree(min_new_tokens=1).solve().policy
    ids = torch.tensor([[0, 0, 3], [0, 4, 5], [5, 5, 3]])
    mask = torch.tensor([[False, False, True], [False, True, True], [True] * 3])

    def alone(row: int, tokens: list[int]) -> tuple[Tensor, Tensor]:
        state = policy.begin(ids[row : row + 1], mask[row : row + 1], T)
        for token in tokens:
            state.step(torch.tensor([token]))
        return state.logits[0], state.values[0]

    state = policy.begin(ids, mask, T)
    state.step(torch.tensor([EOS, 3, 4]))  # too early to end
    state.begin(torch.tensor([1]), ids[2:], mask[2:])
    state.step(torch.tensor([5, 0, EOS]))  # the last row ends here
    expected = [alone(0, [EOS, 5]), alone(2, [0])]
    for row, (logits, value) in enumerate(expected):
        torch.testing.assert_close(state.logits[row], logits)
        torch.testing.assert_close(state.values[row], value)
        assert logits.exp().sum() == pytest.approx(1)
    state.keep(torch.tensor([1, 0]))
    for row, (logits, _) in enumerate(reversed(expected)):
        torch.testing.assert_close(state.logits[row], logits)
    state.step(torch.tensor([3, EOS]))
    ended = state.logits
    for _ in range(5):  # after the end, whatever the token
        state.step(torch.tensor([2, 3]))
        torch.testing.assert_close(state.logits, ended)


def test_an_unknown_prompt_and_a_longer_horizon_are_refused() -> None:
    policy = tiny_tree().solve().policy
    with pytest.raises(InvalidArgumentError, match=r"`prompt_ids` must be a prompt of the tree, got \[3, 3\]"):
        policy.begin(torch.tensor([[0, 3], [3, 3]]), torch.tensor([[False, True], [True, True]]), T)
    with pytest.raises(InvalidArgumentError, match="`max_new_tokens` must be at most 3, got 4"):
        policy.begin(torch.tensor([[3]]), torch.tensor([[True]]), 4)


# --- the gradient ------------------------------------------------------------------------------------------------


def previous_token_logits(table: Tensor) -> EpisodeLogits:
    """Logits by the token before, (V, V) of them; differentiable, in float64."""

    def read_logits(episodes: Episodes) -> Tensor:
        before = torch.cat([episodes.prompt_ids[:, -1:], episodes.response_ids[:, :-1]], dim=1)
        return table[before[episodes.response_mask]]

    return read_logits


def random_table(seed: int = 0) -> Tensor:
    return torch.randn((6, 6), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


GRADIENTS = [{}, {"gamma": 0.5}, {"gamma": 0.5, "dense_kl": False}, {"gamma": 0.9, "min_new_tokens": 1, "kl_coef": 1.5}]


@pytest.mark.parametrize("case", [*GRADIENTS, {"kl_coef": 0.0}, {"gamma": 0.0}], ids=str)
def test_the_gradient_is_that_of_finite_differences(case: dict[str, Any]) -> None:
    tree = tiny_tree(**case)
    table = random_table().requires_grad_()
    value, (gradient,) = tree.gradient(previous_token_logits(table), [table])
    assert value == pytest.approx(tree.evaluate(previous_token_logits(table.detach())).value, abs=1e-10)
    for i, j in ((3, 0), (3, EOS), (5, 3), (4, 5), (0, 2)):
        both = []
        for step in (1e-5, -1e-5):
            moved = table.detach().clone()
            moved[i, j] += step
            both.append(tree.evaluate(previous_token_logits(moved)).value)
        assert gradient[i, j].item() == pytest.approx((both[0] - both[1]) / 2e-5, rel=1e-4, abs=1e-8)
    torch.testing.assert_close(gradient.sum(1), torch.zeros(6, dtype=torch.float64), rtol=0, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_gradient_of_a_transformer(dtype: torch.dtype) -> None:
    """Along a random direction, in the float64 copy of the model, for parameters of either precision."""
    tree = tiny_tree(gamma=0.9)
    lm = CausalLM(copy.deepcopy(PROBLEM.other.model).double(), PROBLEM.lm.tokenizer)
    generator = torch.Generator().manual_seed(0)
    direction = [torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in lm.model.parameters()]
    both = []
    for step in (1e-5, -2e-5, 1e-5):
        with torch.no_grad():
            for p, d in zip(lm.model.parameters(), direction, strict=True):
                p += step * d
        both.append(tree.evaluate(make_episode_logits(lm)).value)
    lm.model.to(dtype)
    parameters = [p.requires_grad_() for p in lm.model.parameters()]
    value, gradients = tree.gradient(make_episode_logits(lm), parameters)
    assert [g.dtype for g in gradients] == [dtype] * len(parameters)
    slope = sum(float((g.double() * d).sum()) for g, d in zip(gradients, direction, strict=True))
    loose = 1e-4 if dtype == torch.float64 else 1e-3
    assert slope == pytest.approx((both[0] - both[1]) / 2e-5, rel=loose)
    assert value == pytest.approx(both[2], abs=1e-5)


@pytest.mark.parametrize("case", GRADIENTS[:3], ids=str)
def test_the_gradient_is_the_mean_of_sampled_reinforce_gradients(case: dict[str, Any]) -> None:
    """E[G(y) grad log pi(y)], with responses drawn token by token from the policy itself."""
    tree = tiny_tree(**case)
    table = random_table(1).requires_grad_()
    samples = 20_000
    task = tree.task
    _, (gradient,) = tree.gradient(previous_token_logits(table), [table])
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(3, (samples,), generator=generator)
    probs = table.detach().softmax(1)
    rows = [rows_of(tree, i) for i in range(3)]
    before = torch.tensor([ids[-1] for ids in tree.prompts])[prompt]
    drawn = []
    for _ in range(T):
        drawn.append(before := torch.multinomial(probs[before], 1, generator=generator).squeeze(1))
    responses = []
    for row in torch.stack(drawn, 1).tolist():
        length = next((t + 1 for t, a in enumerate(row) if ends(task, tuple(row[: t + 1]))), T)
        responses.append(tuple(row[:length]))
    episodes = tree.episodes[[rows[i][y] for i, y in zip(prompt.tolist(), responses, strict=True)]]
    before = torch.cat([episodes.prompt_ids[:, -1:], episodes.response_ids[:, :-1]], dim=1)
    mask = episodes.response_mask
    log_probs = probs.log()[before, episodes.response_ids] * mask
    rewards = token_rewards(replace(episodes, log_probs=log_probs), task.kl_coef, dense=task.dense_kl)
    returns = discounted_return(rewards, task.gamma)
    grads = torch.zeros((samples, 6, 6), dtype=torch.float64)
    for t in range(T):
        row = torch.arange(samples)[mask[:, t]]
        seen = before[row, t]
        chosen = episodes.response_ids[row, t]
        grads[row, seen] -= probs[seen]
        grads[row, seen, chosen] += 1
    if not task.dense_kl:  # the price of a late KL has a gradient of its own: -kl_coef E[gamma^(n - 1) grad log pi]
        returns = returns - task.kl_coef * task.gamma ** (episodes.lengths - 1)
    grads *= returns.view(-1, 1, 1)
    error = grads.std(0) / samples**0.5
    assert ((grads.mean(0) - gradient).abs() < 4 * error + 1e-9).all()
    assert (gradient.abs() > 8 * error).any()  # and is not told apart from 0 by chance


def test_at_the_optimum_the_gradient_vanishes() -> None:
    for case in ({}, {"gamma": 0.5}, {"gamma": 0.5, "dense_kl": False}):
        tree = tiny_tree(**case)
        policy = tree.solve().policy
        logits = policy.log_probs.clone().requires_grad_()
        value, (gradient,) = tree.gradient(make_episode_logits(with_logits(policy, logits)), [logits])
        assert gradient.abs().max() < 1e-10
        assert value == pytest.approx(tree.solve().value, abs=1e-9)
        moved = (2 * policy.log_probs).requires_grad_()
        _, (gradient,) = tree.gradient(make_episode_logits(with_logits(policy, moved)), [moved])
        assert gradient.abs().max() > 1e-3


def test_a_policy_without_support_somewhere_still_has_a_gradient() -> None:
    tree = tiny_tree()
    table = random_table()
    table[:, 3] = -torch.inf
    value, (gradient,) = tree.gradient(previous_token_logits(table.requires_grad_()), [table])
    assert math.isfinite(value)
    assert gradient.isfinite().all()
    assert (gradient[:, 3] == 0).all()
    assert (gradient != 0).any()


def test_logits_that_cannot_be_differentiated_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="`episode_logits` must be differentiable"):
        tiny_tree().gradient(make_episode_logits(PROBLEM.other), [torch.zeros(3, requires_grad=True)])


def test_parameters_that_take_no_part_have_a_gradient_of_zero() -> None:
    table = random_table().requires_grad_()
    idle = torch.ones(2, requires_grad=True)
    _, (gradient, none) = tiny_tree().gradient(previous_token_logits(table), [table, idle])
    assert gradient.abs().max() > 0
    assert none.tolist() == [0, 0]
    assert none.dtype == torch.float32
