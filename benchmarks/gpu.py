"""Checks and measures everything that runs on a GPU: `python -m benchmarks.gpu` (or `make gpu`).

Every part is a process of its own, so that one that fails (or runs out of memory) costs its own rows alone:

- `tests`: the tests marked `gpu`.
- `limits`: bandwidth of a device copy and rate of a bf16 matrix product, which the other parts are compared with.
- `train`: the default training run on the GPU and on the CPU of the same machine.
- `decode`: tokens/s of `rollout.collect` at `kl_coef=0` and of Hugging Face's `generate`, beside the roofline.
- `ppo`: a PPO iteration: tokens/s, share of the measured matrix rate, peak memory.
- `profile`: the kernels that take the most time in decoding and in an update.

Models have random weights: no download. What `pip install -e '.[agents]'` installs must be there; to a machine without
a network, carry the wheels of gymnasium, Farama-Notifications, hydra-core, omegaconf, antlr4-python3-runtime,
stable-baselines3, sb3-contrib and pytest-timeout, where it has torch and transformers. Results go to
`<out>/gpu.json` and, as Markdown tables, to `<out>/gpu.md`.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

LIMITS = {
    "tests": 120,
    "limits": 60,
    "train": 180,
    "decode": 240,
    "ppo": 180,
    "profile": 120,
}  # seconds a part may take


@dataclass(frozen=True)
class Shape:
    """A model with random weights.

    Attributes:
        family: "gpt2" or "llama". layers, width, heads: of its blocks. vocabulary: V.
        kv_heads, inner: of a Llama.
    """

    family: str
    layers: int
    width: int
    heads: int
    vocabulary: int
    kv_heads: int = 0
    inner: int = 0


SHAPES = {
    "tiny": Shape("gpt2", 2, 64, 4, 512),
    "GPT-2 124M": Shape("gpt2", 12, 768, 12, 50_257),
    "GPT-2 1.5B": Shape("gpt2", 48, 1600, 25, 50_257),
    "Llama 8B": Shape("llama", 32, 4096, 32, 128_256, kv_heads=8, inner=14_336),
}
PROMPT = 16  # tokens


def device() -> str:
    """The GPU where there is one: on a CPU the parts run for tests, at tiny shapes."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def synchronise() -> None:
    """Waits for the GPU."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def median_seconds(run: Callable[[], Any], rounds: int) -> float:
    """Median wall-clock time of a call, after one that warms up."""
    run()
    seconds = []
    for _ in range(rounds):
        synchronise()
        started = time.perf_counter()
        run()
        synchronise()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


@functools.cache
def word_tokenizer(vocabulary: int) -> Any:
    """A tokenizer of as many words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<eos>", "<unk>", *(f"w{i}" for i in range(3, vocabulary))]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def build_model(shape: Shape, dtype: torch.dtype) -> Any:
    """A frozen model with random weights, made on the device it stays on."""
    from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

    ends = {"bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0}
    if shape.family == "gpt2":
        config: Any = GPT2Config(
            n_layer=shape.layers, n_embd=shape.width, n_head=shape.heads, vocab_size=shape.vocabulary, **ends
        )
        config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = 0.0
    else:
        config = LlamaConfig(
            num_hidden_layers=shape.layers,
            hidden_size=shape.width,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.kv_heads,
            intermediate_size=shape.inner,
            vocab_size=shape.vocabulary,
            **ends,
        )
    with torch.random.fork_rng(), torch.device(device()):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)


def make_envs(shape: Shape, dtype: torch.dtype, horizon: int, kl_coef: float) -> Any:
    """The token MDP on a model with random weights, with a reward that costs nothing to compute."""
    from lmgym.envs.vector import RLHFVectorEnv
    from lmgym.models.causal import CausalLM, freeze
    from lmgym.models.sharing import fuse_gelu
    from lmgym.tasks import Task

    lm = CausalLM(freeze(fuse_gelu(build_model(shape, dtype))), word_tokenizer(shape.vocabulary))
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(3, shape.vocabulary, (64, PROMPT), generator=generator)
    prompts = [" ".join(f"w{i}" for i in row) for row in words.tolist()]
    task = Task(
        name="random",
        model=lm,
        reward=count_letters,
        prompts={"train": prompts},
        kl_coef=kl_coef,
        max_new_tokens=horizon,
        min_new_tokens=horizon - 1,
    )
    return RLHFVectorEnv(1, task=task, device=device())


