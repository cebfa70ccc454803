"""DPO: its loss and its optimum against enumeration of every response, and the files of feedback that it reads."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TinyProblem, learn, shifted, weights
from torch import Tensor

import agents.algorithms.dpo
from agents.algorithms.dpo import DPO, DPOConfig, Pairs, dpo_loss, read_pairs
from lmgym.envs.vector import RLHFVectorEnv
from lmgym.errors import InvalidArgumentError, LmGymError
from lmgym.feedback.annotators import preference_probability
from lmgym.feedback.files import read_records, write_records
from lmgym.feedback.records import Choice, Completion, Correction, Ranking, Ratings, Record, Skip
from lmgym.optimum.tree import Tree, make_episode_logits
from lmgym.rollout import collect
from lmgym.tasks.base import Task

PROBLEM = TinyProblem(horizon=2)


def tiny(task: Task = PROBLEM.task, num_envs: int = 1) -> RLHFVectorEnv:
    return RLHFVectorEnv(num_envs, autoreset_mode="SameStep", task=task, split="train", device="cpu")


def tiny_dpo(envs: RLHFVectorEnv | None = None, *, seed: int = 0, **config: Any) -> DPO:
    return DPO(envs or tiny(), DPOConfig(**{"batch_size": 16, "lr": 2e-3} | config), seed=shifted(seed))


# -- the loss and its optimum ----------------------------------------------------------------------------------------


def test_the_loss_is_that_of_the_paper() -> None:
    chosen = torch.tensor([0.3, -2.0, 0.0])
    rejected = torch.tensor([-0.1, 1.0, 0.0])
    slow = [
        -math.log(1 / (1 + math.exp(-0.5 * (c - r)))) for c, r in zip(chosen.tolist(), rejected.tolist(), strict=True)
    ]
    assert dpo_loss(chosen, rejected, 0.5).tolist() == pytest.approx(slow, abs=1e-6)


def expected_loss(h: Tensor, preferred: Tensor, beta: float) -> Tensor:
    """The loss over all ordered pairs of R responses, each as likely; `preferred` (R, R) is P(row before column)."""
    i, j = torch.triu_indices(len(h), len(h), offset=1)
    p = preferred[i, j]
    return (p * dpo_loss(h[i], h[j], beta) + (1 - p) * dpo_loss(h[j], h[i], beta)).mean()


def slope(beta: float, temperature: float, of_task: Task | None = None) -> float:
    """Largest entry of the gradient in the log-probs of the tokens, at pi*, under exact preferences over all pairs."""
    tree = Tree.of(of_task or PROBLEM.task, "train")
    policy = tree.solve().policy
    policy.log_probs.requires_grad_(True)
    reference = tree.reference
    total = torch.zeros((), dtype=torch.float64)
    for x in range(len(tree.prompts)):
        own = whole(tree, policy.log_probs, x)
        h = own - whole(tree, torch.cat([r.flatten(0, 1) for r in reference]), x)
        scores = tree.scores[x].numpy()
        table = torch.from_numpy(preference_probability(scores[:, None], scores[None], temperature))
        total = total + expected_loss(h, table, beta)
    (gradient,) = torch.autograd.grad(total, policy.log_probs)
    return gradient.abs().max().item()


def whole(tree: Tree, table: Tensor, prompt: int) -> Tensor:
    """(R / X,) log-probs of the responses to a prompt, from logits (S, A) at the prefixes of all prompts; T = 2."""
    log_pi = table.log_softmax(-1)
    first, second = tree.responses.levels
    root = log_pi[prompt]
    after = log_pi[len(tree.prompts) + prompt * second.nodes :][: second.nodes]
    return torch.cat([root[first.ending], (root[first.going].unsqueeze(1) + after[:, second.ending]).flatten()])


def test_under_bradley_terry_the_gradient_vanishes_at_the_optimum_of_the_task() -> None:
    beta = PROBLEM.kl_coef
    assert slope(beta, 1.0) < 1e-9
    assert slope(beta / 2, 2.0) < 1e-9  # a noisier annotator is the same one in other units
    for wrong in ((beta / 2, 1.0), (2 * beta, 1.0), (beta, 0.5), (beta, 1e-3)):
        assert slope(*wrong) > 1e-3  # another beta, or labels that are always those of the better one


def test_always_preferring_the_better_one_has_no_optimum() -> None:
    """The loss falls for ever as the policy goes to the best response: beta sets no price any more."""
    tree = Tree.of(PROBLEM.task, "train")
    scores = tree.scores[0]
    table = (torch.sign(scores[:, None] - scores[None]) + 1) / 2
    losses = [expected_loss(k * scores / PROBLEM.kl_coef, table, PROBLEM.kl_coef).item() for k in (0, 1, 10, 100)]
    assert losses[0] == pytest.approx(math.log(2))
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.05


# -- online ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["finetune", "gru"])
def test_at_first_the_loss_is_log_2(policy: Any) -> None:
    (first,) = learn(tiny_dpo(policy=policy, epochs=1), 1)
    assert first["train/loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert abs(first["train/margin"]) < 1e-5
    assert abs(first["rollout/kl"]) < 1e-4
    assert first["rollout/return"] == pytest.approx(first["rollout/score"], abs=1e-4)
    assert first["train/grad_norm"] > 0.01
    assert first["step"] == first["rollout/length"] * 32  # every sampled token is an env step


def test_log_ratios_are_those_of_enumeration() -> None:
    agent = tiny_dpo()
    learn(agent, 3)
    tree = Tree.of(PROBLEM.task, "train")
    found = agent.log_ratios(tree.episodes)
    exact = (
        tree.evaluate(make_episode_logits(agent.policy)).log_probs
        - tree.evaluate(make_episode_logits(PROBLEM.lm)).log_probs
    )
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=1e-4)
    assert exact.abs().max() > 0.05


def test_pairs_share_a_prompt_and_labels_follow_the_scores() -> None:
    agent = tiny_dpo(batch_size=600)
    pairs, _ = agent.sample()
    ids = pairs.episodes.prompt_index
    scores = pairs.episodes.scores.double()
    assert torch.equal(ids[pairs.chosen], ids[pairs.rejected])
    assert sorted(torch.cat([pairs.chosen, pairs.rejected]).tolist()) == list(range(1200))
    first = torch.stack([pairs.chosen, pairs.rejected]).amin(0)
    expected = torch.from_numpy(preference_probability(scores[first], scores[first ^ 1], 1.0))
    hits = (pairs.chosen == first).double() - expected
    for rows in (expected > 0.6, expected < 0.4, (expected - 0.5).abs() < 0.1):
        assert abs(hits[rows].mean().item()) < 4 * math.sqrt(0.25 / int(rows.sum()))
    assert hits.abs().max() < 0.9  # nothing is certain
    always = tiny_dpo(batch_size=600, labels="argmax").sample()[0]
    scores = always.episodes.scores
    assert (scores[always.chosen] >= scores[always.rejected]).all()
    tied = scores[always.chosen] == scores[always.rejected]
    assert abs((always.chosen[tied] % 2).double().mean().item() - 0.5) < 4 * math.sqrt(0.25 / int(tied.sum()))


def test_a_pair_of_two_prompts_is_refused() -> None:
    pairs = tiny_dpo(batch_size=8).sample()[0]
    rejected = pairs.rejected.clone()
    rejected[:2] = rejected[:2].flip(0)
    ids = pairs.episodes.prompt_index
    assert ids[rejected[0]] != ids[pairs.chosen[0]]
    with pytest.raises(InvalidArgumentError, match="must be responses to one prompt, and in 2 of 8 pairs they are not"):
        Pairs(pairs.episodes, pairs.chosen, rejected, pairs.tied)


@pytest.mark.slow
def test_learning_goes_most_of_the_way_to_the_optimum() -> None:
    agent = tiny_dpo(batch_size=64, lr=1e-3)
    tree = Tree.of(PROBLEM.task, "train")
    optimum = tree.solve()
    learn(agent, 100, total=12_000)
    value = tree.evaluate(make_episode_logits(agent.policy)).value
    assert (value - optimum.reference) / (optimum.value - optimum.reference) > 0.55


def test_beta_is_the_price_of_the_task_unless_it_is_given() -> None:
    free = tiny(Task(**{**vars(PROBLEM.task), "kl_coef": 0.0}))
    assert tiny_dpo().beta == PROBLEM.kl_coef
    assert tiny_dpo(free, beta=0.3).beta == 0.3
    (first,) = learn(tiny_dpo(free, beta=0.3, epochs=1), 1)  # the env never asks the reference: the agent does
    assert first["train/loss"] == pytest.approx(math.log(2), abs=1e-5)
    with pytest.raises(InvalidArgumentError, match="`beta` must be given"):
        tiny_dpo(free)


# -- offline ---------------------------------------------------------------------------------------------------------


def rankings() -> list[Record]:
    """Of the tiny problem's own texts: the more z, the better."""
    return [
        Record("x", (" z z", " x<eos>", " z<eos>"), Ranking.of_order([0, 2, 1])),
        Record("y z", (" x y", " z z", " x z"), Ranking.of_order([1, 2, 0])),
    ]


