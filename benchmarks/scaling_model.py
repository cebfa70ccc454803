"""How long an iteration of PPO takes on some devices, and how much memory each needs, from sizes alone.

Time is the larger of bytes over bandwidth and FLOPs over rate, divided by the share of it that was reached where it was
measured, plus what goes over the links. Memory is what `agents.memory` estimates, with what autograd keeps of an
episode from the shape of a model instead of a measurement.

Shapes: B episodes a batch, P prompt tokens, T response tokens, N numbers of a model, D its width, n devices.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from agents.memory import Sizes, estimate, estimate_weights, layer_bytes, peak
from benchmarks.gpu_models import Shape

_FORWARD = 2  # FLOPs a number and token
_POSITIONS = 1024  # that a GPT-2 embeds
_ADAM_BYTES = {2: 40, 4: 28}  # read and written a number that learns in a step, by bytes of a weight; clipping included


@dataclass(frozen=True)
class Machine:
    """Devices that train together, and what they have been seen to reach.

    Attributes:
        devices: n. flops: a second, of matrix products on one. bandwidth: bytes/s of its memory. memory: its bytes.
        link: bytes/s that a device sends to the others.
        decoding: share of the roofline that decoding reaches. updating: share of `flops` that teacher-forced passes do.
        step_seconds: of an optimiser step, whatever its size.
    """

    devices: int
    flops: float
    bandwidth: float
    memory: float
    link: float
    decoding: float
    updating: float
    step_seconds: float


@dataclass(frozen=True)
class Run:
    """What an iteration does.

    Attributes:
        batch: B. prompt: P. response: T. micro_batch: episodes of a forward, on one device.
        element: bytes of a weight. adapter: numbers of a LoRA adapter that learns; 0 where all weights learn.
        recomputes: whether layers run again in the backward pass.
        is_sharded: whether each device holds 1/n of the weights, gradients and moments, and fetches the rest (FSDP);
            else each holds all of them.
    """

    batch: int
    prompt: int
    response: int
    epochs: int = 4
    minibatches: int = 4
    micro_batch: int = 16
    element: int = 2
    adapter: int = 0
    recomputes: bool = False
    is_sharded: bool = False


def count_parameters(shape: Shape) -> int:
    """N, norms and biases left out."""
    d = shape.width
    if shape.family == "gpt2":
        return shape.layers * 12 * d * d + (shape.vocabulary + _POSITIONS) * d
    attention = 2 * d * d + 2 * d * key_width(shape)
    return shape.layers * (attention + 3 * d * shape.inner) + 2 * shape.vocabulary * d


def count_adapter(shape: Shape, rank: int) -> int:
    """Numbers of an adapter in all linear layers of a Llama."""
    d = shape.width
    attention = 2 * (d + d) + 2 * (d + key_width(shape))
    return shape.layers * rank * (attention + 3 * (d + shape.inner))


def key_width(shape: Shape) -> int:
    """Numbers of a token's keys in one layer."""
    return shape.width * (shape.kv_heads or shape.heads) // shape.heads


def predict_seconds(shape: Shape, machine: Machine, run: Run) -> dict[str, float]:
    """Seconds of an iteration: "decode", "score" (the reference), "update" and "exchange" (over the links)."""
    numbers = count_parameters(shape)
    n = machine.devices
    rows = -(-run.batch // n)
    tokens = rows * (run.prompt + run.response)
    rate = machine.flops * machine.updating
    learning = run.adapter or numbers
    backward = (1 if run.adapter else 2) * _FORWARD  # under an adapter no gradient of the weights is taken
    passes = _FORWARD + backward + (_FORWARD if run.recomputes else 0)
    steps = run.epochs * run.minibatches
    held = learning / n if run.is_sharded else learning
    adam = held * _ADAM_BYTES[4 if run.adapter else run.element] / machine.bandwidth
    return {
        "decode": run.response * step_seconds(shape, machine, run),
        "score": _FORWARD * numbers * tokens / rate,
        "update": passes * numbers * tokens * run.epochs / rate + steps * (adam + machine.step_seconds),
        "exchange": _exchange_seconds(numbers, learning, machine, run),
    }


def step_seconds(shape: Shape, machine: Machine, run: Run) -> float:
    """Seconds of a decoding step: every weight and a half-filled cache are read, and every row is multiplied."""
    numbers = count_parameters(shape)
    rows = -(-run.batch // machine.devices)
    cache = rows * (run.prompt + run.response / 2) * 2 * shape.layers * key_width(shape) * run.element
    reading = (numbers * run.element + cache) / machine.bandwidth
    multiplying = _FORWARD * numbers * rows / machine.flops
    return max(reading, multiplying) / machine.decoding


def _exchange_seconds(numbers: int, learning: int, machine: Machine, run: Run) -> float:
    """Seconds on the links: an all-reduce of gradients a step; or, sharded, weights for every forward and backward."""
    others = (machine.devices - 1) / machine.devices
    steps = run.epochs * run.minibatches
    if not run.is_sharded:
        gradients = learning * (4 if run.adapter else run.element)
        return steps * 2 * others * gradients / machine.link
    weights = others * numbers * run.element / machine.link
    rows = -(-run.batch // (machine.devices * run.minibatches))
    parts = -(-rows // run.micro_batch)
    update = steps * parts * (2 if run.adapter else 3) * weights  # forward, backward, and gradients the other way
    return update + (run.response + 1) * weights  # and in every decoding step, and once for the reference


def predict_bytes(shape: Shape, machine: Machine, run: Run) -> dict[str, int]:
    """Bytes that a device needs, by what takes them (`agents.memory`)."""
    numbers = count_parameters(shape)
    shards = machine.devices if run.is_sharded else 1
    parts = estimate_weights(
        numbers, run.adapter or numbers, run.element, shares_reference=bool(run.adapter), shards=shards
    )
    training = estimate(predict_sizes(shape, machine, run))
    for name in ("optimiser", "gradients"):
        training[name] = -(-training[name] // shards)
    parts |= training
    if run.is_sharded:
        parts["fetched"] = 2 * numbers * run.element // shape.layers  # a layer that runs, and the next one
    return parts


def predict_peak(shape: Shape, machine: Machine, run: Run) -> int:
    """Bytes that a device needs at the worst moment."""
    return peak(predict_bytes(shape, machine, run))


def predict_sizes(shape: Shape, machine: Machine, run: Run) -> Sizes:
    """What `agents.memory.measure` would measure on one of the devices."""
    length = run.prompt + run.response
    rows = -(-run.batch // machine.devices)
    layer = layer_bytes(length, shape.width, run.element)
    logits = 4 * run.response * shape.vocabulary
    kept = shape.layers * (length * shape.width * run.element if run.recomputes else layer)
    trainable = run.adapter or count_parameters(shape)
    return Sizes(
        batch_size=rows,
        micro_batch_size=min(run.micro_batch, -(-rows // run.minibatches)),
        prompt=run.prompt,
        horizon=run.response,
        vocabulary=shape.vocabulary,
        trainable=trainable,
        trainable_bytes=trainable * (4 if run.adapter else run.element),
        element=run.element,
        kept=kept + logits,
        inside=layer if run.recomputes else 0,
        cached=2 * shape.layers * key_width(shape) * run.element,
        has_graphs=not run.adapter and not run.is_sharded,
    )


def on(machine: Machine, devices: int) -> Machine:
    """The same devices, in another number."""
    return replace(machine, devices=devices)
