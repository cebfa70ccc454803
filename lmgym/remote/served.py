"""A causal LM that answers calls: the model of a small engine of ours, which can be wrong on purpose.

Shapes: B prompts, P prompt columns, T response columns, V vocabulary.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from lmgym.errors import InvalidArgumentError, LmGymError, check_choice, check_int, check_number, shorten, unknown_name
from lmgym.models.adapters import load_pretrained
from lmgym.models.causal import CausalLM, freeze
from lmgym.models.loading import load_model
from lmgym.models.padding import pad_left
from lmgym.models.policy import CausalPolicy
from lmgym.models.positions import max_positions
from lmgym.models.sampling import Sampler, check_finite_log_probs
from lmgym.models.sharing import DTYPES

_FIELDS = {"model", "prompt", "max_tokens", "temperature", "top_k", "top_p", "ignore_eos", "stop_token_ids", "logprobs"}
FIELDS = _FIELDS | {"return_token_ids", "logit_bias", "uniforms"}  # of a call for completions; others are refused


@dataclass(frozen=True)
class Wrong:
    """How an engine differs from the model that it is sent; as it stands here, in nothing.

    Attributes:
        dtype: of the weights and of all that is computed: "float32" or "bfloat16".
        temperature: logits are divided by it once more.
        stale: samples from the weights of so many pushes ago.
    """

    dtype: str = "float32"
    temperature: float = 1.0
    stale: int = 0

    def __post_init__(self) -> None:
        check_choice("dtype", self.dtype, DTYPES)
        check_number("temperature", self.temperature, 0, open_low=True)
        check_int("stale", self.stale, 0)


class ServedModel:
    """A model in a directory, or of a hub name, and the weights that it has been sent.

    Args:
        name: of the model. wrong: how it samples otherwise than asked. seed: of tokens drawn without uniforms.

    Attributes:
        name: of the model. max_tokens: its longest sequence, or None. pushes: how often it has got weights.
    """

    def __init__(self, name: str, wrong: Wrong = Wrong(), seed: int = 0) -> None:
        self.name = name
        self.wrong = wrong
        self.pushes = 0
        model, tokenizer = load_pretrained("model", name, AutoModelForCausalLM, DTYPES[wrong.dtype])
        self._lm = CausalLM(freeze(model), tokenizer)
        self.max_tokens = max_positions(model)
        self._generator = torch.Generator().manual_seed(seed)
        self._history: deque[dict[str, Tensor]] = deque([_copied(model.state_dict())], maxlen=wrong.stale + 1)

    def load_weights(self, directory: Path) -> None:
        """Samples from the weights of a directory from now on, or once as many others have come as it is stale.

        Raises:
            LmGymError: for what is no model of the same shape; the weights then stay as they are.
        """
        if not directory.is_dir():
            raise InvalidArgumentError(f"`weights_path` must be a directory that is there, got {str(directory)!r}.")
        sent = load_model("weights_path", str(directory), AutoModelForCausalLM, DTYPES[self.wrong.dtype]).state_dict()
        own = {name: tuple(x.shape) for name, x in self._lm.model.state_dict().items()}
        if {name: tuple(x.shape) for name, x in sent.items()} != own:
            raise InvalidArgumentError(f"`weights_path` must hold weights of the shapes of {self.name!r}.")
        self._history.append(sent)
        self._lm.model.load_state_dict(self._history[0])
        self.pushes += 1

    @torch.no_grad()
    def complete(self, request: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The choices of an answer to a call for completions.

        Raises:
            LmGymError: for a call that cannot be answered.
        """
        asked = _Asked(request, self._lm, self.max_tokens)
        shape = (len(asked.prompts), asked.max_tokens)
        uniforms = asked.uniforms
        if uniforms is None:
            uniforms = torch.rand(shape, generator=self._generator, dtype=torch.float64)
        sampler = Sampler(asked.temperature * self.wrong.temperature, asked.top_k, asked.top_p)
        ids, mask = pad_left(asked.prompts, self._lm.pad_token_id)
        state = CausalPolicy(self._lm).begin(ids, mask, asked.max_tokens)
        response_ids = torch.zeros(shape, dtype=torch.int64)
        log_probs = torch.zeros(shape)
        lengths = torch.full((shape[0],), asked.max_tokens)
        running = torch.ones(shape[0], dtype=torch.bool)
        for t in range(asked.max_tokens):
            tokens, log_probs[:, t] = sampler.sample(state.logits + asked.bias, t, uniforms[:, t])
            response_ids[:, t] = tokens
            ended = running & asked.is_stop[tokens]
            lengths[ended] = t + 1
            running &= ~ended
            if t + 1 == asked.max_tokens or not running.any():
                break
            state.step(tokens)
        check_finite_log_probs(log_probs)
        return [
            _choice(i, response_ids[i, :n].tolist(), log_probs[i, :n].tolist(), stopped)
            for i, (n, stopped) in enumerate(zip(lengths.tolist(), (~running).tolist(), strict=True))
        ]


