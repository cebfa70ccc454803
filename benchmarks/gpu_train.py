"""Parts of `benchmarks.gpu`: training, beside the CPU, beside TRL, and kernel by kernel."""

from __future__ import annotations

import functools
import importlib.util
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_models import PROMPT, SHAPES, Setting, build_model, make_envs, random_prompts, word_tokenizer

Row = dict[str, Any]
EPOCHS = 4
MINIBATCHES = 4


def sizes(setting: Setting) -> tuple[int, int, int]:
    """Episodes a batch, response tokens, and timed iterations."""
    return (8, 8, 2) if setting.is_small else (64, 64, 3)


def measure_tests(setting: Setting) -> Iterator[Row]:
    """Runs the tests marked `gpu`."""
    # Those files alone that have such tests: others may need packages that a carried set of wheels lacks.
    marked = sorted(str(path) for path in Path("tests").rglob("test_*.py") if "pytest.mark.gpu" in path.read_text())
    files = ["tests/test_gpu.py"] if setting.is_small else marked
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", "--no-header", *files]
    done = subprocess.run(command, capture_output=True, text=True)
    yield {"exit_code": done.returncode, "tail": done.stdout[-3000:] + done.stderr[-1000:]}


def measure_train(setting: Setting) -> Iterator[Row]:
    """The default training run on the GPU, and beside it on the CPU."""
    steps = 512 if setting.is_small else 150_000
    out = Path(os.environ.get("GPU_RUNS", "runs/gpu"))
    running = []
    for device in dict.fromkeys((setting.device, "cpu")):
        directory = out / f"train-{device}-{time.time_ns()}"
        command = [sys.executable, "-m", "agents.train", f"device={device}", f"total_timesteps={steps}"]
        if setting.is_small:
            command += ["evaluation.samples=2", "evaluation.prompts=8"]
        command.append(f"hydra.run.dir={directory}")
        log = subprocess.PIPE
        running.append((device, directory, subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, text=True)))
    for device, directory, process in running:
        output, _ = process.communicate()
        if process.returncode:
            yield {"device": device, "error": output[-1500:]}
            continue
        summary = json.loads((directory / "summary.json").read_text())
        after = summary["after"]
        yield {
            "device": device,
            "normalised": after["normalised"],
            "return": after["return"],
            "train_seconds": summary["train_seconds"],
            "timesteps": summary["total_timesteps"],
        }


def measure_seeds(setting: Setting) -> Iterator[Row]:
    """Many runs of `keyword-32` in one process, beside one of them alone."""
    if importlib.util.find_spec("agents.many_seeds") is None:
        yield {"skipped": "This version trains one seed at a time"}
        return
    seeds = 2 if setting.is_small else 32
    steps = 256 if setting.is_small else 30_000
    out = Path(os.environ.get("GPU_RUNS", "runs/gpu"))
    row: Row = {"seeds": seeds, "timesteps": steps}
    for name, count in (("together", seeds), ("alone", 1)):
        directory = out / f"seeds-{count}-{time.time_ns()}"
        command = [sys.executable, "-m", "agents.train", "task=keyword-32", f"seeds={count}"]
        command += [
            f"device={setting.device}",
            f"total_timesteps={steps}",
            "evaluation.samples=4",
            "evaluation.prompts=4",
        ]
        done = subprocess.run([*command, f"hydra.run.dir={directory}"], capture_output=True, text=True)
        if done.returncode:
            yield row | {"error": (done.stdout + done.stderr)[-1500:]}
            return
        first = directory if count == 1 else directory / "seed0"
        summary = json.loads((first / "summary.json").read_text())
        row[f"{name}_seconds"] = summary["train_seconds"]
        row[f"{name}_return"] = summary["after"]["return"]["mean"]
    yield row


