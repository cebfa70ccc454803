"""The client of an engine.

Shapes: B prompts, T response columns.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import math
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lmgym.ending import EndRule
from lmgym.models.causal import CausalLM
from lmgym.models.sampling import Sampler
from lmgym.remote.protocol import OWNER, EngineError, make_request, read_completions

_QUICK = 60.0  # seconds for an answer that needs no work
_MAX_REASON = 300  # characters of an engine's own message
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # an engine is on the same network
_DEVELOPMENT = "Start vLLM with VLLM_SERVER_DEV_MODE=1 in its environment."


class Client:
    """Calls an engine.

    Args:
        url: such as http://127.0.0.1:8000. timeout: seconds that an answer may take.

    Attributes:
        model: what the engine calls its model.
        root: the directory or hub name that it was started with.
        max_tokens: the longest sequence, prompt and response together; None where it does not say.
        is_ours: whether it takes uniforms.
        logprobs_mode: which log-probs it gives; those that tokens are drawn with are "processed_logprobs".

    Raises:
        EngineError: for an engine that does not answer, or does not take weights.
    """

    def __init__(self, url: str, timeout: float = 600.0) -> None:
        self.url = url.rstrip("/")
        self._timeout = timeout
        self._call("/health", timeout=_QUICK)
        model = _first_model(self._call("/v1/models", timeout=_QUICK))
        self.model = str(model["id"])
        self.root = str(model.get("root") or self.model)
        self.max_tokens: int | None = model.get("max_model_len")
        self.is_ours = model.get("owned_by") == OWNER
        info = self._call("/server_info?config_format=json", timeout=_QUICK, if_missing=_DEVELOPMENT)
        self.logprobs_mode = str(info["vllm_config"]["model_config"]["logprobs_mode"])

    def load_weights(self, directory: Path) -> None:
        """Has the engine sample from the weights of a directory, and forget what it knows of others."""
        body = {"method": "reload_weights", "kwargs": {"weights_path": str(directory)}}
        self._call("/collective_rpc", body, if_missing=_DEVELOPMENT)
        answer = self._call("/reset_prefix_cache", {}, if_missing=_DEVELOPMENT)
        if isinstance(answer, dict) and answer.get("success") is False:
            raise EngineError(f"The engine at {self.url} must be idle for new weights, and its cache is in use.")

    def complete(
        self,
        lm: CausalLM,
        prompts: Sequence[Sequence[int]],
        sampler: Sampler,
        uniforms: Tensor,
        end_rule: EndRule[npt.NDArray[np.bool_]],
    ) -> tuple[Tensor, Tensor]:
        """A response to each prompt.

        Args:
            lm: the model that the engine serves. prompts: B, token ids.
            sampler: how tokens are drawn. uniforms: (B, T), used by an engine of ours.
            end_rule: when a response ends.

        Returns:
            (B, T) int64 response ids, and the (B, T) log-probs that they were drawn with; padding and 0 after an end.

        Raises:
            EngineError: for an answer that is not that.
        """
        horizon = end_rule.horizon
        stops = end_rule.min_new_tokens == 0  # an engine would not draw an EOS before that many tokens
        numbers = uniforms.tolist() if self.is_ours else None
        request = make_request(lm, prompts, horizon, sampler, stops=stops, uniforms=numbers)
        answer = self._call("/v1/completions", {"model": self.model, **request})
        found = read_completions(answer, len(prompts), horizon, lm.vocab_size)
        given = torch.tensor([len(completion.token_ids) for completion in found])
        response_ids = torch.full((len(prompts), horizon), -1)
        log_probs = torch.zeros((len(prompts), horizon))
        is_given = torch.arange(horizon) < given.unsqueeze(1)
        response_ids[is_given] = torch.tensor([token for completion in found for token in completion.token_ids])
        log_probs[is_given] = torch.tensor([x for completion in found for x in completion.log_probs])
        lengths = torch.from_numpy(end_rule.find_ends(response_ids.numpy())[0])
        for row in (lengths > given).nonzero().squeeze(1).tolist():
            raise EngineError(
                f"The engine at {self.url} must end a response with an EOS or its token {horizon}, got one of "
                f"{given[row]} tokens without."
            )
        is_after = torch.arange(horizon) >= lengths.unsqueeze(1)
        return response_ids.masked_fill(is_after, lm.pad_token_id), log_probs.masked_fill(is_after, 0.0)

    def knows_token(self, token: int) -> bool:
        """Whether the engine takes a token in a prompt."""
        try:
            self._call("/v1/completions", {"model": self.model, "prompt": [[token]], "max_tokens": 1})
        except EngineError as error:
            if isinstance(error.__cause__, urllib.error.HTTPError) and error.__cause__.code == 400:
                return False
            raise
        return True

    def _call(
        self, path: str, body: dict[str, Any] | None = None, timeout: float | None = None, if_missing: str = ""
    ) -> Any:
        """What the engine answers: JSON, or None for an empty body.

        Args:
            path: after the address. body: JSON that is posted; None gets.
            timeout: seconds; those of the client if None.
            if_missing: what to do about a path that the engine does not have.
        """
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        try:
            with _OPENER.open(request, timeout=timeout or self._timeout) as answer:
                content = answer.read()
        except urllib.error.HTTPError as error:
            if error.code == 404 and if_missing:
                raise EngineError(f"The engine at {self.url} has no {path.partition('?')[0]}. {if_missing}") from error
            reason = _reason(error.read())
            raise EngineError(f"The engine at {self.url} refused {path}: {error.code}, {reason}") from error
        except (OSError, http.client.HTTPException) as error:
            cause = getattr(error, "reason", None) or error
            raise EngineError(f"No engine answers at {self.url}{path}: {cause or type(error).__name__}.") from error
        try:
            return json.loads(content) if content else None
        except ValueError as error:
            raise EngineError(f"An engine must answer in JSON, and {self.url}{path} does not.") from error


def _first_model(answer: Any) -> dict[str, Any]:
    with contextlib.suppress(KeyError, IndexError, TypeError, AttributeError):
        model: dict[str, Any] = answer["data"][0]
        longest = model.get("max_model_len")
        if "id" in model and (longest is None or math.isfinite(longest)):
            return model
    raise EngineError("An engine must list its model under /v1/models, as vLLM does, and this one does not.")


def _reason(content: bytes) -> str:
    """What an engine says of a call that it refuses, in a line."""
    text = content.decode(errors="replace")
    with contextlib.suppress(ValueError, KeyError, TypeError):
        text = str(json.loads(text)["error"]["message"])
    line = " ".join(text.split())
    return line if len(line) <= _MAX_REASON else f"{line[:_MAX_REASON]} ..."
