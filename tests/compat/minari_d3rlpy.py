"""Minari: records a data set, infos included; d3rlpy: learns from it offline."""

import os
import tempfile

os.environ["MINARI_DATASETS_PATH"] = tempfile.mkdtemp()

import d3rlpy
import gymnasium as gym
import minari
import numpy as np

env = gym.make("lmgym:lmgym/RLHF-v0", task="keyword-8", obs_format="onehot", text_info=False, device="cpu")
collector = minari.DataCollector(env, record_infos=True)
rng = np.random.default_rng(0)
for episode in range(40):
    collector.reset(seed=episode)
    ended = False
    while not ended:
        distribution = np.exp(env.unwrapped.reference_log_probs()).astype(np.float64)
        _, _, terminated, truncated, _ = collector.step(
            int(rng.choice(len(distribution), p=distribution / distribution.sum()))
        )
        ended = terminated or truncated
dataset = collector.create_dataset("lmgym/keyword-v0", algorithm_name="reference", description="the reference")
assert dataset.total_episodes == 40
episode = next(iter(dataset))
assert episode.infos["score"].shape == (len(episode.rewards) + 1,), episode.infos
fields = [np.concatenate([getattr(e, name)[: len(e.rewards)] for e in dataset]) for name in ("observations", "actions")]
rewards = np.concatenate([e.rewards for e in dataset]).astype(np.float32)
terminals = np.concatenate([e.terminations for e in dataset]).astype(np.float32)
data = d3rlpy.dataset.MDPDataset(
    fields[0], fields[1][:, None], rewards[:, None], terminals, action_space=d3rlpy.ActionSpace.DISCRETE,
    action_size=int(env.action_space.n),
)  # fmt: skip
agent = d3rlpy.algos.DiscreteCQLConfig(gamma=1.0, batch_size=32).create(device=False)
agent.fit(
    data, n_steps=100, n_steps_per_epoch=100, show_progress=False, logger_adapter=d3rlpy.logging.NoopAdapterFactory()
)
action = agent.predict(env.reset(seed=0)[0][None])
print("episodes", dataset.total_episodes, "action", action)
