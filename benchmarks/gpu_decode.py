"""Parts of `benchmarks.gpu`: the limits of a card, and decoding beside them and beside transformers."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch

from benchmarks.gpu_models import PROMPT, SHAPES, Setting, make_envs

Row = dict[str, Any]


def measure_limits(setting: Setting) -> Iterator[Row]:
    """Bytes/s of a device copy (read and written) and FLOP/s of a bf16 matrix product."""
    side = 512 if setting.is_small else 8192
    copied = 2**22 if setting.is_small else 2**32
    source = torch.empty(copied, dtype=torch.uint8, device=setting.device).random_(0, 255)
    target = torch.empty_like(source)
    bandwidth = 2 * copied / setting.median_seconds(lambda: target.copy_(source), 10)
    a, b = (torch.randn(side, side, device=setting.device, dtype=torch.bfloat16) for _ in range(2))

    def multiply() -> None:
        for _ in range(10):
            a @ b

    rate = 10 * 2 * side**3 / setting.median_seconds(multiply, 5)
    yield {"bytes_per_second": bandwidth, "flops_per_second": rate}


def measure_decode(setting: Setting) -> Iterator[Row]:
    """Tokens/s of decoding, by model, batch and path; what matters most comes first, should time run out."""
    names = ["tiny"] if setting.is_small else ["GPT-2 1.5B", "Llama 8B", "GPT-2 124M"]
    batches = (4,) if setting.is_small else (256, 64, 512)
    horizon = 8 if setting.is_small else 128
    for paths in (("collect",), ("generate", "continuous")):
        for name in names:
            envs = make_envs(SHAPES[name], torch.bfloat16, horizon, 0.0, setting.device)
            for path, batch in itertools.product(paths, batches):
                if path == "collect" or batch <= 256:
                    yield _decode_row(setting, envs, name, path, batch, horizon)
            del envs
            setting.free()


def _decode_row(setting: Setting, envs: Any, name: str, path: str, batch: int, horizon: int) -> Row:
    row: Row = {"model": name, "path": path, "batch": batch, "horizon": horizon}
    model = envs.engine.lm.model
    row["parameters"] = model.num_parameters()
    row["bytes_a_step"] = bytes_a_step(model, batch, horizon)
    row["flops_a_step"] = 2 * model.num_parameters() * batch
    rounds = 1 if setting.is_small or path != "collect" else 2
    try:
        run = _PATHS[path](envs, batch, horizon)
        row["tokens_per_second"] = batch * horizon / setting.median_seconds(run, rounds)
    except Exception as error:  # another library's own, or out of memory: the other rows are measured all the same
        row["error"] = f"{type(error).__name__}: {error}"[:200]
    finally:
        if path == "continuous":
            _end_continuous(model)
        setting.free()
    return row


def _collect(envs: Any, batch: int, horizon: int) -> Callable[[], Any]:
    """Ours."""
    from lmgym.models.policy import CausalPolicy
    from lmgym.rollout import collect

    policy = CausalPolicy(envs.engine.lm)
    return functools.partial(collect, envs, policy, _prompts(envs, batch), None, torch.Generator().manual_seed(0))


def _generate(envs: Any, batch: int, horizon: int) -> Callable[[], Any]:
    """`generate` of transformers, sampled from the whole distribution."""
    lm = envs.engine.lm
    ids, mask = (x.to(lm.device) for x in envs.engine.pad_prompts(_prompts(envs, batch)))
    sampling = {"do_sample": True, "top_k": 0, "top_p": 1.0, "pad_token_id": 0}
    lengths = {"max_new_tokens": horizon, "min_new_tokens": horizon}

    @torch.inference_mode()
    def run() -> Any:
        return lm.model.generate(ids, attention_mask=mask.long(), **sampling, **lengths)

    return run


def _continuous(envs: Any, batch: int, horizon: int) -> Callable[[], Any]:
    """Continuous batching of transformers; its manager lives on from call to call, as a server's would."""
    from transformers import GenerationConfig

    model = envs.engine.lm.model
    inputs = [list(prompt.ids) for prompt in _prompts(envs, batch)]
    config = GenerationConfig(
        do_sample=True, top_k=0, top_p=1.0, max_new_tokens=horizon, eos_token_id=-1, pad_token_id=0
    )

    def run() -> None:
        outputs = model.generate_batch(inputs, generation_config=config, persistent_manager=True)
        made = sum(len(output.generated_tokens) for output in outputs.values())
        if made != batch * horizon:
            raise RuntimeError(f"It made {made} tokens where {batch * horizon} were asked for.")

    return run


def _end_continuous(model: Any) -> None:
    """Frees the cache of continuous batching, which takes most of the card."""
    manager = getattr(model, "_cached_continuous_batching_manager", None)
    if manager is not None:
        model.destroy_cached_continuous_batching_manager()


_PATHS = {"collect": _collect, "generate": _generate, "continuous": _continuous}


def _prompts(envs: Any, batch: int) -> list[Any]:
    prompts = envs.engine.prompts
    return [prompts[i % len(prompts)] for i in range(batch)]


def bytes_a_step(model: Any, batch: int, horizon: int) -> float:
    """Fewest bytes that a decoding step reads: every weight once, and the keys and values of a half-done response."""
    embedding = 0 if model.config.tie_word_embeddings else model.get_input_embeddings().weight.nbytes
    weights = sum(parameter.nbytes for parameter in model.parameters()) - embedding
    config = model.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = config.hidden_size // config.num_attention_heads
    a_token = 2 * config.num_hidden_layers * heads * width * next(model.parameters()).element_size()
    return weights + batch * (PROMPT + horizon / 2) * a_token
