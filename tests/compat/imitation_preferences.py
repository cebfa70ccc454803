"""imitation: preference comparisons with synthetic feedback."""

import numpy as np
from imitation.algorithms import preference_comparisons
from imitation.policies.base import FeedForward32Policy
from imitation.rewards.reward_nets import BasicRewardNet
from imitation.util.util import make_vec_env
from stable_baselines3 import PPO

import lmgym  # noqa: F401 - registers the environments

rng = np.random.default_rng(0)
settings = {
    "task": "keyword-8",
    "obs_format": "onehot",
    "text_info": False,
    "device": "cpu",
    "truncate": True,
    "min_new_tokens": 7,
}
venv = make_vec_env("lmgym/RLHF-v0", rng=rng, n_envs=2, env_make_kwargs=settings)
reward_net = BasicRewardNet(venv.observation_space, venv.action_space)
agent = PPO(FeedForward32Policy, venv, n_steps=64, batch_size=32, n_epochs=1, gamma=1.0, device="cpu")
generator = preference_comparisons.AgentTrainer(agent, reward_net, venv, rng=rng, exploration_frac=0.05)
comparisons = preference_comparisons.PreferenceComparisons(
    generator,
    reward_net,
    num_iterations=2,
    fragmenter=preference_comparisons.RandomFragmenter(warning_threshold=0, rng=rng),
    preference_gatherer=preference_comparisons.SyntheticGatherer(rng=rng),
    reward_trainer=preference_comparisons.BasicRewardTrainer(
        preference_model=preference_comparisons.PreferenceModel(reward_net),
        loss=preference_comparisons.CrossEntropyRewardLoss(), epochs=1, rng=rng,
    ),
    fragment_length=4,
    transition_oversampling=1,
    initial_comparison_frac=0.2,
)  # fmt: skip
result = comparisons.train(total_timesteps=256, total_comparisons=32)
print("reward accuracy", result["reward_accuracy"])
