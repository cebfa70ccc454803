"""The random streams of a run, each derived from the run's seed and from what the stream is for.

A run needs several streams: prompts, sampled tokens, initial weights, and so on. `numpy.random.SeedSequence` derives
them. Two streams of one run are independent, and so are the streams of runs with neighbouring seeds.
"""

from __future__ import annotations

import numpy as np
import torch

# What a stream is for, as the spawn key of a SeedSequence. A new stream gets a new number; none is used twice.
ROWS = 0  # prompts of the env's rows, and what is random in the reward
ACTIONS = 1  # tokens that the agent samples, and the order of its minibatches
WEIGHTS = 2  # initial weights of a residual or an adapter
CANDIDATES = 3  # candidates of a deterministic best-of-n
SB3 = 4  # the process's generators of Python and torch, lent to Stable-Baselines3
SB3_NUMPY = 5  # the process's generator of numpy, lent to Stable-Baselines3
COMPLETIONS = 6  # tokens sampled to be judged
REFERENCE_SAMPLES = 7  # tokens sampled to centre a reward model
LABELS = 8  # prompts and completions to be labelled, of each round
JUDGES = 9  # simulated annotators of each round
REWARD_NOISE = 10  # noise on the scores, put there on purpose
DATASETS = 11  # tokens of a data set, of each of its policies
RANDOM_CRITIC = 12  # what a critic says that knows nothing
EVALUATION = 20_000_003  # tokens sampled to grade a policy


def stream_seed(seed: int, *key: int) -> int:
    """The seed of one stream of a run, below 2^32: as much as torch's CPU generator takes.

    Args:
        seed: of the run, >= 0.
        key: what the stream is for, one of the constants above; and a number after it where there are several of them.
    """
    return int(np.random.SeedSequence(seed, spawn_key=key).generate_state(1)[0])


def row_seeds(seed: int, num_rows: int) -> list[int]:
    """Seeds of the env's rows, below 2^64.

    `envs.reset(seed=seed)` gives row i the seed + i, so that runs of neighbouring seeds share most of their prompts.

    Args:
        seed: of the run, >= 0.
        num_rows: how many.
    """
    return np.random.SeedSequence(seed, spawn_key=(ROWS,)).generate_state(num_rows, np.uint64).tolist()


def torch_generator(seed: int, *key: int) -> torch.Generator:
    """A CPU generator at the start of one stream of a run; arguments as for `stream_seed`."""
    return torch.Generator().manual_seed(stream_seed(seed, *key))
