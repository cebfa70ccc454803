"""The base of all vector wrappers."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from gymnasium.vector import AutoresetMode, VectorWrapper


class TokenVectorWrapper(VectorWrapper):
    """A vector wrapper that also has the attribute `autoreset_mode`, as the vector env itself does."""

    @property
    def autoreset_mode(self) -> AutoresetMode:
        """When rows that ended begin again."""
        mode = self.metadata["autoreset_mode"]
        assert isinstance(mode, AutoresetMode)
        return mode

    def _rows(self, options: dict[str, Any] | None) -> npt.NDArray[np.bool_]:
        """(N,) the rows that a reset with these options begins."""
        mask = (options or {}).get("reset_mask")
        return np.ones(self.num_envs, dtype=np.bool_) if mask is None else mask
