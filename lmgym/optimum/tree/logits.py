"""The logits of any policy, as a tree asks for them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from lmgym.episodes import Episodes
from lmgym.models.causal import CausalLM
from lmgym.models.padding import pack
from lmgym.models.policy import Policy

EpisodeLogits = Callable[[Episodes], Tensor]
"""Gives (n, V) logits at every chosen token of episodes, row by row of their mask."""


def make_episode_logits(model: CausalLM | Policy) -> EpisodeLogits:
    """A function that gives the logits of a model at every chosen token of episodes, as `Tree.evaluate` calls it.

    It runs one teacher-forced, differentiable forward of a `CausalLM`, and steps any other `Policy` along.
    """
    return partial(_read_logits, model) if isinstance(model, CausalLM) else partial(_step_logits, model)


def _read_logits(lm: CausalLM, episodes: Episodes) -> Tensor:
    packed = pack(episodes.prompt_ids, episodes.prompt_mask, episodes.response_ids, episodes.response_mask)
    ids, rows, columns, _ = (x.to(lm.device) for x in packed)
    return lm.response_hidden(ids, rows, columns)[1]


def _step_logits(policy: Policy, episodes: Episodes) -> Tensor:
    episodes = episodes.to(policy.device)
    horizon = episodes.response_ids.shape[1]
    state = policy.begin(episodes.prompt_ids, episodes.prompt_mask, horizon)
    logits = [state.logits]
    for t in range(horizon - 1):
        state.step(episodes.response_ids[:, t])
        logits.append(state.logits)
    return torch.stack(logits, dim=1)[episodes.response_mask]
