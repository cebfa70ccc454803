"""What the parts of `benchmarks.gpu` measure with: models with random weights, tasks on them, and a stopwatch."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

PROMPT = 16  # tokens


@dataclass(frozen=True)
class Setting:
    """How a part is run.

    Attributes:
        device: "cuda", or "cpu" for a look at what it does.
        is_small: tiny shapes and few rounds.
    """

    device: str
    is_small: bool = False

    @property
    def is_cuda(self) -> bool:
        """Whether it runs on a GPU."""
        return self.device == "cuda"

    def wait(self) -> None:
        """Waits for what has been launched."""
        if self.is_cuda:
            torch.cuda.synchronize()

    def free(self) -> None:
        """Gives back the memory that nobody uses."""
        if self.is_cuda:
            torch.cuda.empty_cache()

    def median_seconds(self, run: Callable[[], Any], rounds: int) -> float:
        """Median wall-clock time of a call, after one that warms up."""
        run()
        seconds = []
        for _ in range(rounds):
            self.wait()
            started = time.perf_counter()
            run()
            self.wait()
            seconds.append(time.perf_counter() - started)
        return statistics.median(seconds)


@dataclass(frozen=True)
class Shape:
    """A model with random weights.

    Attributes:
        family: "gpt2" or "llama". layers, width, heads: of its blocks. vocabulary: V.
        kv_heads, inner: of a Llama.
    """

    family: str
    layers: int
    width: int
    heads: int
    vocabulary: int
    kv_heads: int = 0
    inner: int = 0


SHAPES = {
    "tiny": Shape("gpt2", 2, 64, 4, 512),
    "GPT-2 124M": Shape("gpt2", 12, 768, 12, 50_257),
    "GPT-2 1.5B": Shape("gpt2", 48, 1600, 25, 50_257),
    "Llama 8B": Shape("llama", 32, 4096, 32, 128_256, kv_heads=8, inner=14_336),
}


@functools.cache
def word_tokenizer(vocabulary: int) -> Any:
    """A tokenizer of as many words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<eos>", "<unk>", *(f"w{i}" for i in range(3, vocabulary))]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def model_config(shape: Shape) -> Any:
    """The config of a shape, without dropout."""
    from transformers import GPT2Config, LlamaConfig

    ends = {"bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0}
    if shape.family == "llama":
        return LlamaConfig(
            num_hidden_layers=shape.layers,
            hidden_size=shape.width,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.kv_heads,
            intermediate_size=shape.inner,
            vocab_size=shape.vocabulary,
            **ends,
        )
    config = GPT2Config(
        n_layer=shape.layers, n_embd=shape.width, n_head=shape.heads, vocab_size=shape.vocabulary, **ends
    )
    config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = 0.0
    return config


def build_model(shape: Shape, dtype: torch.dtype, device: str) -> Any:
    """A model with random weights, made on the device it stays on."""
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(), torch.device(device):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(model_config(shape), dtype=dtype, trust_remote_code=False)


def random_prompts(vocabulary: int, count: int = 64) -> list[str]:
    """Prompts of words drawn at random."""
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(3, vocabulary, (count, PROMPT), generator=generator)
    return [" ".join(f"w{i}" for i in row) for row in words.tolist()]


def make_envs(shape: Shape, dtype: torch.dtype, horizon: int, kl_coef: float, device: str) -> Any:
    """The token MDP on a model with random weights, with a reward that costs nothing to compute."""
    from lmgym.envs.vector import RLHFVectorEnv
    from lmgym.models.activations import fuse_activations
    from lmgym.models.causal import CausalLM, freeze
    from lmgym.tasks import Task

    lm = CausalLM(freeze(fuse_activations(build_model(shape, dtype, device))), word_tokenizer(shape.vocabulary))
    task = Task(
        name="random",
        model=lm,
        reward=count_letters,
        prompts={"train": random_prompts(shape.vocabulary)},
        kl_coef=kl_coef,
        max_new_tokens=horizon,
        min_new_tokens=horizon - 1,
    )
    return RLHFVectorEnv(1, task=task, device=device, dtype=str(dtype).removeprefix("torch."))


def count_letters(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    """A reward that needs no model."""
    return [len(completion) / 100 for completion in completions]
