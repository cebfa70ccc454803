"""What a checkpoint says of how to generate from it: plain transformers then draws from the policy's distribution."""

from __future__ import annotations

import json
from pathlib import Path

from transformers import GenerationConfig

from lmgym.models.causal import CausalLM


def make_generation_config(lm: CausalLM) -> GenerationConfig:
    """Samples from softmax(logits / temperature) over the tokenizer's ids, and from nothing else.

    Left to itself, `generate` takes the likeliest token, or leaves all but the 50 likeliest out, and what the reference
    was published with (top_p, a repetition penalty) would go on with the policy.
    """
    tokenizer = lm.tokenizer
    ends = sorted(lm.eos_token_ids)
    pad = tokenizer.pad_token_id
    if pad is None:
        pad = ends[0] if ends else lm.pad_token_id
    return GenerationConfig(
        do_sample=True,
        temperature=lm.temperature,
        top_k=0,
        top_p=1.0,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=ends or None,
        pad_token_id=pad,
        suppress_tokens=[*lm.holes, *range(lm.vocab_size, lm.embedded)] or None,
    )


def save_generation(lm: CausalLM, directory: Path) -> None:
    """Writes `generation_config.json`, and the tokenizer as one that pads on the left, where generation needs it."""
    make_generation_config(lm).save_pretrained(directory)
    lm.tokenizer.save_pretrained(directory)
    path = directory / "tokenizer_config.json"
    described = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(described | {"padding_side": "left"}, indent=2, ensure_ascii=False), encoding="utf-8")
