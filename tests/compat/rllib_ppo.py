"""RLlib: one iteration of PPO by the id and `env_config`."""

import gymnasium as gym
from ray.rllib.algorithms.ppo import PPOConfig
from ray.tune.registry import register_env

register_env(
    "lmgym",
    lambda config: gym.make("lmgym:lmgym/RLHF-v0", obs_format="onehot", text_info=False, device="cpu", **config),
)
config = (
    PPOConfig()
    .environment("lmgym", env_config={"task": "keyword-8"})
    .env_runners(num_env_runners=0, num_envs_per_env_runner=4, rollout_fragment_length=64)
    .training(train_batch_size_per_learner=256, minibatch_size=64, num_epochs=1, gamma=1.0)
    .learners(num_learners=0)
)
result = config.build_algo().train()
print("mean return", result["env_runners"]["episode_return_mean"])
assert result["num_env_steps_sampled_lifetime"] >= 256
