"""Models before their training, and the tokenizer of words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

PAD = "<pad>"
EOS = "<eos>"
UNKNOWN = "<unk>"

# The models of a build with their tokenizers, by directory; and what was measured, by name.
Built = tuple[dict[str, tuple[Any, Any]], dict[str, Any]]


def make_gpt2(shape: dict[str, Any], tokenizer: Any, seed: int) -> Any:
    """A GPT-2 with random weights, without dropout."""
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_embd=shape["width"],
        n_layer=shape["layers"],
        n_head=shape["heads"],
        n_positions=shape["positions"],
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return GPT2LMHeadModel(config)


def make_word_tokenizer(words: Sequence[str], max_length: int) -> Any:
    """A tokenizer with one token a word: text is split at white space and joined by single spaces."""
    vocabulary = {word: token for token, word in enumerate([PAD, EOS, UNKNOWN, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        bos_token=EOS,
        unk_token=UNKNOWN,
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )
