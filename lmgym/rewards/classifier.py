"""A reward model: a Hugging Face sequence-classification model with a scalar head, read at the last token."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification

from lmgym.errors import InvalidArgumentError, LmGymError, RewardError
from lmgym.models.causal import CausalLM
from lmgym.models.loading import check_finite_weights
from lmgym.models.positions import max_positions
from lmgym.models.segmentation import SpecialTokens, compare
from lmgym.models.sharing import SharedModels
from lmgym.rewards.normalisation import apply_normalisation, read_normalisation
from lmgym.rewards.sequence import probe_sequences, sequence_logits

_FORWARD_ROWS = 64  # episodes a forward


class ClassifierReward:
    """Scores `prompt + completion` with a sequence-classification model.

    Text goes through the model's own tokenizer, special tokens included. If the policy's tokenizer splits texts in the
    same way, the model gets the policy's token ids instead, an EOS included, between the special tokens that its own
    tokenizer adds. Nothing is decoded then, and the model sees whether the response ended.

    Attributes:
        model: the Hugging Face model, `num_labels` 1 (its logit is the score) or 2 (the log-odds of label 1).
        tokenizer: its tokenizer.
        reads_ids: whether it reads the policy's token ids; else it reads text.
    """

    reads_plain_text = True

    def __init__(self, model: Any, tokenizer: Any) -> None:
        if model.config.num_labels not in (1, 2):
            name = f" {model.name_or_path!r}" if model.name_or_path else ""
            raise InvalidArgumentError(
                f"`reward`{name} must be a model with 1 or 2 labels, got {model.config.num_labels}."
            )
        self.model = model
        self.tokenizer = tokenizer
        self.reads_ids = False
        self._limit = max_positions(model)
        self._own = self._policys = SpecialTokens((), ())
        self._source: ClassifierReward | None = None
        self._lengths: dict[tuple[str, ...], list[int]] = {}  # of prompts, in tokens; envs on one model share them

    def __deepcopy__(self, memo: dict[int, Any]) -> ClassifierReward:
        return self

    def for_tokenizer(self, tokenizer: Any) -> ClassifierReward:
        """This reward model for responses of a policy with this tokenizer."""
        bound = ClassifierReward(self.model, self.tokenizer)
        bound._source = self  # keeps the shared copy alive
        bound._lengths = self._lengths
        bound.reads_ids, bound._own, bound._policys = compare(self.tokenizer, tokenizer)
        return bound

    def check_fits(self, lm: CausalLM, splits: Iterable[Sequence[str]], width: int, horizon: int) -> None:
        """Raises unless the model has positions for the longest prompt with the longest response.

        A model that reads text may split a response into more tokens than the policy chose. The ratio is estimated on
        the prompts. A text that turns out longer is a `RewardError` when it is scored.

        Args:
            lm: the policy's reference.
            splits: the prompts, as texts.
            width: tokens of the longest of them. horizon: T, tokens of the longest response.

        Raises:
            InvalidArgumentError: naming how many positions are needed.
        """
        if self._limit is None:
            return
        if self.reads_ids:
            added = max(0, len(self._own.before) - len(self._policys.before)) + len(self._own.after)
            needed = width + horizon + added
            sizes = f"the longest prompt has {width} tokens, `max_new_tokens` is {horizon}"
            sizes += f" and the reward's tokenizer adds {added}" if added else ""
        else:
            longest, ratio = self._measure_prompts(lm, splits)
            response = math.ceil(ratio * horizon)
            needed = longest + response
            sizes = f"the longest prompt has {longest} tokens of its tokenizer and `max_new_tokens` is {horizon}"
            sizes += f", which are about {response} of them" if response > horizon else ""
        if needed > self._limit:
            raise InvalidArgumentError(
                f"`reward` must be a model with at least {needed} positions, got {self._limit}: {sizes}. "
                "Lower `max_new_tokens`, shorten the prompts, or name another reward model."
            )

    def _measure_prompts(self, lm: CausalLM, splits: Iterable[Sequence[str]]) -> tuple[int, float]:
        """Tokens of the longest prompt, special ones included, and tokens for each of the policy's, at least 1."""
        own: list[int] = []
        policys: list[int] = []
        for texts in map(tuple, splits):
            if texts not in self._lengths:
                self._lengths[texts] = [len(ids) for ids in self.tokenizer(list(texts))["input_ids"]]
            own += self._lengths[texts]
            policys += [len(ids) for ids in lm.encode_all(texts)]
        return max(own), max(1.0, sum(own) / max(1, sum(policys)))

    @torch.inference_mode()
    def __call__(self, prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        """One score an episode; batches are bucketed by length, so that a score does not depend on its batch-mates.

        Raises:
            RewardError: for an episode that has no token, or more than the model has positions.
        """
        if self.reads_ids:
            pairs = zip(columns["prompt_ids"], columns["completion_ids"], strict=True)
            sequences = [self._join(prompt, completion) for prompt, completion in pairs]
        else:
            texts = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
            sequences = [self._own.once(ids) for ids in self.tokenizer(texts)["input_ids"]]
        self._check_lengths(sequences)
        order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
        parts = [torch.zeros(0, device=self.model.device)]
        for start in range(0, len(order), _FORWARD_ROWS):
            rows = order[start : start + _FORWARD_ROWS]
            logits = sequence_logits(self.model, [sequences[i] for i in rows]).float()
            parts.append(logits[:, 0] if logits.shape[1] == 1 else logits[:, 1] - logits[:, 0])
        scores = torch.zeros(len(sequences))
        scores[order] = torch.cat(parts).cpu()  # all at once: each look has a GPU wait
        return apply_normalisation(self.model.config, scores).tolist()

    def _join(self, prompt: Sequence[int], completion: Sequence[int]) -> list[int]:
        """Ids of an episode, with the special tokens of this tokenizer in place of those of the policy's."""
        start = len(self._policys.before)
        bare = prompt[start:] if tuple(prompt[:start]) == self._policys.before else prompt
        ids = [*self._own.before, *bare, *completion]
        after = self._own.after
        ended = bool(after) and tuple(ids[-len(after) :]) == after
        return ids if ended else [*ids, *after]

    def _check_lengths(self, sequences: Sequence[Sequence[int]]) -> None:
        for ids in sequences:
            if not ids:
                raise RewardError("The reward model cannot score an episode that has no token of its tokenizer.")
            if self._limit is not None and len(ids) > self._limit:
                raise RewardError(
                    f"The reward model has {self._limit} positions, and an episode has {len(ids)} tokens of its "
                    "tokenizer. Lower `max_new_tokens`, shorten the prompts, or name another reward model."
                )


def _check_model(model: Any, tokenizer: Any) -> ClassifierReward:
    """The reward of a model that has just been loaded, once it has given finite scores."""
    reward = ClassifierReward(model, tokenizer)
    read_normalisation(model.config)
    with torch.no_grad():
        logits = sequence_logits(model, probe_sequences(model))
    if not bool(logits.isfinite().all()):
        check_finite_weights("reward", model.name_or_path, model)
        raise LmGymError(f"`reward` {model.name_or_path!r} must give finite scores, and does not.")
    return reward


_reward_models = SharedModels("reward", AutoModelForSequenceClassification, _check_model)


def load_reward_model(name: str, device: str = "auto", dtype: str = "float32") -> ClassifierReward:
    """Loads a sequence-classification model, frozen; one copy a (name, device, dtype) while anybody holds it.

    Raises:
        InvalidArgumentError: for a name, device or dtype that cannot be.
        LmGymError: if Hugging Face cannot load it (the cause is chained), or it was saved without its head.
    """
    return _reward_models.load(name, device, dtype)
