"""What is measured and checked of collected episodes: are they of the policy, and are groups of them of one prompt?

Shapes: B episodes, T response columns.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from agents.policies.actor_critic import TrainablePolicy, read_logits
from lmgym.episodes import Episodes
from lmgym.errors import InvalidArgumentError
from lmgym.models import categorical
from lmgym.models.causal import CausalLM
from lmgym.models.sampling import Sampler


@torch.no_grad()
def exact_kl(policy: TrainablePolicy, sampler: Sampler, reference: CausalLM, episodes: Episodes) -> float:
    """Nats an episode: KL(pi || pi_ref) over the whole vocabulary, summed over the states that the episodes visit."""
    positions = episodes.response_mask.nonzero()[:, 1]
    logits = sampler.adjust_rows(policy.read(episodes).logits, positions)
    return categorical.exact_kl(logits, read_logits(reference, episodes)).sum().item() / len(episodes)


def eos_fraction(episodes: Episodes, is_eos: npt.NDArray[np.bool_]) -> float:
    """Share of the episodes that end with an EOS token; `is_eos` (V,) says which tokens are."""
    last = episodes.response_ids.gather(1, (episodes.lengths - 1).unsqueeze(1)).squeeze(1).cpu()
    return torch.from_numpy(is_eos)[last].float().mean().item()


def log_prob_gap(episodes: Episodes, others: Tensor) -> float:
    """Nats a token between the log-probs of episodes and others (B, T) of the same tokens: mean absolute difference."""
    gaps = (episodes.log_probs - others) * episodes.response_mask
    return gaps.abs().sum().item() / episodes.num_tokens


def round_off(dtype: torch.dtype) -> float:
    """Nats a token by which two computations of one log-prob in a type may differ on average."""
    return 1e-3 if dtype == torch.float32 else 0.1


def check_start(episodes: Episodes, start_log_probs: Tensor, dtype: torch.dtype) -> None:
    """Checks that the policy starts as the reference.

    Args:
        episodes: the first batch. start_log_probs: (B, T) log-probs of its tokens under the reference.
        dtype: the coarsest type that the policy computes in.

    Raises:
        RuntimeError: where the log-prob of a response is not the same under both.
    """
    gaps = (episodes.log_probs - start_log_probs) * episodes.response_mask
    gap = gaps.sum(-1).abs().sum().item() / episodes.num_tokens
    if not gap < round_off(dtype):
        raise RuntimeError(
            f"The first batch must have KL 0, and its log-probs differ from the reference's by {gap:.2g} nats "
            "a token: the policy does not start as the reference."
        )


def check_ratio(gap: float, dtype: torch.dtype) -> None:
    """Checks that the ratio is 1 before anything has changed: new log-probs equal those of the sampling.

    Args:
        gap: mean absolute difference of the two, nats a token. dtype: the coarsest type that the policy computes in.

    Raises:
        RuntimeError: where they differ by more than rounding.
    """
    if not gap < round_off(dtype):
        raise RuntimeError(
            "A batch's first update must have ratio 1, and log-probs recomputed differ from those that sampled by "
            f"{gap:.2g} nats a token: the update is not of the distribution that sampled."
        )


def check_groups(episodes: Episodes, group_size: int) -> None:
    """Raises `InvalidArgumentError` unless each `group_size` neighbours of B episodes are responses to one prompt."""
    same = share_prompts(episodes, group_size)
    if not same.all():
        raise InvalidArgumentError(
            f"`envs` must give the {group_size} rows of a group the same prompts in the same order, and in "
            f"{int((~same).sum())} of {len(same)} groups they differ: rows that end one by one in `envs.step` draw "
            "their next prompts apart. Bring them back together by envs.reset(seed=...), or step another env."
        )


def share_prompts(episodes: Episodes, group_size: int) -> Tensor:
    """(B / group_size,) bool: whether neighbours, in groups of `group_size`, are responses to one prompt."""
    prompts = torch.cat([episodes.prompt_ids, episodes.prompt_mask.long()], dim=1).unflatten(0, (-1, group_size))
    return (prompts == prompts[:, :1]).flatten(1).all(1)
