"""Tianshou 2: PPO and discrete SAC on one-hot observations; SAC's temperature is `kl_coef`, so that it optimises J."""

import gymnasium as gym
import torch
from tianshou.algorithm import PPO, DiscreteSAC
from tianshou.algorithm.modelfree.discrete_sac import DiscreteSACPolicy
from tianshou.algorithm.modelfree.reinforce import DiscreteActorPolicy
from tianshou.algorithm.optim import AdamOptimizerFactory
from tianshou.data import Collector, VectorReplayBuffer
from tianshou.env import DummyVectorEnv
from tianshou.trainer import OffPolicyTrainerParams, OnPolicyTrainerParams
from tianshou.utils.net.common import Net
from tianshou.utils.net.discrete import DiscreteActor, DiscreteCritic

from lmgym.sb3 import evaluate

SETTINGS = {"task": "keyword-8", "obs_format": "onehot", "device": "cpu"}
ROWS = 16


def make() -> gym.Env:
    return gym.make("lmgym:lmgym/RLHF-v0", **SETTINGS)


def grade(name: str, logits_of: object) -> float:
    envs = gym.make_vec("lmgym/RLHF-v0", num_envs=64, autoreset_mode="SameStep", split="test", **SETTINGS)
    found = evaluate(logits_of, envs, samples=64)
    print(f"{name}: J {found.metrics['return'].mean:+.3f}, normalised {found.normalised.mean:.3f}")
    return found.normalised.mean


env = make()
size = env.observation_space.shape
actions = int(env.action_space.n)
torch.manual_seed(0)
adam = AdamOptimizerFactory(lr=1e-3)


def net() -> Net:
    return Net(state_shape=size, hidden_sizes=[128])


actor = DiscreteActor(preprocess_net=net(), action_shape=actions, softmax_output=False)
policy = DiscreteActorPolicy(
    actor=actor, dist_fn=lambda x: torch.distributions.Categorical(logits=x), action_space=env.action_space
)
ppo = PPO(policy=policy, critic=DiscreteCritic(preprocess_net=net()), optim=adam, gamma=env.unwrapped.gamma)
collector = Collector(ppo, DummyVectorEnv([make] * ROWS), VectorReplayBuffer(4096, ROWS))
ppo.run_training(
    OnPolicyTrainerParams(
        training_collector=collector, max_epochs=1, epoch_num_steps=4096, update_step_num_repetitions=2, batch_size=256,
        collection_step_num_env_steps=1024, test_collector=None,
    )
)  # fmt: skip
grade("PPO, the env's reward alone", lambda states: actor(states)[0])

actor = DiscreteActor(preprocess_net=net(), action_shape=actions, softmax_output=False)
critics = [DiscreteCritic(preprocess_net=net(), last_size=actions) for _ in range(2)]
sac = DiscreteSAC(
    policy=DiscreteSACPolicy(actor=actor, action_space=env.action_space), policy_optim=adam, critic=critics[0],
    critic_optim=adam, critic2=critics[1], critic2_optim=adam, tau=0.01, gamma=env.unwrapped.gamma,
    alpha=env.unwrapped.kl_coef,
)  # fmt: skip
collector = Collector(sac, DummyVectorEnv([make] * ROWS), VectorReplayBuffer(20_000, ROWS))
sac.run_training(
    OffPolicyTrainerParams(
        training_collector=collector, max_epochs=1, epoch_num_steps=20_000, collection_step_num_env_steps=16,
        update_step_num_gradient_steps_per_sample=1 / 16, batch_size=256, test_collector=None,
    )
)  # fmt: skip
assert grade("DiscreteSAC, alpha = kl_coef", lambda states: actor(states)[0]) > 0.8