def count_letters(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    """A reward that needs no model."""
    return [len(completion) / 100 for completion in completions]


# -- the parts -------------------------------------------------------------------------------------------------------


def measure_tests(small: bool) -> Iterator[dict[str, Any]]:
    """Runs the tests marked `gpu`."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", "--no-header", "tests"]
    done = subprocess.run(command, capture_output=True, text=True)
    yield {"exit_code": done.returncode, "tail": done.stdout[-3000:] + done.stderr[-1000:]}


def measure_limits(small: bool) -> Iterator[dict[str, Any]]:
    """Bytes/s of a device copy (read and written) and FLOP/s of a bf16 matrix product."""
    side, copied = (512, 2**22) if small else (8192, 2**32)
    source = torch.empty(copied, dtype=torch.uint8, device=device()).random_(0, 255)
    target = torch.empty_like(source)
    bandwidth = 2 * copied / median_seconds(lambda: target.copy_(source), 10)
    a, b = (torch.randn(side, side, device=device(), dtype=torch.bfloat16) for _ in range(2))

    def multiply() -> None:
        for _ in range(10):
            a @ b

    yield {"bytes_per_second": bandwidth, "flops_per_second": 10 * 2 * side**3 / median_seconds(multiply, 5)}


def measure_train(small: bool) -> Iterator[dict[str, Any]]:
    """The default training run on the GPU, and beside it on the CPU."""
    steps = 4_096 if small else 150_000
    out = Path(os.environ.get("GPU_RUNS", "runs/gpu"))
    running = []
    for where in dict.fromkeys((device(), "cpu")):
        directory = out / f"train-{where}-{time.time_ns()}"
        command = [sys.executable, "-m", "agents.train", f"device={where}", f"total_timesteps={steps}"]
        if small:
            command.append("evaluation.samples=2")
        command.append(f"hydra.run.dir={directory}")
        log = subprocess.PIPE
        running.append((where, directory, subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, text=True)))
    for where, directory, process in running:
        output, _ = process.communicate()
        if process.returncode:
            yield {"device": where, "error": output[-1500:]}
            continue
        summary = json.loads((directory / "summary.json").read_text())
        after = summary["after"]
        yield {
            "device": where,
            "normalised": after["normalised"],
            "return": after["return"],
            "train_seconds": summary["train_seconds"],
            "timesteps": summary["total_timesteps"],
        }


def measure_decode(small: bool) -> Iterator[dict[str, Any]]:
    """Tokens/s of decoding, ours and Hugging Face's, by model and batch."""
    names = ["tiny"] if small else ["GPT-2 124M", "GPT-2 1.5B", "Llama 8B"]
    batches, horizon = ((4,), 8) if small else ((64, 256, 512), 128)
    for name in names:
        envs = make_envs(SHAPES[name], torch.float32 if small else torch.bfloat16, horizon, 0.0)
        for batch in batches:
            row = {"model": name, "batch": batch, "horizon": horizon}
            yield row | _decode_row(envs, batch, horizon, small)
        del envs
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _decode_row(envs: Any, batch: int, horizon: int, small: bool) -> dict[str, Any]:
    from lmgym.models.policy import CausalPolicy
    from lmgym.rollout import collect

    lm = envs.engine.lm
    policy = CausalPolicy(lm)
    generator = torch.Generator().manual_seed(0)
    prompts = [envs.engine.prompts[i % len(envs.engine.prompts)] for i in range(batch)]
    ids, mask = (x.to(lm.device) for x in envs.engine.pad_prompts(prompts))

    @torch.inference_mode()
    def generate() -> Any:
        return lm.model.generate(
            ids,
            attention_mask=mask.long(),
            do_sample=True,
            top_k=0,
            top_p=1.0,
            max_new_tokens=horizon,
            min_new_tokens=horizon,
            pad_token_id=0,
        )

    rounds = 1 if small else 2
    row: dict[str, Any] = {
        "parameters": lm.model.num_parameters(),
        "bytes_a_step": bytes_a_step(lm.model, batch, horizon),
    }
    row["flops_a_step"] = 2 * lm.model.num_parameters() * batch
    for path, run in (("collect", lambda: collect(envs, policy, prompts, None, generator)), ("generate", generate)):
        if path == "generate" and batch > 256:
            continue
        try:
            row[path] = batch * horizon / median_seconds(run, rounds if path == "collect" else 1)
        except torch.OutOfMemoryError as error:
            row[f"{path}_error"] = str(error)[:200]
    return row


def bytes_a_step(model: Any, batch: int, horizon: int) -> float:
    """Fewest bytes that a decoding step reads: every weight once, and the keys and values of a half-done response."""
    embedding = 0 if model.config.tie_word_embeddings else model.get_input_embeddings().weight.nbytes
    weights = sum(parameter.nbytes for parameter in model.parameters()) - embedding
    config = model.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = config.hidden_size // config.num_attention_heads
    a_token = 2 * config.num_hidden_layers * heads * width * next(model.parameters()).element_size()
    return weights + batch * (PROMPT + horizon / 2) * a_token


def measure_ppo(small: bool) -> Iterator[dict[str, Any]]:
    """A PPO iteration: 64 episodes of 16 + 64 tokens, 4 epochs of 4 minibatches, a shared trunk."""
    runs = [("tiny", torch.float32)] if small else [("GPT-2 124M", torch.float32), ("GPT-2 124M", torch.bfloat16)]
    runs += [] if small else [("GPT-2 1.5B", torch.bfloat16)]
    for name, dtype in runs:
        row = {"model": name, "dtype": str(dtype).removeprefix("torch.")}
        try:
            row |= _ppo_row(SHAPES[name], dtype, small)
        except torch.OutOfMemoryError as error:
            row["error"] = str(error)[:200]
        yield row
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _ppo_agent(shape: Shape, dtype: torch.dtype, batch: int, horizon: int) -> Any:
    from agents.algorithms.ppo import PPO, PPOConfig

    envs = make_envs(shape, dtype, horizon, 0.05)
    return PPO(envs, PPOConfig(batch_size=batch, micro_batch_size=min(batch, 16), lr=1e-6), seed=0)


def _ppo_row(shape: Shape, dtype: torch.dtype, small: bool) -> dict[str, Any]:
    batch, horizon, iterations = (8, 8, 2) if small else (64, 64, 3)
    agent = _ppo_agent(shape, dtype, batch, horizon)
    parameters = agent.envs.engine.lm.model.num_parameters()
    seen: list[dict[str, float]] = []

    def iterate() -> None:
        agent.learn(agent.num_timesteps + 1, lambda _, metrics: seen.append(metrics))

    iterate()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    for _ in range(iterations):
        iterate()
    synchronise()
    seconds = (time.perf_counter() - started) / iterations
    read = batch * (PROMPT + horizon)
    config = agent.config
    row = {
        "parameters": parameters,
        "batch": batch,
        "horizon": horizon,
        "seconds": seconds,
        "collect_seconds": statistics.mean(metrics["time/collect_seconds"] for metrics in seen[1:]),
        "update_seconds": statistics.mean(metrics["time/update_seconds"] for metrics in seen[1:]),
        "tokens_per_second": batch * horizon / seconds,
        "update_flops": 6 * parameters * read * config.epochs,
        "flops": parameters * read * (6 * config.epochs + 2 + 2),
    }
    if torch.cuda.is_available():
        row["peak_bytes"] = torch.cuda.max_memory_allocated()
    return row


def _update(agent: Any, episodes: Any) -> None:
    """Learns from a batch."""
    agent.learn_from(agent.shape(episodes))


def measure_profile(small: bool) -> Iterator[dict[str, Any]]:
    """The ten kernels that take the most time in decoding and in an update of the 124M shape."""
    from torch.profiler import ProfilerActivity, profile

    name, dtype = ("tiny", torch.float32) if small else ("GPT-2 124M", torch.bfloat16)
    agent = _ppo_agent(SHAPES[name], dtype, 8 if small else 64, 8 if small else 64)
    agent.learn(1)
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])
    for part in ("collect", "update"):
        agent.learn(agent.num_timesteps + 1)
        if part == "collect":
            run: Callable[[], Any] = agent.collect
        else:
            run = functools.partial(_update, agent, agent.collect())
        synchronise()
        started = time.perf_counter()
        with profile(activities=activities) as recorded:
            run()
            synchronise()
        seconds = time.perf_counter() - started
        yield from _heaviest(part, seconds, recorded.key_averages())