@pytest.fixture
def file(tmp_path: Path) -> str:
    write_records(tmp_path / "preferences.jsonl", rankings())
    return str(tmp_path / "preferences.jsonl")


def test_every_pair_of_a_ranking_is_read() -> None:
    engine = tiny().engine
    pairs = read_pairs(rankings(), engine)
    episodes = pairs.episodes
    decode = engine.lm.tokenizer.decode
    words = [decode(ids[mask]) for ids, mask in zip(episodes.response_ids, episodes.response_mask, strict=True)]
    found = [(words[c], words[r]) for c, r in zip(pairs.chosen.tolist(), pairs.rejected.tolist(), strict=True)]
    first = [("z z", "z <eos>"), ("z z", "x <eos>"), ("z <eos>", "x <eos>")]
    assert found == [*first, ("z z", "x z"), ("z z", "x y"), ("x z", "x y")]
    prompts = [decode(ids[mask]) for ids, mask in zip(episodes.prompt_ids, episodes.prompt_mask, strict=True)]
    assert prompts == ["x"] * 3 + ["y z"] * 3
    exact = PROBLEM.token_log_probs(PROBLEM.lm, "y z")
    row = PROBLEM.responses.index(tuple(episodes.response_ids[4].tolist()))
    torch.testing.assert_close(episodes.ref_log_probs[4].double(), exact[row], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("completions", "expected"),
    [
        ([" x y z", " x"], "1 to 2 tokens"),
        (["", " x"], "1 to 2 tokens"),
        ([" <eos> x", " x"], "goes on after it"),
    ],
)
def test_a_completion_that_is_none_of_the_tasks_is_named(completions: list[str], expected: str) -> None:
    with pytest.raises(InvalidArgumentError, match=expected) as error:
        read_pairs([Record("x", tuple(completions), Choice(0, 1))], tiny().engine)
    assert repr(completions[0]) in str(error.value)


