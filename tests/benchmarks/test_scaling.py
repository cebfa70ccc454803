"""The model of time and memory: closed forms, the shapes of real models, and what an agent measures of itself."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from agents.algorithms.ppo import PPO, PPOConfig
from agents.memory import estimate, estimate_weights
from agents.on_policy import memory_sizes
from benchmarks.gpu_models import SHAPES, Shape, build_model, make_envs
from benchmarks.pages import table
from benchmarks.scaling import LLAMA_70B, check_rows, check_table, prediction_table
from benchmarks.scaling_model import (
    Machine,
    Run,
    count_adapter,
    count_parameters,
    on,
    predict_bytes,
    predict_peak,
    predict_seconds,
    predict_sizes,
)

PAGE = Path(__file__).parents[2] / "docs" / "scaling.md"
TINY = SHAPES["tiny"]
TINY_LLAMA = Shape("llama", 2, 64, 4, 512, kv_heads=2, inner=96)
PLAIN = Machine(1, 1e12, 1e9, 8e9, 1e9, decoding=1.0, updating=1.0, step_seconds=0.0)
RUN = Run(8, 4, 6, epochs=3, minibatches=2)


def test_parameters_are_those_of_the_models() -> None:
    for shape in (TINY, TINY_LLAMA):
        numbers = build_model(shape, torch.float32, "cpu").num_parameters()
        assert count_parameters(shape) == pytest.approx(numbers, rel=0.02)
    assert count_parameters(SHAPES["GPT-2 124M"]) == pytest.approx(124.4e6, rel=0.01)
    assert count_parameters(SHAPES["Llama 8B"]) == pytest.approx(8.03e9, rel=0.01)
    assert count_parameters(LLAMA_70B) == pytest.approx(70.6e9, rel=0.01)


def test_an_adapter_is_in_every_linear_layer_but_the_head() -> None:
    model = build_model(TINY_LLAMA, torch.float32, "cpu")
    layers = [x for name, x in model.named_modules() if isinstance(x, torch.nn.Linear) and name != "lm_head"]
    assert count_adapter(TINY_LLAMA, 3) == sum(3 * (x.in_features + x.out_features) for x in layers)


def test_time_on_one_device_is_bytes_and_flops() -> None:
    numbers = count_parameters(TINY)
    found = predict_seconds(TINY, PLAIN, RUN)
    cache = 8 * (4 + 6 / 2) * 2 * 2 * 64 * 2
    assert found["decode"] == pytest.approx(6 * (2 * numbers + cache) / 1e9)
    assert found["score"] == pytest.approx(2 * numbers * 80 / 1e12)
    assert found["update"] == pytest.approx(6 * numbers * 80 * 3 / 1e12 + 3 * 2 * 40 * numbers / 1e9)
    assert found["exchange"] == 0
    slow = predict_seconds(TINY, replace(PLAIN, flops=1e8), RUN)  # where arithmetic is what takes longer
    assert slow["decode"] == pytest.approx(6 * 2 * numbers * 8 / 1e8)


def test_devices_share_the_arithmetic_and_send_gradients_around() -> None:
    numbers = count_parameters(TINY)
    one = predict_seconds(TINY, PLAIN, RUN)
    four = predict_seconds(TINY, on(PLAIN, 4), RUN)
    assert four["score"] == pytest.approx(one["score"] / 4)
    assert four["exchange"] == pytest.approx(6 * 2 * 3 / 4 * 2 * numbers / 1e9)
    lora = predict_seconds(TINY, on(PLAIN, 4), replace(RUN, adapter=numbers // 100))
    assert lora["exchange"] < four["exchange"] / 40
    sharded = predict_seconds(TINY, on(PLAIN, 4), replace(RUN, is_sharded=True))
    fetches = 3 * 2 * 3 + 6 + 1  # three of each optimiser step; of each decoding step and the reference's pass one
    assert sharded["exchange"] == pytest.approx(fetches * 3 / 4 * 2 * numbers / 1e9)


def test_weights_are_counted_once_under_an_adapter() -> None:
    assert estimate_weights(100, 100, 2, shares_reference=False) == {"policy": 200, "reference": 200, "copies": 400}
    assert estimate_weights(100, 5, 2, shares_reference=True) == {"policy": 20, "reference": 200, "copies": 0}
    assert estimate_weights(100, 100, 4, shares_reference=False)["copies"] == 0
    assert estimate_weights(100, 100, 4, shares_reference=False, shards=8)["policy"] == 50


@pytest.mark.parametrize("recomputes", [False, True])
def test_memory_is_about_what_an_agent_measures(recomputes: bool) -> None:
    envs = make_envs(TINY, torch.float32, 24, 0.05, "cpu")
    config = PPOConfig(batch_size=32, micro_batch_size=4, gradient_checkpointing=recomputes)
    measured = estimate(memory_sizes(PPO(envs, config, seed=0)))
    run = Run(32, envs.engine.width, 24, micro_batch=4, element=4, recomputes=recomputes)
    predicted = estimate(predict_sizes(TINY, PLAIN, run))
    for name in ("optimiser", "gradients", "cache", "logits"):
        assert predicted[name] == pytest.approx(measured[name], rel=0.02), name
    assert 0.7 < predicted["layers"] / measured["layers"] < 1.6


def test_shards_leave_a_part_of_the_weights_on_each_device() -> None:
    whole = predict_bytes(TINY, on(PLAIN, 8), RUN)
    parts = predict_bytes(TINY, on(PLAIN, 8), replace(RUN, is_sharded=True))
    for name in ("policy", "reference", "copies", "optimiser", "gradients"):
        assert parts[name] == pytest.approx(whole[name] / 8, abs=1)
    assert predict_peak(TINY, on(PLAIN, 8), replace(RUN, is_sharded=True)) < predict_peak(TINY, on(PLAIN, 8), RUN)


def test_what_was_measured_is_within_a_third() -> None:
    for name, measured, predicted, _ in check_rows():
        assert abs(predicted / measured - 1) < (0.02 if "fitted" in name else 1 / 3), name


@pytest.mark.parametrize(("name", "lines"), [("scaling-check", check_table), ("scaling-predictions", prediction_table)])
def test_the_page_has_the_tables_of_the_command(name: str, lines: object) -> None:
    assert table(PAGE, name) == list(lines())  # type: ignore[operator]
