"""Directories in the formats of the public checkpoints and data sets that tasks are on, with tiny weights.

`python tests/checkpoints.py DIRECTORY` writes those of all four tasks.
"""

from __future__ import annotations

import gzip
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow
import torch
import transformers as hf
from pyarrow import parquet
from tokenizers import ByteLevelBPETokenizer

TEXT = "the film was good bad and i saw it with friends who liked every part of that long old story"
WORDS = TEXT.split()
QUESTION = "Tom has {} apples and buys {} more. How many has he?"
POST = "SUBREDDIT: r/relationships\n\nTITLE: post {}\n\nPOST: i saw a film with friends\n\nTL;DR:"
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
_CORPUS = [TEXT, QUESTION, POST, "#### 0 1 2 3 4 5 6 7 8 9", "user assistant Human: Assistant:"]
_GPT2 = {"n_embd": 16, "n_layer": 1, "n_head": 2, "bos_token_id": 0, "eos_token_id": 0}
_SIZE = {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 32}


def train_bpe(special: Sequence[str]) -> ByteLevelBPETokenizer:
    """Byte pairs of a small corpus."""
    backend = ByteLevelBPETokenizer()
    backend.train_from_iterator(_CORPUS, vocab_size=400, special_tokens=list(special), show_progress=False)
    return backend


def save_bpe(directory: Path, special: Sequence[str], eos: str, template: str | None = None) -> Any:
    """A byte-level BPE tokenizer like that of GPT-2, Pythia and Qwen; `template` is its chat template."""
    backend = train_bpe(special)
    tokenizer = hf.PreTrainedTokenizerFast(tokenizer_object=backend._tokenizer, eos_token=eos)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(directory)
    return tokenizer


def save_model(directory: Path, kind: type, config: Any) -> None:
    """A model with weights drawn from a fixed seed, as safetensors."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        kind(config).save_pretrained(directory)


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """A Parquet file, or JSON lines that are packed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        parquet.write_table(pyarrow.Table.from_pylist([dict(row) for row in rows]), path)
    else:
        path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))


def imdb(root: Path) -> dict[str, str]:
    """GPT-2 with the tokenizer's two files, a DistilBERT of two labels, and reviews of which some are long."""
    model, reward, data = (root / name for name in ("model", "reward", "data"))
    backend = train_bpe(["<|endoftext|>"])
    model.mkdir(parents=True)
    backend.save_model(str(model))  # vocab.json and merges.txt
    (model / "tokenizer_config.json").write_text('{"model_max_length": 1024}')
    save_model(model, hf.GPT2LMHeadModel, hf.GPT2Config(vocab_size=backend.get_vocab_size(), n_positions=128, **_GPT2))
    reward.mkdir(parents=True)
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz.,", *WORDS[:6]]
    pieces += [f"##{letter}" for letter in "abcdefghijklmnopqrstuvwxyz"]
    (reward / "vocab.txt").write_text("\n".join(dict.fromkeys(pieces)) + "\n")
    hf.BertTokenizer(str(reward / "vocab.txt")).save_pretrained(reward)
    sizes = {"dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 32, "max_position_embeddings": 96}
    config = hf.DistilBertConfig(vocab_size=len(dict.fromkeys(pieces)), num_labels=2, **sizes)
    save_model(reward, hf.DistilBertForSequenceClassification, config)
    for split in ("train", "test"):
        words = [WORDS[i % len(WORDS)] for i in range(400)]
        rows = [{"text": " ".join([split, *words[i : i + 8 + 12 * i]]), "label": i % 2} for i in range(20)]
        write_rows(data / "plain_text" / f"{split}-00000-of-00001.parquet", rows)
    return {"model": str(model), "reward": str(reward), "prompts": str(data)}


def tldr(root: Path) -> dict[str, str]:
    """A GPT-NeoX and a reward model on it that read the same tokens, and posts in two files, one of them too long."""
    model, reward, data = (root / name for name in ("model", "reward", "data"))
    for directory, kind in ((model, hf.GPTNeoXForCausalLM), (reward, hf.GPTNeoXForSequenceClassification)):
        tokenizer = save_bpe(directory, ["<|endoftext|>", "[PAD]"], "<|endoftext|>")
        sizes = {**_SIZE, "max_position_embeddings": 1024, "bos_token_id": 0, "eos_token_id": 0}
        config = hf.GPTNeoXConfig(vocab_size=len(tokenizer) + 20, num_labels=1, **sizes)
        save_model(directory, kind, config)
    for split in ("train", "validation", "test"):
        rows = [{"prompt": POST.format(f"{split} {i}"), "completion": " a film"} for i in range(6)]
        rows[1]["prompt"] = rows[1]["prompt"].replace("a film", "a film " * 600)
        for i in range(2):
            write_rows(data / "data" / f"{split}-0000{i}-of-00002.parquet", rows[i::2])
    return {"model": str(model), "reward": str(reward), "prompts": str(data)}


def chat_model(directory: Path) -> str:
    """A Qwen 2 with a chat template and no start token."""
    tokenizer = save_bpe(directory, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], "<|im_end|>", CHATML)
    sizes = {**_SIZE, "num_key_value_heads": 2, "max_position_embeddings": 1024, "tie_word_embeddings": True}
    save_model(directory, hf.Qwen2ForCausalLM, hf.Qwen2Config(vocab_size=len(tokenizer) + 8, **sizes))
    return str(directory)


def hh(root: Path) -> dict[str, Any]:
    """A chat model, two GPT-2 with a score, and dialogues; one of each file is no dialogue, and one is there twice."""
    rewards = []
    for name in ("helpful", "harmless"):
        tokenizer = save_bpe(root / name, ["<|endoftext|>"], "<|endoftext|>")
        config = hf.GPT2Config(vocab_size=len(tokenizer), num_labels=1, pad_token_id=0, **_GPT2)
        save_model(root / name, hf.GPT2ForSequenceClassification, config)
        rewards.append(str(root / name))
    for split in ("train", "test"):
        for kind in ("helpful", "harmless"):
            rows = [_dialogue(f"{split} {kind} {i}", i % 2 + 1) for i in range(4)]
            rows += [rows[0], {"chosen": "no dialogue", "rejected": "none"}]
            write_rows(root / "data" / f"{kind}-base" / f"{split}.jsonl.gz", rows)
    return {"model": chat_model(root / "model"), "reward": rewards, "prompts": str(root / "data")}


def _dialogue(topic: str, turns: int) -> dict[str, str]:
    asked = "".join(f"\n\nHuman: i saw {topic}\n\nAssistant: it was part {i}" for i in range(turns))
    return {"chosen": f"{asked} good", "rejected": f"{asked} bad"}


def gsm8k(root: Path) -> dict[str, str]:
    """A chat model, and problems with their solutions."""
    for split, first in (("train", 0), ("test", 10)):
        rows = []
        for i in range(first, first + 6):
            solution = f"He has {i} + {1000 * i} = <<{i}+{1000 * i}={1001 * i}>>{1001 * i}.\n#### {1001 * i:,}"
            rows.append({"question": QUESTION.format(i, 1000 * i), "answer": solution})
        write_rows(root / "data" / "main" / f"{split}-00000-of-00001.parquet", rows)
    return {"model": chat_model(root / "model"), "prompts": str(root / "data")}


if __name__ == "__main__":
    for make in (imdb, tldr, hh, gsm8k):
        print(make.__name__, make(Path(sys.argv[1]) / make.__name__))
