"""How a finished run is shown on a terminal: a table, and responses before and after."""

from __future__ import annotations

import json
import math
import os
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

from lmgym.files import write_atomically

Interval = Mapping[str, float]
"""`{"mean": ..., "low": ..., "high": ...}`: an estimate and its 95 % interval."""

_ROWS = {
    "return": "return",
    "score": "score",
    "sampled_score": "sampled score",
    "gold_score": "gold_score",
    "kl": "kl (nats)",
    "length": "length (tokens)",
    "normalised": "normalised",
}
_OPTIONAL = ("sampled_score", "gold_score")  # of a noisy reward, and of a task that has a gold one
_COLUMN = 18
_WIDTH = 100
_WIDE = 0.02  # of the gain: bounds of V* that are farther apart make a share uncertain, and it is said

_ROUNDING = 1e-5  # of returns that are summed in another order than the optimum
_PASSED = (
    "This is above the upper bound of V*, by more than its interval. No policy can be: either this is the one grading "
    "of 40 whose interval is too high, which another seed tells, or the bound does not hold here, and then please "
    "report it."
)


def table(summary: Mapping[str, Any]) -> str:
    """The result of a run as plain text.

    Args:
        summary: The content of `summary.json`: `before` and `after` (each a mapping from `return`, `score`,
            `sampled_score`, `gold_score`, `kl`, `length`, `normalised` to an interval or None), `optimum` (`reference`,
            `lower` and `upper`, each an interval or None; `value`, the V* of `normalised`, or None; `unknown`, why
            there is no `lower`, or None; `best_response`, a number or None; `assumption`, a text or None),
            `train_seconds`, `forward_tokens`, `backward_tokens`, `total_timesteps`, `agent`, `task`, `seed`, and
            `replaced`, what was put in place of the task's model, reward and prompts, by name.

    Returns:
        A heading, one row a quantity as `mean ± longer arm` of its 95 % interval ("-" where there is none, `exact`
        where it is known without sampling), the optimum, what training cost, and one sentence that grades the result.
        The sentence says how well the gain is known, where the bounds of V* are more than 2 % of it apart. Where the
        return passes the upper bound, a last line says that too.
    """
    label = max(map(len, _ROWS.values()))
    lines = [_heading(summary), "", f"{'':{label}}{'before':>{_COLUMN}}{'after':>{_COLUMN}}"]
    for key, name in _ROWS.items():
        if key in _OPTIONAL and key not in summary["after"]:
            continue
        cells = "".join(f"{_cell(summary[when].get(key)):>{_COLUMN}}" for when in ("before", "after"))
        lines.append(f"{name:{label}}{cells}".rstrip())
    lines.append("")
    optimum = summary.get("optimum") or {}
    if is_known(optimum.get("reference")):
        lines.append(f"{'reference':{label}}   J_ref = {_point(optimum['reference'])}")
    for sign, bound in optimum_bounds(summary):
        lines.append(f"{'optimum':{label}}   V* {sign} {_point(bound)}")
    if is_known(optimum.get("lower")) and not is_known(optimum.get("upper")):
        lines.append(f"{'':{label}}   V* itself is not known: the samples bound it from below alone")
    if optimum.get("unknown"):
        lines.append(f"{'optimum':{label}}   V* is not known: {optimum['unknown']}")
    if optimum.get("assumption"):
        wrapped = textwrap.wrap(f"taken for granted: {optimum['assumption']}", _WIDTH - label - 3)
        lines += [f"{'':{label}}   {line}" for line in wrapped]
    best = optimum.get("best_response")
    if best is not None:
        lines.append(f"{'':{label}}   J <= {best:.2f} of a policy that is certain of every token")
    lines.append(f"{'train_seconds':{label}}   {summary['train_seconds']:.1f}")
    read = f"{summary['forward_tokens']:,} forward, {summary['backward_tokens']:,} backward"
    lines.append(f"{'tokens read':{label}}   {read}")
    sentence = _grade(summary)
    lines += ["", sentence] if sentence else []
    if passes_the_bound(summary):
        lines += textwrap.wrap(_PASSED, _WIDTH)
    return "\n".join(lines)


