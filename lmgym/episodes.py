"""The one data type that flows: a batch of whole episodes.

Shapes use the letters of the design: B episodes, P prompt columns, T response columns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypedDict

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lmgym.errors import InvalidArgumentError


class Observation(TypedDict):
    """What the env shows: the prompt, left-padded to P columns, then the response, token t in column P + t.

    `input_ids` is int64 (L,), `attention_mask` int8 (L,) with 1 on every real token; L = P + T.
    """

    input_ids: npt.NDArray[np.int64]
    attention_mask: npt.NDArray[np.int8]


# How a tokenizer decodes: it leaves special tokens out, and every blank in.
_DECODING = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}


@dataclass(frozen=True)
class Episodes:
    """A batch of finished episodes, each row on its own.

    Attributes:
        prompt_ids: (B, P) int64, left-padded.
        prompt_mask: (B, P) bool, True on prompt tokens.
        response_ids: (B, T) int64, right-padded.
        response_mask: (B, T) bool, True on chosen tokens, the EOS included.
        log_probs: (B, T) float, nats: log-probs with which the chosen tokens were drawn; 0 off the mask.
        ref_log_probs: (B, T) float, nats: the same under the reference; 0 off the mask, and everywhere at `kl_coef=0`.
        scores: (B,) float, paid at the end, a missing-EOS penalty already subtracted.
        values: (B, T) float, the critic's estimate before each token, or None.
        terminated: (B,) bool, False where a length limit was reported as truncation.
        prompt_index: (B,) int64, the prompt's index in its split; -1 of a prompt from elsewhere.
        gold_scores: (B,) float, the gold reward where the task has one, or None.
    """

    prompt_ids: Tensor
    prompt_mask: Tensor
    response_ids: Tensor
    response_mask: Tensor
    log_probs: Tensor
    ref_log_probs: Tensor
    scores: Tensor
    values: Tensor | None
    terminated: Tensor
    prompt_index: Tensor
    gold_scores: Tensor | None = None

    def __post_init__(self) -> None:
        b, p = self.prompt_ids.shape
        t = self.response_ids.shape[-1]
        shapes: dict[str, tuple[int, ...]] = {
            "prompt_mask": (b, p),
            "response_ids": (b, t),
            "response_mask": (b, t),
            "log_probs": (b, t),
        }
        shapes |= {"ref_log_probs": (b, t), "scores": (b,), "values": (b, t), "terminated": (b,), "prompt_index": (b,)}
        shapes |= {"gold_scores": (b,)}
        for name, shape in shapes.items():
            tensor = getattr(self, name)
            if tensor is not None and tuple(tensor.shape) != shape:
                raise InvalidArgumentError(f"`{name}` must have shape {shape}, got {tuple(tensor.shape)}.")

    def __len__(self) -> int:
        return self.prompt_ids.shape[0]

    def __repr__(self) -> str:
        if not len(self):
            return "Episodes(none)"
        kl = float(((self.log_probs - self.ref_log_probs) * self.response_mask).sum(-1).mean())
        return (
            f"Episodes({len(self):,} of {float(self.lengths.float().mean()):.1f} tokens each, score "
            f"{float(self.scores.mean()):.3f}, KL {round(kl, 3) + 0.0:.3f} nats)"
        )

    def with_tokenizer(self, tokenizer: Any) -> Episodes:
        """These episodes, which know the tokenizer that their ids are of: `texts` needs it."""
        object.__setattr__(self, "_tokenizer", tokenizer)
        return self

    def texts(self, tokenizer: Any = None) -> list[tuple[str, str]]:
        """Prompt and response of each episode, as texts without special tokens; joined they are that of both.

        Args:
            tokenizer: a Hugging Face tokenizer. None is that of the env that the episodes were collected in.

        Raises:
            InvalidArgumentError: where that is not known.
        """
        tokenizer = tokenizer or getattr(self, "_tokenizer", None)
        if tokenizer is None:
            raise InvalidArgumentError(
                "`tokenizer` must be given, for these episodes do not know theirs: envs.tokenizer."
            )
        texts = []
        for i in range(len(self)):
            prompt = self.prompt_ids[i][self.prompt_mask[i]].tolist()
            response = self.response_ids[i][self.response_mask[i]].tolist()
            before = tokenizer.decode(prompt, **_DECODING)
            both = tokenizer.decode([*prompt, *response], **_DECODING)
            if not both.startswith(before):  # such as half a character at the border
                both = before + tokenizer.decode(response, **_DECODING)
            texts.append((before, both[len(before) :]))
        return texts

    @property
    def lengths(self) -> Tensor:
        """(B,) int64: response tokens of each episode, the EOS included."""
        return self.response_mask.sum(-1)

    @property
    def num_tokens(self) -> int:
        """Env steps in the batch: one a chosen token."""
        return int(self.response_mask.sum())

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of all prompts, each as often as it was answered."""
        return int(self.prompt_mask.sum())

    @property
    def input_ids(self) -> Tensor:
        """(B, P + T) int64: prompt and response side by side, as a model reads them."""
        return torch.cat([self.prompt_ids, self.response_ids], dim=1)

    @property
    def attention_mask(self) -> Tensor:
        """(B, P + T) bool: True on prompt tokens and on chosen tokens."""
        return torch.cat([self.prompt_mask, self.response_mask], dim=1)

    def __getitem__(self, rows: Tensor | slice | Sequence[int]) -> Episodes:
        """Picks episodes: an index tensor, a slice, or a bool mask over B."""
        return self._map(lambda tensor: tensor[rows])

    def to(self, device: torch.device | str) -> Episodes:
        """Moves every tensor."""
        return self._map(lambda tensor: tensor.to(device))

    def _map(self, change: Callable[[Tensor], Tensor]) -> Episodes:
        columns: dict[str, Any] = {}
        for f in fields(self):
            tensor = getattr(self, f.name)
            columns[f.name] = None if tensor is None else change(tensor)
        return Episodes(**columns).with_tokenizer(getattr(self, "_tokenizer", None))

    def trimmed(self) -> Episodes:
        """Drops columns that hold no token in any row: on the left of the prompts, on the right of the responses."""
        p = max(int(self.prompt_mask.sum(-1).max()), 1)
        t = max(int(self.lengths.max()), 1)
        cut = {name: getattr(self, name)[:, -p:] for name in ("prompt_ids", "prompt_mask")}
        for name in ("response_ids", "response_mask", "log_probs", "ref_log_probs", "values"):
            tensor = getattr(self, name)
            cut[name] = None if tensor is None else tensor[:, :t]
        return replace(self, **cut).with_tokenizer(getattr(self, "_tokenizer", None))

    @staticmethod
    def concatenate(parts: Sequence[Episodes]) -> Episodes:
        """Stacks batches of equal P and T along B."""
        if not parts:
            raise InvalidArgumentError("`parts` must hold at least one Episodes, got none.")
        columns: dict[str, Any] = {}
        for f in fields(Episodes):
            tensors = [getattr(part, f.name) for part in parts]
            shapes = {None if tensor is None else tuple(tensor.shape[1:]) for tensor in tensors}
            if len(shapes) > 1:
                raise InvalidArgumentError(f"`parts` must have `{f.name}` of equal columns, or all None, got {shapes}.")
            columns[f.name] = None if tensors[0] is None else torch.cat(tensors)
        return Episodes(**columns).with_tokenizer(getattr(parts[0], "_tokenizer", None))