def measure_ppo(setting: Setting) -> Iterator[Row]:
    """A PPO iteration, 4 epochs of 4 minibatches with a shared trunk: by model, dtype, and with layers run again."""
    runs: list[tuple[str, str, dict[str, Any]]] = [
        ("GPT-2 124M", "bfloat16", {}),
        ("GPT-2 124M", "bfloat16", {"critic": "reference"}),  # as TRL's always is
        ("GPT-2 1.5B", "bfloat16", {}),
        ("GPT-2 124M", "float32", {}),
        ("GPT-2 1.5B", "bfloat16", {"gradient_checkpointing": True}),
    ]
    if setting.is_small:
        runs = [("tiny", "float32", {}), ("tiny", "float32", {"gradient_checkpointing": True})]
    for name, dtype, config in runs:
        row: Row = {"model": name, "dtype": dtype, "config": config}
        try:
            row |= _ppo_row(setting, name, dtype, config)
        except Exception as error:  # such as out of memory: the other rows are measured all the same
            row["error"] = f"{type(error).__name__}: {error}"[:300]
        yield row
        setting.free()


def make_ppo(setting: Setting, name: str, dtype: str, config: dict[str, Any]) -> Any:
    """The agent of a row."""
    from agents.algorithms.ppo import PPO, PPOConfig

    batch, horizon, _ = sizes(setting)
    envs = make_envs(SHAPES[name], getattr(torch, dtype), horizon, 0.05, setting.device)
    numbers = {"batch_size": batch, "micro_batch_size": batch // MINIBATCHES, "epochs": EPOCHS}
    return PPO(envs, PPOConfig(**numbers, minibatches=MINIBATCHES, lr=1e-6, **config), seed=0)


def _ppo_row(setting: Setting, name: str, dtype: str, config: dict[str, Any]) -> Row:
    from agents.memory import estimate, peak
    from agents.on_policy import memory_sizes

    batch, horizon, iterations = sizes(setting)
    agent = make_ppo(setting, name, dtype, config)
    parameters = agent.envs.engine.lm.model.num_parameters()
    seen: list[dict[str, float]] = []

    def iterate() -> None:
        agent.learn(agent.num_timesteps + 1, lambda _, metrics: seen.append(metrics))

    row: Row = {"estimated_bytes": peak(estimate(memory_sizes(agent)))}
    if setting.is_cuda:
        row["bytes_before"] = torch.cuda.memory_allocated()
        # Before the first iteration: later torch does not count what graphs hold between their launches.
        torch.cuda.reset_peak_memory_stats()
    iterate()
    setting.wait()
    started = time.perf_counter()
    for _ in range(iterations):
        iterate()
    setting.wait()
    seconds = (time.perf_counter() - started) / iterations
    row |= {
        "batch": batch,
        "horizon": horizon,
        "seconds": seconds,
        "collect_seconds": statistics.mean(metrics["time/collect_seconds"] for metrics in seen[1:]),
        "update_seconds": statistics.mean(metrics["time/update_seconds"] for metrics in seen[1:]),
        "tokens_per_second": batch * horizon / seconds,
        "update_flops": 6 * parameters * batch * (PROMPT + horizon) * EPOCHS,
    }
    if setting.is_cuda:
        row["peak_bytes"] = torch.cuda.max_memory_allocated()
    return row


def measure_trl(setting: Setting) -> Iterator[Row]:
    """An iteration of TRL's PPOTrainer on the work of the row of GPT-2 124M, where TRL is installed."""
    if importlib.util.find_spec("trl") is None:
        yield {"skipped": "TRL is not installed"}
        return
    name = "tiny" if setting.is_small else "GPT-2 124M"
    with tempfile.TemporaryDirectory() as directory:
        trainer, laps = _trl_trainer(setting, name, directory)
        trainer.train()
    batch, horizon, _ = sizes(setting)
    seconds = statistics.mean(after - before for before, after in itertools.pairwise(laps))
    row: Row = {"model": name, "seconds": seconds, "tokens_per_second": batch * horizon / seconds}
    row["dtype"] = "bfloat16 autocast" if setting.is_cuda else "float32"
    if setting.is_cuda:
        row["peak_bytes"] = torch.cuda.max_memory_allocated()
    yield row


def _trl_trainer(setting: Setting, name: str, directory: str) -> tuple[Any, list[float]]:
    """PPOTrainer of TRL 1.12, and a list that it fills with the time at the end of each iteration.

    Its critic has a trunk of its own always. A minibatch is a part of a "device batch", which is the whole batch.
    """
    from datasets import Dataset
    from transformers import AutoModelForSequenceClassification, TrainerCallback
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    shape = SHAPES[name]
    batch, horizon, iterations = sizes(setting)
    tokenizer = word_tokenizer(shape.vocabulary)
    model = build_model(shape, torch.float32, setting.device)
    model.save_pretrained(directory)
    laps: list[float] = []

    class Laps(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            setting.wait()
            laps.append(time.perf_counter())

    def classifier() -> Any:
        return AutoModelForSequenceClassification.from_pretrained(directory, num_labels=1, dtype=torch.float32)

    config = PPOConfig(
        output_dir=directory,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=1,
        num_mini_batches=MINIBATCHES,
        num_ppo_epochs=EPOCHS,
        total_episodes=batch * (iterations + 1),
        local_rollout_forward_batch_size=batch,
        num_sample_generations=0,
        response_length=horizon,
        temperature=1.0,
        kl_coef=0.05,
        learning_rate=1e-6,
        use_cpu=not setting.is_cuda,
        bf16=setting.is_cuda,
        gradient_checkpointing=False,
        report_to="none",
        save_strategy="no",
        eval_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
    )
    rows = [{"input_ids": tokenizer(prompt)["input_ids"]} for prompt in random_prompts(shape.vocabulary)]
    trainer = PPOTrainer(
        args=config,
        processing_class=tokenizer,
        model=model,
        ref_model=build_model(shape, torch.float32, setting.device),
        reward_model=classifier(),
        value_model=classifier(),
        train_dataset=Dataset.from_list(rows),
    )
    trainer.add_callback(Laps())
    return trainer, laps


def measure_profile(setting: Setting) -> Iterator[Row]:
    """The ten kernels that take the most time in decoding and in an update, by model."""
    names = ["tiny"] if setting.is_small else ["GPT-2 124M"]  # the profiler takes minutes for larger ones
    for name in names:
        agent = make_ppo(setting, name, "float32" if setting.is_small else "bfloat16", {})
        agent.learn(1)
        yield from _profile(setting, f"collect, {name}", agent.collect)
        episodes = agent.collect()
        yield from _profile(setting, f"update, {name}", functools.partial(_update, agent, episodes))
        del agent, episodes
        setting.free()
    if not setting.is_small:
        yield from _profile_decoding(setting, "GPT-2 1.5B")
        setting.free()
        yield from _profile_decoding(setting, "Llama 8B")


def _update(agent: Any, episodes: Any) -> None:
    """Learns from a batch."""
    agent.learn_from(agent.shape(episodes))


def _profile_decoding(setting: Setting, name: str) -> Iterator[Row]:
    """The kernels of decoding a batch of 256 without a reference."""
    from lmgym.models.policy import CausalPolicy
    from lmgym.rollout import collect

    envs = make_envs(SHAPES[name], torch.bfloat16, 32, 0.0, setting.device)
    run = functools.partial(collect, envs, CausalPolicy(envs.engine.lm), 256, None, torch.Generator().manual_seed(0))
    run()
    yield from _profile(setting, f"decode, {name}", run)


def _profile(setting: Setting, part: str, run: Callable[[], Any]) -> Iterator[Row]:
    """The ten events with the most time of their own, on the GPU where there is one."""
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU]
    if setting.is_cuda:
        activities.append(ProfilerActivity.CUDA)
    setting.wait()
    started = time.perf_counter()
    with profile(activities=activities) as recorded:
        run()
        setting.wait()
    seconds = time.perf_counter() - started
    events: Any = recorded.key_averages()
    field = "self_cpu_time_total"
    if setting.is_cuda:
        field = "self_device_time_total"
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
