"""The mask of MaskablePPO: which tokens may be chosen, in the env and in the policy that is graded.

Shapes: B rows, P prompt columns, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from agents.policies.actor_critic import MaskedState
from agents.sb3.config import SB3Config
from lmgym.envs.engine import Engine
from lmgym.errors import InvalidArgumentError
from lmgym.models.policy import CausalPolicy, Policy
from lmgym.models.sampling import Sampler
from lmgym.wrappers import VectorActionMask
from lmgym.wrappers.action_mask import find_support


def mask_envs(envs: Any, config: SB3Config) -> tuple[Any, Sampler | None]:
    """The env with the mask that MaskablePPO asks for.

    Returns:
        The env, and the sampler whose support under the reference is the mask; None where there is no mask.

    Raises:
        InvalidArgumentError: for a mask by another wrapper than VectorActionMask, and for two masks.
    """
    if config.algorithm != "MaskablePPO":
        return envs, None
    layer = envs
    while layer is not None and not hasattr(layer, "action_masks"):
        layer = getattr(layer, "env", None)
    if layer is not None and not isinstance(layer, VectorActionMask):
        raise InvalidArgumentError(
            f"`envs` must be masked by VectorActionMask, whose mask the policy knows wherever it acts, got "
            f"{type(layer).__name__}: give that to MaskablePPO by VecEnvBridge."
        )
    if config.mask_top_k is not None or config.mask_top_p is not None:
        if layer is not None:
            raise InvalidArgumentError("`envs` must have no mask where mask_top_k or mask_top_p is given, and has one.")
        layer = VectorActionMask(envs, top_k=config.mask_top_k, top_p=config.mask_top_p)
        envs = layer
    return envs, None if layer is None else layer.sampler


class MaskedPolicy:
    """What MaskablePPO does under a `VectorActionMask`: the policy's distribution over the tokens that the mask allows.

    Args:
        policy: the network.
        engine: of the env; its reference decides the mask.
        sampler: the sampler of the mask.
    """

    def __init__(self, policy: Policy, engine: Engine, sampler: Sampler) -> None:
        self._policy = policy
        self._reference = CausalPolicy(engine.lm)
        self._is_eos = torch.as_tensor(engine.is_eos, device=engine.lm.device)
        self._sampler = sampler

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self._policy.device

    def begin(self, prompt_ids: Tensor, prompt_mask: Tensor, max_new_tokens: int) -> MaskedState:
        """Reads prompts (B, P), left-padded."""
        state = self._policy.begin(prompt_ids, prompt_mask, max_new_tokens)
        reference = self._reference.begin(prompt_ids, prompt_mask, max_new_tokens)
        return MaskedState(state, reference, self._mask)

    def _mask(self, logits: Tensor, reference: Tensor) -> Tensor:
        """(B, V) logits of the policy, -inf where the mask of the reference's logits (B, V) forbids the token."""
        return logits.masked_fill(~find_support(reference, self._sampler, self._is_eos), -torch.inf)
