"""The contents of `info`: the same keys at `reset` and at every step, which logs and replay buffers rely on.

Shapes: N rows.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from lmgym.envs.engine import Engine
from lmgym.envs.outcomes import Transition

Bools = npt.NDArray[np.bool_]
Columns = dict[str, npt.NDArray[Any]]


def info_columns(engine: Engine, text_info: bool, step: Transition | None = None, rows: Bools | None = None) -> Columns:
    """A column of values for each key of `info`.

    Args:
        engine: the rows, after the step.
        text_info: whether to add texts to the numbers.
        step: what the last step gave; None at a reset.
        rows: (N,) bool, rows that report their last step, None for all; the others report that they have just begun.

    Returns:
        (N,) float64 for numbers, 0.0 where there is no value yet, and (N,) object for texts, "" there.
    """
    columns = _at_reset(engine, text_info)
    if step is None:
        return columns
    reporting = np.ones(engine.num_rows, dtype=np.bool_) if rows is None else rows
    if step.ref_log_probs is not None:
        columns["ref_log_prob"] = np.where(reporting, step.ref_log_probs, 0.0)
    if step.outcomes is not None:
        chosen = reporting[step.ended]
        for name, values in step.outcomes.columns().items():
            if name in columns:
                column = np.array(values, dtype=columns[name].dtype)
                columns[name][step.ended[chosen]] = column[chosen]
    return columns


def _at_reset(engine: Engine, text_info: bool) -> Columns:
    numbers = ["score", "discounted_return"]
    if engine.task.kl_coef > 0:
        numbers.append("ref_log_prob")
    if engine.task.gold is not None:
        numbers.append("gold_score")
    columns: Columns = {name: np.zeros(engine.num_rows) for name in numbers}
    if text_info:
        columns["prompt"] = engine.prompt_texts.copy()
        columns["response"] = np.full(engine.num_rows, "", dtype=object)
        columns["finish_reason"] = np.full(engine.num_rows, "", dtype=object)
    return columns


def row_info(columns: Columns) -> dict[str, Any]:
    """The info of row 0: numbers as `np.float64`, texts as `str`."""
    return {name: column[0] for name, column in columns.items()}


def vector_infos(columns: Columns, rows: Bools) -> dict[str, Any]:
    """Infos of some rows (N,) as Gymnasium's vector envs shape them: arrays, 0 or None elsewhere, each with a mask."""
    infos: dict[str, Any] = {}
    others = np.flatnonzero(~rows)
    for name, column in columns.items():
        infos[name] = column.copy()
        if len(others):
            infos[name][others] = None if column.dtype == object else 0
        infos[f"_{name}"] = rows.copy()
    return infos


def add_columns(infos: dict[str, Any], columns: Columns, rows: Bools, at_end: Columns) -> dict[str, Any]:
    """The infos of a vector env with more columns.

    Args:
        infos: of the env, left as they are.
        columns: of the states that are returned. rows: (N,) bool, those that the columns are given for.
        at_end: columns of the final states, for `infos["final_info"]`.
    """
    infos = infos | vector_infos(columns, rows)
    if "final_info" in infos:
        infos["final_info"] = infos["final_info"] | vector_infos(at_end, infos["_final_info"])
    return infos
