"""The Markdown tables of what `benchmarks.gpu` measured."""

from __future__ import annotations

import math
from typing import Any

from benchmarks.gpu_models import PROMPT

Row = dict[str, Any]


def markdown(results: dict[str, Any]) -> str:
    """The tables of docs/performance.md."""
    about = results["machine"]
    lines = [
        f"`python -m benchmarks.gpu {results['command']}`: {about['device']}, torch {about['torch']}, transformers "
        f"{about['transformers']}, {about['date']}; random weights.",
        "",
    ]
    limits = results.get("limits", [{}])[0]
    bandwidth = limits.get("bytes_per_second", math.nan)
    rate = limits.get("flops_per_second", math.nan)
    lines += [
        f"A device copy moves {bandwidth / 1e12:.2f} TB/s, a bf16 matrix product makes {rate / 1e12:.0f} TFLOP/s.",
        "",
    ]
    lines += _decode_table(results.get("decode", []), bandwidth, rate)
    lines += _ppo_table(results.get("ppo", []), results.get("trl", []), rate)
    lines += _train_table(results.get("train", []))
    lines += _seeds_table(results.get("seeds", []))
    lines += _profile_tables(results.get("profile", []))
    for row in results.get("tests", []):
        lines += [f"Tests marked `gpu`: {row['tail'].strip().splitlines()[-1].strip('= ')}.", ""]
    for part, text in results.get("errors", {}).items():
        lines += [f"`{part}` failed:", "", "```text", text, "```", ""]
    return "\n".join(lines)


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    lines += [f"| {' | '.join(cells)} |" for cells in rows]
    return [*lines, ""]


def _decode_table(rows: list[Row], bandwidth: float, rate: float) -> list[str]:
    """Tokens/s by path, a row a model and batch; the limit of a step is its bytes or its FLOPs."""
    if not rows:
        return []
    cells = []
    for model, batch in dict.fromkeys((row["model"], row["batch"]) for row in rows):
        of_cell = {row["path"]: row for row in rows if (row["model"], row["batch"]) == (model, batch)}
        first = next(iter(of_cell.values()))
        limit = batch / max(first["bytes_a_step"] / bandwidth, first["flops_a_step"] / rate)
        speeds = {path: row.get("tokens_per_second", math.nan) for path, row in of_cell.items()}
        ours = speeds.get("collect", math.nan)
        line = [model, f"{batch}", f"{limit:,.0f}", _number(ours), _ratio(ours, limit)]
        for path in ("generate", "continuous"):
            theirs = speeds.get(path, math.nan)
            line += [_number(theirs), _ratio(ours, theirs)]
        cells.append(line)
    text = f"Decoding, bf16, prompts of {PROMPT} tokens and responses of {rows[0]['horizon']}, tokens/s:"
    head = ["model", "batch", "roofline", "`collect`", "share", "`generate`", "ratio", "continuous batching", "ratio"]
    failed = [
        f"- {row['model']}, {row['path']}, batch {row['batch']}: {row['error']}" for row in rows if "error" in row
    ]
    return [text, "", *_table(head, cells), *failed, *([""] if failed else [])]


def _number(x: float) -> str:
    return "" if math.isnan(x) else f"{x:,.0f}"


def _ratio(one: float, other: float) -> str:
    return "" if math.isnan(one / other) else f"{one / other:.2f}"


