"""What `info` tells: the same keys at `reset` and at every step, as other libraries' logs and replay buffers want it.

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
    """What there is to tell of every row, by the keys of `info`.

    Args:
        engine: the rows as they stand.
        text_info: whether texts are told, beside the numbers.
        step: what the last step gave; None at a reset.
        rows: (N,) the rows whose last step is told, None for all. The others are told as they begin.

    Returns:
        (N,) float64 numbers, 0.0 where there is nothing to tell yet, and (N,) objects, which are strings, "" there.
    """
    columns = _at_reset(engine, text_info)
    if step is None:
        return columns
    told = np.ones(engine.num_rows, dtype=np.bool_) if rows is None else rows
    if step.ref_log_probs is not None:
        columns["ref_log_prob"] = np.where(told, step.ref_log_probs, 0.0)
    if step.outcomes is not None:
        chosen = told[step.ended]
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
        columns: of the states returned, told of rows (N,).
        at_end: of the states that `infos["final_info"]` tells of.
    """
    infos = infos | vector_infos(columns, rows)
    if "final_info" in infos:
        infos["final_info"] = infos["final_info"] | vector_infos(at_end, infos["_final_info"])
    return infos
