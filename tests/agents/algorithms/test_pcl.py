"""PCL: paths of any policy have no error at the optimum, and what is replayed is what was kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TinyProblem
from directions import DISCOUNT, as_collected
from test_klq import tabular

from agents.algorithms.klq import KLQ
from agents.algorithms.pcl import PCL
from agents.on_policy import OnPolicyAgent
from lmgym.envs.vector import RLHFVectorEnv
from lmgym.optimum.tree import Tree


def made(kind: type[OnPolicyAgent], **config: Any) -> Any:
    """An agent at the reference, with batches of 8 episodes and one step on each."""
    numbers = {"batch_size": 8, "epochs": 1, "minibatches": 1, "policy": "mlp", "width": 16, "lr": 1e-2}
    envs = RLHFVectorEnv(1, task=TinyProblem().task, device="cpu")
    return kind(envs, kind.Config(**{**numbers, **config}))


@pytest.mark.parametrize("gamma", [1.0, DISCOUNT])
@pytest.mark.parametrize("td_lambda", [0.0, 0.7, 1.0])
def test_no_path_has_an_error_at_the_optimum(gamma: float, td_lambda: float) -> None:
    """Also paths that the optimal policy hardly ever takes; away from the optimum most have one."""
    tree = Tree.of(TinyProblem(gamma=gamma).task, "train")
    errors = []
    for moved in (0.0, 0.1):
        agent = tabular(tree, moved=moved, td_lambda=td_lambda)
        episodes = as_collected(agent, tree.episodes)
        errors.append(agent.advantages(episodes, agent.rewards(episodes))[0][episodes.response_mask])
    assert errors[0].abs().max() < 1e-5
    assert errors[1].abs().median() > 1e-3


def test_without_a_replay_a_step_is_that_of_klq() -> None:
    steps = []
    for kind, config in ((KLQ, {}), (PCL, {"replay": 1})):
        agent = made(kind, lr_schedule="constant", **config)
        agent.learn(1)
        steps.append(torch.cat([weight.detach().flatten() for weight in agent.policy.parameters()]))
    torch.testing.assert_close(steps[1], steps[0], rtol=0, atol=2e-5)


def test_the_newest_batches_are_kept_and_drawn_from() -> None:
    agent = made(PCL, replay=2, epochs=3)
    collected = []
    collect = agent.collect
    agent.collect = lambda: collected.append(collect()) or collected[-1]
    kept = []
    for _ in range(3):
        agent.learn(agent.num_timesteps + 1, lambda _, metrics: kept.append(metrics["train/replayed_episodes"]))
    assert kept == [8, 16, 16]
    drawn = agent.draw(16)
    expected = torch.cat([batch.response_ids for batch in collected[1:]])
    assert torch.equal(drawn.response_ids, expected)  # all that is kept, in its order
    some = agent.draw(5)
    assert (
        len({tuple(row) for row in some.ref_log_probs.tolist()} - {tuple(row) for row in drawn.ref_log_probs.tolist()})
        == 0
    )


def test_a_replay_is_read_again_by_the_policy_that_learns() -> None:
    agent = made(PCL)
    agent.learn(1)
    before = agent.draw(8)
    again = agent.read_again(before, 0.0).episodes
    mask = before.response_mask
    expected = agent.policy.read(before)
    chosen = expected.logits.log_softmax(-1).gather(1, before.response_ids[mask][:, None]).squeeze(1)
    torch.testing.assert_close(again.log_probs[mask], chosen, rtol=0, atol=1e-5)
    assert again.values is not None
    torch.testing.assert_close(again.values[mask], expected.values, rtol=0, atol=1e-5)
    assert (again.log_probs - before.log_probs).abs().max() > 1e-3  # the policy has moved since


def test_a_checkpoint_has_the_replay(tmp_path: Path) -> None:
    agent = made(PCL, replay=3, epochs=2)
    agent.learn(60)
    agent.save(tmp_path / "checkpoint")
    other = made(PCL, replay=3, epochs=2)
    other.load(tmp_path / "checkpoint")
    goal = agent.num_timesteps + 60
    for one in (agent, other):
        one.learn(goal)
    for mine, theirs in zip(agent.policy.parameters(), other.policy.parameters(), strict=True):
        assert torch.equal(mine, theirs)
