"""The policy's half of the KL, for on-policy algorithms of Stable-Baselines3.

Shapes: N rows.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from stable_baselines3.common.callbacks import BaseCallback


class PolicyKLCallback(BaseCallback):
    """Subtracts `kl_coef * log pi(a|s)` from the rewards of an on-policy algorithm, before the buffer stores them.

    The env's reward already holds the other half, `kl_coef * log pi_ref(a|s)`. An algorithm without log-probs (DQN)
    has a point mass on its action: log pi is 0, and there is nothing to subtract.

    Args:
        kl_coef: beta, in units of the score a nat; None is that of the env.
        dense: whether it is subtracted at every token, or at the last one for the whole episode; None is as in the env.

    Attributes:
        owed: (N,) log pi of the tokens of each running episode that has not been subtracted yet.
    """

    def __init__(self, kl_coef: float | None = None, dense: bool | None = None) -> None:
        super().__init__()
        self.kl_coef = kl_coef
        self.dense = dense
        self.restart()

    def restart(self) -> None:
        """Forgets the running episodes."""
        self.owed: npt.NDArray[np.float64] = np.zeros(0)

    def _init_callback(self) -> None:
        if self.kl_coef is None:
            self.kl_coef = float(self.training_env.get_attr("kl_coef")[0])
        if self.dense is None:
            self.dense = bool(self.training_env.get_attr("dense_kl")[0])

    def _on_step(self) -> bool:
        if "log_probs" in self.locals and self.kl_coef:
            log_probs = self.locals["log_probs"].cpu().numpy().astype(np.float64)
            dones = self.locals["dones"]
            if len(self.owed) != len(log_probs):
                self.owed = np.zeros(len(log_probs))
            self.owed += log_probs
            due = np.ones_like(dones) if self.dense else dones
            self.locals["rewards"] -= self.kl_coef * self.owed * due  # in place: the buffer stores this very array
            self.owed[due] = 0.0
        return True
