"""What invariants are measured on: tiny models, a few responses, and a batch that is its own distribution.

Shapes as in `lmgym.testing.adapter`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lmgym.testing.adapter import Responses

EOS = 1
VOCABULARY = 12


def rotary_model() -> Any:
    """A random Llama of two layers: it knows positions only by their differences. In training mode, as handed over."""
    return copy.deepcopy(_rotary_model())


def learned_positions_model(*, dropout: float = 0.0) -> Any:
    """A random GPT-2 of two layers, whose positions are learned embeddings. In training mode, as it is handed over."""
    model = copy.deepcopy(_learned_positions_model())
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = dropout
    return model


@cache
def _rotary_model() -> Any:
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,
        bos_token_id=EOS,
        eos_token_id=EOS,
        pad_token_id=EOS,
        tie_word_embeddings=False,
    )
    return _random(LlamaForCausalLM, config)


@cache
def _learned_positions_model() -> Any:
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=16,
        n_layer=2,
        n_head=2,
        n_positions=64,
        initializer_range=0.3,
        attn_pdrop=0.0,
        bos_token_id=EOS,
        eos_token_id=EOS,
        pad_token_id=EOS,
    )
    return _random(GPT2LMHeadModel, config)


def _random(kind: Any, config: Any) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return kind(config).train()


def word_tokenizer() -> Any:
    """One token a word, for the vocabulary of the models above."""
    words = ["<pad>", "<eos>", "<unk>", *"abcdefghi"]
    backend = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
    )


def some_responses() -> Responses:
    """Three responses of 4, 2 and 5 tokens to prompts of 3, 1 and 2; the last has no EOS, and padding is EOS."""
    prompts = [[4, 5, 6], [7], [8, 9]]
    responses = [[2, 3, 10, EOS], [11, EOS], [3, 2, 11, 10, 2]]
    return pad(prompts, responses)


def pad(prompts: list[list[int]], responses: list[list[int]]) -> Responses:
    """Prompts and responses as tensors; padding is EOS."""
    p = max(len(prompt) for prompt in prompts)
    t = max(len(response) for response in responses)
    prompt_ids = torch.tensor([[EOS] * (p - len(x)) + x for x in prompts])
    prompt_mask = torch.tensor([[False] * (p - len(x)) + [True] * len(x) for x in prompts])
    response_ids = torch.tensor([x + [EOS] * (t - len(x)) for x in responses])
    response_mask = torch.tensor([[True] * len(x) + [False] * (t - len(x)) for x in responses])
    return Responses(prompt_ids, prompt_mask, response_ids, response_mask, EOS, EOS)


def widen(responses: Responses, left: int = 0, right: int = 0) -> Responses:
    """The same responses with more padding."""
    pads = nn.functional.pad
    return replace(
        responses,
        prompt_ids=pads(responses.prompt_ids, (left, 0), value=responses.pad),
        prompt_mask=pads(responses.prompt_mask, (left, 0), value=False),
        response_ids=pads(responses.response_ids, (0, right), value=responses.pad),
        response_mask=pads(responses.response_mask, (0, right), value=False),
    )


def rows_of(responses: Responses) -> Iterator[tuple[int, list[int], list[int]]]:
    """Yields each row's number, prompt and response without padding."""
    for i in range(len(responses.prompt_ids)):
        prompt = responses.prompt_ids[i][responses.prompt_mask[i]].tolist()
        response = responses.response_ids[i][responses.response_mask[i]].tolist()
        yield i, prompt, response


def plain_log_probs(model: Any, responses: Responses, temperature: float = 1.0) -> Tensor:
    """(B, T) by the definition: each row alone, without padding, and dropout off; 0 off the mask."""
    was_training = model.training
    model.eval()
    found = torch.zeros(responses.response_mask.shape)
    with torch.no_grad():
        for i, prompt, response in rows_of(responses):
            logits = model(input_ids=torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
            log_probs = (logits.float() / temperature).log_softmax(-1)
            found[i, : len(response)] = log_probs[range(len(response)), response]
    model.train(was_training)
    return found


@dataclass(frozen=True)
class Enumerated:
    """All responses of a tiny policy, each as often as is probable: the mean over the batch is the expectation.

    A policy of states, one a prefix, has the probabilities 1/4, 1/2 and 1/4 in each. A response is one or two tokens
    of 0 (EOS), 1 and 2, so that 16 rows hold every response exactly in proportion.

    Attributes:
        logits: (S, 3) of the states, float64, with a gradient. states: (B, T) the state before each token.
        tokens: (B, T). mask: (B, T) bool.
    """

    logits: Tensor
    states: Tensor
    tokens: Tensor
    mask: Tensor

    @property
    def log_probs(self) -> Tensor:
        """(B, T) nats, differentiable; -1 on padding, a number without a meaning."""
        chosen = self.logits.log_softmax(-1)[self.states, self.tokens]
        return torch.where(self.mask, chosen, -1.0)

    def log_probs_under(self, logits: Tensor) -> Tensor:
        """(B, T) nats under other logits (S, 3); -1 on padding."""
        return torch.where(self.mask, logits.log_softmax(-1)[self.states, self.tokens], -1.0)

    def gradient(self, loss: Tensor) -> Tensor:
        """(S, 3) gradient of a scalar; 0 where the scalar does not depend on the policy."""
        if not loss.requires_grad:
            return torch.zeros_like(self.logits)
        found = torch.autograd.grad(loss, self.logits, allow_unused=True)[0]
        return torch.zeros_like(self.logits) if found is None else found


QUARTERS = ((1, 2, 1), (2, 1, 1), (1, 1, 2))  # of a state's tokens, by the state


def enumerate_responses(tokens: int, *, has_eos: bool = False) -> Enumerated:
    """All responses of so many tokens (1 or 2); with `has_eos` token 0 ends one, and lengths differ."""
    states: list[list[int]] = []
    chosen: list[list[int]] = []
    for first in range(3):
        is_over = tokens == 1 or (has_eos and first == 0)
        count = QUARTERS[0][first] * (4 if tokens == 2 else 1)
        if is_over:
            states += [[0]] * count
            chosen += [[first]] * count
            continue
        after = 1 + first
        for second in range(3):
            repeats = QUARTERS[0][first] * QUARTERS[after % 3][second]
            states += [[0, after]] * repeats
            chosen += [[first, second]] * repeats
    mask = torch.tensor([[t < len(row) for t in range(tokens)] for row in chosen])
    padded = [torch.tensor([row + [0] * (tokens - len(row)) for row in rows]) for rows in (states, chosen)]
    quarters = torch.tensor([QUARTERS[s % 3] for s in range(4)], dtype=torch.float64)
    return Enumerated((quarters / 4).log().requires_grad_(), padded[0], padded[1], mask)


def reference_logits() -> Tensor:
    """(4, 3) of a reference that differs from the policy in every state."""
    return torch.tensor([[0.3, -0.5, 0.8], [-0.7, 0.4, 0.1], [0.6, 0.2, -0.9], [0.0, 1.0, -0.4]], dtype=torch.float64)
