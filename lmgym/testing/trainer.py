"""Holds a trainer's loss, advantages and log-probs to what the mathematics says."""

from __future__ import annotations

import math
from collections.abc import Collection

from lmgym.errors import check_choice
from lmgym.testing.adapter import TrainerAdapter
from lmgym.testing.invariants import advantages, log_probs, losses, tokens
from lmgym.testing.invariants.base import Invariant
from lmgym.testing.report import Report, Result, TrainerError

INVARIANTS: dict[str, Invariant] = {
    invariant.name: invariant for room in (log_probs, tokens, losses, advantages) for invariant in room.INVARIANTS
}


def check_trainer(adapter: TrainerAdapter, *, raises: bool = True, only: Collection[str] | None = None) -> Report:
    """Puts a trainer's functions through invariants that hold for every trainer.

    Args:
        adapter: the trainer's functions. Where one is missing, its invariants are reported as not checked.
        raises: whether a failure raises; the report has it in either case.
        only: names of invariants; None is all of them.

    Returns:
        The report: print it for a table, `failures` has the names.

    Raises:
        TrainerError: with the report, where an invariant fails that `by_design` does not name.
        UnknownNameError: for a name in `only` or in `by_design` that no invariant has.
    """
    for name in [*(only or ()), *adapter.by_design]:
        check_choice("invariant", name, INVARIANTS)
    chosen = [one for name, one in INVARIANTS.items() if only is None or name in only]
    report = Report(adapter.name, tuple(_check(adapter, invariant) for invariant in chosen))
    if raises and report.failures:
        raise TrainerError(str(report))
    return report


def _check(adapter: TrainerAdapter, invariant: Invariant) -> Result:
    """One invariant."""
    missing = [name for name in invariant.needs if getattr(adapter, name) is None]
    if missing:
        return Result(invariant.name, invariant.statement, "not checked", f"needs `{missing[0]}`")
    try:
        gaps = list(invariant.measure(adapter))
    except NotImplementedError as error:
        return Result(invariant.name, invariant.statement, "not checked", str(error) or "not implemented")
    except Exception as error:  # a trainer that cannot compute it at all
        return Result(invariant.name, invariant.statement, "error", f"{type(error).__name__}: {error}")
    what, gap = max(gaps, key=lambda pair: math.inf if math.isnan(pair[1]) else pair[1])
    detail = f"{what}: {gap:.2g} (at most {invariant.tolerance:g}: {invariant.reason})"
    if gap <= invariant.tolerance:
        return Result(invariant.name, invariant.statement, "ok", detail)
    if invariant.name in adapter.by_design:
        return Result(
            invariant.name, invariant.statement, "by design", f"{adapter.by_design[invariant.name]}; {detail}"
        )
    return Result(invariant.name, invariant.statement, "FAILS", detail)