def _ppo_table(rows: list[Row], peers: list[Row], rate: float) -> list[str]:
    if not rows and not peers:
        return []
    sizes = next((row for row in rows if "batch" in row), {"batch": "?", "horizon": "?"})
    cells = []
    failed = []
    for row in rows:
        title = ", ".join([row["model"], *(f"{key}={value}" for key, value in row.get("config", {}).items())])
        if "error" in row:
            failed.append(f"- {title}, {row['dtype']}: {row['error']}")
            continue
        made = row["update_flops"] / row["update_seconds"]
        line = [title, row["dtype"], f"{row['seconds']:.2f}", f"{row['collect_seconds']:.2f}"]
        line += [f"{row['update_seconds']:.2f}", _number(row["tokens_per_second"]), f"{made / 1e12:.1f}"]
        grown = row.get("peak_bytes", math.nan) - row.get("bytes_before", math.nan)
        line += [f"{made / rate:.2f}", _gigabytes(row.get("peak_bytes", math.nan)), _gigabytes(grown)]
        cells.append([*line, _gigabytes(row.get("estimated_bytes", math.nan))])
    for row in peers:
        if "skipped" in row:
            failed.append(f"- {row['skipped']}.")
            continue
        line = [f"TRL's PPOTrainer, {row['model']}", row["dtype"], f"{row['seconds']:.2f}", "", ""]
        line += [_number(row["tokens_per_second"]), "", "", _gigabytes(row.get("peak_bytes", math.nan)), "", ""]
        cells.append(line)
    text = (
        f"A PPO iteration of {sizes['batch']} episodes of {PROMPT} + {sizes['horizon']} tokens, 4 epochs of 4 "
        "minibatches:"
    )
    head = ["model", "dtype", "iteration, s", "collect, s", "update, s", "sampled tokens/s", "update, TFLOP/s"]
    head += ["of the rate", "peak, GB", "of it training, GB", "estimated, GB"]
    return [text, "", *_table(head, cells), *failed, *([""] if failed else [])]


def _gigabytes(x: float) -> str:
    return "" if math.isnan(x) else f"{x / 1e9:.1f}"


def _train_table(rows: list[Row]) -> list[str]:
    if not rows:
        return []
    cells = []
    intervals = []
    for row in rows:
        if "error" in row:
            cells.append([row["device"], "failed", ""])
            continue
        share = row["normalised"] or {"mean": math.nan, "low": math.nan, "high": math.nan}
        intervals.append(share)
        interval = f"{share['mean']:.3f} [{share['low']:.3f}, {share['high']:.3f}]"
        cells.append([row["device"], interval, f"{row['train_seconds']:.1f}"])
    lines = ["The default training run:", "", *_table(["device", "normalised return", "training, s"], cells)]
    if len(intervals) == 2:
        overlap = max(x["low"] for x in intervals) <= min(x["high"] for x in intervals)
        lines += [f"The intervals {'overlap' if overlap else 'do not overlap'}.", ""]
    return lines


def _seeds_table(rows: list[Row]) -> list[str]:
    """How much more is trained a second where seeds train together than one after the other."""
    rows = [row for row in rows if "skipped" not in row]
    cells = []
    for row in rows:
        if "error" in row:
            cells.append([f"{row['seeds']}", "failed", "", "", ""])
            continue
        ratio = row["seeds"] * row["alone_seconds"] / row["together_seconds"]
        line = [f"{row['seeds']}", f"{row['together_seconds']:.1f}", f"{row['alone_seconds']:.1f}", f"{ratio:.1f}"]
        cells.append([*line, f"{row['together_return']:.3f}, {row['alone_return']:.3f}"])
    head = ["seeds", "together, s", "one alone, s", "throughput, times", "return of the first, together and alone"]
    text = f"Runs of `keyword-32` at once, {rows[0]['timesteps']:,} tokens each:" if rows else ""
    return [text, "", *_table(head, cells)] if rows else []


def _profile_tables(rows: list[Row]) -> list[str]:
    lines = []
    for part in dict.fromkeys(row["part"] for row in rows):
        of_part = [row for row in rows if row["part"] == part]
        seconds = of_part[0]["seconds"]
        busy = of_part[0]["kernel_seconds"]
        lines += [f"Kernels of one {part} ({seconds:.3f} s, kernels busy {busy:.3f} s):", ""]
        cells = [[f"`{row['kernel'].replace('|', '/')}`", f"{row['share']:.3f}", f"{row['calls']}"] for row in of_part]
        lines += _table(["kernel", "share of kernel time", "calls"], cells)
    return lines
