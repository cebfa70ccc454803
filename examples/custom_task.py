"""A task of your own: a reference, a reward and prompts, registered, checked and solved exactly.

    python examples/custom_task.py --samples 2000

The digits of a response should add up to the prompt, modulo 3. The reference is a table and the reward an automaton, so
V* and pi* can be computed. Episodes of pi_ref and of pi* must then agree with them.
"""

from __future__ import annotations

import argparse
import functools
from typing import Any

import gymnasium as gym
import numpy as np
import torch

import lmgym
from lmgym.automata import Automaton
from lmgym.models.causal import CausalLM
from lmgym.models.tables import markov_lm
from lmgym.rewards.automaton import AutomatonReward
from lmgym.testing import check_task


@functools.cache  # the task is built again at each call; its model must be the same one
def reference() -> CausalLM:
    rows = np.array([[0.1, 0.3, 0.3, 0.3], [0.1, 0.2, 0.5, 0.2], [0.1, 0.2, 0.2, 0.5], [0.1, 0.5, 0.2, 0.2]])
    return markov_lm(rows, ["0", "1", "2"])  # token 0 is the EOS, token i + 1 the digit i


def modulo(prompt_ids: tuple[int, ...]) -> Automaton:
    sums = (np.arange(3)[:, None] + [0, 0, 1, 2]) % 3  # of a state and a token: the next state
    return Automaton.dense(sums, payments=np.eye(3)[prompt_ids[-1] - 1])  # 1 in the state of the prompt's digit


def build() -> lmgym.Task:
    return lmgym.Task(
        name="modulo",
        model=reference,
        reward=AutomatonReward(modulo),
        prompts={"train": ["0", "1", "2"], "test": ["0", "1", "2"]},
        kl_coef=0.1,
        max_new_tokens=8,
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="A task of your own")
    parser.add_argument("--samples", type=int, default=2000, help="episodes a prompt")
    samples = parser.parse_args().samples
    env_id = lmgym.register_task("modulo", build)
    check_task("modulo")
    optimum = lmgym.solve("modulo")
    print(f"{env_id}: J_ref = {optimum.reference:.6f}, V* = {optimum.value:.6f}, by {optimum.method}")
    envs: Any = gym.make_vec(env_id, split="test", device="cpu")
    policies: Any = {"pi_ref": envs.reference_policy(), "pi*": optimum.policy}
    for name, policy in policies.items():
        found = lmgym.evaluate(policy, envs, samples=samples, generator=torch.Generator().manual_seed(1))
        j = found.metrics["return"]
        print(f"{name}: J = {j.mean:.4f} [{j.low:.4f}, {j.high:.4f}]")
