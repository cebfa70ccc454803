"""What a reward model learns from: the texts and the judgements of records of feedback, as token ids.

Shapes: K ranked completions a prompt, N completions of a batch of prompts.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lmgym.errors import InvalidArgumentError, shorten
from lmgym.feedback.comparisons import ranked, scores_of
from lmgym.feedback.files import locate_records
from lmgym.feedback.judgements import Choice, Ranking, Ratings, Votes
from lmgym.feedback.records import Record
from lmgym.feedback.rendering import render_record
from lmgym.models.segmentation import SpecialTokens, added_special_tokens
from lmgym.rewards.ranking import Comparisons, Tiers


@dataclass(frozen=True)
class Example:
    """A prompt with the completions that were judged.

    Attributes:
        record: texts alone; completions that were not judged are not in it, and its judgement is a ranking, or ratings
            of a single completion.
        sequences: K sequences of token ids, prompt and completion together.
        tiers: of the ranking; none where nothing is compared.
        strengths: of each pair in the order of `Comparisons.of_rankings`, 0 where it was not said.
        ratings: K numbers, those of a scale as shares of it; None where the judgement has no numbers.
        kind: of the judgement as it was given.
    """

    record: Record
    sequences: tuple[tuple[int, ...], ...]
    tiers: Tiers
    strengths: tuple[float, ...]
    ratings: tuple[float, ...] | None
    kind: str

    @property
    def prompt(self) -> str:
        """The text of the prompt."""
        return str(self.record.prompt)

    @property
    def length(self) -> int:
        """Tokens of the longest sequence."""
        return max(map(len, self.sequences))


@dataclass(frozen=True)
class Batch:
    """Examples that share a forward.

    Attributes:
        examples: B of them.
        share: what the mean loss over them is multiplied by, so that the sum over the forwards of an update is the mean
            over its examples, times the number of these forwards.
    """

    examples: Sequence[Example]
    share: float = 1.0

    @property
    def sequences(self) -> list[tuple[int, ...]]:
        """N sequences of token ids, prompt by prompt."""
        return [sequence for example in self.examples for sequence in example.sequences]

    @property
    def sizes(self) -> list[int]:
        """K of each prompt."""
        return [len(example.sequences) for example in self.examples]

    @property
    def rankings(self) -> list[Tiers]:
        """The tiers of each prompt."""
        return [example.tiers for example in self.examples]

    def comparisons(self) -> Comparisons:
        """The pairs of these prompts."""
        strengths = [strength for example in self.examples for strength in example.strengths]
        return replace(Comparisons.of_rankings(self.rankings, self.sizes), strength=torch.tensor(strengths))

    def ratings(self) -> tuple[Tensor, Tensor]:
        """(N,) ratings, NaN where there is none, and (N,) the prompt that each is of."""
        ratings: list[float] = []
        for example in self.examples:
            ratings += example.ratings or [math.nan] * len(example.sequences)
        return torch.tensor(ratings), torch.repeat_interleave(torch.tensor(self.sizes))


class Read(NamedTuple):
    """What `read_examples` has found: examples, and how many records there were."""

    examples: list[Example]
    records: int


def read_examples(source: object, tokenizer: Any, limit: int | None, argument: str = "preferences") -> Read:
    """Everything that can be learned from in a source of feedback.

    Args:
        source: a file, rows or records, as for `lmgym.feedback.files.read_records`.
        tokenizer: of the reward model; conversations are written by its chat template.
        limit: positions of the reward model; None for no limit.
        argument: what the source was given as, for messages.

    Raises:
        InvalidArgumentError: for a source that cannot be read, or with a text that the model cannot.
    """
    found = []
    records = 0
    for location, record in locate_records(source, argument):
        records += 1
        judged = _judged(record)
        if judged is not None:
            where = f"{location} of `{argument}`"
            found.append((where, record, render_record(argument, judged, tokenizer, where)))
    texts = [f"{r.prompt}{c.text}" for _, _, r in found for c in r.completions]
    try:
        encoded = iter(encode_texts(tokenizer, texts))
    except Exception:  # nothing narrower comes from a tokenizer without an unknown token
        _name_unknown_text(argument, tokenizer, texts)
        raise
    examples = []
    for where, original, record in found:
        sequences = tuple(tuple(next(encoded)) for _ in record.completions)
        for ids, completion in zip(sequences, record.completions, strict=True):
            if not ids or (limit is not None and len(ids) > limit):
                most = "" if limit is None else f" to {limit}"
                raise InvalidArgumentError(
                    f"{where[:1].upper()}{where[1:]}: prompt and completion must have 1{most} tokens together, which "
                    f"is what the model can read, got {len(ids)} in {str(completion.text)[:80]!r} after "
                    f"{str(record.prompt)[:80]!r}."
                )
        examples.append(_example(original, record, sequences))
    return Read(examples, records)


def _name_unknown_text(argument: str, tokenizer: Any, texts: Sequence[str]) -> None:
    """Raises `InvalidArgumentError` with the first text that a tokenizer cannot encode."""
    for text in texts:
        try:
            tokenizer(text)
        except Exception as error:
            raise InvalidArgumentError(
                f"`{argument}` must have texts that the model's tokenizer knows, got {shorten(text)}: {error}."
            ) from error


def _judged(record: Record) -> Record | None:
    """The record with a ranking of all its completions, or with ratings of one; None where nothing can be learned."""
    order = ranked(record)
    if order is None:
        ratings = record.judgement
        return record if isinstance(ratings, Ratings) and len(record.completions) == 1 else None
    assert isinstance(order.judgement, Ranking)
    chosen = [index for group in order.judgement.tiers for index in group]
    if len(chosen) == len(order.completions):
        return order
    kept = sorted(chosen)
    tiers = tuple(tuple(kept.index(index) for index in group) for group in order.judgement.tiers)
    completions = tuple(order.completions[index] for index in kept)
    return replace(order, completions=completions, judgement=Ranking(tiers), order_shown=None)


def _example(original: Record, record: Record, sequences: tuple[tuple[int, ...], ...]) -> Example:
    tiers = record.judgement.tiers if isinstance(record.judgement, Ranking) else ()
    assert original.judgement is not None
    return Example(record, sequences, tiers, _strengths(original, tiers), _ratings(original), original.judgement.kind)


def _strengths(record: Record, tiers: Tiers) -> tuple[float, ...]:
    """How much better the better one of each pair is, in the units of the judgement."""
    order = [index for group in tiers for index in group]
    pairs = list(itertools.combinations(order, 2))
    if isinstance(record.judgement, Choice):
        return (record.judgement.strength or 0.0,)
    scores = [float(score) for _, score in sorted(scores_of(record).items())]
    return tuple(scores[better] - scores[worse] if scores else 0.0 for better, worse in pairs)


def _ratings(record: Record) -> tuple[float, ...] | None:
    """The numbers of a judgement, in the order of the completions that have one."""
    scores = [float(score) for _, score in sorted(scores_of(record).items())]
    if isinstance(record.judgement, Ratings):
        low = record.judgement.low
        high = record.judgement.high
        return tuple((score - low) / (high - low) for score in scores)
    return tuple(scores) if isinstance(record.judgement, Votes) else None


def encode_texts(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of whole texts, in which the special tokens that the tokenizer adds stand only once."""
    if not texts:
        return []
    added = added_special_tokens(tokenizer) or SpecialTokens((), ())
    n = len(added.after)
    encoded = []
    for ids in tokenizer(list(texts))["input_ids"]:
        once = added.once(ids)
        doubled = n > 0 and tuple(once[-2 * n :]) == added.after * 2
        encoded.append(once[:-n] if doubled else once)
    return encoded


def split_by_prompt(
    examples: Sequence[Example], share: float, generator: torch.Generator
) -> tuple[list[Example], list[Example]]:
    """Examples to learn from, and others that are held out: all of some prompts, drawn at random.

    Args:
        examples: what is split. share: of the prompts that are held out; some prompt always stays on either side.
        generator: of the draw.

    Raises:
        InvalidArgumentError: where there is one prompt alone and some are to be held out.
    """
    if share == 0:
        return list(examples), []
    prompts = list(dict.fromkeys(example.prompt for example in examples))
    if len(prompts) < 2:
        raise InvalidArgumentError(
            f"`held_out` must be 0 where the feedback is on {len(prompts)} prompt, got {share}: there is none to keep."
        )
    count = min(max(1, round(share * len(prompts))), len(prompts) - 1)
    chosen = torch.randperm(len(prompts), generator=generator)[:count].tolist()
    held_out = {prompts[i] for i in chosen}
    return (
        [example for example in examples if example.prompt not in held_out],
        [example for example in examples if example.prompt in held_out],
    )
