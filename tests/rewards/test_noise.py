"""Noise on top of a reward."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
from conftest import table_reward

from lmgym.errors import InvalidArgumentError, RewardError
from lmgym.rewards.base import remove_noise, score
from lmgym.rewards.noise import NoisyReward


def test_noise_has_its_mean_and_standard_deviation() -> None:
    n = 20_000
    sigma = 0.7
    reward = NoisyReward(lambda prompts, completions, **_: [2.0 * len(c) for c in completions], sigma, seed=3)
    columns: dict[str, Any] = {"prompt_ids": [[1]] * n, "completion_ids": [[2]] * n}
    noise = np.array(score(reward, [""] * n, ["abc"] * n, **columns)) - 6.0
    assert abs(noise.mean()) < 4 * sigma / math.sqrt(n)
    assert abs(noise.std() - sigma) < 4 * sigma / math.sqrt(2 * n)
    assert abs(np.corrcoef(noise[:-1], noise[1:])[0, 1]) < 4 / math.sqrt(n)


def test_noise_is_drawn_anew_and_only_its_own() -> None:
    def inside(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        return table_reward(prompts, completions, **columns)

    first = NoisyReward(inside, 0.5, seed=1)
    second = NoisyReward(inside, 0.5, seed=1)
    other = NoisyReward(inside, 0.5)
    call: dict[str, Any] = {"prompts": ["p"] * 3, "completions": [""] * 3, "completion_ids": [[1], [2, 3], [4]]}
    scores = [first(**call), first(**call)]
    assert scores == [second(**call), second(**call)]
    assert scores[0] != scores[1]
    assert other(**call) != scores[0]
    assert first.expected is inside
    assert NoisyReward(inside, 0.0)(**call) == inside(**call)
    assert [type(x) for x in first(**call)] == [float] * 3


def test_noise_goes_on_from_its_state() -> None:
    call: dict[str, Any] = {"prompts": ["p"] * 3, "completions": [""] * 3, "completion_ids": [[1], [2, 3], [4]]}
    reward = NoisyReward(table_reward, 0.5, seed=1)
    fresh = NoisyReward(table_reward, 0.5, seed=9)
    reward(**call)
    state = reward.get_state()
    text = json.dumps(state)
    expected = [reward(**call) for _ in range(3)]
    assert json.dumps(state) == text  # a copy, not a view of what runs on
    fresh.set_state(json.loads(text))
    assert [fresh(**call) for _ in range(3)] == expected
    reward.set_state(state)
    assert [reward(**call) for _ in range(3)] == expected


def test_noise_on_noise_is_independent_of_it_and_begins_and_goes_on_with_it() -> None:
    """With one seed for both the standard deviations would add, not the variances."""
    n = 20_000
    call: dict[str, Any] = {"prompts": [""] * n, "completions": [""] * n}
    reward = NoisyReward(NoisyReward(lambda prompts, completions: [0.0] * len(prompts), 1.0), 1.0)
    first = np.array(reward(**call))
    assert abs(first.std() - math.sqrt(2)) < 4 * math.sqrt(2 / (2 * n))
    state = json.loads(json.dumps(reward.get_state()))
    second = reward(**call)
    reward.set_state(state)
    assert reward(**call) == second
    reward.reseed(0)
    assert reward(**call) == first.tolist()
    with pytest.raises(InvalidArgumentError, match="`state` must come from `NoisyReward.get_state`"):
        reward.set_state(NoisyReward(table_reward, 1.0).get_state())


def test_what_is_paid_on_average_is_found_under_any_number_of_layers() -> None:
    assert remove_noise(table_reward) is table_reward
    assert remove_noise(NoisyReward(table_reward, 1.0)) is table_reward
    assert remove_noise(NoisyReward(NoisyReward(table_reward, 1.0), 1.0)) is table_reward

    def own(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        return [0.0] * len(prompts)

    own.expected = 0.5  # type: ignore[attr-defined]
    assert remove_noise(own) is own  # a number of its own, not a reward
    own.expected = own  # type: ignore[attr-defined]
    assert remove_noise(own) is own


@pytest.mark.parametrize("state", [{}, {"bit_generator": "MT19937"}, {"bit_generator": "PCG64"}, 3])
def test_a_state_of_something_else(state: Any) -> None:
    with pytest.raises(InvalidArgumentError, match="`state` must come from `NoisyReward.get_state`"):
        NoisyReward(table_reward, 0.5).set_state(state)


def test_noise_that_cannot_be() -> None:
    with pytest.raises(InvalidArgumentError, match="`sigma` must be a finite number >= 0, got -1"):
        NoisyReward(table_reward, -1)
    with pytest.raises(InvalidArgumentError, match="`seed` must be an int >= 0, got None"):
        NoisyReward(table_reward, 1, seed=None)  # type: ignore[arg-type]
    with pytest.raises(InvalidArgumentError, match="`reward` must be a callable, got 'x'."):
        NoisyReward("x", 1)  # type: ignore[arg-type]
    with pytest.raises(RewardError, match="must return 2 scores"):
        NoisyReward(lambda **_: [1.0], 1)(["p"] * 2, [""] * 2)
