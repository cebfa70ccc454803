"""A reward model: a Hugging Face sequence-classification model with a scalar head, read at the last token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification

from lmgym.errors import InvalidArgumentError
from lmgym.models.causal import SharedModels

_ROWS = 64  # episodes a forward takes at once


class ClassifierReward:
    """Scores `prompt + completion` with a sequence-classification model.

    Text goes through the model's own tokenizer. Where that is the policy's too (`on_ids`), token ids are handed over
    as they are, an EOS included: nothing is decoded, and the model sees whether the response ended.

    Attributes:
        model: the Hugging Face model, `num_labels` 1 (its logit is the score) or 2 (the log-odds of label 1).
        tokenizer: its tokenizer.
    """

    def __init__(self, model: Any, tokenizer: Any, *, on_ids: bool = False) -> None:
        if model.config.num_labels not in (1, 2):
            raise InvalidArgumentError(f"`reward` must be a model with 1 or 2 labels, got {model.config.num_labels}.")
        self.model, self.tokenizer, self._on_ids = model, tokenizer, on_ids
        self._source: ClassifierReward | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> ClassifierReward:
        return self

    def for_tokenizer(self, tokenizer: Any) -> ClassifierReward:
        """This reward model for responses of a policy with this tokenizer."""
        same = self.tokenizer.get_vocab() == tokenizer.get_vocab()
        bound = ClassifierReward(self.model, self.tokenizer, on_ids=same)
        bound._source = self  # keeps the shared copy alive
        return bound

    @torch.inference_mode()
    def __call__(self, prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        """One score an episode; batches are bucketed by length, so that a score does not depend on its batch-mates."""
        if self._on_ids:
            sequences = [[*p, *c] for p, c in zip(columns["prompt_ids"], columns["completion_ids"], strict=True)]
        else:
            texts = [p + c for p, c in zip(prompts, completions, strict=True)]
            limit = getattr(self.model.config, "max_position_embeddings", None)
            sequences = self.tokenizer(texts, truncation=limit is not None, max_length=limit)["input_ids"]
        order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
        scores = torch.zeros(len(sequences))
        at_once = min(_ROWS, self.model.get_input_embeddings().weight.shape[0] - 1)
        for start in range(0, len(order), at_once):
            rows = order[start : start + at_once]
            scores[rows] = self._forward([sequences[i] for i in rows]).cpu()
        return scores.tolist()

    def _forward(self, sequences: Sequence[Sequence[int]]) -> Tensor:
        """(n,) float32 scores of sequences, right-padded into one batch."""
        # Transformers reads the score at the last token that is not the pad token, and refuses batches where there is
        # none: then any id that no sequence ends in will do.
        config, ends = self.model.config, {sequence[-1] for sequence in sequences if sequence}
        own = config.pad_token_id
        pad = next(i for i in range(len(ends) + 1) if i not in ends) if own is None else own
        longest = max(1, *(len(s) for s in sequences))
        ids = torch.full((len(sequences), longest), pad, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, sequence in enumerate(sequences):
            ids[row, : len(sequence)] = torch.as_tensor(sequence, dtype=torch.int64)
            mask[row, : len(sequence)] = 1
        device = next(self.model.parameters()).device
        config.pad_token_id = pad
        try:
            logits = self.model(input_ids=ids.to(device), attention_mask=mask.to(device)).logits.float()
        finally:
            config.pad_token_id = own
        return logits[:, 0] if logits.shape[1] == 1 else logits[:, 1] - logits[:, 0]


_reward_models = SharedModels("reward", AutoModelForSequenceClassification, ClassifierReward)


def load_reward_model(name: str, device: str = "auto", dtype: str = "float32") -> ClassifierReward:
    """Loads a sequence-classification model, frozen; one copy a (name, device, dtype) while anybody holds it.

    Raises:
        InvalidArgumentError: for a name, device or dtype that cannot be.
        LmGymError: if Hugging Face cannot load it; the cause is chained.
    """
    return _reward_models.load(name, device, dtype)
