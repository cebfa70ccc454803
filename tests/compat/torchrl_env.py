"""TorchRL: `GymEnv` with its info reader and `check_env_specs`, then a rollout."""

from torchrl.envs import GymEnv, check_env_specs

import lmgym  # noqa: F401 - registers the environments

for kwargs in ({}, {"obs_format": "onehot"}, {"obs_format": "embedding", "top_k": 16, "task": "reviews"}):
    settings = {"task": "keyword-8", "device": "cpu", "text_info": False, **kwargs}
    env = GymEnv("lmgym/RLHF-v0", **settings)
    check_env_specs(env)
    env = GymEnv("lmgym/RLHF-v0", **settings).auto_register_info_dict()
    check_env_specs(env)
    steps = env.rollout(20, break_when_any_done=False)
    assert {"score", "ref_log_prob"} <= set(steps["next"].keys()), steps
    print("steps", steps.shape, sorted(steps["next"].keys()))
