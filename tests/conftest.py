"""Fixtures, and what pytest asks. Tests import tiny models from here too; they are made in tests/tiny.py.

The process that hands the tests out to others reads this file, and would load torch for nothing: nothing here does.
"""

from __future__ import annotations

import gc
import importlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from lmgym.models.causal import CausalLM

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
    "test_infos.py",
    "test_gpu_tables.py",
    "test_project.py",
    "test_distributed.py",
    "test_questions.py",
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
    import torch

    items.sort(key=lambda item: item.path.name not in LONG)
    has_cuda = torch.cuda.is_available()
    seen: set[str] = set()
    for item in items:
        if hasattr(getattr(item, "module", None), "shifted"):
            item.add_marker("seeds")
        function = item.nodeid.partition("[")[0]
        if function not in seen and not any(item.get_closest_marker(name) for name in ("slow", "gpu", "network")):
            item.add_marker("fast")
        seen.add(function)
        if item.get_closest_marker("gpu") and not has_cuda:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


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
    from lmgym.models import decoding

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


def __getattr__(name: str) -> Any:
    """What is made in tests/tiny.py."""
    if name.startswith(("_", "pytest")):  # pytest looks for its own
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module("tiny"), name)


def local_tasks() -> list[str]:
    """The names of the registered tasks for which nothing has to be downloaded."""
    from lmgym.tasks import registered_tasks

    return sorted(name for name, registered in registered_tasks().items() if not registered.on_hub)


def word_count(prompts: list[str], completions: list[str], **columns: object) -> list[float]:
    """A reward as a plain function."""
    return [0.1 * len((p + c).split()) for p, c in zip(prompts, completions, strict=True)]


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A causal LM over `WORDS`, with three embeddings more than its tokenizer has words."""
    from tiny import gpt2, word_tokenizer

    path = tmp_path_factory.mktemp("model")
    tokenizer = word_tokenizer()
    gpt2(len(tokenizer) + 3).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


@pytest.fixture(scope="session")
def reward_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A sequence classifier with the same tokenizer."""
    from tiny import gpt2, word_tokenizer
    from transformers import GPT2ForSequenceClassification

    path = tmp_path_factory.mktemp("reward")
    tokenizer = word_tokenizer()
    gpt2(len(tokenizer), seed=1, cls=GPT2ForSequenceClassification, num_labels=1).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


@pytest.fixture(scope="session")
def byte_reward_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A sequence classifier with another tokenizer, and no pad token."""
    from tiny import byte_tokenizer, gpt2
    from transformers import GPT2ForSequenceClassification

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


@pytest.fixture(scope="session")
def loaded(model_dir: str, reward_dir: str) -> object:
    """Keeps one copy of the tiny models in the shared cache, so that envs do not load them anew for every test."""
    from lmgym.models.sharing import load_causal_lm
    from lmgym.rewards.classifier import load_reward_model

    return load_causal_lm(model_dir), load_reward_model(reward_dir)


@pytest.fixture
def parts(model_dir: str, reward_dir: str, prompts_file: Path, loaded: object) -> dict[str, object]:
    """Keyword arguments of an env over tiny parts: quick, random, with early EOS now and then."""
    return {"model": model_dir, "reward": reward_dir, "prompts": str(prompts_file), "max_new_tokens": 8, "kl_coef": 0.2}
