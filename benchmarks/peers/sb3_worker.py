"""A process that trains Stable-Baselines3's PPO on the plainest env: `python -m benchmarks.peers.sb3_worker SPEC`.

The env is what one writes first: one episode, a full forward of the reference a step for the KL, the reward model at
the end. The policy is the same network as ours, as a features extractor that reads the whole state for each action,
with SB3's heads on it; the policy head starts as the LM head.
"""

from __future__ import annotations

import sys
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.vec_env import DummyVecEnv
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from benchmarks.peers.worker import KL_COEF, LR, Meter, Spec, report, spec_of

ENVS = 16


def lengths_of(ids: Tensor) -> Tensor:
    """(B,) tokens of sequences (B, L) that begin in column 0, padded with -1."""
    return (ids >= 0).sum(-1)


class NaiveEnv(gym.Env[np.ndarray, np.integer]):
    """One episode of fixed length over the token ids so far, padded with -1 on the right."""

    def __init__(self, spec: Spec, reference: Any, reward: Any, prompts: list[list[int]], seed: int) -> None:
        self.reference = reference
        self.reward = reward
        self.prompts = prompts
        self.horizon = spec.horizon
        self.rng = np.random.default_rng(seed)
        vocabulary = reference.config.vocab_size
        width = max(map(len, prompts)) + spec.horizon
        self.observation_space = gym.spaces.Box(-1, vocabulary - 1, (width,), np.int64)
        self.action_space = gym.spaces.Discrete(vocabulary)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict[str, Any]]:
        self.tokens = list(self.prompts[self.rng.integers(len(self.prompts))])
        self.start = len(self.tokens)
        return self.observation(), {}

    def observation(self) -> np.ndarray:
        """(L,) int64."""
        padded = np.full(self.observation_space.shape, -1, np.int64)
        padded[: len(self.tokens)] = self.tokens
        return padded

    @torch.inference_mode()
    def step(self, action: np.integer) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        logits = self.reference(input_ids=torch.tensor([self.tokens])).logits[0, -1]
        reward = KL_COEF * logits.log_softmax(-1)[int(action)].item()
        self.tokens.append(int(action))
        ended = len(self.tokens) - self.start == self.horizon
        if ended:
            reward += self.reward(input_ids=torch.tensor([self.tokens])).logits.item()
        return self.observation(), reward, ended, False, {}


class Trunk(BaseFeaturesExtractor):
    """The hidden state of a causal LM at the last token."""

    def __init__(self, observation_space: gym.spaces.Box, model: Any) -> None:
        super().__init__(observation_space, model.config.hidden_size)
        self.model = model

    def forward(self, observations: Tensor) -> Tensor:
        """(B, D) of observations (B, L)."""
        ids = observations.long()
        longest = int(lengths_of(ids).max())
        hidden = self.model(input_ids=ids[:, :longest].clamp(min=0)).last_hidden_state
        return hidden[torch.arange(len(ids)), lengths_of(ids) - 1]


class Laps(BaseCallback):
    """Ends an iteration where the next rollout begins: after an update."""

    def __init__(self, meter: Meter, spec: Spec) -> None:
        super().__init__()
        self.meter = meter
        self.spec = spec
        self.rollouts = 0

    def lap(self) -> None:
        """An iteration is over."""
        sampled = self.spec.batch * self.spec.horizon
        self.meter.lap(sampled, sampled * self.spec.epochs)

    def _on_rollout_start(self) -> None:
        if self.rollouts:
            self.lap()
        self.rollouts += 1

    def _on_step(self) -> bool:
        return True

    def _on_training_end(self) -> None:
        self.lap()


def run(spec: Spec) -> dict[str, Any]:
    """Trains and measures."""
    tokenizer = AutoTokenizer.from_pretrained(spec.model)
    reference = AutoModelForCausalLM.from_pretrained(spec.model).eval()
    reward = AutoModelForSequenceClassification.from_pretrained(spec.reward).eval()
    trunk = AutoModelForCausalLM.from_pretrained(spec.model)
    prompts = tokenizer(spec.read_prompts())["input_ids"]
    makers = [lambda seed=seed: NaiveEnv(spec, reference, reward, prompts, seed) for seed in range(ENVS)]
    steps = spec.batch * spec.horizon
    agent = PPO(
        "MlpPolicy",
        DummyVecEnv(makers),
        learning_rate=LR,
        n_steps=steps // ENVS,
        batch_size=steps // spec.minibatches,
        n_epochs=spec.epochs,
        gamma=1.0,
        device="cpu",
        policy_kwargs={
            "features_extractor_class": Trunk,
            "features_extractor_kwargs": {"model": trunk.base_model},
            "net_arch": [],
            "normalize_images": False,
        },
    )
    head = trunk.get_output_embeddings().weight.detach()
    with torch.no_grad():  # so that it starts from the reference
        agent.policy.action_net.weight.copy_(head)
    meter = Meter(spec, list(trunk.base_model.parameters()))
    meter.start()
    agent.learn(steps * (spec.iterations + 1), Laps(meter, spec))
    return meter.result()


if __name__ == "__main__":
    report(run(spec_of(sys.argv[1])))