def _heaviest(part: str, seconds: float, events: Any) -> Iterator[dict[str, Any]]:
    """The ten events with the most time of their own, on the GPU where there is one."""
    field = "self_device_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
    if torch.cuda.is_available():
        events = [event for event in events if event.device_type.name == "CUDA"]
    total = sum(getattr(event, field) for event in events)
    for event in sorted(events, key=lambda event: getattr(event, field), reverse=True)[:10]:
        yield {
            "part": part,
            "seconds": seconds,
            "kernel_seconds": total / 1e6,
            "kernel": event.key[:90],
            "share": getattr(event, field) / total,
            "calls": event.count,
        }


PARTS: dict[str, Callable[[bool], Iterator[dict[str, Any]]]] = {
    "limits": measure_limits,
    "train": measure_train,
    "decode": measure_decode,
    "ppo": measure_ppo,
    "tests": measure_tests,
    "profile": measure_profile,
}


# -- what is written -------------------------------------------------------------------------------------------------


def machine() -> dict[str, str]:
    """What it was measured on."""
    import transformers

    name = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    return {
        "device": name,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def markdown(results: dict[str, Any]) -> str:
    """The tables of docs/performance.md."""
    about = results["machine"]
    lines = [
        f"{about['device']}, torch {about['torch']}, transformers {about['transformers']}, {about['date']}; "
        "random weights.",
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
    lines += _ppo_table(results.get("ppo", []), rate)
    lines += _train_table(results.get("train", []))
    lines += _profile_table(results.get("profile", []))
    for row in results.get("tests", []):
        lines += [f"Tests marked `gpu`: {row['tail'].strip().splitlines()[-1].strip('= ')}.", ""]
    for part, text in results.get("errors", {}).items():
        lines += [f"`{part}` failed:", "", "```text", text, "```", ""]
    return "\n".join(lines)


def _decode_table(rows: list[dict[str, Any]], bandwidth: float, rate: float) -> list[str]:
    if not rows:
        return []
    lines = [
        f"Decoding, bf16, prompts of {PROMPT} tokens and responses of {rows[0]['horizon']}, tokens/s:",
        "",
        "| model | batch | roofline | `collect` | share | `generate` | collect / generate |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        floor = max(row["bytes_a_step"] / bandwidth, row["flops_a_step"] / rate)
        limit = row["batch"] / floor
        ours = row.get("collect", math.nan)
        theirs = row.get("generate", math.nan)
        cells = [row["model"], f"{row['batch']}", f"{limit:,.0f}", f"{ours:,.0f}", f"{ours / limit:.2f}"]
        cells += [f"{theirs:,.0f}", f"{ours / theirs:.2f}"] if theirs == theirs else ["", ""]
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]


def _ppo_table(rows: list[dict[str, Any]], rate: float) -> list[str]:
    if not rows:
        return []
    lines = [
        f"A PPO iteration of {rows[0].get('batch')} episodes of {PROMPT} + {rows[0].get('horizon')} tokens, 4 epochs "
        "of 4 minibatches:",
        "",
        "| model | dtype | collect, s | update, s | sampled tokens/s | update, TFLOP/s | of the rate | peak, GB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if "error" in row:
            lines.append(f"| {row['model']} | {row['dtype']} | {row['error']} | | | | | |")
            continue
        made = row["update_flops"] / row["update_seconds"]
        cells = [row["model"], row["dtype"], f"{row['collect_seconds']:.2f}", f"{row['update_seconds']:.2f}"]
        cells += [f"{row['tokens_per_second']:,.0f}", f"{made / 1e12:.1f}", f"{made / rate:.2f}"]
        cells.append(f"{row.get('peak_bytes', math.nan) / 1e9:.1f}")
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]


def _train_table(rows: list[dict[str, Any]]) -> list[str]:
    if not rows:
        return []
    lines = ["The default training run:", "", "| device | normalised return | training, s |", "|---|---|---|"]
    for row in rows:
        if "error" in row:
            lines.append(f"| {row['device']} | failed | |")
            continue
        share = row["normalised"] or {"mean": math.nan, "low": math.nan, "high": math.nan}
        interval = f"{share['mean']:.3f} [{share['low']:.3f}, {share['high']:.3f}]"
        lines.append(f"| {row['device']} | {interval} | {row['train_seconds']:.1f} |")
    return [*lines, ""]


def _profile_table(rows: list[dict[str, Any]]) -> list[str]:
    lines = []
    for part in dict.fromkeys(row["part"] for row in rows):
        of_part = [row for row in rows if row["part"] == part]
        seconds = of_part[0]["seconds"]
        busy = of_part[0]["kernel_seconds"]
        lines += [f"Kernels of one `{part}` ({seconds:.3f} s, kernels busy {busy:.3f} s):", ""]
        lines += ["| kernel | share of kernel time | calls |", "|---|---|---|"]
        lines += [f"| `{row['kernel'].replace('|', '/')}` | {row['share']:.3f} | {row['calls']} |" for row in of_part]
        lines.append("")
    return lines


def main() -> None:
    """Runs the parts, each in its own process, and writes what came."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--small", action="store_true", help="tiny shapes, for a look at what it writes")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"))
    parser.add_argument("--part", choices=list(PARTS), help=argparse.SUPPRESS)  # this process is that part
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.part is not None:
        rows: list[dict[str, Any]] = []
        for row in PARTS[args.part](args.small):
            rows.append(row)
            print(json.dumps(row), flush=True)
            (args.out / f"{args.part}.json").write_text(json.dumps(rows))  # what was measured before a failure stays
        return
    results: dict[str, Any] = {"machine": machine(), "command": " ".join(sys.argv[1:]), "errors": {}}
    for part in args.parts:
        started = time.perf_counter()
        command = [sys.executable, "-m", "benchmarks.gpu", "--part", part, "--out", str(args.out)]
        command += ["--small"] if args.small else []
        written = args.out / f"{part}.json"
        written.unlink(missing_ok=True)
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=LIMITS[part])
            failure = "" if done.returncode == 0 else (done.stdout + done.stderr)[-3000:]
        except subprocess.TimeoutExpired as error:
            failure = f"took more than {LIMITS[part]} s\n{_text(error.stdout)[-2000:]}"
        if written.is_file():
            results[part] = json.loads(written.read_text())
        if failure:
            results["errors"][part] = failure
        print(f"{part}: {'failed' if failure else 'done'} in {time.perf_counter() - started:.0f} s", flush=True)
        (args.out / "gpu.json").write_text(json.dumps(results, indent=1) + "\n")
        (args.out / "gpu.md").write_text(markdown(results))
    print("\n" + markdown(results))


def _text(output: bytes | str | None) -> str:
    if output is None:
        return ""
    return output if isinstance(output, str) else output.decode(errors="replace")


if __name__ == "__main__":
    main()
