"""Compares two tokenizers: a model of one may read token ids of the other only if both cut texts in the same way."""

from __future__ import annotations

import json
import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

# Capitals, accents, a ligature, blanks of several kinds: tokenizers normalise and cut these differently.
_TELLING_TEXT = "  The Film wasn't\tgood,\n\nbut CAFÉ ﬁne — 12345 naïve!  "


class SpecialTokens(NamedTuple):
    """The ids that a tokenizer adds before and after a text, such as a BOS, or [CLS] and [SEP]."""

    before: tuple[int, ...]
    after: tuple[int, ...]

    def once(self, ids: Sequence[int]) -> list[int]:
        """Ids of a text in which the added tokens stand only once, where the text itself began with them."""
        n = len(self.before)
        doubled = n > 0 and tuple(ids[: 2 * n]) == self.before * 2
        return list(ids[n:] if doubled else ids)


class Pair(NamedTuple):
    """Two tokenizers compared.

    Attributes:
        reads_ids: whether a model of the first may be given token ids of the other.
        own: special tokens of the first. others: of the other.
    """

    reads_ids: bool
    own: SpecialTokens
    others: SpecialTokens


_pairs: weakref.WeakKeyDictionary[Any, weakref.WeakKeyDictionary[Any, Pair]] = weakref.WeakKeyDictionary()


def compare(tokenizer: Any, other: Any) -> Pair:
    """What a model of `tokenizer` must know of texts that `other` cuts; found once a pair, because it takes a while."""
    found = _pairs.setdefault(tokenizer, weakref.WeakKeyDictionary())
    if other not in found:
        own = added_special_tokens(tokenizer)
        others = added_special_tokens(other)
        reads_ids = own is not None and others is not None and reads_ids_of(tokenizer, other)
        unknown = SpecialTokens((), ())
        found[other] = Pair(reads_ids, own or unknown, others or unknown)
    return found[other]


def added_special_tokens(tokenizer: Any) -> SpecialTokens | None:
    """The special tokens that a tokenizer adds to a text; None where it cannot be found out."""
    special = set(tokenizer.all_special_ids)
    for token in sorted(set(tokenizer.get_vocab().values()) - special):
        text = tokenizer.decode([token])
        bare = tokenizer(text, add_special_tokens=False)["input_ids"] if text.strip() else []
        if not bare or special & set(bare):
            continue
        whole = tokenizer(text)["input_ids"]
        for start in range(len(whole) - len(bare) + 1):
            if whole[start : start + len(bare)] == bare:
                return SpecialTokens(tuple(whole[:start]), tuple(whole[start + len(bare) :]))
        return None
    return None


def reads_ids_of(tokenizer: Any, other: Any) -> bool:
    """Whether `tokenizer` cuts every text into the ids that `other` gives it, special tokens aside.

    It may have more added tokens than `other`, such as a pad token of its own.
    """
    if any(getattr(each, "backend_tokenizer", None) is None for each in (tokenizer, other)):
        return _cuts_alike(tokenizer, other)
    own = json.loads(tokenizer.backend_tokenizer.to_str())
    others = json.loads(other.backend_tokenizer.to_str())
    if any(own[step] != others[step] for step in ("normalizer", "pre_tokenizer", "model")):
        return False
    return _added_tokens(others) <= _added_tokens(own)


def _added_tokens(backend: dict[str, Any]) -> set[tuple[Any, ...]]:
    names = ("id", "content", "lstrip", "rstrip", "normalized", "single_word")
    return {tuple(token[name] for name in names) for token in backend["added_tokens"]}


def _cuts_alike(tokenizer: Any, other: Any) -> bool:
    """Whether tokenizers in Python, whose rules cannot be compared, agree in class, vocabulary and ids of a text."""
    if type(tokenizer) is not type(other) or tokenizer.get_vocab() != other.get_vocab():
        return False
    own = tokenizer(_TELLING_TEXT, add_special_tokens=False)["input_ids"]
    return bool(own == other(_TELLING_TEXT, add_special_tokens=False)["input_ids"])
