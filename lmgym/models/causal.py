"""A Hugging Face causal language model, with what the token MDP needs to know of it.

Shapes: B rows, P prompt columns, T response columns, L = P + T, V vocabulary, D width of the model.
"""

from __future__ import annotations

import copy
import os
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.activations import NewGELUActivation

from lmgym.errors import InvalidArgumentError, LmGymError, check_choice
from lmgym.models import markov
from lmgym.models.adapters import load_pretrained
from lmgym.models.loading import check_embedded
from lmgym.models.names import check_model_name
from lmgym.models.padding import pack
from lmgym.models.positions import max_positions
from lmgym.models.probes import check_language_model
from lmgym.models.texts import Texts

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_SCORING_ROWS = 16  # rows a teacher-forced forward takes at once: larger batches only fault more pages in
_HEAD_ROWS = 256  # hidden states the LM head takes at once, so that (rows, V) stays in the cache of the processor
_GPU_SCORING_ROWS, _GPU_HEAD_ROWS = 128, 2048  # the same on a GPU, which small products leave idle


class CausalLM(Texts):
    """A causal LM with its tokenizer; the reference of a task, or the trunk of a policy.

    Tokens that the model embeds but the tokenizer does not have (padded embeddings) do not exist here: `vocab_size` is
    the tokenizer's, and every law is normalised over it.

    Attributes:
        model: the Hugging Face model.
        tokenizer: its tokenizer.
        vocab_size: V, one more than the tokenizer's largest id.
        embedded: tokens that the model gives logits for, V or more.
        holes: ids below V that the tokenizer does not have.
        eos_token_ids: ids that end a response.
        pad_token_id: the id that fills columns holding no token.
        temperature: what logits are divided by, wherever they are read.
    """

    def __init__(self, model: Any, tokenizer: Any, temperature: float = 1.0) -> None:
        super().__init__(tokenizer)
        self.model = model
        self.temperature = temperature
        self.origin: CausalLM | None = None  # held, so that whoever asks for it again gets this one
        known = set(tokenizer.get_vocab().values())
        self.embedded, _ = _head_shape(model)
        self.vocab_size = max(known) + 1
        check_embedded("`model`", self.embedded, self.vocab_size)
        self.holes = sorted(set(range(self.vocab_size)) - known)
        self.eos_token_ids = _eos_token_ids(model, tokenizer, self.vocab_size)
        pad = tokenizer.pad_token_id
        self.pad_token_id = pad if pad is not None and pad < self.vocab_size else min(known)
        self._head_splits: bool | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> CausalLM:
        # gymnasium deep-copies the kwargs of a spec once a wrapper: a model is shared, never copied by accident.
        return self

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
        """Whether `token` is an id the tokenizer has."""
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
        """Hidden states and logits at chosen places of right-padded sequences; differentiable.

        Causal attention makes right padding invisible, so no mask and no position ids are needed: this is the plainest
        forward a model has, and the definition that cached decoding must reproduce.

        Args:
            ids: (B, L) int64, sequences from column 0, right-padded.
            rows: (n,) int64. columns: (n,) int64: the places wanted.

        Returns:
            hidden (n, D), the input of the LM head, and logits (n, V).
        """
        if self._head_splits is None:
            self._head_splits = self._check_head_splits(ids)
        everywhere = torch.ones_like(ids)
        if self._head_splits:
            hidden = self.model.base_model(input_ids=ids, attention_mask=everywhere, use_cache=False)[0]
            hidden = hidden[rows, columns]
            return hidden, self.legal_logits(self.model.get_output_embeddings()(hidden))
        out = self.model(input_ids=ids, attention_mask=everywhere, use_cache=False, output_hidden_states=True)
        return out.hidden_states[-1][rows, columns], self.legal_logits(out.logits[rows, columns])

    @torch.no_grad()
    def _check_head_splits(self, ids: Tensor) -> bool:
        """Whether logits are just the head over the trunk (some models scale or cap them on the way)."""
        if getattr(self.model.config.get_text_config(), "final_logit_softcapping", None) is not None:
            return False  # invisible in small logits, so it is asked for by name
        few = ids[:1, :8]
        everywhere = torch.ones_like(few)
        trunk = self.model.base_model(input_ids=few, attention_mask=everywhere, use_cache=False)[0]
        if trunk.shape[-1] != _head_shape(self.model)[1]:
            return False
        split = self.model.get_output_embeddings()(trunk)
        whole = self.model(input_ids=few, attention_mask=everywhere, use_cache=False).logits
        return split.shape == whole.shape and torch.allclose(split, whole, rtol=1e-3, atol=1e-4)

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
            ids, rows, columns, targets = (x.to(self.device) for x in packed)
            log_probs = self._log_probs_at(ids, rows, columns, targets)
            part = torch.zeros((len(chunk), response_ids.shape[1]), device=self.device)
            part[response_mask[chunk].to(self.device)] = log_probs
            result[chunk.to(self.device)] = part
        return result.to(response_ids.device)

    def _log_probs_at(self, ids: Tensor, rows: Tensor, columns: Tensor, targets: Tensor) -> Tensor:
        """(n,) float32 log-probs of `targets` at places of (B, L) sequences, the head taken in blocks."""
        if self._head_splits is None:
            self._head_splits = self._check_head_splits(ids)
        if not self._head_splits:
            _, logits = self.response_hidden(ids, rows, columns)
            return token_log_probs(logits, targets)
        trunk = self.model.base_model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)[0]
        hidden, head = trunk[rows, columns], self.model.get_output_embeddings()
        at_once = _GPU_HEAD_ROWS if self.device.type == "cuda" else _HEAD_ROWS
        blocks = zip(hidden.split(at_once), targets.split(at_once), strict=True)
        return torch.cat([token_log_probs(self.legal_logits(head(h)), t) for h, t in blocks])


