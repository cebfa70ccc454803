"""What an observation is, and the space that it lies in.

Shapes: L columns of a prompt and its response.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from gymnasium import spaces

from lmgym.envs.engine import Engine


def observation_space(engine: Engine, obs_format: str) -> spaces.Space[Any]:
    """The space of one row's observations."""
    length = engine.width + engine.horizon
    largest = engine.lm.vocab_size - 1
    if obs_format == "flat":
        return spaces.Box(-1, largest, (length,), np.int64)
    return spaces.Dict(
        input_ids=spaces.Box(0, largest, (length,), np.int64), attention_mask=spaces.Box(0, 1, (length,), np.int8)
    )


def observe(engine: Engine, obs_format: str, rows: int | slice | npt.NDArray[np.int64]) -> Any:
    """A copy of the observations of some rows."""
    ids = engine.input_ids[rows]
    mask = engine.attention_mask[rows]
    if obs_format == "flat":
        return np.where(mask == 1, ids, -1)
    return {"input_ids": ids.copy(), "attention_mask": mask.copy()}
