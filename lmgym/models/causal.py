"""A Hugging Face causal language model, with what the token MDP needs to know of it.

Shapes: B rows, P prompt columns, T response columns, L = P + T, V vocabulary, D width of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Any, TypeVar, TypeVarTuple

import torch
from torch import Tensor, nn

from lmgym.errors import LmGymError
from lmgym.models.categorical import log_probs_and_entropies
from lmgym.models.lean.find import find_lean, find_trained
from lmgym.models.lean.products import logits_in_half
from lmgym.models.lean.scoring import score_by_columns
from lmgym.models.lean.trained import TrainedTrunk
from lmgym.models.loading import check_embedded
from lmgym.models.padding import pack
from lmgym.models.positions import max_positions
from lmgym.models.texts import Texts
from lmgym.models.transfer import to_device

_SCORING_ROWS = 16  # episodes in a teacher-forced forward: larger batches only fault more pages in
_HEAD_ROWS = 256  # hidden states that the LM head takes at once, so that (rows, V) stays in the processor's cache
_MIN_WIDE_VOCABULARY = 8192  # from which the head goes through its columns in blocks on a CPU
_WIDE_HEAD_ROWS = 512  # hidden states at once, where the columns are in blocks
_GPU_SCORING_ROWS = 128  # the same on a GPU, which small products leave idle
_GPU_HEAD_ROWS = 2048
_PROBE_TOKENS = 8  # of the sequence that tells whether a model has a separate head

Made = TypeVar("Made")
Arguments = TypeVarTuple("Arguments")


class CausalLM(Texts):
    """A causal LM with its tokenizer; the reference of a task, or the trunk of a policy.

    Tokens that the model embeds but the tokenizer does not have (padded embeddings) do not exist here: `vocab_size` is
    the tokenizer's, and every distribution is normalised over it.

    What others make of a model and want again (a copy at another temperature, a recorded step, whether a check has
    passed) lies in the model's own cache, see `remember`, and is freed with it.

    Attributes:
        model: the Hugging Face model.
        tokenizer: its tokenizer.
        vocab_size: V, one more than the tokenizer's largest id.
        embedded: tokens that the model gives logits for, V or more.
        holes: ids below V that the tokenizer does not have.
        eos_token_ids: ids that end a response.
        pad_token_id: the id that fills columns without a token.
        temperature: what logits are divided by, wherever they are read.
        origin: the model that this one is a copy of at another temperature, or None.
    """

    def __init__(self, model: Any, tokenizer: Any, temperature: float = 1.0) -> None:
        super().__init__(tokenizer)
        self.model = model
        self.temperature = temperature
        self.origin: CausalLM | None = None
        known = set(tokenizer.get_vocab().values())
        self.embedded, _ = _head_shape(model)
        self.vocab_size = max(known) + 1
        check_embedded("`model`", self.embedded, self.vocab_size)
        self.holes = sorted(set(range(self.vocab_size)) - known)
        self.eos_token_ids = _eos_token_ids(model, tokenizer, self.vocab_size)
        pad = tokenizer.pad_token_id
        self.pad_token_id = pad if pad is not None and pad < self.vocab_size else min(known)
        self._remembered: dict[Hashable, Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_remembered": {}}  # recorded steps cannot be pickled, and are soon made again

    def __deepcopy__(self, memo: dict[int, Any]) -> CausalLM:
        # gymnasium deep-copies the kwargs of a spec once a wrapper: a model is shared, never copied by accident.
        return self

    def remember(self, make: Callable[[CausalLM, *Arguments], Made], *arguments: *Arguments) -> Made:
        """What `make(self, *arguments)` gives; made once, and kept for as long as this model lives.

        Args:
            make: a function of a module, which is the name it is kept under. What it makes must not hold this model,
                which would then be freed late, by Python's collector of cycles.
            arguments: hashable.
        """
        key = (make, arguments)
        if key not in self._remembered:
            self._remembered[key] = make(self, *arguments)
        made: Made = self._remembered[key]
        return made

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """What the weights are stored in."""
        return next(self.model.parameters()).dtype

    @property
    def max_positions(self) -> int | None:
        """Longest sequence the model has positions for, in tokens; None where it does not say."""
        return max_positions(self.model)

    def is_legal(self, token: int) -> bool:
        """Whether `token` is an id that the tokenizer has."""
        return 0 <= token < self.vocab_size and token not in self.holes

    @property
    def legal_table(self) -> Tensor:
        """(V,) bool on the CPU: ids that the tokenizer has."""
        table = torch.ones(self.vocab_size, dtype=torch.bool)
        table[self.holes] = False
        return table

    @property
    def eos_table(self) -> Tensor:
        """(V,) bool on the CPU: ids that end a response."""
        table = torch.zeros(self.vocab_size, dtype=torch.bool)
        table[sorted(self.eos_token_ids)] = True
        return table

    def legal_logits(self, logits: Tensor) -> Tensor:
        """(..., model vocabulary) logits cut to (..., V) at the temperature, with -inf on ids the tokenizer lacks."""
        return legal_logits(logits, self.vocab_size, self.holes, self.temperature)

    def response_hidden(self, ids: Tensor, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden states and logits at chosen positions of right-padded sequences; differentiable.

        Causal attention does not see padding on the right, so no mask and no position ids are needed. This is the
        plainest forward that a model has, and the definition that cached decoding must reproduce.

        Args:
            ids: (B, L) int64, sequences from column 0, right-padded.
            rows: (n,) int64. columns: (n,) int64 of the positions.

        Returns:
            hidden (n, D), the input of the LM head, and logits (n, V).
        """
        everywhere = torch.ones_like(ids)
        if self.remember(has_separate_head):
            hidden = self.model.base_model(input_ids=ids, attention_mask=everywhere, use_cache=False)[0]
            hidden = hidden[rows, columns]
            return hidden, self.legal_logits(self.model.get_output_embeddings()(hidden))
        out = self.model(input_ids=ids, attention_mask=everywhere, use_cache=False, output_hidden_states=True)
        return out.hidden_states[-1][rows, columns], self.legal_logits(out.logits[rows, columns])

    def read_at(
        self, ids: Tensor, rows: Tensor, columns: Tensor, autocast: torch.dtype | None = None
    ) -> tuple[Tensor, Tensor]:
        """What `response_hidden` gives, by the quickest forward that has been found to have its gradients too.

        Args:
            ids, rows, columns: as there.
            autocast: what the trunk's products are computed in, where that is not the type of the weights. Norms,
                sums of layers and logits stay in float32.
        """
        trained = self.remember(find_trained)
        if autocast is not None:
            return self._read_coarsely(trained, ids, rows, columns, autocast)
        hidden = None if trained is None else trained.read_at(ids, rows, columns)
        if trained is None or hidden is None:
            return self.response_hidden(ids, rows, columns)
        return hidden, self.legal_logits(trained.lean.logits(hidden, self.vocab_size))

    def _read_coarsely(
        self, trained: TrainedTrunk | None, ids: Tensor, rows: Tensor, columns: Tensor, autocast: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        is_separate = self.remember(has_separate_head)  # tried out before anything is coarse
        with torch.autocast(self.device.type, autocast):
            if not is_separate:
                hidden, logits = self.response_hidden(ids, rows, columns)
                return hidden, logits.float()
            found = None if trained is None else trained.read_at(ids, rows, columns)
            if found is not None:
                hidden = found
            else:
                trunk = self.model.base_model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
                hidden = trunk[0][rows, columns]
        head = self.model.get_output_embeddings()
        if type(head) is nn.Linear:
            logits = logits_in_half(hidden.float(), head.weight.t(), head.bias)
        else:
            logits = head(hidden.float())
        return hidden, self.legal_logits(logits)

    @torch.inference_mode()
    def response_log_probs(
        self, prompt_ids: Tensor, prompt_mask: Tensor, response_ids: Tensor, response_mask: Tensor
    ) -> Tensor:
        """Log-probs of whole responses in one teacher-forced pass (in chunks of like length).

        Args:
            prompt_ids: (B, P) int64, left-padded. prompt_mask: (B, P) bool.
            response_ids: (B, T) int64, right-padded. response_mask: (B, T) bool.

        Returns:
            (B, T) float32 nats, 0 off the mask.
        """
        result = torch.zeros(response_ids.shape, dtype=torch.float32, device=self.device)
        order = (prompt_mask.sum(-1) + response_mask.sum(-1)).argsort()
        for chunk in order.split(_GPU_SCORING_ROWS if self.device.type == "cuda" else _SCORING_ROWS):
            packed = pack(prompt_ids[chunk], prompt_mask[chunk], response_ids[chunk], response_mask[chunk])
            positions = response_mask[chunk].nonzero()[:, 1]
            ids, rows, columns, targets, at = (to_device(x, self.device) for x in (*packed, positions))
            log_probs = self._log_probs_at(ids, rows, columns, targets)
            result[to_device(chunk, self.device)[rows], at] = log_probs
        return result.to(response_ids.device)

    def _log_probs_at(self, ids: Tensor, rows: Tensor, columns: Tensor, targets: Tensor) -> Tensor:
        """(n,) float32 log-probs of `targets` at positions of (B, L) sequences; the head runs in blocks."""
        lean = self.remember(find_lean)
        head: Callable[[Tensor], Tensor]
        if lean is not None and (lean.window is None or ids.shape[1] <= lean.window):
            trunk, _ = lean.read(ids)
            if self.vocab_size > _MIN_WIDE_VOCABULARY and self.dtype == torch.float32 and self.device.type == "cpu":
                shape = (self.vocab_size, self.holes, self.temperature)
                blocks = zip(trunk[rows, columns].split(_WIDE_HEAD_ROWS), targets.split(_WIDE_HEAD_ROWS), strict=True)
                assert lean.head is not None
                return torch.cat([score_by_columns(lean.head, block, tokens, *shape) for block, tokens in blocks])
            head = partial(lean.logits, vocab_size=self.vocab_size)
        elif self.remember(has_separate_head):
            trunk = self.model.base_model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)[0]
            head = self.model.get_output_embeddings()
        else:
            _, logits = self.response_hidden(ids, rows, columns)
            return token_log_probs(logits, targets)
        hidden = trunk[rows, columns]
        at_once = _GPU_HEAD_ROWS if self.device.type == "cuda" else _HEAD_ROWS
        blocks = zip(hidden.split(at_once), targets.split(at_once), strict=True)
        return torch.cat([token_log_probs(self.legal_logits(head(block)), tokens) for block, tokens in blocks])


