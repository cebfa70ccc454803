"""What is said to an engine and what it answers: the part of vLLM's HTTP protocol that is used here.

| call | what for |
|---|---|
| `GET /health` | whether it answers |
| `GET /v1/models` | the model's name, its directory and its longest sequence |
| `GET /server_info?config_format=json` | which log-probs it gives; only in vLLM's development mode, like the next two |
| `POST /collective_rpc` | `reload_weights`: takes the weights of a directory |
| `POST /reset_prefix_cache` | forgets what it has computed with other weights |
| `POST /v1/completions` | responses to prompts of token ids, with their token ids and log-probs |

`uniforms` is an addition of ours, and only sent to an engine of ours.

Shapes: B prompts, T response columns.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from lmgym.errors import LmGymError, shorten
from lmgym.models.causal import CausalLM
from lmgym.models.sampling import Sampler

OWNER = "lmgym"  # what an engine of ours says that its model is owned by
_FORBIDDEN = -100.0  # is added to logits of ids that may not be drawn: the lowest bias that the protocol has


class EngineError(LmGymError, RuntimeError):
    """An engine cannot be reached, refuses a call, or answers with something else than what it was asked for."""


class Completion(NamedTuple):
    """A response: token ids and the log-probs, in nats, that they were drawn with."""

    token_ids: list[int]
    log_probs: list[float]


def make_request(
    lm: CausalLM,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    sampler: Sampler,
    *,
    stops: bool = True,
    uniforms: Sequence[Sequence[float]] | None = None,
) -> dict[str, Any]:
    """The body of a call for one response to each prompt.

    The engine is told where responses end, and follows neither its tokenizer nor its generation config.

    Args:
        lm: the model that it serves: its end-of-sequence ids, its temperature, and ids that it must not draw.
        prompts: B, token ids. max_tokens: T.
        sampler: how tokens are drawn.
        stops: whether an EOS ends a response; if not, all have T tokens.
        uniforms: (B, T), all the randomness there is; None leaves it to the engine.
    """
    request: dict[str, Any] = {
        "prompt": [list(ids) for ids in prompts],
        "max_tokens": max_tokens,
        "temperature": sampler.temperature * lm.temperature,
        "top_k": sampler.top_k,
        "top_p": sampler.top_p,
        "ignore_eos": True,
        "stop_token_ids": sorted(lm.eos_token_ids) if stops else [],
        "logprobs": 0,  # of the tokens drawn, and no others
        "return_token_ids": True,
    }
    forbidden = [*lm.holes, *range(lm.vocab_size, lm.embedded)]
    if forbidden:
        request["logit_bias"] = {str(token): _FORBIDDEN for token in forbidden}
    if uniforms is not None:
        request["uniforms"] = [list(row) for row in uniforms]
    return request


def read_completions(answer: Any, count: int, max_tokens: int, vocab_size: int) -> list[Completion]:
    """The responses in an answer, in the order of their prompts.

    Args:
        answer: to a call for completions. count: B. max_tokens: T. vocab_size: V.

    Raises:
        EngineError: for an answer that does not hold one such response to each prompt.
    """
    try:
        choices = sorted(answer["choices"], key=lambda choice: int(choice["index"]))
        found = [_read_choice(choice, max_tokens, vocab_size) for choice in choices]
        indices = [int(choice["index"]) for choice in choices]
    except (KeyError, TypeError, ValueError) as error:
        raise EngineError(
            "An engine must answer with `choices` that have `index`, `token_ids` and `logprobs.token_logprobs`, got "
            f"{shorten(answer)} ({error})."
        ) from error
    if indices != list(range(count)):
        raise EngineError(f"An engine must give one response to each of {count} prompts, got {len(indices)}.")
    return found


def _read_choice(choice: dict[str, Any], max_tokens: int, vocab_size: int) -> Completion:
    token_ids = [int(token) for token in choice["token_ids"]]
    log_probs = [float(x) for x in choice["logprobs"]["token_logprobs"]]
    if not 1 <= len(token_ids) <= max_tokens:
        raise ValueError(f"a response of {len(token_ids)} tokens, where 1 to {max_tokens} were asked for")
    if len(log_probs) != len(token_ids):
        raise ValueError(f"{len(log_probs)} log-probs of {len(token_ids)} tokens")
    strange = [token for token in token_ids if not 0 <= token < vocab_size]
    if strange:
        raise ValueError(f"token {strange[0]} of {vocab_size} that there are")
    if not all(math.isfinite(x) and x < 1e-3 for x in log_probs):  # above 0 by rounding at most
        raise ValueError(f"log-probs such as {max(log_probs, key=abs)}")
    return Completion(token_ids, log_probs)
