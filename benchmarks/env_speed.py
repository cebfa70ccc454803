"""How fast the environments are, side by side with the limits in one run: `python -m benchmarks.env_speed`.

Every path takes the same number of tokens of the same random-weight GPT-2 shapes: N rows, prompts of 8 to 16 tokens,
responses of T. Paths are interleaved round by round and medians are reported, because machines are shared. Nothing
here asserts a threshold.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, DynamicCache, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

import lmgym  # noqa: F401 - registers the ids
from lmgym.models.caches import cache_keyword
from lmgym.models.causal import CausalLM, token_log_probs
from lmgym.models.policy import CausalPolicy
from lmgym.rollout import collect

SIZES = {
    "small": {"n_layer": 2, "n_embd": 128, "n_head": 4, "vocab_size": 512},
    "large": {"n_layer": 6, "n_embd": 512, "n_head": 8, "vocab_size": 50257},
}
PROMPTS = (8, 16)
EOS = 1
PATHS = {
    "bare loop": "Hugging Face forward a token, dynamic cache, tokens given, a prefill an episode: limit of stepping",
    "step": "RLHFVectorEnv.step",
    "generate": "model.generate, sampled",
    "decode": "rollout.collect at kl_coef=0: tokens and their log-probs, what generate gives and more",
    "collect": "rollout.collect: the same, with the reference's pass and the rewards",
    "bare forced": "Hugging Face teacher-forced forward and log-softmax, chunks of 16: the limit of replay",
    "replay": "RLHFVectorEnv.replay",
    "bookkeeping": "RLHFVectorEnv.step at kl_coef=0: no model",
    "sync": "SyncVectorEnv of RLHFEnv",
    "async": "AsyncVectorEnv of RLHFEnv",
    "naive": "SyncVectorEnv of an env with a full forward a step",
}


def zero(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    """A reward that costs nothing."""
    return [0.0] * len(completions)


def make_model(directory: Path, size: str, positions: int) -> str:
    """A random-weight GPT-2 shape with a tokenizer of as many words, saved; returns the path."""
    shape = SIZES[size]
    words = ["<pad>", "<eos>", "<unk>", *(f"w{i}" for i in range(3, shape["vocab_size"]))]
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )
    config = GPT2Config(**shape, n_positions=positions, bos_token_id=EOS, eos_token_id=EOS, pad_token_id=0)
    config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = 0.0
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = GPT2LMHeadModel(config)
    path = directory / f"{size}-{positions}"
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


class Bench:
    """One model size, one N, one T: everything each path needs, and a method a path that returns tokens taken."""

    def __init__(self, path: str, size: str, num_envs: int, horizon: int, device: str) -> None:
        rng = np.random.default_rng(0)
        vocabulary = SIZES[size]["vocab_size"]
        lengths = rng.integers(PROMPTS[0], PROMPTS[1] + 1, 512)
        prompts = [" ".join(f"w{i}" for i in rng.integers(3, vocabulary, n)) for n in lengths]
        # The longest prompt is always there, so that P is the same for every N.
        self.kwargs: dict[str, Any] = {
            "model": path,
            "reward": zero,
            "prompts": prompts,
            "kl_coef": 0.1,
            "max_new_tokens": horizon,
            "device": device,
            "min_new_tokens": horizon - 1,
        }
        self.n = num_envs
        self.horizon = horizon
        self.vocabulary = vocabulary
        self.tokens = rng.integers(3, vocabulary, (horizon, num_envs))
        self.made: dict[str, Any] = {}
        self.generator = torch.Generator().manual_seed(0)
        self.plain: Any = (
            AutoModelForCausalLM.from_pretrained(path, trust_remote_code=False).eval().to(device)
        )  # as Hugging Face loads it
        self.policy: CausalPolicy | None = None

    def envs(self, name: str) -> Any:
        """The vector env of a path, made once and warm."""
        if name not in self.made:
            make = partial(gym.make, "lmgym/RLHF-v0", disable_env_checker=True, **self.kwargs)
            if name == "native":
                env = gym.make_vec("lmgym/RLHF-v0", num_envs=self.n, autoreset_mode="SameStep", **self.kwargs)
            elif name == "bookkeeping":
                kwargs = {**self.kwargs, "kl_coef": 0.0}
                env = gym.make_vec("lmgym/RLHF-v0", num_envs=self.n, autoreset_mode="SameStep", **kwargs)
            elif name == "sync":
                env = SyncVectorEnv([make] * self.n, autoreset_mode=AutoresetMode.SAME_STEP)
            elif name == "async":
                # Spawned, because a fork of a process with OpenMP threads hangs; one thread each, or they fight.
                with one_thread_in_children():
                    env = AsyncVectorEnv([make] * self.n, autoreset_mode=AutoresetMode.SAME_STEP, context="spawn")
            else:
                env = SyncVectorEnv([partial(NaiveEnv, self.kwargs)] * self.n, autoreset_mode=AutoresetMode.SAME_STEP)
            env.reset(seed=0)
            self.made[name] = env
        return self.made[name]

    @property
    def lm(self) -> Any:
        return self.envs("native").engine.lm

    def prompt_batch(self) -> tuple[torch.Tensor, torch.Tensor]:
        engine = self.envs("native").engine
        ids, mask = engine.pad_prompts([engine.prompts[i % len(engine.prompts)] for i in range(self.n)])
        return ids.to(self.lm.device), mask.long().to(self.lm.device)

    def drive(self, name: str, steps: int) -> int:
        env = self.envs(name)
        for t in range(steps):
            env.step(self.tokens[t % self.horizon])
        return steps * self.n

    def step(self) -> int:
        return self.drive("native", self.horizon)

    def bookkeeping(self) -> int:
        return self.drive("bookkeeping", self.horizon)

    def sync(self) -> int:
        return self.drive("sync", min(self.horizon, max(2, 512 // self.n)))

    def async_(self) -> int:
        return self.drive("async", min(self.horizon, max(2, 512 // self.n)))

    def naive(self) -> int:
        return self.drive("naive", min(self.horizon, max(2, 256 // self.n)))

    @torch.inference_mode()
    def bare_loop(self) -> int:
        ids, mask = self.prompt_batch()
        model = self.plain
        cached = {cache_keyword(model): DynamicCache()}
        positions = (mask.cumsum(-1) - 1).clamp_(min=0)
        model(input_ids=ids, attention_mask=mask, position_ids=positions, logits_to_keep=1, **cached)
        position = positions[:, -1:]
        tokens = torch.from_numpy(self.tokens).to(ids.device)
        ones = mask.new_ones((self.n, 1))
        for t in range(self.horizon - 1):
            mask = torch.cat([mask, ones], 1)
            position = position + 1
            model(
                input_ids=tokens[t][:, None],
                attention_mask=mask,
                position_ids=position,
                use_cache=True,
                logits_to_keep=1,
                **cached,
            )
        return self.n * self.horizon

    @torch.inference_mode()
    def generate(self) -> int:
        ids, mask = self.prompt_batch()
        self.plain.generate(
            ids,
            attention_mask=mask,
            do_sample=True,
            top_k=0,
            top_p=1.0,
            max_new_tokens=self.horizon,
            min_new_tokens=self.horizon,
            pad_token_id=0,
        )
        return self.n * self.horizon

    def learner(self) -> CausalPolicy:
        """A policy with weights of its own: what samples from the reference itself would spare its pass."""
        if self.policy is None:
            self.policy = CausalPolicy(CausalLM(copy.deepcopy(self.lm.model), self.lm.tokenizer))
        return self.policy

    def decode(self) -> int:
        return collect(self.envs("bookkeeping"), self.learner(), self.n, None, self.generator).num_tokens

    def collect(self) -> int:
        return collect(self.envs("native"), self.learner(), self.n, None, self.generator).num_tokens

    @torch.inference_mode()
    def bare_forced(self) -> int:
        ids, _ = self.prompt_batch()
        tokens = torch.from_numpy(self.tokens.T.copy()).to(ids.device)
        p = ids.shape[1]
        for rows in torch.arange(self.n).split(16):
            whole = torch.cat([ids[rows], tokens[rows]], 1)
            logits = self.plain(input_ids=whole, attention_mask=torch.ones_like(whole), use_cache=False).logits
            token_log_probs(logits[:, p - 1 : -1], tokens[rows])
        return self.n * self.horizon

    def replay(self) -> int:
        engine = self.envs("native").engine
        prompts = [engine.prompts[i % len(engine.prompts)] for i in range(self.n)]
        engine.replay(prompts, self.tokens.T.copy())
        return self.n * self.horizon

    def close(self) -> None:
        for env in self.made.values():
            env.close()


@contextlib.contextmanager
def one_thread_in_children() -> Iterator[None]:
    """Processes started here have one OpenMP thread."""
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        yield
    finally:
        del os.environ["OMP_NUM_THREADS"]
        if before is not None:
            os.environ["OMP_NUM_THREADS"] = before


class NaiveEnv(gym.Env[Any, Any]):
    """What one writes first: every step a full forward over prompt and response."""

    def __init__(self, kwargs: dict[str, Any]) -> None:
        self.env = gym.make("lmgym/RLHF-v0", disable_env_checker=True, **{**kwargs, "kl_coef": 0.0})
        self.observation_space = self.env.observation_space
        self.action_space = self.env.action_space
        self.model: Any = AutoModelForCausalLM.from_pretrained(kwargs["model"], trust_remote_code=False).eval()
        self.kl_coef = kwargs["kl_coef"]

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        self.observation, info = self.env.reset(seed=seed, options=options)
        return self.observation, info

    @torch.inference_mode()
    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        mask = self.observation["attention_mask"] == 1
        ids = torch.from_numpy(self.observation["input_ids"][mask])[None]
        logits = self.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, -1]
        log_prob = float(logits.log_softmax(-1)[int(action)])
        self.observation, reward, terminated, truncated, info = self.env.step(action)
        return self.observation, float(reward) + self.kl_coef * log_prob, terminated, truncated, info


def method(bench: Bench, path: str) -> Callable[[], int]:
    """The method that runs a path."""
    return getattr(bench, {"async": "async_"}.get(path, path.replace(" ", "_")))


def wanted(path: str, size: str, num_envs: int) -> bool:
    """Slow paths are left out where they would take minutes and say nothing new."""
    if path == "async":
        return num_envs <= 16 and size == "small"
    return not (path in ("sync", "naive") and (num_envs > 64 or size == "large"))


def measure(bench: Bench, size: str, rounds: int) -> dict[str, float]:
    """Median tokens/s of every path, rounds interleaved."""
    paths = [path for path in PATHS if wanted(path, size, bench.n)]
    times: dict[str, list[float]] = {path: [] for path in paths}
    for r in range(rounds + 1):
        for path in paths:
            started = time.perf_counter()
            tokens = method(bench, path)()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if r:  # the first round warms up
                times[path].append((time.perf_counter() - started) / tokens)
    return {path: 1 / statistics.median(seconds) for path, seconds in times.items()}


def peak_memory(model: str, size: str, num_envs: int, horizon: int, path: str) -> float:
    """MB that a path needs at its peak beyond the loaded model, in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.env_speed", "--cell", model, size, str(num_envs), str(horizon), path]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


