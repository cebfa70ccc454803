"""Tiny models made on the spot, in the formats of real ones, and a problem whose responses can be written down."""

from __future__ import annotations

import copy
import functools
import itertools
import math
from typing import Any

import gymnasium
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    PretrainedConfig,
    PreTrainedTokenizerFast,
)

from lmgym.models.causal import CausalLM, freeze
from lmgym.tasks import Task

# Before 1.4 Gymnasium's vector RecordEpisodeStatistics leaves the first step of every episode but the first uncounted
# where an env resets in the same step.
COUNTS_SAME_STEP = tuple(int(part) for part in gymnasium.__version__.split(".")[:2]) >= (1, 4)


TEXT = "the a film book meal was is very not good bad fine dull and but , . it we liked hated"
WORDS = TEXT.split()


def word_tokenizer(words: list[str] = WORDS, *, pad: str = "<pad>") -> PreTrainedTokenizerFast:
    """One token a word; decoding joins them with blanks."""
    vocabulary = {w: i for i, w in enumerate([pad, "<eos>", "<unk>", *words])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token=pad, eos_token="<eos>", unk_token="<unk>")


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE without merges: reads every text, and has no pad token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: i for i, symbol in enumerate(["<|end|>", *alphabet])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>", bos_token="<|end|>")


def gpt2(
    vocab_size: int, *, seed: int = 0, cls: type = GPT2LMHeadModel, scale: float = 0.3, **config: int
) -> torch.nn.Module:
    """A random GPT-2 shape whose logits are far from uniform."""
    return copy.deepcopy(_draw_gpt2(vocab_size, seed, cls, scale, **config))


@functools.cache
def _draw_gpt2(vocab_size: int, seed: int, cls: type, scale: float, **config: int) -> torch.nn.Module:
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 48} | config
    shape = GPT2Config(
        vocab_size=vocab_size,
        bos_token_id=1,
        eos_token_id=1,
        pad_token_id=0,
        initializer_range=scale,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        **sizes,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return cls(shape).eval()


def tiny_lm(config: PretrainedConfig, *, seed: int = 0) -> CausalLM:
    """A random causal LM of any architecture over `WORDS`; `config.vocab_size` may be larger than that."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
    return CausalLM(freeze(model), word_tokenizer())


def table_reward(
    prompts: list[str], completions: list[str], completion_ids: list[list[int]], **columns: object
) -> list[float]:
    """Scores between -1 and 1 that depend on every token, its place, and the end."""
    return [
        math.sin(len(p) + sum((t + 2) * i * i for t, i in enumerate(ids)))
        for p, ids in zip(prompts, completion_ids, strict=True)
    ]


class TinyProblem:
    """A task with so few responses that all of them can be written down.

    Attributes:
        lm: the reference, over 6 tokens; the EOS is token 1.
        other: another model, as a policy.
        responses: all R of them.
        T: the horizon.
    """

    def __init__(self, horizon: int = 3, kl_coef: float = 0.4, **changes: object) -> None:
        tokenizer = word_tokenizer(["x", "y", "z"])
        self.lm, self.other = (
            CausalLM(freeze(gpt2(6, seed=seed, n_positions=16, scale=0.4)), tokenizer) for seed in (0, 5)
        )
        self.T = horizon
        self.kl_coef = kl_coef
        self.prompts = ["x", "y z", "z z x"]
        fields = {"name": "tiny", "model": self.lm, "reward": table_reward, "prompts": {"train": self.prompts}}
        self.task = Task(**{**fields, "kl_coef": kl_coef, "max_new_tokens": horizon, **changes})
        words = [i for i in range(6) if i != 1]
        self.responses = [
            (*head, last)
            for t in range(horizon)
            for head in itertools.product(words, repeat=t)
            for last in ([1] if t < horizon - 1 else range(6))
        ]

    def token_log_probs(self, lm: CausalLM, prompt: str) -> torch.Tensor:
        """(R, T) float64 log-probs of the tokens of every response, 0 after its end; plain forwards."""
        ids = lm.tokenizer(prompt)["input_ids"]
        result = torch.zeros((len(self.responses), self.T), dtype=torch.float64)
        by_length = itertools.groupby(sorted(range(len(self.responses)), key=self._length), key=self._length)
        for length, group in by_length:
            rows = list(group)
            batch = torch.tensor([[*ids, *self.responses[i]] for i in rows])
            with torch.inference_mode():
                log_pi = lm.model(input_ids=batch).logits.double().log_softmax(-1)[:, len(ids) - 1 : -1]
            result[rows, :length] = log_pi.gather(2, batch[:, len(ids) :, None]).squeeze(2)
        return result

    def _length(self, i: int) -> int:
        return len(self.responses[i])

    def scores(self, prompt: str) -> torch.Tensor:
        """(R,) float64."""
        rows = [list(r) for r in self.responses]
        return torch.tensor(table_reward([prompt] * len(rows), [""] * len(rows), rows), dtype=torch.float64)

    def optimum(self, prompt: str) -> tuple[float, torch.Tensor]:
        """V*(x), and (R,) log pi*(y|x)."""
        log_weights = self.token_log_probs(self.lm, prompt).sum(1) + self.scores(prompt) / self.kl_coef
        value = self.kl_coef * log_weights.logsumexp(0)
        return value.item(), log_weights - value / self.kl_coef

    def objective(self, prompt: str, log_probs: torch.Tensor) -> float:
        """J(pi) of a policy with (R,) log-probs of whole responses."""
        ratio = log_probs - self.token_log_probs(self.lm, prompt).sum(1)
        return float((log_probs.exp() * (self.scores(prompt) - self.kl_coef * ratio)).sum())


def learn(agent: Any, batches: int, total: int = 10**6) -> list[dict[str, float]]:
    """The metrics of a number of batches, those that a clock makes left out."""
    history: list[dict[str, float]] = []

    def keep(step: int, metrics: dict[str, float]) -> bool:
        history.append({name: x for name, x in metrics.items() if not name.startswith("time/")} | {"step": step})
        return len(history) < batches

    agent.learn(total, keep)
    return history


def weights(agent: Any) -> Tensor:
    """Every parameter of an agent's policy, in one long vector."""
    return torch.cat([p.detach().flatten() for p in agent.policy.parameters()])
