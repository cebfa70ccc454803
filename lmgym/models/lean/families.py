"""Which Hugging Face models a lean forward is known for, and how their modules map to its parts.

A model that differs from what its family usually is (an adapter in a layer, a hook, cross-attention, rotary positions
that depend on the length) is refused, and runs as it is.

Shapes: n tokens, H query heads, G key-value heads, h width of a head.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lmgym.models.lean.parts import MLP, GatedMLP, Linear, Norm, Rope, UnknownPartError
from lmgym.models.lean.transformer import Heads, Layer, Transformer

_STATIC_ROPES = ("default", "linear", "llama3", "yarn")  # whose frequencies do not depend on the length


def describe(model: Any) -> Transformer | None:
    """A causal LM in the parts of a lean forward; None where it is not known to be made of them."""
    if type(model).__name__ not in _LANGUAGE_MODELS or not type(model).__module__.startswith("transformers."):
        return None
    return _describe(model, model.base_model, model.get_output_embeddings())


def describe_trunk(trunk: Any) -> Transformer | None:
    """The same of a model without a head, such as a critic's."""
    return _describe(trunk, trunk, None)


def _describe(model: nn.Module, trunk: Any, head: nn.Module | None) -> Transformer | None:
    family = _FAMILIES.get(type(trunk).__name__)
    if family is None or not type(trunk).__module__.startswith("transformers.") or _has_hooks(model):
        return None
    try:
        return family(trunk, None if head is None else Linear.of(head))
    except (UnknownPartError, AttributeError, KeyError, TypeError):
        return None


def _has_hooks(model: nn.Module) -> bool:
    return any(
        module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module) for module in model.modules()
    )


def _require(condition: bool, what: str) -> None:
    if not condition:
        raise UnknownPartError(what)


def _gpt2(trunk: Any, head: Linear | None) -> Transformer:
    config = trunk.config
    _require(not config.add_cross_attention, "cross-attention")
    layers = []
    for i, block in enumerate(trunk.h):
        attention = block.attn
        scaling = attention.head_dim**-0.5 if config.scale_attn_weights else 1.0
        if config.scale_attn_by_inverse_layer_idx:
            scaling /= i + 1
        layers.append(
            Layer(
                attention_norm=Norm.of(block.ln_1),
                project=_ProjectTogether(Linear.of(attention.c_attn), attention.num_heads, by_head=False),
                scaling=scaling,
                out=Linear.of(attention.c_proj),
                mlp_norm=Norm.of(block.ln_2),
                mlp=MLP(Linear.of(block.mlp.c_fc), Linear.of(block.mlp.c_proj), block.mlp.act),
            )
        )
    tokens = _embedding(trunk.wte)
    positions = _embedding(trunk.wpe)
    return Transformer(tokens, positions, None, layers, Norm.of(trunk.ln_f), head)


def _gpt_neox(trunk: Any, head: Linear | None) -> Transformer:
    layers = []
    for block in trunk.layers:
        attention = block.attention
        heads = trunk.config.num_attention_heads
        layers.append(
            Layer(
                attention_norm=Norm.of(block.input_layernorm),
                project=_ProjectTogether(Linear.of(attention.query_key_value), heads, by_head=True),
                scaling=attention.scaling,
                out=Linear.of(attention.dense),
                mlp_norm=Norm.of(block.post_attention_layernorm),
                mlp=MLP(Linear.of(block.mlp.dense_h_to_4h), Linear.of(block.mlp.dense_4h_to_h), block.mlp.act),
                parallel=block.use_parallel_residual,
            )
        )
    tokens = _embedding(trunk.embed_in)
    rope = _rope(trunk.rotary_emb)
    return Transformer(tokens, None, rope, layers, Norm.of(trunk.final_layer_norm), head)


def _llama(trunk: Any, head: Linear | None) -> Transformer:
    layers = []
    for block in trunk.layers:
        attention = block.self_attn
        mlp = block.mlp
        layers.append(
            Layer(
                attention_norm=Norm.of(block.input_layernorm),
                project=_project_apart(attention),
                scaling=attention.scaling,
                out=Linear.of(attention.o_proj),
                mlp_norm=Norm.of(block.post_attention_layernorm),
                mlp=GatedMLP(Linear.of(mlp.gate_proj), Linear.of(mlp.up_proj), Linear.of(mlp.down_proj), mlp.act_fn),
            )
        )
    window = getattr(trunk.config, "sliding_window", None)
    return Transformer(
        tokens=_embedding(trunk.embed_tokens),
        positions=None,
        rope=_rope(trunk.rotary_emb),
        layers=layers,
        norm=Norm.of(trunk.norm),
        head=head,
        window=window,
        padding_idx=trunk.embed_tokens.padding_idx,
    )


_LANGUAGE_MODELS = (
    "GPT2LMHeadModel",
    "GPTNeoXForCausalLM",
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
)
_FAMILIES: dict[str, Callable[[Any, Linear | None], Transformer]] = {
    "GPT2Model": _gpt2,
    "GPTNeoXModel": _gpt_neox,
    "LlamaModel": _llama,
    "MistralModel": _llama,
    "Qwen2Model": _llama,
    "Qwen3Model": _llama,
}


def _embedding(module: nn.Module) -> dict[str, Any]:
    is_plain = type(module) is nn.Embedding and module.max_norm is None and not module.scale_grad_by_freq
    _require(is_plain, type(module).__name__)
    return module._parameters


def _rope(module: Any) -> Rope:
    _require(module.rope_type in _STATIC_ROPES, "rotary positions that depend on the length")
    return Rope(module._buffers, float(module.attention_scaling))


@dataclass(frozen=True)
class _ProjectTogether:
    """Queries, keys and values of one layer; `by_head`: whether those of each head stand together."""

    linear: Linear
    heads: int
    by_head: bool

    def __call__(self, x: Tensor) -> Heads:
        together = self.linear(x)
        if self.by_head:
            queries, keys, values = together.view(len(x), self.heads, 3, -1).unbind(2)
        else:
            queries, keys, values = together.view(len(x), 3, self.heads, -1).unbind(1)
        return queries, keys, values


@dataclass(frozen=True)
class _ProjectApart:
    """Queries, keys and values of a layer each, of heads h wide; Qwen3 normalises the heads of the first two."""

    queries: Linear
    keys: Linear
    values: Linear
    width: int
    query_norm: Norm | None
    key_norm: Norm | None

    def __call__(self, x: Tensor) -> Heads:
        queries, keys, values = (
            each(x).view(len(x), -1, self.width) for each in (self.queries, self.keys, self.values)
        )
        if self.query_norm is not None and self.key_norm is not None:
            queries = self.query_norm(queries)
            keys = self.key_norm(keys)
        return queries, keys, values


def _project_apart(attention: Any) -> _ProjectApart:
    has_norms = hasattr(attention, "q_norm")
    return _ProjectApart(
        queries=Linear.of(attention.q_proj),
        keys=Linear.of(attention.k_proj),
        values=Linear.of(attention.v_proj),
        width=attention.head_dim,
        query_norm=Norm.of(attention.q_norm) if has_norms else None,
        key_norm=Norm.of(attention.k_norm) if has_norms else None,
    )
