"""Small models, a tokenizer of words, and feedback on films: what the tests of reward models learn from."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from conftest import shifted
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lmgym.feedback.records import Completion, Ranking, Ratings, Record

WORDS = ["the", "film", "soup", "was", "good", "fine", "dull", "bad", "."]
VALENCE = {"good": 2, "fine": 1, "dull": -1, "bad": -2}
SPECIAL = ["<pad>", "<eos>", "<unk>"]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(shifted(seed))


def make_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: i for i, word in enumerate([*SPECIAL, *WORDS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def make_gpt2(dropout: float = 0.1) -> GPT2LMHeadModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return GPT2LMHeadModel(
            GPT2Config(
                vocab_size=len(WORDS) + len(SPECIAL),
                n_embd=16,
                n_layer=1,
                n_head=2,
                n_positions=16,
                resid_pdrop=dropout,
                pad_token_id=0,
                eos_token_id=1,
                bos_token_id=1,
            )
        )


def make_llama() -> LlamaForCausalLM:
    """A model without a bias anywhere, and without a pad token."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(WORDS) + len(SPECIAL),
                hidden_size=16,
                intermediate_size=16,
                num_hidden_layers=1,
                num_attention_heads=2,
                max_position_embeddings=16,
                pad_token_id=None,
                eos_token_id=1,
                bos_token_id=1,
            )
        )


def toy_records(size: int, k: int = 4, *, sign: int = 1, seed: int = 3, rated: bool = False) -> list[Record]:
    """Feedback of somebody who goes by the words of a completion alone; equal ones are tied. Each prompt is its own."""
    rng = np.random.default_rng(seed)
    records = []
    for _ in range(size):
        prompt = " ".join([*rng.choice(WORDS, 4), "was"])
        texts = [f" {' '.join(rng.choice(list(VALENCE), rng.integers(1, 4)))} . <eos>" for _ in range(k)]
        scores = [sign * sum(VALENCE.get(word, 0) for word in text.split()) for text in texts]
        judgement: Any = Ratings(tuple(scores), -6, 6)
        if not rated:
            values = sorted(set(scores), reverse=True)
            judgement = Ranking(tuple(tuple(i for i in range(k) if scores[i] == value) for value in values))
        records.append(Record(prompt, tuple(map(Completion, texts)), judgement))
    return records