def legal_logits(logits: Tensor, vocab_size: int, holes: Sequence[int] | Tensor, temperature: float = 1.0) -> Tensor:
    """(..., model vocabulary) logits cut to (..., V) and divided by `temperature`, with -inf on the ids in `holes`.

    Ids in a tensor on the device of the logits are not copied there.
    """
    if logits.shape[-1] > vocab_size:
        logits = logits[..., :vocab_size]
    if temperature != 1:
        logits = logits / temperature
    if len(holes):
        logits = logits.index_fill(-1, torch.as_tensor(holes, device=logits.device), -torch.inf)
    return logits


def token_log_probs(logits: Tensor, tokens: Tensor) -> Tensor:
    """log softmax(logits)[token] in float32, without writing the whole softmax; differentiable.

    Args:
        logits: (..., V). tokens: (...) int64.

    Returns:
        (...) float32 nats.
    """
    if logits.requires_grad and torch.is_grad_enabled() and logits.dim() == 2:
        return log_probs_and_entropies(logits, tokens)[0]
    logits = logits.float()
    return logits.gather(-1, tokens.unsqueeze(-1)).squeeze(-1) - logits.logsumexp(-1)


@torch.no_grad()
def has_separate_head(lm: CausalLM) -> bool:
    """Whether the logits are the LM head over the trunk; some models scale or cap them. Runs the model twice."""
    model = lm.model
    if getattr(model.config.get_text_config(), "final_logit_softcapping", None) is not None:
        return False  # small logits do not show it, so the config is asked
    length = min(_PROBE_TOKENS, lm.max_positions or _PROBE_TOKENS)
    ids = torch.arange(length, device=lm.device)[None] % lm.vocab_size
    everywhere = torch.ones_like(ids)
    trunk = model.base_model(input_ids=ids, attention_mask=everywhere, use_cache=False)[0]
    if trunk.shape[-1] != _head_shape(model)[1]:
        return False
    split = model.get_output_embeddings()(trunk)
    whole = model(input_ids=ids, attention_mask=everywhere, use_cache=False).logits
    return split.shape == whole.shape and torch.allclose(split, whole, rtol=1e-3, atol=1e-4)


def freeze(model: nn.Module) -> nn.Module:
    """Puts a model in eval mode, and takes its parameters out of autograd."""
    model.eval()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return model


def _head_shape(model: Any) -> tuple[int, int]:
    """V and D of the LM head, which need not be linear."""
    head = model.get_output_embeddings()
    if head is None:
        raise LmGymError(f"`model` must be a causal language model, and a {type(model).__name__} has no LM head.")
    rows, width = head.weight.shape if hasattr(head, "weight") else (head.out_features, head.in_features)
    return rows, width


def _eos_token_ids(model: Any, tokenizer: Any, vocab_size: int) -> frozenset[int]:
    """Every id that ends a response: the tokenizer's, and those the generation config adds (Llama 3 has several)."""
    listed = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    listed = listed if isinstance(listed, (list, tuple)) else [listed]
    return frozenset(i for i in (tokenizer.eos_token_id, *listed) if isinstance(i, int) and 0 <= i < vocab_size)
