"""IPO: its loss and the optimum of it, against enumeration of every response."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from conftest import TinyProblem, learn

from agents.algorithms.dpo import Pairs
from agents.algorithms.ipo import IPO, TAU, ipo_loss
from lmgym.envs.vector import RLHFVectorEnv
from lmgym.feedback.annotators import preference_probability
from lmgym.optimum.tree import Tree

PROBLEM = TinyProblem(horizon=2)


def tiny_ipo(**config: Any) -> IPO:
    envs = RLHFVectorEnv(1, autoreset_mode="SameStep", task=PROBLEM.task, split="train", device="cpu")
    return IPO(envs, IPO.Config(**{"batch_size": 16, "epochs": 1} | config))


def test_the_loss_is_that_of_the_paper() -> None:
    losses = ipo_loss(torch.tensor([0.3, -2.0]), torch.tensor([-0.1, 1.0]), 0.5)
    assert losses.tolist() == pytest.approx([(0.4 - 1) ** 2, (-3.0 - 1) ** 2])


@pytest.mark.parametrize(("spread", "error"), [(1e-3, 1e-6), (3.0, None)])
def test_the_optimum_is_that_of_the_task_for_small_differences_in_score(spread: float, error: float | None) -> None:
    """The expected squared loss is least at the projection of 2 (2 P - 1) / beta on differences."""
    tree = Tree.of(PROBLEM.task, "train")
    beta = PROBLEM.kl_coef
    scores = spread * tree.scores[0].numpy()
    preferred = torch.from_numpy(preference_probability(scores[:, None], scores[None], 1.0))
    h = torch.from_numpy(scores / beta).requires_grad_()
    pairs = (h.unsqueeze(1), h.unsqueeze(0), TAU * beta)
    loss = (preferred * ipo_loss(*pairs) + (1 - preferred) * ipo_loss(pairs[1], pairs[0], pairs[2])).mean()
    (gradient,) = torch.autograd.grad(loss, h)
    size = np.abs(scores).max() / beta
    found = gradient.abs().max().item() / size
    assert found < error if error else found > 1e-3


def test_at_first_the_loss_is_that_of_no_difference_and_that_of_a_tie_is_less() -> None:
    agent = tiny_ipo()
    (first,) = learn(agent, 1)
    assert first["train/loss"] == pytest.approx(1 / (2 * TAU * PROBLEM.kl_coef) ** 2, rel=1e-4)
    assert tiny_ipo(tau=0.5).pair_losses(torch.zeros(1), torch.zeros(1)).item() == 1
    pairs = agent.sample()[0]
    tied = Pairs(pairs.episodes, pairs.chosen, pairs.rejected, torch.ones_like(pairs.tied))
    chosen, rejected = agent.log_ratios(pairs.episodes).view(-1, 2).T
    expected = (chosen - rejected).square() + 1 / (2 * TAU * agent.beta) ** 2
    assert agent.loss(tied)[0].item() == pytest.approx(expected.mean().item(), rel=1e-4)