def test_every_kind_of_judgement_is_learned_from() -> None:
    engine = tiny().engine
    texts = (" z z", Completion(" x", ended=True), " z<eos>")
    records = [
        Record("x", texts, judgement)
        for judgement in (
            Ratings((5, None, 1), 1, 5),
            Skip(),
            Choice(1, 2, strength=0),
            Correction(1, " z"),
            Ranking(((2,), (0, 1))),
        )
    ]
    (pair,) = read_records([{"prompt": "x", "chosen": " z", "rejected": " y"}])
    pairs = read_pairs([*records, pair], engine)
    episodes = pairs.episodes
    decode = engine.lm.tokenizer.decode
    words = [decode(ids[mask]) for ids, mask in zip(episodes.response_ids, episodes.response_mask, strict=True)]
    found = [
        (words[c], words[r], t)
        for c, r, t in zip(pairs.chosen.tolist(), pairs.rejected.tolist(), pairs.tied.tolist(), strict=True)
    ]
    assert found == [
        ("z z", "z <eos>", False),
        ("x <eos>", "z <eos>", True),
        ("z <eos>", "x <eos>", False),
        ("z <eos>", "z z", False),
        ("z <eos>", "x <eos>", False),
        ("z z", "x <eos>", True),
        ("z <eos>", "y <eos>", False),
    ]


def test_a_tie_counts_by_half_in_each_direction(tmp_path: Path) -> None:
    losses = []
    for name, judgement in (("a", Choice(0, 1)), ("b", Choice(1, 0)), ("tie", Choice(0, 1, strength=0))):
        path = tmp_path / f"{name}.jsonl"
        write_records(path, [Record("x", (" z z", " x y"), judgement)])
        agent = tiny_dpo(mode="offline", preferences=str(path), batch_size=1)
        pairs, _ = agent.select(torch.tensor([0]))
        pairs.episodes.ref_log_probs[0] += 1.0  # as if one of the two had become less likely
        losses.append(float(agent.loss(pairs)[0].detach()))
    assert losses[2] == pytest.approx((losses[0] + losses[1]) / 2)
    assert abs(losses[0] - losses[1]) > 0.01


def test_no_comparison_is_too_few() -> None:
    for records in ([], [Record("x", (" z", " x"), Skip())]):
        with pytest.raises(InvalidArgumentError, match="at least one judgement that compares"):
            read_pairs(records, tiny().engine)