class _Asked:
    """A call for completions, checked.

    Attributes:
        prompts: B, token ids. max_tokens: T. temperature, top_k, top_p: as in `Sampler`.
        is_stop: (V,) bool, tokens that end a response. bias: (V,) is added to logits.
        uniforms: (B, T) float64, or None.
    """

    def __init__(self, request: Mapping[str, Any], lm: CausalLM, longest: int | None) -> None:
        for name in request:
            if name not in FIELDS:
                raise unknown_name("field", name, FIELDS)
        self.max_tokens = request.get("max_tokens", 16)
        check_int("max_tokens", self.max_tokens, 1)
        self.prompts = _read_prompts(request.get("prompt"), lm, self.max_tokens, longest)
        self.temperature = request.get("temperature", 1.0)
        check_number("temperature", self.temperature, 0)
        self.top_k = max(0, request.get("top_k", 0))  # -1 is none in vLLM
        self.top_p = request.get("top_p", 1.0)
        self.is_stop = torch.zeros(lm.vocab_size, dtype=torch.bool)
        stops = set(request.get("stop_token_ids", ()))
        self.is_stop[sorted(stops if request.get("ignore_eos", False) else stops | lm.eos_token_ids)] = True
        self.bias = torch.zeros(lm.vocab_size)
        for token, value in request.get("logit_bias", {}).items():
            if int(token) < lm.vocab_size:  # what the tokenizer lacks is never drawn here
                self.bias[int(token)] = value
        self.uniforms = _read_uniforms(request.get("uniforms"), (len(self.prompts), self.max_tokens))


def _read_prompts(given: Any, lm: CausalLM, max_tokens: int, longest: int | None) -> list[list[int]]:
    if not isinstance(given, list) or not given or not all(isinstance(ids, list) and ids for ids in given):
        raise InvalidArgumentError(f"`prompt` must be lists of token ids, got {shorten(given)}.")
    for ids in given:
        for token in ids:
            if type(token) is not int or not 0 <= token < lm.embedded:
                raise InvalidArgumentError(f"Token id {shorten(token)} is out of vocabulary.")
        if longest is not None and len(ids) + max_tokens > longest:
            raise InvalidArgumentError(f"`max_tokens` must be at most {longest - len(ids)} here, got {max_tokens}.")
    return given


def _read_uniforms(given: Any, shape: tuple[int, int]) -> Tensor | None:
    if given is None:
        return None
    try:
        uniforms = torch.tensor(given, dtype=torch.float64)
    except (TypeError, ValueError) as error:
        raise InvalidArgumentError("`uniforms` must be lists of numbers.") from error
    if tuple(uniforms.shape) != shape or not bool(((uniforms >= 0) & (uniforms < 1)).all()):
        raise InvalidArgumentError(f"`uniforms` must be {shape} numbers from 0 to 1, got {tuple(uniforms.shape)}.")
    return uniforms


def _choice(index: int, token_ids: list[int], log_probs: list[float], stopped: bool) -> dict[str, Any]:
    if not all(math.isfinite(x) for x in log_probs):
        raise LmGymError("The model's logits are not finite.")
    return {
        "index": index,
        "text": "",
        "token_ids": token_ids,
        "logprobs": {"token_logprobs": log_probs},
        "finish_reason": "stop" if stopped else "length",
    }


def _copied(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: x.clone() for name, x in state.items()}
