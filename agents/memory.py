"""How much memory a training run will take, before it starts: a run that does not fit says so, and says what to lower.

What autograd keeps of an episode is measured, on episodes of full length; the rest follows from sizes.

Shapes: B episodes a batch, b a micro-batch, P prompt columns, T response columns, L = P + T, V vocabulary, D width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache

from agents.batch import Batch, read_minibatch
from agents.policies.actor_critic import TrainablePolicy
from lmgym.episodes import Episodes
from lmgym.errors import InvalidArgumentError
from lmgym.models.caches import cache_keyword
from lmgym.models.causal import CausalLM
from lmgym.models.cuda_graphs import round_up_capacity
from lmgym.models.lean.graphs import MAX_TOKENS, round_up_shape
from lmgym.models.markov import MarkovLM
from lmgym.models.sampling import Sampler

_INSIDE = 24  # numbers a token that autograd keeps of one layer, by D: 17 of GPT-2, 21 of a Llama in bfloat16
_LOGIT_COPIES = 3  # float32 (B, V) that sampling makes of the logits
_GRADIENT_COPIES = 2  # float32 (n, V) that a backward pass makes of the gradient of n tokens' logits
_MARGIN = 1.05  # what an allocator loses between blocks
_GB = 1e9

ADVICE = {
    "layers": "lower `micro_batch_size`, or set `gradient_checkpointing` to true",
    "cache": "lower `batch_size` or `max_new_tokens`",
    "logits": "lower `batch_size`",
    "gradients": "train an adapter with `policy`='lora'",
    "graphs": "train an adapter with `policy`='lora'",
    "optimiser": "train an adapter with `policy`='lora'",
}


@dataclass(frozen=True)
class Sizes:
    """What the memory of a run depends on.

    Attributes:
        batch_size: B. micro_batch_size: b. prompt: P. horizon: T. vocabulary: V.
        trainable: numbers that learn. trainable_bytes: that they take.
        element: bytes of a number of the model.
        kept: bytes that autograd keeps of an episode of full length.
        cast: bytes that it keeps once: weights in another type.
        inside: bytes that one layer needs for an episode while it runs again; 0 where layers are kept.
        cached: bytes of a token's keys and values in all layers.
        moment: bytes of a number of Adam's moments.
        has_graphs: whether optimiser steps may run as CUDA graphs.
    """

    batch_size: int
    micro_batch_size: int
    prompt: int
    horizon: int
    vocabulary: int
    trainable: int
    trainable_bytes: int
    element: int
    kept: int
    inside: int
    cached: int
    cast: int = 0
    has_graphs: bool = False
    moment: int = 4


def estimate(sizes: Sizes) -> dict[str, int]:
    """Bytes that training takes beyond the weights and their float32 copies, by what takes them.

    Returns:
        "optimiser": Adam's two moments. "gradients": of all weights, in float32 too where weights are not.
        "layers": of a micro-batch, with its logits. "cache": keys and values of a batch. "logits": of sampling.
        "graphs": what those of optimiser steps keep besides.
    """
    b = min(sizes.micro_batch_size, sizes.batch_size)
    float32 = 4
    half = sizes.trainable_bytes < float32 * sizes.trainable
    gradients = sizes.trainable_bytes + (float32 * sizes.trainable if half else 0)
    logit_gradients = _GRADIENT_COPIES * sizes.horizon * sizes.vocabulary * float32
    return {
        "optimiser": 2 * sizes.moment * sizes.trainable,
        "gradients": gradients,
        "layers": sizes.cast + b * (sizes.kept + max(sizes.inside, logit_gradients)),
        "cache": sizes.batch_size * round_up_capacity(sizes.prompt + sizes.horizon) * sizes.cached,
        "logits": sizes.batch_size * sizes.vocabulary * (2 * sizes.element + _LOGIT_COPIES * float32),
        "graphs": _graph_bytes(sizes, b) if sizes.has_graphs else 0,
    }


def estimate_weights(
    parameters: int, trainable: int, element: int, *, shares_reference: bool, shards: int = 1
) -> dict[str, int]:
    """Bytes of weights, by what takes them; with `estimate` all that a run needs but for a reward model.

    Args:
        parameters: numbers of the reference. trainable: numbers that learn.
        element: bytes of a number of the model. Where they are fewer than 4, those that learn have float32 copies.
        shares_reference: whether the policy is an adapter in the reference.
        shards: devices that each hold a part of the weights.

    Returns:
        "policy", "reference" and "copies", of one device.
    """
    float32 = 4
    policy = trainable * (float32 if shares_reference else element)
    copies = 0 if shares_reference or element == float32 else float32 * trainable
    parts = {"policy": policy, "reference": parameters * element, "copies": copies}
    return {name: -(-size // shards) for name, size in parts.items()}


def layer_bytes(tokens: int, width: int, element: int) -> int:
    """Bytes that autograd keeps of one layer for so many tokens, at most."""
    return _INSIDE * tokens * width * element


def _graph_bytes(sizes: Sizes, b: int) -> int:
    """Bytes that graphs of optimiser steps keep, of b episodes, beside a micro-batch's layers and all gradients.

    A graph writes the gradients before it adds them up. Its layers stand in the place of a micro-batch's, filled up;
    where a micro-batch of full length is too large for graphs, those of shorter ones are there too.
    """
    length = sizes.prompt + sizes.horizon
    tokens = math.prod(round_up_shape(b, length, None))
    besides = tokens - b * length if tokens <= MAX_TOKENS else MAX_TOKENS
    return sizes.trainable_bytes + besides * sizes.kept // length


def peak(parts: dict[str, int]) -> int:
    """Bytes at the worst moment, in a backward pass: the graphs of decoding keep their rings and logits meanwhile."""
    return round(_MARGIN * sum(parts.values()))


def check_fits(parts: dict[str, int], free: int, device: torch.device) -> None:
    """Raises where a run needs more than the bytes that are free.

    Raises:
        InvalidArgumentError: with what takes the memory, and what to lower.
    """
    needed = peak(parts)
    if needed <= free:
        return
    heaviest = sorted(parts, key=lambda name: parts[name], reverse=True)
    listed = ", ".join(f"{name} {parts[name] / _GB:.1f}" for name in heaviest)
    advice = list(dict.fromkeys(ADVICE[name] for name in heaviest[:2]))
    raise InvalidArgumentError(
        f"`micro_batch_size` and `batch_size` must fit into the memory of {device}, got sizes that need about "
        f"{needed / _GB:.1f} GB where {free / _GB:.1f} GB are free (in GB: {listed}). To need less: "
        f"{'; or '.join(advice)}; or set `dtype` of the env to 'bfloat16'."
    )


def free_bytes(device: torch.device) -> int:
    """What a GPU can still give, the blocks included that torch has reserved and does not use."""
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused


def measure(
    policy: TrainablePolicy,
    lm: CausalLM,
    sampler: Sampler,
    *,
    batch_size: int,
    micro_batch_size: int,
    prompt: int,
    horizon: int,
    recomputes: bool,
) -> Sizes:
    """The sizes of a run of a policy, from forwards over one episode of full length and over two.

    Args:
        policy: what learns. lm: the model it decodes with, or one of that shape. sampler: how tokens are drawn.
        batch_size: B. micro_batch_size: b. prompt: P. horizon: T.
        recomputes: whether its layers run again in the backward pass.
    """
    weights = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    known = [*policy.parameters(), *lm.model.parameters(), *lm.model.buffers()]

    def kept_of(count: int) -> int:
        episodes = _episodes_of_full_length(count, prompt, horizon, policy.device)
        zeros = torch.zeros_like(episodes.log_probs)

        def read() -> Tensor:
            part = Batch(episodes, zeros, zeros)
            minibatch = read_minibatch(policy, sampler, part, episodes.lengths.sum(), count)
            return (minibatch.log_probs + minibatch.values + minibatch.entropies).sum()

        return kept_bytes(read, known)

    with torch.no_grad():  # the first read tries out which forward to use
        policy.read(_episodes_of_full_length(1, prompt, horizon, policy.device))
    one = kept_of(1)
    kept = kept_of(2) - one
    element = lm.dtype.itemsize
    inside = 0
    if recomputes:
        inside = layer_bytes(prompt + horizon, lm.model.config.get_text_config().hidden_size, element)
    return Sizes(
        batch_size=batch_size,
        micro_batch_size=micro_batch_size,
        prompt=prompt,
        horizon=horizon,
        vocabulary=lm.vocab_size,
        trainable=sum(parameter.numel() for parameter in weights),
        trainable_bytes=sum(parameter.nbytes for parameter in weights),
        element=element,
        kept=kept,
        inside=inside,
        cached=_cached_bytes(lm),
        cast=max(one - kept, 0),
        has_graphs=policy.has_graphs,
    )


def kept_bytes(run: Callable[[], Tensor], weights: Iterable[Tensor]) -> int:
    """Bytes that autograd keeps of what a function computes, weights left out."""
    known = {weight.untyped_storage().data_ptr() for weight in weights}
    kept: dict[int, int] = {}

    def note(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        result = run()  # alive, and with it all that was kept, until the bytes are counted
    total = sum(kept.values())
    del result
    return total


@torch.no_grad()
def _cached_bytes(lm: CausalLM) -> int:
    """Bytes of the keys and values of one token; 0 of a table, which has none."""
    if isinstance(lm.model, MarkovLM):
        return 0
    cache = DynamicCache()
    ids = torch.zeros((1, 1), dtype=torch.int64, device=lm.device)
    lm.model(input_ids=ids, attention_mask=torch.ones_like(ids), **{cache_keyword(lm.model): cache})
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


def _episodes_of_full_length(count: int, prompt: int, horizon: int, device: torch.device) -> Episodes:
    """Episodes of zeros as long as any can be."""
    response = torch.zeros((count, horizon))
    episodes = Episodes(
        prompt_ids=torch.zeros((count, prompt), dtype=torch.int64),
        prompt_mask=torch.ones((count, prompt), dtype=torch.bool),
        response_ids=torch.zeros((count, horizon), dtype=torch.int64),
        response_mask=torch.ones((count, horizon), dtype=torch.bool),
        log_probs=response,
        ref_log_probs=response,
        scores=torch.zeros(count),
        values=response,
        terminated=torch.ones(count, dtype=torch.bool),
        prompt_index=torch.zeros(count, dtype=torch.int64),
    )
    return episodes.to(device)
