"""Behaviour cloning: its gradient against enumeration of every response, what it counts, and the files it reads."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import hydra
import numpy as np
import pytest
import torch
from conftest import TinyProblem, learn, shifted, weights
from omegaconf import OmegaConf
from torch import Tensor

import agents.algorithms.sft
import agents.train
from agents.algorithms.best_of_n import BestOfN, BestOfNConfig, best_of_n_log_probs
from agents.algorithms.sft import SFT, SFTConfig, episodes_of
from agents.finite import GRAD_NORM
from agents.seeds import row_seeds
from agents.update import clip_gradients, norm_of, sum_gradients
from lmgym.envs.vector import RLHFVectorEnv
from lmgym.episodes import Episodes
from lmgym.errors import InvalidArgumentError, LmGymError
from lmgym.models.sampling import Sampler
from lmgym.optimum.tree import Tree, make_episode_logits
from lmgym.tasks.base import Task

ROOT = Path(__file__).parents[3]
PROBLEM = TinyProblem(horizon=2)
FULL = replace(PROBLEM.task, min_new_tokens=1)  # every response has two tokens
LINES = [("x", " z z"), ("y z", " x<eos>"), ("x", " <eos>"), ("z z x", " y x"), ("y z", " z y")]


def tiny(task: Task = PROBLEM.task, num_envs: int = 1, **settings: Any) -> RLHFVectorEnv:
    return RLHFVectorEnv(num_envs, autoreset_mode="SameStep", task=task, split="train", device="cpu", **settings)


def tiny_sft(envs: RLHFVectorEnv | None = None, *, seed: int = 0, **config: Any) -> SFT:
    return SFT(envs or tiny(), SFTConfig(**{"batch_size": 16, "lr": 2e-3} | config), seed=shifted(seed))


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "demonstrations.jsonl"
    rows = [json.dumps({"prompt": prompt, "completion": completion}) for prompt, completion in LINES]
    path.write_text("\n".join([*rows[:2], "", *rows[2:]]) + "\n")
    return str(path)


@pytest.fixture(params=["best_of_n", "optimal", "file"])
def source(request: pytest.FixtureRequest, file: str) -> dict[str, Any]:
    """Each kind of demonstrations."""
    return {"demonstrations": request.param} | ({"path": file} if request.param == "file" else {})


def gradient(agent: SFT, loss: Tensor) -> Tensor:
    parts = torch.autograd.grad(loss, agent.updater.optimizer.param_groups[0]["params"], allow_unused=True)
    return torch.cat([part.flatten() for part in parts if part is not None])


# -- the loss --------------------------------------------------------------------------------------------------------


def expert(tree: Tree) -> tuple[Tensor, Tensor]:
    """(R,) probabilities of pi* for each response, the mean over prompts, and its log-probs (n, V) at every token."""
    policy = tree.solve().policy
    assert policy is not None
    probs = tree.evaluate(make_episode_logits(policy)).log_probs.exp() / len(tree.prompts)
    return probs, make_episode_logits(policy)(tree.episodes).log_softmax(-1)


def test_the_gradient_under_the_expert_is_that_of_the_kl_from_it() -> None:
    """KL(pi* || pi), summed at the prefixes that pi* reaches, against -log pi of its tokens; and from samples."""
    tree = Tree.of(PROBLEM.task, "train")
    agent = tiny_sft(demonstrations="optimal", batch_size=2000)
    probs, distribution = expert(tree)
    row = tree.episodes.response_mask.nonzero()[:, 0]
    own = agent.policy.read(tree.episodes).logits.double().log_softmax(-1)
    states = torch.nan_to_num(distribution.exp() * (distribution - own)).sum(-1)  # KL of each state
    forward = gradient(agent, (probs[row] * states).sum())
    cloned = gradient(agent, -(probs[row] * agent.log_probs(tree.episodes)).sum())
    torch.testing.assert_close(cloned, forward, rtol=0, atol=1e-4 * forward.norm().item())

    own = agent.policy.read(tree.episodes).logits.double().log_softmax(-1)
    whole = torch.zeros(len(probs), dtype=torch.float64).index_add(0, row, agent.log_probs(tree.episodes).double())
    reverse = gradient(agent, (whole.exp() * (whole - (probs * len(tree.prompts)).log())).sum() / len(tree.prompts))
    episodes, _ = agent.sample()
    sampled = gradient(agent, -agent.log_probs(episodes).mean())
    mean_length = (probs * tree.episodes.lengths).sum()
    near = (sampled - forward / mean_length).norm() / sampled.norm()
    assert near < 0.15
    assert (sampled - reverse / mean_length).norm() / sampled.norm() > 3 * near  # not that of KL(pi || pi*)


@pytest.mark.parametrize("policy", ["finetune", "gru"])
def test_at_first_the_loss_is_the_cross_entropy_of_the_reference(policy: Any, source: dict[str, Any]) -> None:
    (first,) = learn(tiny_sft(policy=policy, epochs=1, **source), 1)
    assert first["train/loss"] == pytest.approx(first["train/reference_loss"], abs=1e-5)
    assert first["train/loss"] > 0.5
    assert first["train/grad_norm"] > 0.01


def test_the_loss_is_of_the_response_alone_and_its_end(file: str) -> None:
    agent = tiny_sft(demonstrations="file", path=file)
    nats = 0.0
    count = 0
    for prompt, completion in LINES:
        ids = tuple(PROBLEM.lm.tokenizer(completion)["input_ids"])
        nats -= PROBLEM.token_log_probs(PROBLEM.lm, prompt)[PROBLEM.responses.index(ids)].sum().item()
        count += len(ids)
    (first,) = learn(agent, 1)
    assert first["train/reference_loss"] == pytest.approx(nats / count, abs=1e-5)
    assert first["train/demonstration_length"] == pytest.approx(count / len(LINES))
    assert first["step"] == count
    assert agent.step(agent._file)["train/loss"] < nats / count - 0.01  # type: ignore[arg-type]


def test_a_gradient_is_of_this_loss_and_clipped() -> None:
    weight = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
    for limit, expected in ((1.0, [0.6, 0.8]), (math.inf, [3.0, 4.0])):
        losses = [(weight.square().sum() / 4, {"loss": torch.tensor(1.0)}) for _ in range(2)]
        sums = sum_gradients(losses, [weight])
        assert {name: x.item() for name, x in sums.items()} == pytest.approx({"loss": 2, GRAD_NORM: 5})
        clip_gradients([weight], sums[GRAD_NORM].item(), limit)
        assert weight.grad is not None
        assert weight.grad.tolist() == pytest.approx(expected, abs=1e-5)


def test_gradients_of_several_types_are_clipped_as_pytorch_does() -> None:
    def weights() -> list[torch.nn.Parameter]:
        generator = torch.Generator().manual_seed(0)
        made = []
        for dtype in (torch.float32, torch.bfloat16, torch.float64, torch.bfloat16):
            weight = torch.nn.Parameter(torch.zeros(50, dtype=dtype))
            weight.grad = torch.randn(50, generator=generator).to(dtype)
            made.append(weight)
        return [*made, torch.nn.Parameter(torch.zeros(3))]  # one without a gradient

    ours = weights()
    theirs = [torch.nn.Parameter(weight.double()) for weight in ours]
    for mine, other in zip(ours, theirs, strict=True):
        other.grad = None if mine.grad is None else mine.grad.double()
    norm = norm_of([weight.grad for weight in ours if weight.grad is not None])
    expected = torch.nn.utils.clip_grad_norm_(theirs, 2.0)
    assert norm.item() == pytest.approx(expected.item(), rel=1e-6)
    clip_gradients(ours, norm.item(), 2.0)
    for mine, other in zip(ours[:-1], theirs, strict=False):
        torch.testing.assert_close(
            mine.grad, other.grad.to(mine.dtype), rtol=1e-2 if mine.dtype == torch.bfloat16 else 1e-5, atol=0
        )
    assert ours[-1].grad is None


# -- what is demonstrated --------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_an_expert_is_cloned() -> None:
    tree = Tree.of(PROBLEM.task, "train")
    agent = tiny_sft(demonstrations="optimal", batch_size=64, lr=5e-3, epochs=4)
    optimum = tree.solve()
    assert optimum.policy is not None
    history = learn(agent, 200, total=4_000)
    value = tree.evaluate(make_episode_logits(agent.policy)).value
    assert (value - optimum.reference) / (optimum.value - optimum.reference) > 0.8
    returns = np.mean([row["train/demonstration_return"] for row in history])
    assert returns == pytest.approx(optimum.value, abs=0.03)
    kl = tree.evaluate(make_episode_logits(optimum.policy)).metrics["kl"]
    assert np.mean([row["train/demonstration_kl"] for row in history]) == pytest.approx(kl, abs=0.05)


@pytest.mark.slow
def test_cloning_the_best_of_n_goes_to_its_distribution() -> None:
    tree = Tree.of(PROBLEM.task, "train")
    agent = tiny_sft(n=4, batch_size=64, lr=5e-3, epochs=4)
    reference = tree.evaluate(make_episode_logits(PROBLEM.lm)).log_probs.view(3, -1)
    history = learn(agent, 100, total=15_000)
    found = tree.evaluate(make_episode_logits(agent.policy)).log_probs.view(3, -1)
    best = {}
    distance = {}
    start = {}
    for n in (1, 2, 4, 8):
        distribution = torch.stack([best_of_n_log_probs(*pair, n) for pair in zip(reference, tree.scores, strict=True)])
        best[n] = (distribution.exp() * tree.scores).sum(1).mean().item()
        distance[n], start[n] = (
            (distribution.exp() * (distribution - x)).sum(1).mean().item() for x in (found, reference)
        )
    assert min(distance, key=distance.__getitem__) == 4
    assert distance[4] < 0.2 * start[4]
    scores = [row["train/demonstration_score"] for row in history]
    assert np.mean(scores) == pytest.approx(best[4], abs=4 * float(np.std(scores)) / math.sqrt(len(scores)))
    score = (found.exp() * tree.scores).sum(1).mean().item()
    assert (score - best[1]) / (best[4] - best[1]) == pytest.approx(1, abs=0.1)


@pytest.mark.slow
def test_of_one_candidate_there_is_nothing_to_learn() -> None:
    """In expectation the gradient of -log pi_ref is 0 at pi_ref."""
    tree = Tree.of(PROBLEM.task, "train")
    log_probs = tree.evaluate(make_episode_logits(PROBLEM.lm)).log_probs
    row = tree.episodes.response_mask.nonzero()[:, 0]
    agents_by_n = {n: tiny_sft(n=n, batch_size=1500) for n in (1, 4)}
    exact = gradient(agents_by_n[1], -(log_probs.exp()[row] * agents_by_n[1].log_probs(tree.episodes)).sum())
    sampled = {n: gradient(a, -a.log_probs(a.sample()[0]).mean()).norm() for n, a in agents_by_n.items()}
    assert exact.norm() < 1e-4 * sampled[4]
    assert sampled[1] < 0.2 * sampled[4]


def test_the_best_candidates_are_those_of_best_of_n() -> None:
    agent = tiny_sft(n=3, batch_size=6, seed=4)
    twin = BestOfN(tiny(), BestOfNConfig(3), seed=shifted(4))
    twin.envs.reset(seed=row_seeds(shifted(4), 1))
    episodes, steps = agent.sample()
    same = twin.respond(twin.envs, twin.envs.next_prompts(6))
    assert torch.equal(episodes.response_ids, same.response_ids)
    assert torch.equal(episodes.scores, same.scores)
    assert steps == twin.num_timesteps > episodes.num_tokens


def test_candidates_are_of_the_samplers_distribution_and_those_of_the_expert_of_his_own() -> None:
    numbers: dict[str, int] = {}
    for kind in ("best_of_n", "optimal"):
        config: Any = {"demonstrations": kind, "batch_size": 60}
        episodes, _ = SFT(tiny(), SFTConfig(**config), sampler=Sampler(greedy_tokens=2)).sample()
        rows = torch.cat([episodes.prompt_index.unsqueeze(1), episodes.response_ids], dim=1)
        numbers[kind] = len(rows.unique(dim=0))
    assert numbers["best_of_n"] == 3  # one to each prompt
    assert numbers["optimal"] > 9


# -- what it costs ---------------------------------------------------------------------------------------------------


def test_every_token_is_counted() -> None:
    """Three prompts of 1, 2 and 3 tokens a batch, and two tokens to each."""
    in_turn = {"task": FULL, "prompt_order": "sequential"}
    size = 6 + 3 * 2
    chosen = tiny_sft(tiny(**in_turn), n=4, batch_size=3, epochs=5)
    learned = learn(chosen, 2)
    assert [row["step"] for row in learned] == [24, 48]
    assert chosen.tokens.forward == 2 * (4 + 5) * size == learned[-1]["cost/forward_tokens"]
    assert chosen.tokens.backward == 2 * 5 * size == learned[-1]["cost/backward_tokens"]
    cloned = tiny_sft(tiny(**in_turn), demonstrations="optimal", batch_size=3, epochs=5)
    assert [row["step"] for row in learn(cloned, 2)] == [6, 12]
    assert (cloned.tokens.forward, cloned.tokens.backward) == (2 * (1 + 5) * size, 2 * 5 * size)


def test_a_file_is_used_once_a_pass(file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    agent = tiny_sft(demonstrations="file", path=file, batch_size=3, epochs=3)
    size = agent.tokens.forward  # read by the reference
    seen: list[tuple[int, ...]] = []
    step = agent.step

    def spy(episodes: Episodes) -> dict[str, float]:
        ids = torch.cat([episodes.prompt_ids, episodes.response_ids], dim=1)
        seen.extend(tuple(row) for row in ids.tolist())
        return step(episodes)

    monkeypatch.setattr(agent, "step", spy)
    monkeypatch.setattr(agents.algorithms.sft, "collect", None)  # no env step is taken
    history = learn(agent, 100)
    assert len(history) == 6  # 3 + 2 demonstrations a pass
    passes = [seen[i : i + 5] for i in (0, 5, 10)]
    assert [sorted(p) for p in passes] == [sorted(passes[0])] * 3
    assert len(set(passes[0])) == 5
    assert len({tuple(p) for p in passes}) > 1
    assert history[-1]["step"] == 3 * 9
    assert size == 9 + 9  # of prompts, and of responses
    assert (agent.tokens.forward, agent.tokens.backward) == (4 * size, 3 * size)
    assert history[-1]["train/lr"] == pytest.approx(2e-3 * (2 / 5) / 3)  # two demonstrations are left
    assert history[-1]["train/loss"] < history[-1]["train/reference_loss"]


# -- going on --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["finetune", "mlp"])
def test_a_resumed_run_is_the_uninterrupted_one(policy: Any, source: dict[str, Any], tmp_path: Path) -> None:
    config = {"policy": policy, "batch_size": 3, "epochs": 3, **source}
    whole_run, first, second = (tiny_sft(seed=seed, **config) for seed in (1, 1, 9))
    history = learn(whole_run, 4)
    start = learn(first, 1)
    first.save(tmp_path / "run" / "checkpoint")
    first.save(tmp_path / "run" / "checkpoint")  # over an older one
    second.load(tmp_path / "run" / "checkpoint")
    assert start + learn(second, 3) == history
    assert torch.equal(weights(second), weights(whole_run))
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["checkpoint"]


def test_a_loaded_agent_acts_as_the_saved_one(tmp_path: Path) -> None:
    envs = tiny(num_envs=64)
    agent = tiny_sft(envs)
    other = tiny_sft(envs, seed=5)
    learn(agent, 5)
    agent.save(tmp_path / "checkpoint")
    other.load(tmp_path / "checkpoint")
    observation, _ = envs.reset(seed=0)
    for deterministic in (False, True, False):
        actions = [a.predict(observation, deterministic=deterministic)[0] for a in (agent, other)]
        assert np.array_equal(*actions)
    assert len(set(actions[0].tolist())) > 1
    likeliest, _ = agent.predict(observation, deterministic=True)
    ids = torch.from_numpy(observation["input_ids"][:, :3])
    mask = torch.from_numpy(observation["attention_mask"][:, :3]).bool()
    assert np.array_equal(likeliest, agent.policy.begin(ids, mask, 2).logits.argmax(-1).numpy())


# -- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "match"),
    [
        ({"demonstrations": "file"}, "`path` must be a file where"),
        ({"path": "x.jsonl"}, "`path` must be null unless"),
        ({"demonstrations": "file", "path": "nowhere.jsonl"}, "there is none at 'nowhere.jsonl'"),
        ({"demonstrations": "human"}, "`demonstrations`"),
        ({"n": 0}, "`n`"),
        ({"batch_size": 0}, "`batch_size`"),
        ({"lr": -1.0}, "`lr`"),
        ({"lr_schedule": "cosine"}, "`lr_schedule`"),
    ],
)
def test_a_bad_config_is_named(config: dict[str, Any], match: str) -> None:
    with pytest.raises(LmGymError, match=match):
        SFTConfig(**config)


@pytest.mark.parametrize(
    ("changes", "match"),
    [({"max_new_tokens": 12}, "`limit` must be at least the number of responses"), ({"kl_coef": 0.0}, "`kl_coef`")],
)
def test_an_expert_that_nobody_knows_is_refused(changes: dict[str, Any], match: str) -> None:
    envs = tiny(replace(PROBLEM.task, **changes))
    with pytest.raises(InvalidArgumentError, match=match):
        tiny_sft(envs, demonstrations="optimal")
    (first,) = learn(tiny_sft(envs, n=2), 1)  # the best of n needs no expert
    assert ("train/reference_loss" in first) == (envs.kl_coef > 0)


@pytest.mark.parametrize(
    ("line", "match"),
    [
        ('{"prompt": "x", ', "line 2, is not JSON"),
        ('{"prompt": "x"}', r"rows with a .completion., and line 2 of .* has the columns \['prompt'\]"),
        ('["x", " y"]', "texts or rows with a .prompt., and line 2 of"),
        ('{"prompt": "x", "completion": " x y z"}', "1 to 2 tokens"),
        ('{"prompt": "x", "completion": " <eos> y"}', "goes on after it"),
        ('{"prompt": "", "completion": " y"}', "`path` must hold non-empty texts, and line 2 of"),
        ('{"prompt": "x x x x", "completion": " y"}', "Line 2 of .* `prompt` must have 1 to 3 tokens"),
    ],
)
def test_a_line_that_is_no_demonstration_is_named(line: str, match: str, tmp_path: Path) -> None:
    path = tmp_path / "demonstrations.jsonl"
    path.write_text('{"prompt": "x", "completion": " y y"}\n' + line + "\n")
    with pytest.raises(InvalidArgumentError, match=match):
        episodes_of(path, tiny().engine)


def test_no_demonstrations_are_too_few(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(InvalidArgumentError, match="`path` must hold at least one demonstration, got none"):
        episodes_of(tmp_path / "empty.jsonl", tiny().engine)


# -- its page --------------------------------------------------------------------------------------------------------


def table(first: str) -> dict[str, list[str]]:
    """Rows of the page's table whose first column is `first`: name to the cells after it, without backticks."""
    page = (ROOT / "docs" / "agents" / "sft.md").read_text(encoding="utf-8")
    found = re.search(rf"^\| {first} \|.*\n\|[-|]*\n((?:\|.*\n)*)", page, flags=re.MULTILINE)
    assert found is not None
    rows = [[cell.strip().strip("`") for cell in line.strip("|").split("|")] for line in found[1].splitlines()]
    return {name: cells for name, *cells in rows}


def test_the_page_lists_the_fields_and_the_metrics(file: str) -> None:
    fields = {field.name: str(field.default) for field in dataclasses.fields(SFTConfig)}
    written = table("field")
    assert {name: cells[0] for name, cells in written.items()} == fields
    with hydra.initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        shipped: Any = OmegaConf.to_container(hydra.compose("train", ["agent=sft"]).agent)
    assert hydra.utils.get_class(shipped.pop("_target_")) is SFT
    assert {name: str(value) for name, value in shipped.items()} == {name: cells[1] for name, cells in written.items()}
    logged: set[str] = set()
    task = replace(PROBLEM.task, gold=PROBLEM.task.reward)
    for kind, path in (("best_of_n", None), ("optimal", None), ("file", file)):
        agent = tiny_sft(tiny(task), demonstrations=kind, path=path)
        agent.learn(1, lambda _, metrics: logged.update(metrics))
    assert logged == set(table("metric"))