def resident(field: str) -> float:
    """MB of this process: VmRSS now, or VmHWM at its peak."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 1024


def cell(model: str, size: str, num_envs: str, horizon: str, path: str) -> None:
    """Prints the memory of one path."""
    bench = Bench(model, size, int(num_envs), int(horizon), "cpu")
    small = Bench(model, size, 1, 2, "cpu")
    small.step()
    before = resident("VmRSS")
    for _ in range(2):
        method(bench, path)()
    print(max(0.0, resident("VmHWM") - before))


def table(results: list[dict[str, Any]], horizon: int) -> str:
    """Markdown tables, one a size: tokens/s by path and N."""
    lines = []
    for size in dict.fromkeys(row["size"] for row in results):
        rows = [row for row in results if row["size"] == size and row["horizon"] == horizon]
        lines += [
            f"\n{size}: {SIZES[size]}, T = {horizon}, tokens/s\n",
            "| path | " + " | ".join(f"N={r['n']}" for r in rows) + " |",
        ]
        lines.append("|---" * (len(rows) + 1) + "|")
        for path in PATHS:
            cells = [f"{r['tokens_per_second'][path]:,.0f}" if path in r["tokens_per_second"] else "" for r in rows]
            lines.append(f"| {path} | " + " | ".join(cells) + " |")
        for name, top, bottom in RATIOS:
            cells = [ratio(r["tokens_per_second"], top, bottom) for r in rows]
            lines.append(f"| *{name}* | " + " | ".join(cells) + " |")
        if any("memory" in r for r in rows):
            for path in ("step", "collect", "generate"):
                lines.append(
                    f"| *{path}, peak MB* | " + " | ".join(f"{r['memory'].get(path, 0):.0f}" for r in rows) + " |"
                )
    return "\n".join(lines)


RATIOS = (
    ("step / bare loop", "step", "bare loop"),
    ("replay / bare forced", "replay", "bare forced"),
    ("decode / generate", "decode", "generate"),
    ("collect / generate", "collect", "generate"),
    ("step / naive", "step", "naive"),
)


def ratio(speeds: dict[str, float], top: str, bottom: str) -> str:
    """A ratio of two paths, where both ran."""
    return f"{speeds[top] / speeds[bottom]:.2f}" if top in speeds and bottom in speeds else ""


def plot(by_n: list[dict[str, Any]], by_t: list[dict[str, Any]], path: Path) -> None:
    """Cost a token against N and against T."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 2)
    for axis, rows, x, label in (
        (axes[0], by_n, "n", "N, environments"),
        (axes[1], by_t, "horizon", "T, response tokens"),
    ):
        for name in ("bare loop", "step", "generate", "decode", "collect", "replay"):
            axis.plot([r[x] for r in rows], [1e6 / r["tokens_per_second"][name] for r in rows], marker="o", label=name)
        scale = "log" if x == "n" else "linear"
        axis.set(xscale="log", yscale=scale, xlabel=label, ylabel="microseconds a token")
        axis.set_xticks([r[x] for r in rows], [str(r[x]) for r in rows])
        axis.xaxis.minorticks_off()
        axis.grid(alpha=0.3)
        if x != "n":
            axis.set_ylim(bottom=0)
    axes[0].legend(frameon=False)
    figure.savefig(path, dpi=130)