def legal_logits(logits: Tensor, vocab_size: int, holes: Sequence[int], temperature: float = 1.0) -> Tensor:
    """(..., model vocabulary) logits cut to (..., V) and divided by `temperature`, with -inf on the ids in `holes`."""
    logits = logits[..., :vocab_size]
    if temperature != 1:
        logits = logits / temperature
    if holes:
        logits = logits.clone()
        logits[..., list(holes)] = -torch.inf
    return logits


def token_log_probs(logits: Tensor, tokens: Tensor) -> Tensor:
    """log softmax(logits)[token] in float32, without writing the whole softmax.

    Args:
        logits: (..., V). tokens: (...) int64.

    Returns:
        (...) float32 nats.
    """
    logits = logits.float()
    return logits.gather(-1, tokens.unsqueeze(-1)).squeeze(-1) - logits.logsumexp(-1)


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


def resolve_device(device: str) -> torch.device:
    """A torch device from its name; "auto" is the GPU where there is one.

    Raises:
        InvalidArgumentError: if the name is not a device, or is a GPU this machine does not have.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise InvalidArgumentError(
            f"`device` must be 'auto' or a torch device such as 'cpu', got {device!r}."
        ) from error
    if resolved.type == "cuda" and not torch.cuda.is_available():
        raise InvalidArgumentError(f"`device` must be one this machine has, got {device!r} and torch sees no GPU.")
    return resolved


Held = TypeVar("Held")


class SharedModels(Generic[Held]):
    """Loads models with their tokenizers, frozen; one copy a (name, device, dtype) for as long as anybody holds it.

    Args:
        argument: what the name is called in messages.
        auto_class: the transformers class that loads the model.
        wrap: makes of a model and its tokenizer what is handed out.
    """

    def __init__(self, argument: str, auto_class: Any, wrap: Callable[[Any, Any], Held]) -> None:
        self._argument, self._auto_class, self._wrap = argument, auto_class, wrap
        self._held: weakref.WeakValueDictionary[tuple[Any, ...], Held] = weakref.WeakValueDictionary()
        self._loading = threading.Lock()

    def load(self, name: str, device: str, dtype: str) -> Held:
        """The model of that name on that device, loaded now or before.

        Raises:
            InvalidArgumentError: for a name, device or dtype that cannot be.
            LmGymError: if Hugging Face cannot load it; the cause is chained.
        """
        check_model_name(self._argument, name)
        name = os.fspath(name)
        check_choice("dtype", dtype, DTYPES)
        place = resolve_device(device)
        key = (*_identity(name), str(place), dtype)
        with self._loading:
            held = self._held.get(key)
            if held is None:
                model, tokenizer = load_pretrained(self._argument, name, self._auto_class, DTYPES[dtype])
                held = self._held[key] = self._wrap(freeze(fuse_gelu(model).to(place)), tokenizer)
        return held


def _identity(name: str) -> tuple[Any, ...]:
    """What tells a model from others: its place, and the state of its files, which may be written anew."""
    if not os.path.isdir(name):
        return (name,)
    states = []
    for entry in os.scandir(name):
        if entry.is_file():
            state = entry.stat()
            states.append((entry.name, state.st_mtime_ns, state.st_size))
    return os.path.realpath(name), *sorted(states)


_causal_lms = SharedModels("model", AutoModelForCausalLM, CausalLM)


def load_causal_lm(name: str, device: str = "auto", dtype: str = "float32") -> CausalLM:
    """Loads a causal LM and its tokenizer in eval mode, frozen; one copy a (name, device, dtype) while held.

    Args:
        name: local directory or hub name.
        device: "auto", "cpu", "cuda", ...
        dtype: "float32", "bfloat16" or "float16".

    Raises:
        InvalidArgumentError: for a name, device or dtype that cannot be.
        LmGymError: if Hugging Face cannot load it; the cause is chained.
    """
    lm = _causal_lms.load(name, device, dtype)
    check_language_model(lm)
    return lm


_tempered: weakref.WeakKeyDictionary[CausalLM, weakref.WeakValueDictionary[float, CausalLM]]
_tempered = weakref.WeakKeyDictionary()


def tempered(lm: CausalLM, temperature: float) -> CausalLM:
    """The model whose law is softmax(logits / temperature), on the same weights; one for as long as it is held.

    A table of transition probabilities becomes another table, so that whoever reads it sees the law.

    Raises:
        InvalidArgumentError: for a table of low rank, which no temperature but 1 leaves of low rank.
    """
    if temperature == 1:
        return lm
    made = _tempered.setdefault(lm, weakref.WeakValueDictionary())
    found = made.get(temperature)
    if found is None:
        model = lm.model
        if not isinstance(model, markov.MarkovLM):
            found = CausalLM(model, lm.tokenizer, lm.temperature * temperature)
        elif model.mixture is not None:
            raise InvalidArgumentError(
                f"`temperature` must be 1 where the reference is a table of low rank, got {temperature}."
            )
        else:
            rows = (model.rows.double().log() / temperature).softmax(-1)
            table = markov.MarkovLM.from_probs(
                rows.cpu().numpy(), order=model.config.order, eos_token_id=model.config.eos_token_id
            )
            found = CausalLM(freeze(table.to(lm.device, lm.dtype)), lm.tokenizer)
        found.origin = lm
        made[temperature] = found
    return found


_placed: weakref.WeakKeyDictionary[CausalLM, dict[tuple[str, str], CausalLM]] = weakref.WeakKeyDictionary()


def place(lm: CausalLM, device: str, dtype: str) -> CausalLM:
    """The model itself where it already lies so; else a copy, one a (device, dtype) for as long as `lm` is held."""
    check_choice("dtype", dtype, DTYPES)
    where = resolve_device(device)
    if lm.device.type == where.type and lm.dtype == DTYPES[dtype]:
        return lm
    copies = _placed.setdefault(lm, {})
    key = (str(where), dtype)
    if key not in copies:
        copies[key] = CausalLM(copy.deepcopy(lm.model).to(where, DTYPES[dtype]), lm.tokenizer, lm.temperature)
    return copies[key]


def fuse_gelu(model: nn.Module) -> nn.Module:
    """Swaps GPT-2's GELU, written out in eight operations, for torch's one kernel of the same function."""
    for module in model.modules():
        for name, child in module.named_children():
            if isinstance(child, NewGELUActivation):
                setattr(module, name, nn.GELU(approximate="tanh"))
    return model


def freeze(model: nn.Module) -> nn.Module:
    """Puts a model in eval mode and takes its parameters out of autograd."""
    model.eval()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return model
