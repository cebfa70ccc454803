"""Texts to token ids and back, without a change to a letter of a prompt or of its completion.

A tokenizer adds tokens of its own, may change a text (unknown words, lower case), and writes a token at the start of a
text differently than after another token. Therefore a text here is the one that the user wrote, or is decoded from all
tokens together.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from lmgym.errors import InvalidArgumentError

_REPLACEMENT = "\ufffd"  # what tokenizers write for bytes that are no whole character
_MAX_IDS_FOR_ONE_THREAD = 4096  # fewer ids are decoded before the threads of the tokenizer wake up
_ANCHORS = ("", "\n")  # texts before a completion that is encoded apart; some tokenizers put a blank before the first
_MAX_DECODED_PROMPTS = 100_000  # that are remembered


class Texts:
    """A tokenizer's work on texts and on ids.

    Attributes:
        tokenizer: a Hugging Face tokenizer.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._encoded: dict[tuple[str, ...], list[list[int]]] = {}
        self._changes: dict[tuple[str, ...], list[tuple[str, str]]] = {}
        self._decoded: dict[tuple[int, ...], str] = {}

    # -- to ids ------------------------------------------------------------------------------------------------------

    def encode(self, text: str) -> list[int]:
        """Token ids of a prompt: the tokenizer's start token once, and nothing that the tokenizer appends.

        A start or end token that the user wrote belongs to the text.

        Raises:
            InvalidArgumentError: for a text that the tokenizer cannot read, or makes no token of.
        """
        try:
            whole = self.tokenizer(text)["input_ids"]
            bare = self._bare(text)
        except Exception as error:  # nothing narrower comes from a tokenizer without an unknown token
            raise InvalidArgumentError(f"`prompt` must be a text that the tokenizer knows, got {text!r}.") from error
        if not bare:
            raise InvalidArgumentError(
                f"`prompt` must have a token at least, and the tokenizer makes none of {text!r}."
            )
        return _started_once(whole, bare)

    def encode_all(self, texts: tuple[str, ...]) -> list[list[int]]:
        """Token ids of many prompts; they are remembered, and every env on one model shares them.

        Raises:
            InvalidArgumentError: with the first text that the tokenizer cannot read, or makes no token of.
        """
        if texts not in self._encoded:
            try:
                whole = self.tokenizer(list(texts))["input_ids"]
                bare = whole
                if self._adds_tokens():
                    bare = self.tokenizer(list(texts), add_special_tokens=False)["input_ids"]
            except Exception:  # as in `encode`, which then finds the text
                bare = [[]]
            if all(bare):
                encoded = [_started_once(*ids) for ids in zip(whole, bare, strict=True)]
            else:
                encoded = [self.encode(text) for text in texts]  # names the text
            self._encoded[texts] = encoded
        return self._encoded[texts]

    def start_of_last(self, text: str, count: int) -> int | None:
        """Where in a text its last `count` tokens begin, in characters; None where the tokenizer cannot say."""
        return find_start_of_last(self.tokenizer, text, count)

    def encode_response(self, prompt: str, prompt_ids: Sequence[int], completion: str) -> list[int]:
        """Token ids of a completion, as a policy would have to choose them after those of its prompt.

        Where the tokenizer cuts the text of both elsewhere than at the end of the prompt ("film" + "s"), they are the
        ids of the completion alone.

        Raises:
            InvalidArgumentError: where no tokens after the prompt's have that text.
        """
        whole = self.encode(prompt + completion)
        if whole[: len(prompt_ids)] == list(prompt_ids):
            return whole[len(prompt_ids) :]
        written = self._written(prompt_ids) + completion
        for anchor in _ANCHORS:
            start = self._bare(anchor)
            both = self._bare(anchor + completion)
            ids = both[len(start) :]
            if both[: len(start)] == start and self._written([*prompt_ids, *ids]) == written:
                return ids
        raise InvalidArgumentError(
            f"`completions` must be texts that tokens after those of their prompt can have, and {completion!r} after "
            f"{prompt!r} is not: the tokenizer merges the two at their border. Begin the completion, not end the "
            "prompt, with the blank between them."
        )

    def changes(self, texts: tuple[str, ...]) -> list[tuple[str, str]]:
        """Texts that the tokenizer changes in more than their blanks, each with its changed form."""
        if texts not in self._changes:
            changes = []
            for text, ids in zip(texts, self.encode_all(texts), strict=True):
                if self.decode(ids) == text:
                    continue
                read = self._written(self._bare(text))  # special tokens, written or added, are no change
                if "".join(read.split()) != "".join(text.split()):
                    changes.append((text, read))
            self._changes[texts] = changes
        return self._changes[texts]

    def _adds_tokens(self) -> bool:
        """Whether the tokenizer puts tokens of its own around a text; True where it cannot say."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        return backend is None or backend.num_special_tokens_to_add(False) > 0

    def _bare(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    # -- to texts ----------------------------------------------------------------------------------------------------

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, without special tokens."""
        return self._decode_batch([list(ids)])[0]

    def decode_prompt(self, prompt_ids: Sequence[int]) -> str:
        """Text of a prompt that is given as ids; half a character at its end belongs to the response."""
        key = tuple(prompt_ids)
        if key not in self._decoded:
            if len(self._decoded) >= _MAX_DECODED_PROMPTS:
                self._decoded.clear()
            text = self.decode(key)
            if text.endswith(_REPLACEMENT) and self.encode(text) != list(key):  # the character itself is one too
                text = text.rstrip(_REPLACEMENT)
            self._decoded[key] = text
        return self._decoded[key]

    def completions(self, prompt_ids: Sequence[Sequence[int]], response_ids: Sequence[Sequence[int]]) -> list[str]:
        """Texts of responses as they stand after their prompts, spaces included.

        `decode_prompt` and the completion together are the text of all tokens, without special ones.
        """
        both = [[*p, *r] for p, r in zip(prompt_ids, response_ids, strict=True)]
        texts = []
        for whole, prompt, response in zip(self._decode_batch(both), prompt_ids, response_ids, strict=True):
            before = self.decode_prompt(prompt)
            texts.append(whole[len(before) :] if whole.startswith(before) else self.decode(response))
        return texts

    def pieces(self, prompt_ids: Sequence[int], response_ids: Sequence[int]) -> list[str]:
        """Text of each token of a response; joined they are its text, special tokens by their names.

        A character that several tokens make together belongs to the last of them.
        """
        grown = [response_ids[: t + 1] for t in range(len(response_ids))]
        texts = self.completions([prompt_ids] * len(grown), grown)
        special = set(self.tokenizer.all_special_ids)
        pieces = []
        end = 0
        for t, token in enumerate(response_ids):
            start = end
            last = t == len(texts) - 1  # which half a character belongs to that nothing completes
            end = len(texts[-1]) if last else max(start, common_length(texts[t], texts[-1]))
            name = f" {self.tokenizer.convert_ids_to_tokens(token)}" if token in special else ""
            pieces.append(texts[-1][start:end] + name)
        return pieces

    def _written(self, ids: Sequence[int]) -> str:
        """Text of token ids with special tokens as they are written."""
        written = self.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return str(written)

    def _decode_batch(self, rows: list[list[int]]) -> list[str]:
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is None:
            options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
            return [str(self.tokenizer.decode(row, **options)) for row in rows]
        # The backend does not check every id of every row, as the tokenizer does.
        if sum(map(len, rows)) < _MAX_IDS_FOR_ONE_THREAD:
            return [backend.decode(row, skip_special_tokens=True) for row in rows]
        return list(backend.decode_batch(rows, skip_special_tokens=True))


def find_start_of_last(tokenizer: Any, text: str, count: int) -> int | None:
    """Where in a text its last `count` tokens begin, in characters; None where the tokenizer cannot say."""
    if not getattr(tokenizer, "is_fast", False):
        return None
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    starts = [start for start, _ in encoded["offset_mapping"]]
    return starts[-count] if len(starts) > count else 0


def common_length(first: Sequence[Any], second: Sequence[Any]) -> int:
    """How many items, such as characters, two sequences have in common at their start."""
    together = zip(first, second, strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], together))


def _started_once(whole: Sequence[int], bare: Sequence[int]) -> list[int]:
    """Ids of a text without the tokens that the tokenizer appends, and with those that it puts before a text once.

    Args:
        whole: with the tokens that it adds. bare: without.
    """
    whole = list(whole)
    bare = list(bare)
    for start in range(len(whole) - len(bare) + 1):
        if whole[start : start + len(bare)] == bare:
            before = whole[:start]
            return bare if bare[:start] == before else before + bare
    return whole
