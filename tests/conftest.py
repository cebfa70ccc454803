"""Tiny models made on the spot, in the formats of real ones."""

from __future__ import annotations

import copy
import functools
import gc
import itertools
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    PretrainedConfig,
    PreTrainedTokenizerFast,
)

from lmgym.models import decoding
from lmgym.models.causal import CausalLM, freeze
from lmgym.models.sharing import load_causal_lm
from lmgym.rewards.classifier import load_reward_model
from lmgym.tasks import Task

LONG = (
    "test_contributing.py",
    "test_pipeline.py",
    "test_compare_sweep.py",
    "test_page.py",
    "test_train.py",
    "test_own_feedback.py",
    "test_multirun.py",
    "test_build.py",
    "test_examples.py",
)
SEED_SHIFT = int(os.environ.get("SEED_SHIFT", "0"))


def shifted(seed: int = 0) -> int:
    """A seed that `SEED_SHIFT=100 make test` moves by 100: what a test says must be true of others as well."""
    return seed + SEED_SHIFT


@pytest.hookimpl(tryfirst=True)  # before `-m` chooses
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks what can be told without running it, and skips tests marked `gpu` where there is none.

    `seeds` are the tests of modules whose seeds can be shifted. `fast` is the first case of every test that is not
    marked `slow`. Files with tests that take long go first, so that no process is left alone with one at the end.
    """
    items.sort(key=lambda item: item.path.name not in LONG)
    seen: set[str] = set()
    for item in items:
        if hasattr(getattr(item, "module", None), "shifted"):
            item.add_marker("seeds")
        function = item.nodeid.partition("[")[0]
        if function not in seen and not any(item.get_closest_marker(name) for name in ("slow", "gpu", "network")):
            item.add_marker("fast")
        seen.add(function)
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


# Before 1.4 Gymnasium's vector RecordEpisodeStatistics leaves the first step of every episode but the first uncounted
# where an env resets in the same step.
COUNTS_SAME_STEP = tuple(int(part) for part in gymnasium.__version__.split(".")[:2]) >= (1, 4)


def pytest_collection_finish() -> None:
    """Takes what was imported out of the garbage collector's sight.

    A full collection is then cheap and comes often, and frees the models that are held in cycles.
    """
    gc.collect()
    gc.freeze()


def architecture(lm: CausalLM) -> tuple[object, ...]:
    """All of a model but its weights, of which only whether they are finite."""
    finite = all(bool(p.isfinite().all()) for p in lm.model.parameters())
    modules = tuple(map(type, lm.model.modules()))
    return (*modules, lm.model.config.to_json_string(), lm.vocab_size, lm.temperature, lm.dtype, lm.device, finite)


EXACT: dict[tuple[object, ...], bool] = {}  # whether the ring is exact for an architecture


@pytest.fixture(scope="module", autouse=True)
def _rings_are_tried_once_an_architecture(request: pytest.FixtureRequest) -> Iterator[None]:
    """Every new model would be tried, which takes longer than most tests; tests/models does try each of its own."""
    ring_is_exact = decoding.ring_is_exact

    def once(lm: CausalLM) -> bool:
        key = architecture(lm)
        if key not in EXACT:
            EXACT[key] = ring_is_exact(lm)
        return EXACT[key]

    with pytest.MonkeyPatch.context() as patched:
        if request.path.parent.name != "models":
            patched.setattr(decoding, "ring_is_exact", once)
        yield


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


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A causal LM over `WORDS`, with three embeddings more than its tokenizer has words."""
    path = tmp_path_factory.mktemp("model")
    tokenizer = word_tokenizer()
    gpt2(len(tokenizer) + 3).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


@pytest.fixture(scope="session")
def reward_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A sequence classifier with the same tokenizer."""
    path = tmp_path_factory.mktemp("reward")
    tokenizer = word_tokenizer()
    gpt2(len(tokenizer), seed=1, cls=GPT2ForSequenceClassification, num_labels=1).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


@pytest.fixture(scope="session")
def byte_reward_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A sequence classifier with another tokenizer, and no pad token."""
    path = tmp_path_factory.mktemp("byte_reward")
    tokenizer = byte_tokenizer()
    model = gpt2(len(tokenizer), seed=2, cls=GPT2ForSequenceClassification, num_labels=1, n_positions=256)
    model.config.pad_token_id = None
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


@pytest.fixture(scope="session")
def prompts_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ragged prompts, as JSON lines."""
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    texts = ["the film was", "a book", "it", "we liked the meal and", "the meal is not", "a film , a book and"]
    path.write_text("".join(f'{{"prompt": "{text}"}}\n' for text in texts))
    return path


def word_count(prompts: list[str], completions: list[str], **columns: object) -> list[float]:
    """A reward as a plain function."""
    return [0.1 * len((p + c).split()) for p, c in zip(prompts, completions, strict=True)]


@pytest.fixture(scope="session")
def loaded(model_dir: str, reward_dir: str) -> object:
    """Keeps one copy of the tiny models in the shared cache, so that envs do not load them anew for every test."""
    return load_causal_lm(model_dir), load_reward_model(reward_dir)


@pytest.fixture
def parts(model_dir: str, reward_dir: str, prompts_file: Path, loaded: object) -> dict[str, object]:
    """Keyword arguments of an env over tiny parts: quick, random, with early EOS now and then."""
    return {"model": model_dir, "reward": reward_dir, "prompts": str(prompts_file), "max_new_tokens": 8, "kl_coef": 0.2}


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