def main() -> None:
    """Runs what the arguments ask for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--envs", nargs="+", type=int, default=[1, 16, 64, 256])
    parser.add_argument("--horizon", type=int, default=32)
    parser.add_argument(
        "--horizons", nargs="*", type=int, default=[16, 64, 256], help="T of the cost against T, small, N=64"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--memory", action="store_true", help="also the peak memory of each path, in processes of their own"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/env_speed"), help="JSON and PNG go here")
    parser.add_argument("--cell", nargs=5, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.cell:
        cell(*args.cell)
        return
    torch.set_num_threads(args.threads)
    print(f"{platform.machine()}, {os.cpu_count()} cores, {args.threads} threads, torch {torch.__version__}")
    by_n = []
    by_t = []
    with tempfile.TemporaryDirectory() as scratch:
        for size in args.sizes:
            model = make_model(Path(scratch), size, PROMPTS[1] + args.horizon)
            for n in args.envs:
                rounds = args.rounds if size == "small" or n <= 64 else max(1, args.rounds // 2)
                by_n.append(run(model, size, n, args.horizon, rounds, args.device))
                if args.memory:
                    paths = ("step", "collect", "generate")
                    by_n[-1]["memory"] = {p: peak_memory(model, size, n, args.horizon, p) for p in paths}
        for horizon in args.horizons:
            model = make_model(Path(scratch), "small", PROMPTS[1] + horizon)
            by_t.append(run(model, "small", 64, horizon, args.rounds, args.device))
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "env_speed.json").write_text(
        json.dumps({"by_n": by_n, "by_t": by_t, "threads": args.threads}, indent=1)
    )
    print(table(by_n, args.horizon))
    if by_t:
        print("\nsmall, N = 64, tokens/s\n\n| path | " + " | ".join(f"T={r['horizon']}" for r in by_t) + " |")
        print("|---" * (len(by_t) + 1) + "|")
        for path in ("bare loop", "step", "collect", "replay"):
            print(f"| {path} | " + " | ".join(f"{r['tokens_per_second'][path]:,.0f}" for r in by_t) + " |")
        plot([r for r in by_n if r["size"] == args.sizes[0]], by_t, args.out / "env_speed.png")


def run(model: str, size: str, n: int, horizon: int, rounds: int, device: str) -> dict[str, Any]:
    """Measures one cell of the table."""
    bench = Bench(model, size, n, horizon, device)
    speeds = measure(bench, size, rounds)
    bench.close()
    print(f"{size} N={n} T={horizon}: " + ", ".join(f"{k} {v:,.0f}" for k, v in speeds.items()), file=sys.stderr)
    return {"size": size, "n": n, "horizon": horizon, "tokens_per_second": speeds}


if __name__ == "__main__":
    main()
