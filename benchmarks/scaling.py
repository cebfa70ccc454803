"""What an iteration of PPO costs by the model in `benchmarks.scaling_model`: `python -m benchmarks.scaling`.

The first table holds the model against what was measured, the second is what it predicts. Rates and bandwidths are
those of the measurements; of links, which were not measured, those of data sheets.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from benchmarks.gpu_models import SHAPES, Shape
from benchmarks.pages import fill
from benchmarks.scaling_model import (
    Machine,
    Run,
    count_adapter,
    on,
    predict_peak,
    predict_seconds,
    step_seconds,
)

LLAMA_70B = Shape("llama", 80, 8192, 64, 128_256, kv_heads=8, inner=28_672)
SMALL = Shape("gpt2", 4, 256, 4, 2_048)
GPT2_124M = SHAPES["GPT-2 124M"]
GPT2_1_5B = SHAPES["GPT-2 1.5B"]
LLAMA_8B = SHAPES["Llama 8B"]

# `decoding` is the median share of the roofline in docs/performance.md, `updating` and `step_seconds` what makes the
# updates of GPT-2 124M and 1.5B there come out. A device sends half of NVLink's 900 GB/s.
H100 = Machine(1, 701e12, 2.99e12, 80e9, 450e9, decoding=0.52, updating=0.33, step_seconds=0.009)
NETWORK = 50e9  # bytes/s of a device to other machines: 400 Gbit/s
# A core of the machine that docs/performance.md was measured on. `updating` makes one process come out.
CORE = Machine(1, 95e9, 1e10, 16e9, 1e9, decoding=0.5, updating=0.72, step_seconds=0.0)

PPO = Run(64, 16, 64)
CPU_RUN = Run(64, 16, 32, epochs=2, element=4)
DECODED = (
    ("GPT-2 1.5B", 64, 17_510),
    ("GPT-2 1.5B", 256, 40_028),
    ("GPT-2 1.5B", 512, 49_334),
    ("Llama 8B", 64, 8_319),
    ("Llama 8B", 256, 22_913),
    ("Llama 8B", 512, 27_534),
)  # tokens/s of `collect`, responses of 128 tokens: docs/performance.md, 2026-11-27

TASK = Run(512, 512, 512, recomputes=True, micro_batch=4)  # responses of a chat model


def check_rows() -> Iterator[tuple[str, float, float, str]]:
    """What was measured, by name: the number, what the model says, and its format."""
    fitted = {"GPT-2 124M": (0.24, GPT2_124M), "GPT-2 1.5B": (1.30, GPT2_1_5B)}
    for name, (measured, shape) in fitted.items():
        yield f"H100, update of {name}, s (fitted)", measured, predict_seconds(shape, H100, PPO)["update"], ".2f"
    again = replace(PPO, recomputes=True)
    yield "H100, the same with layers run again, s", 1.44, predict_seconds(GPT2_1_5B, H100, again)["update"], ".2f"
    seconds = predict_seconds(GPT2_1_5B, H100, PPO)
    yield "H100, collect of GPT-2 1.5B, s", 0.27, seconds["decode"] + seconds["score"], ".2f"
    for name, batch, measured in DECODED:
        run = Run(batch, 16, 128)
        yield (
            f"H100, {name} decodes {batch} rows, tokens/s",
            measured,
            batch / step_seconds(SHAPES[name], H100, run),
            ",.0f",
        )
    for name, measured, shape in (("GPT-2 124M", 4.3, GPT2_124M), ("GPT-2 1.5B", 40.7, GPT2_1_5B)):
        yield f"H100, peak of PPO with {name}, GB", measured, predict_peak(shape, H100, PPO) / 1e9, ".1f"
    for n, measured in ((1, 2.92), (2, 2.00)):
        name = "1 process (fitted)" if n == 1 else "each of 2 processes"
        predicted = sum(predict_seconds(SMALL, on(CORE, n), CPU_RUN).values())
        yield f"CPU, 4 x 256, {name}, CPU s a batch", measured, predicted, ".2f"


def check_table() -> Iterator[str]:
    """The lines of the first table."""
    yield "| | measured | predicted | ratio |"
    yield "|---" * 4 + "|"
    for name, measured, predicted, form in check_rows():
        yield f"| {name} | {measured:{form}} | {predicted:{form}} | {predicted / measured:.2f} |"


def cases() -> Iterator[tuple[str, Shape, Machine, Run]]:
    """What is predicted, by name."""
    eight = count_adapter(LLAMA_8B, 16)
    seventy = count_adapter(LLAMA_70B, 16)
    many = replace(on(H100, 64), link=NETWORK)
    yield "1.5B, 1 GPU", GPT2_1_5B, H100, replace(TASK, batch=64)
    yield "8B LoRA, 1 GPU", LLAMA_8B, H100, replace(TASK, batch=64, adapter=eight)
    yield "8B LoRA, 8 GPUs", LLAMA_8B, on(H100, 8), replace(TASK, adapter=eight)
    yield "8B, 8 GPUs", LLAMA_8B, on(H100, 8), TASK
    yield "8B, 8 GPUs, sharded", LLAMA_8B, on(H100, 8), replace(TASK, is_sharded=True)
    yield "70B LoRA, 64 GPUs", LLAMA_70B, many, replace(TASK, batch=1024, adapter=seventy)
    yield "70B, 64 GPUs, sharded", LLAMA_70B, many, replace(TASK, batch=1024, is_sharded=True)


def prediction_table() -> Iterator[str]:
    """The lines of the second table."""
    yield "| | memory, GB | fits | decode, s | score, s | update, s | links, s | iteration, s | sampled tokens/s |"
    yield "|---" * 9 + "|"
    for name, shape, machine, run in cases():
        needed = predict_peak(shape, machine, run)
        fits = "yes" if needed <= machine.memory else "no"
        seconds = predict_seconds(shape, machine, run)
        total = sum(seconds.values())
        shown = " | ".join(f"{x:,.1f}" for x in (*seconds.values(), total))
        rate = run.batch * run.response / total
        yield f"| {name} | {needed / 1e9:,.0f} | {fits} | {shown} | {rate:,.0f} |"


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, help="a page with the markers of the tables")
    args = parser.parse_args()
    for name, lines in {"scaling-check": check_table(), "scaling-predictions": prediction_table()}.items():
        printed = list(lines)
        print("\n".join(printed), end="\n\n")
        if args.write:
            fill(args.write, name, printed)


if __name__ == "__main__":
    main()
