"""Seeds of the parts of a build, all derived from the one of the command."""

from __future__ import annotations

import numpy as np


def derive_seeds(seed: int, part: str) -> tuple[int, int, int]:
    """Three independent seeds for a part of the build."""
    state = np.random.SeedSequence([seed, *part.encode()]).generate_state(3)
    return int(state[0]), int(state[1]), int(state[2])
