"""Ids for programs that take an id and nothing else: `--env-id ids:keyword-onehot-v0`, with this folder on the path."""

import gymnasium as gym

import lmgym  # noqa: F401 - registers the environments

gym.register(
    "keyword-onehot-v0",
    entry_point="lmgym.wrappers.inside:make_token_env",
    kwargs={"task": "keyword-8", "obs_format": "onehot", "text_info": False, "device": "cpu"},
)
