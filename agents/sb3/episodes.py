"""The running episodes of an algorithm of Stable-Baselines3, saved and restored: a rollout ends in the midst of them.

Shapes: N rows, T tokens.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from lmgym.envs.single import EnvState, restore_row, row_state
from lmgym.envs.spaces import observe
from lmgym.envs.vector import RLHFVectorEnv


def describe_episodes(envs: RLHFVectorEnv) -> list[dict[str, Any]] | None:
    """The running episode of each row, as JSON values.

    Returns:
        N rows; None before the first reset, or where a prompt belongs to no split.
    """
    states = [row_state(envs.engine, row, None) for row in range(envs.num_envs)]
    rows = []
    for state in states:
        if state is None or state.prompt.index < 0 or not state.running:
            return None
        log_probs = state.ref_log_probs[: len(state.response_ids)].tolist()
        rows.append(
            {
                "prompt": state.prompt.index,
                "response": list(state.response_ids),
                "ref_log_probs": [None if np.isnan(x) else x for x in log_probs],
                "returns": list(state.returns),
                "start": state.start,
            }
        )
    return rows


def restore_episodes(envs: RLHFVectorEnv, rows: list[dict[str, Any]]) -> tuple[Any, Any]:
    """Continues the episodes that `describe_episodes` described.

    Returns:
        The observation, and (N,) bool: which rows are at the start of an episode.
    """
    envs.reset()  # makes the env ready; the caller sets its streams of prompts afterwards
    engine = envs.engine
    for row, saved in enumerate(rows):
        ref_log_probs = np.full(engine.horizon, np.nan)
        ref_log_probs[: len(saved["response"])] = [np.nan if x is None else x for x in saved["ref_log_probs"]]
        restore_row(
            engine,
            row,
            EnvState(
                prompt=engine.prompts[saved["prompt"]],
                response_ids=tuple(saved["response"]),
                ref_log_probs=ref_log_probs,
                returns=(saved["returns"][0], saved["returns"][1]),
                start=saved["start"],
                running=True,
                outcomes=None,
            ),
        )
    starts = np.array([not saved["response"] for saved in rows])
    return observe(engine, envs.settings.obs_format, slice(None)), starts


def lstm_states(model: Any) -> dict[str, Tensor]:
    """The states of an LSTM in the running episodes, as named tensors; empty where there is no LSTM."""
    states = getattr(model, "_last_lstm_states", None)
    if states is None:
        return {}
    return {f"{name}.{i}": x.contiguous() for name in states._fields for i, x in enumerate(getattr(states, name))}


def restore_lstm_states(model: Any, tensors: dict[str, Tensor]) -> None:
    """Gives an LSTM the states that `lstm_states` returned."""
    states = model._last_lstm_states
    restored = {}
    for name in states._fields:
        count = len(getattr(states, name))
        restored[name] = tuple(torch.clone(tensors[f"{name}.{i}"]) for i in range(count))
    model._last_lstm_states = type(states)(**restored)
