"""Can the agent learn from a noisy scorer? The task is `anchor-0.1`, and its score has Gaussian noise.

The noise is independent at every call, so the optimum is that of the score without it. This score is reported as the
gold score, and policies are graded by it. Under the reference it has a standard deviation of about 0.2. The knob is the
standard deviation of the noise.
"""

from __future__ import annotations

import functools
from dataclasses import replace

from lmgym.rewards.noise import NoisyReward
from lmgym.tasks import Task, register_task
from lmgym.tasks.anchor import anchor, scaled_sum

SIGMAS = (0.3, 1.0, 3.0)


def noise(sigma: float) -> Task:
    """The task at one standard deviation of the noise."""
    return replace(anchor(0.1), name=f"noise-{sigma:g}", reward=NoisyReward(scaled_sum(), sigma), gold=scaled_sum())


for _sigma in SIGMAS:
    register_task(f"noise-{_sigma:g}", functools.partial(noise, _sigma))