def test_offline_every_pair_is_used_once_a_pass(file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    agent = tiny_dpo(mode="offline", preferences=file, batch_size=4, epochs=3)
    seen: list[int] = []
    step = agent.step

    def spy(pairs: Pairs) -> dict[str, float]:
        keys = 10 * pairs.chosen + pairs.rejected
        seen.extend(keys.tolist())
        return step(pairs)

    monkeypatch.setattr(agent, "step", spy)
    monkeypatch.setattr(agents.algorithms.dpo, "collect", None)  # no env step is taken
    history = learn(agent, 100)
    assert len(history) == 6  # 4 + 2 pairs a pass
    passes = [seen[i : i + 6] for i in (0, 6, 12)]
    assert [sorted(p) for p in passes] == [sorted(passes[0])] * 3
    assert len(set(passes[0])) == 6
    assert len({tuple(p) for p in passes}) > 1
    assert history[-1]["step"] == 3 * 6 * 2 * 2  # response tokens of both sides
    assert not any(name.startswith("rollout/") for name in history[-1])


def test_offline_the_preferred_gains_on_the_rejected(file: str) -> None:
    agent = tiny_dpo(mode="offline", preferences=file, batch_size=6, epochs=60, lr=1e-2)
    history = learn(agent, 60)
    assert history[0]["train/loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert history[-1]["train/accuracy"] == 1
    assert history[-1]["train/margin"] > 1


# -- going on --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["finetune", "mlp"])
@pytest.mark.parametrize("mode", ["online", "offline"])
def test_a_resumed_run_is_the_uninterrupted_one(mode: Any, policy: Any, file: str, tmp_path: Path) -> None:
    config = {"mode": mode, "policy": policy, "batch_size": 4, "epochs": 3}
    config |= {"preferences": file} if mode == "offline" else {}
    whole_run, first, second = (tiny_dpo(seed=seed, **config) for seed in (1, 1, 9))
    history = learn(whole_run, 4)
    start = learn(first, 1)
    first.save(tmp_path / "run" / "checkpoint")
    first.save(tmp_path / "run" / "checkpoint")  # over an older one
    second.load(tmp_path / "run" / "checkpoint")
    assert start + learn(second, 3) == history
    assert torch.equal(weights(second), weights(whole_run))
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["checkpoint"]


@pytest.mark.parametrize("mode", ["online", "offline"])
def test_what_is_saved_where_a_batch_fails_goes_on_to_the_same_curve(
    mode: Any, file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = {"mode": mode, "batch_size": 4, "epochs": 3} | ({"preferences": file} if mode == "offline" else {})
    whole_run, first, second = (tiny_dpo(seed=seed, **config) for seed in (1, 1, 9))
    history = learn(whole_run, 4)
    start = learn(first, 2)
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(first, "describe", lambda _: 1 / 0)  # after the batch was drawn
        learn(first, 1)
    assert first.at_rest
    first.save(tmp_path / "checkpoint")
    second.load(tmp_path / "checkpoint")
    assert start + learn(second, 2) == history
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(second, "step", lambda _: 1 / 0)
        learn(second, 1)
    assert not second.at_rest


def test_a_loaded_agent_acts_as_the_saved_one(tmp_path: Path) -> None:
    envs = tiny(num_envs=64)
    agent = tiny_dpo(envs)
    other = tiny_dpo(envs, seed=5)
    learn(agent, 5)
    agent.save(tmp_path / "checkpoint")
    other.load(tmp_path / "checkpoint")
    observation, _ = envs.reset(seed=0)
    for deterministic in (False, True, False):
        actions = [a.predict(observation, deterministic=deterministic)[0] for a in (agent, other)]
        assert np.array_equal(*actions)
    assert len(set(actions[0].tolist())) > 1
    likeliest, _ = agent.predict(observation, deterministic=True)
    prompts = [p for p in envs.engine.current if p is not None]
    drawn = collect(envs, agent.policy, prompts, None, torch.Generator().manual_seed(0))
    assert likeliest.shape == drawn.response_ids[:, 0].shape


@pytest.mark.parametrize(
    ("config", "match"),
    [
        ({"mode": "offline"}, "`preferences` must be a file where"),
        ({"preferences": "x.jsonl"}, "`preferences` must be null where"),
        ({"mode": "offline", "preferences": "nowhere.jsonl"}, "there is none at 'nowhere.jsonl'"),
        ({"beta": 0.0}, "`beta`"),
        ({"labels": "soft"}, "`labels`"),
        ({"batch_size": 0}, "`batch_size`"),
    ],
)
def test_a_bad_config_is_named(config: dict[str, Any], match: str) -> None:
    with pytest.raises(LmGymError, match=match):
        DPOConfig(**config)
