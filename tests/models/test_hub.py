"""Names of models on a hub that has them, that has not, and that cannot be reached."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

from lmgym.errors import InvalidArgumentError
from lmgym.models import adapters
from lmgym.models.adapters import tokenizer_source
from lmgym.models.hub import TIMEOUT, locate
from lmgym.models.sharing import load_causal_lm


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Has the hub answer with an error, or with a model where it is None; counts the questions."""
    asked: list[str] = []

    def answer(error: Exception | None) -> list[str]:
        def model_info(self: Any, name: str, timeout: float) -> None:
            assert timeout == TIMEOUT
            asked.append(name)
            if error is not None:
                raise error

        monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
        return asked

    return answer


def refusal(kind: type[HfHubHTTPError], status: int) -> HfHubHTTPError:
    """An answer, whichever network library the hub's own uses."""
    return kind("no", response=MagicMock(status_code=status, headers={}))


def test_a_directory_is_not_asked_for(hub: Any, tmp_path: Path) -> None:
    asked = hub(OSError("no network"))
    assert locate("model", str(tmp_path)) == str(tmp_path)
    assert asked == []


def test_a_model_of_the_hub_is_loaded_by_its_name(hub: Any) -> None:
    assert hub(None) == []
    assert locate("model", "some/model") == "some/model"
    hub(refusal(HfHubHTTPError, 429))
    assert locate("model", "some/model") == "some/model"


def test_a_model_and_its_tokenizer_are_asked_for_once(hub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("is_adapter", "_load", "load_tokenizer", "check_tokenizer"):
        monkeypatch.setattr(adapters, name, lambda *_: None)
    asked = hub(None)
    adapters.load_pretrained("model", "some/model", None, torch.float32)
    assert asked == ["some/model"]


def test_a_name_that_the_hub_does_not_know_is_told(hub: Any) -> None:
    hub(refusal(RepositoryNotFoundError, 404))
    with pytest.raises(InvalidArgumentError, match="`reward` must be .* is called 'some/modle'"):
        locate("reward", "some/modle")


def test_without_a_network_nothing_else_is_asked(hub: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Every file would be asked for six times, with pauses in between: minutes until the first word."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    asked = hub(ConnectionError("[Errno -2] Name or service not known"))
    with pytest.raises(InvalidArgumentError, match=r"no model of that name in the cache, .* \(\[Errno -2\] Name"):
        load_causal_lm("nobody/no-such-model", "cpu", "float32")
    assert asked == ["nobody/no-such-model"]
    with pytest.raises(InvalidArgumentError, match="no model of that name in the cache"):
        tokenizer_source("model", "nobody/no-such-model")


def test_without_a_network_the_cache_serves(hub: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    hub(ConnectionError("no network"))
    snapshot = tmp_path / "models--some--model" / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (tmp_path / "models--some--model" / "refs").mkdir()
    (tmp_path / "models--some--model" / "refs" / "main").write_text("a" * 40)
    assert Path(locate("model", "some/model")) == snapshot
