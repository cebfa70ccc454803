"""A policy that starts from any reference and learns a correction of its logits: logits(s) = log pi_ref(.|s) + f(s).

f is a fresh network over the tokens of prompt and response whose last layer is zero at first, so that KL to the
reference is exactly 0 at the start. The optimum has this form too: log pi* = log pi_ref + Q / kl_coef up to a constant
a state (docs/optimum.md, (2)), so what f learns is a Q function.

Shapes: N slots, B sequences, L columns, n places read, V vocabulary, W width of f.
"""

from __future__ import annotations

import json
import os
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from agents.policies.actor_critic import Read, TrainablePolicy, new_value_head
from lmgym.errors import InvalidArgumentError, check_choice, check_int
from lmgym.models.causal import CausalLM
from lmgym.models.decoding import Decoder, make_decoder
from lmgym.models.padding import compact_left

Network = Literal["transformer", "gru", "mlp"]
_WINDOW = 16  # tokens that the mlp sees
_PROBE_POSITIONS = 16  # what `make_decoder` needs to find out that its ring is exact


class _Transformer(nn.Module):
    """A GPT-2 shape, its head apart from its embeddings."""

    def __init__(self, reference: CausalLM, width: int, layers: int, positions: int) -> None:
        super().__init__()
        heads = max(1, width // 16)
        config = GPT2Config(
            vocab_size=reference.vocab_size,
            n_positions=max(positions, _PROBE_POSITIONS),
            n_embd=width,
            n_layer=layers,
            n_head=next(h for h in range(heads, 0, -1) if width % h == 0),
            activation_function="gelu_pytorch_tanh",
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=None,
        )
        self.model = GPT2LMHeadModel(config).eval()
        self._lm = CausalLM(self.model, reference.tokenizer)
        self._lm.holes = []  # the reference rules ids out, for the sum

    @property
    def head(self) -> nn.Linear:
        return self.model.lm_head

    def hidden_at(self, ids: Tensor, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        return self._lm.response_hidden(ids, rows, columns)

    def decoder(self, slots: int, capacity: int) -> Decoder:
        return make_decoder(self._lm, slots, capacity, keep_hidden=True)


class _Stateful(nn.Module, ABC):
    """A network whose past is a state of fixed size (N, ...) a slot."""

    head: nn.Linear

    @abstractmethod
    def places(self, ids: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        """(n, W) hidden states at places of sequences (B, L) from column 0."""

    @abstractmethod
    def start(self, ids: Tensor, lengths: Tensor) -> Tensor:
        """(B, ...) states behind sequences (B, L) of `lengths` (B,) tokens from column 0."""

    @abstractmethod
    def advance(self, state: Tensor, tokens: Tensor) -> Tensor:
        """(N, ...) states behind one more token (N,)."""

    @abstractmethod
    def hidden(self, state: Tensor) -> Tensor:
        """(N, W) hidden states."""

    def hidden_at(self, ids: Tensor, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.places(ids, rows, columns)
        return hidden, self.head(hidden)

    def decoder(self, slots: int, capacity: int) -> Decoder:
        return _StateDecoder(self, slots)


class _GRU(_Stateful):
    """Gated recurrent units (Cho et al. 2014) over embedded tokens; the state is (N, layers, W)."""

    def __init__(self, reference: CausalLM, width: int, layers: int, positions: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(reference.vocab_size, width)
        self.gru = nn.GRU(width, width, layers, batch_first=True)
        self.head = nn.Linear(width, reference.vocab_size, bias=False)

    def places(self, ids: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        return self.gru(self.embedding(ids))[0][rows, columns]

    def start(self, ids: Tensor, lengths: Tensor) -> Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(
            self.embedding(ids), lengths.cpu(), batch_first=True, enforce_sorted=False
        )
        return self.gru(packed)[1].transpose(0, 1)

    def advance(self, state: Tensor, tokens: Tensor) -> Tensor:
        return self.gru(self.embedding(tokens)[:, None], state.transpose(0, 1).contiguous())[1].transpose(0, 1)

    def hidden(self, state: Tensor) -> Tensor:
        return state[:, -1]


class _MLP(_Stateful):
    """Layers over the last 16 tokens, embedded side by side, and the place; the state is (N, 17) int64, those ids."""

    def __init__(self, reference: CausalLM, width: int, layers: int, positions: int) -> None:
        super().__init__()
        self.start_id = reference.vocab_size  # stands where there is no token yet
        self.embedding = nn.Embedding(reference.vocab_size + 1, width)
        self.place = nn.Embedding(positions, width)
        self.first = nn.Linear(_WINDOW * width, width)
        self.rest = nn.ModuleList(nn.Linear(width, width) for _ in range(layers - 1))
        self.head = nn.Linear(width, reference.vocab_size, bias=False)

    def places(self, ids: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        return self.hidden(self._states(ids, rows, columns))

    def start(self, ids: Tensor, lengths: Tensor) -> Tensor:
        return self._states(ids, torch.arange(len(ids), device=ids.device), lengths - 1)

    def _states(self, ids: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        padded = nn.functional.pad(ids, (_WINDOW - 1, 0), value=self.start_id)
        return torch.cat([padded.unfold(1, _WINDOW, 1)[rows, columns], columns[:, None]], dim=1)

    def advance(self, state: Tensor, tokens: Tensor) -> Tensor:
        return torch.cat([state[:, 1:-1], tokens[:, None], state[:, -1:] + 1], dim=1)

    def hidden(self, state: Tensor) -> Tensor:
        tokens, place = state[:, :-1], state[:, -1].clamp(max=self.place.num_embeddings - 1)
        hidden = nn.functional.gelu(self.first(self.embedding(tokens).flatten(1)) + self.place(place))
        for layer in self.rest:
            hidden = nn.functional.gelu(layer(hidden))
        return hidden


class _StateDecoder:
    """Slots of a network with a state (`lmgym.models.decoding.Decoder`): a step costs no forward over the past."""

    def __init__(self, network: _Stateful, slots: int) -> None:
        self._network, self._slots = network, slots
        self._state: Tensor | None = None
        self.logits, self.hidden = torch.empty(0), torch.empty(0)

    @torch.inference_mode()
    def begin(self, slots: Tensor, ids: Tensor, mask: Tensor) -> None:
        """Restarts slots (n,) from sequences (n, W), left-padded."""
        started = self._network.start(compact_left(ids, mask), mask.sum(-1))
        if self._state is None:
            self._state = started.new_zeros((self._slots, *started.shape[1:]))
        self._state[slots] = started
        self._read(self._state)

    @torch.inference_mode()
    def step(self, tokens: Tensor) -> None:
        """Appends a token (N,) to every slot."""
        assert self._state is not None
        self._state = self._network.advance(self._state, tokens)
        self._read(self._state)

    @torch.inference_mode()
    def keep(self, slots: Tensor) -> None:
        """Keeps only these slots (n,), in this order."""
        assert self._state is not None
        self._state, self._slots = self._state[slots], len(slots)
        self.logits, self.hidden = self.logits[slots], self.hidden[slots]

    def _read(self, state: Tensor) -> None:
        self.hidden = self._network.hidden(state)
        self.logits = self._network.head(self.hidden)


class ResidualState:
    """Running responses (`lmgym.models.policy.PolicyState`): the reference's decoder and that of f, side by side."""

    def __init__(self, reference: Decoder, residual: Decoder, value_head: nn.Module) -> None:
        self._reference, self._residual, self._value_head = reference, residual, value_head

    @property
    def logits(self) -> Tensor:
        """(B, V) of each response's next token."""
        return self._reference.logits.float() + self._residual.logits

    @property
    def values(self) -> Tensor:
        """(B,) the value head's estimate."""
        with torch.inference_mode():
            return self._value_head(self._residual.hidden).squeeze(-1)

    def begin(self, rows: Tensor, prompt_ids: Tensor, prompt_mask: Tensor) -> None:
        """Restarts rows (n,) from prompts (n, P), left-padded."""
        for decoder in (self._reference, self._residual):
            decoder.begin(rows, prompt_ids, prompt_mask)

    def step(self, tokens: Tensor) -> None:
        """Appends a token (B,) to every response."""
        for decoder in (self._reference, self._residual):
            decoder.step(tokens)

    def keep(self, rows: Tensor) -> None:
        """Keeps only these rows (n,), in this order."""
        for decoder in (self._reference, self._residual):
            decoder.keep(rows)


_NETWORKS: dict[str, Any] = {"transformer": _Transformer, "gru": _GRU, "mlp": _MLP}


class ResidualPolicy(TrainablePolicy):
    """logits(s) = log pi_ref(.|s) + f(s), with a value head on f's last hidden state; both are 0 at first.

    The reference is the one that the env has: frozen, not copied, and no part of the weights. Where it gives a token no
    probability (ids that the tokenizer lacks), neither does the policy.

    Args:
        reference: what the policy starts from, of any architecture.
        network: f. "transformer" is a GPT-2 shape, "gru" gated recurrent units, "mlp" layers over the last 16 tokens.
        width: W, of the network's hidden states. layers: how many.
        positions: the longest sequence there will be, prompt and response together, in tokens.
        seed: of the weights.
    """

    def __init__(
        self,
        reference: CausalLM,
        network: Network = "transformer",
        *,
        width: int = 64,
        layers: int = 2,
        positions: int,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_choice("network", network, _NETWORKS)
        for name, number in (("width", width), ("layers", layers), ("positions", positions)):
            check_int(name, number, 1)
        self.reference = reference
        self.shape: dict[str, Any] = {"network": network, "width": width, "layers": layers, "positions": positions}
        self.shape["vocab_size"] = reference.vocab_size
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.network: _Transformer | _Stateful = _NETWORKS[network](reference, width, layers, positions)
        nn.init.zeros_(self.network.head.weight)
        self.network.to(reference.device)
        self.value_head = new_value_head(width, reference.device)

    @property
    def device(self) -> torch.device:
        return self.reference.device

    @property
    def dtype(self) -> torch.dtype:
        return self.reference.dtype  # f is in float32

    def begin(self, prompt_ids: Tensor, prompt_mask: Tensor, max_new_tokens: int) -> ResidualState:
        b, p = prompt_ids.shape
        longest = int(prompt_mask.sum(-1).max()) + max_new_tokens
        if longest > self.shape["positions"]:
            raise InvalidArgumentError(
                f"`prompt_ids` and `max_new_tokens` must fit into {self.shape['positions']} positions, got {longest}."
            )
        decoders = make_decoder(self.reference, b, p + max_new_tokens), self.network.decoder(b, p + max_new_tokens)
        state = ResidualState(*decoders, self.value_head)
        state.begin(torch.arange(b, device=prompt_ids.device), prompt_ids, prompt_mask)
        return state

    def read_at(self, ids: Tensor, rows: Tensor, columns: Tensor) -> Read:
        with torch.no_grad():
            reference = self.reference.response_hidden(ids, rows, columns)[1]
        hidden, residual = self.network.hidden_at(ids, rows, columns)
        return Read(reference.float() + residual, self.value_head(hidden).squeeze(-1), hidden)

    def critic_parameters(self) -> list[nn.Parameter]:
        return list(self.value_head.parameters())

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Writes f and the value head as `residual.safetensors`, and their shape as `residual.json`."""
        weights = {name: x.contiguous() for name, x in self.state_dict().items()}
        save_file(weights, Path(directory) / "residual.safetensors")
        (Path(directory) / "residual.json").write_text(json.dumps(self.shape))

    def load(self, directory: str | os.PathLike[str]) -> None:
        path = Path(directory) / "residual.json"
        shape = json.loads(path.read_text()) if path.is_file() else None
        if shape != self.shape:
            raise InvalidArgumentError(f"`directory` must hold a residual of shape {self.shape}, got {shape}.")
        self.load_state_dict(load_file(path.with_suffix(".safetensors"), device=str(self.device)))