def passes_the_bound(summary: Mapping[str, Any]) -> bool:
    """Whether the whole interval of the return after training lies above the upper bound of V*.

    By chance that happens to one in 40 gradings of pi* itself. More often it means that the bound does not hold.
    """
    after = summary["after"].get("return")
    upper = (summary.get("optimum") or {}).get("upper")
    return is_known(after) and is_known(upper) and after["low"] > upper["high"] + _ROUNDING


def samples_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Responses before and after training, wrapped for a terminal of 100 columns.

    Args:
        rows: Mappings with `prompt`, `before`, `before_score`, `after`, `after_score`.
    """
    return "\n\n".join([f"{'score':>14}   response", *map(_sample, rows)])


def write_json(path: str | os.PathLike[str], obj: Any) -> None:
    """Writes indented JSON so that no reader ever sees half of it. Numbers that are not finite become null."""
    write_atomically(path, json.dumps(_finite(obj), indent=2, allow_nan=False) + "\n")


# --- the table ---------------------------------------------------------------------------------------------------


def _heading(summary: Mapping[str, Any]) -> str:
    steps = f"{summary['total_timesteps']:,}"
    return f"{summary['agent']} on {problem(summary)}, seed {summary['seed']}, {steps} tokens (mean ± 95 % interval)"


def problem(summary: Mapping[str, Any]) -> str:
    """The task by name, with the parts of it that the user has replaced: `reviews with model gpt2`."""
    replaced = summary.get("replaced") or {}
    parts = [f"{name} {'/'.join(str(value).split(os.sep)[-2:])}" for name, value in replaced.items()]
    return f"{summary['task']} with {', '.join(parts)}" if parts else str(summary["task"])


def two_decimals(number: float) -> str:
    """`0.50`, and never `-0.00`."""
    return f"{round(number, 2) + 0.0:.2f}"


def _cell(interval: Interval | None) -> str:
    if not is_known(interval):
        return f"{'-':7}"  # under the ± of the other cells
    mean = interval["mean"]
    half_width = max(interval["high"] - mean, mean - interval["low"])
    decimals = 3 if abs(mean) < 10 else 2 if abs(mean) < 100 else 1
    number = f"{round(mean, decimals) + 0.0:.{decimals}f}"  # no -0.000
    if half_width == 0:
        return f"{number} {'exact':7}"
    width = f"{half_width:.{decimals}f}"
    if float(width) == 0:
        width = f"{half_width:.0e}"  # small, and not nothing
    return f"{number} ± {width:5}"


def _point(interval: Interval) -> str:
    """`0.0243` of a number that is known, `0.02 [0.01, 0.03]` of an estimate."""
    mean, low, high = (interval[end] for end in ("mean", "low", "high"))
    return f"{mean:.4f}" if low == high else f"{mean:.2f} [{low:.2f}, {high:.2f}]"


def is_known(interval: Interval | None) -> TypeGuard[Interval]:
    # null stands in summary.json for a number that was not finite
    return interval is not None and interval["mean"] is not None and math.isfinite(interval["mean"])


def optimum_bounds(summary: Mapping[str, Any]) -> list[tuple[str, Interval]]:
    """The known bounds of V*, each with its sign; one "=" where the two coincide, as on tasks solved exactly."""
    optimum = summary.get("optimum") or {}
    lower = optimum.get("lower")
    upper = optimum.get("upper")
    if is_known(lower) and is_known(upper) and lower["mean"] == upper["mean"]:
        return [("=", lower)]
    return [(sign, bound) for sign, bound in ((">=", lower), ("<=", upper)) if is_known(bound)]


def _grade(summary: Mapping[str, Any]) -> str:
    """`J = 1.10 of V* >= 1.25: 0.88 of the gain`, or nothing where the optimum is unknown.

    Where the 1 of the share lies within the bounds it says so: `V* ~ 1.27`.
    """
    after = summary["after"].get("return")
    optimum = optimum_bounds(summary)
    if not is_known(after) or not optimum:
        return ""
    sign, bound = optimum[0]
    best = bound["mean"]
    value = summary["optimum"].get("value")
    if value is not None and value != best:
        sign = "~"
        best = value
    sentence = f"J = {after['mean']:.2f} of V* {sign} {best:.2f}"
    share = share_of_gain(summary)
    if share is None:
        return sentence
    width = _width(summary)
    known = f", and the gain is known to within {100 * width:.1f} %" if width > _WIDE else ""
    return f"{sentence}: {share:.2f} of the gain{_below(summary, share)}{known}"


def _below(summary: Mapping[str, Any], share: float) -> str:
    """What a share below 0 means, in words."""
    reference = reference_of(summary)
    if share >= 0 or not is_known(reference):
        return ""
    better = summary["after"]["return"]["high"] >= reference["low"]  # it may be, as far as one knows
    return ", no better than the reference" if better else ", worse than the reference"


def _width(summary: Mapping[str, Any]) -> float:
    """How far the bounds of V* are apart, as a share of the gain (`StoredOptimum.width`); 0 where one is not known."""
    optimum = summary.get("optimum") or {}
    upper = optimum.get("upper")
    gain = _gain(summary)
    if gain is None or not is_known(upper):
        return 0.0
    return (upper["mean"] - optimum["lower"]["mean"]) / gain


def share_of_gain(summary: Mapping[str, Any]) -> float | None:
    """(J - J_ref) / (V* - J_ref), as evaluated if the summary has it; an upper estimate where V* is a lower bound."""
    normalised = summary["after"].get("normalised")
    if is_known(normalised):
        return normalised["mean"]
    reference = reference_of(summary)
    after = summary["after"].get("return")
    gain = _gain(summary)
    if gain is None or not (is_known(reference) and is_known(after)):
        return None
    return (after["mean"] - reference["mean"]) / gain


def reference_of(summary: Mapping[str, Any]) -> Interval | None:
    """J_ref, or where it is not known the return that the run measured before training."""
    return (summary.get("optimum") or {}).get("reference") or summary["before"].get("return")


def _gain(summary: Mapping[str, Any]) -> float | None:
    """V* - J_ref, V* being the 1 of the share; None where one is not known, or no gain can be told from noise.

    A summary without that 1, of an earlier version, has the lower bound in its place.
    """
    optimum = summary.get("optimum") or {}
    reference = reference_of(summary)
    lower = optimum.get("lower")
    if not (is_known(reference) and is_known(lower)):
        return None
    value = optimum.get("value", lower["mean"])
    return value - reference["mean"] if value is not None and value > reference["mean"] else None


# --- responses ---------------------------------------------------------------------------------------------------


def _sample(row: Mapping[str, Any]) -> str:
    lines = [_wrapped("prompt", row["prompt"])]
    lines += [_wrapped(f"{when:6} {row[f'{when}_score']:+7.2f}", row[when]) for when in ("before", "after")]
    return "\n".join(lines)


def _wrapped(label: str, text: str) -> str:
    # A model may emit anything, terminal escapes included.
    printable = "".join(character if character.isprintable() else " " for character in text)
    indent = 17
    return textwrap.fill(
        " ".join(printable.split()) or "(empty)",
        width=_WIDTH,
        initial_indent=f"{label:{indent}}",
        subsequent_indent=" " * indent,
    )


def _finite(obj: Any) -> Any:
    if isinstance(obj, float):
        return obj if math.isfinite(obj) else None
    if isinstance(obj, Mapping):
        return {key: _finite(value) for key, value in obj.items()}
    if isinstance(obj, list | tuple):
        return [_finite(value) for value in obj]
    return obj
