"""Fresh networks over the tokens of prompt and response: what a residual policy adds to the reference's logits.

Shapes: N slots, B sequences, L columns, n positions read, V vocabulary, W width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from lmgym.models.causal import CausalLM
from lmgym.models.decoding import Decoder, make_decoder
from lmgym.models.padding import compact_left

Network = Literal["transformer", "gru", "mlp"]
_WINDOW = 16  # tokens that the mlp sees
_PROBE_POSITIONS = 16  # what `make_decoder` needs to find out that its ring is exact


class Transformer(nn.Module):
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
        self.lm = CausalLM(self.model, reference.tokenizer)
        self.lm.holes = []  # the reference rules ids out, for the sum

    @property
    def head(self) -> nn.Linear:
        return self.model.lm_head

    def hidden_at(self, ids: Tensor, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        return self.lm.read_at(ids, rows, columns)

    def decoder(self, slots: int, capacity: int) -> Decoder:
        return make_decoder(self.lm, slots, capacity, keep_hidden=True)


class Stateful(nn.Module, ABC):
    """A network whose past is a state of fixed size (N, ...) a slot."""

    head: nn.Linear

    @abstractmethod
    def read_hidden(self, ids: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        """(n, W) hidden states at positions of sequences (B, L) from column 0."""

    @abstractmethod
    def start(self, ids: Tensor, lengths: Tensor) -> Tensor:
        """(B, ...) states after sequences (B, L) of `lengths` (B,) tokens from column 0."""

    @abstractmethod
    def advance(self, state: Tensor, tokens: Tensor) -> Tensor:
        """(N, ...) states after one more token (N,)."""

    @abstractmethod
    def hidden(self, state: Tensor) -> Tensor:
        """(N, W) hidden states."""

    def hidden_at(self, ids: Tensor, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.read_hidden(ids, rows, columns)
        return hidden, self.head(hidden)

    def decoder(self, slots: int, capacity: int) -> Decoder:
        return StateDecoder(self, slots)


class GRU(Stateful):
    """Gated recurrent units (Cho et al. 2014) over embedded tokens; the state is (N, layers, W)."""

    def __init__(self, reference: CausalLM, width: int, layers: int, positions: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(reference.vocab_size, width)
        self.gru = nn.GRU(width, width, layers, batch_first=True)
        self.head = nn.Linear(width, reference.vocab_size, bias=False)

    def read_hidden(self, ids: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
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


class MLP(Stateful):
    """Layers over the last 16 tokens, embedded side by side, and the position; the state is (N, 17) int64, both."""

    def __init__(self, reference: CausalLM, width: int, layers: int, positions: int) -> None:
        super().__init__()
        self.start_id = reference.vocab_size  # stands where there is no token yet
        self.embedding = nn.Embedding(reference.vocab_size + 1, width)
        self.place = nn.Embedding(positions, width)  # of a position; the name is in every checkpoint
        self.first = nn.Linear(_WINDOW * width, width)
        self.rest = nn.ModuleList(nn.Linear(width, width) for _ in range(layers - 1))
        self.head = nn.Linear(width, reference.vocab_size, bias=False)

    def read_hidden(self, ids: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        return self.hidden(self._states(ids, rows, columns))

    def start(self, ids: Tensor, lengths: Tensor) -> Tensor:
        return self._states(ids, torch.arange(len(ids), device=ids.device), lengths - 1)

    def _states(self, ids: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        padded = nn.functional.pad(ids, (_WINDOW - 1, 0), value=self.start_id)
        return torch.cat([padded.unfold(1, _WINDOW, 1)[rows, columns], columns[:, None]], dim=1)

    def advance(self, state: Tensor, tokens: Tensor) -> Tensor:
        return torch.cat([state[:, 1:-1], tokens[:, None], state[:, -1:] + 1], dim=1)

    def hidden(self, state: Tensor) -> Tensor:
        tokens = state[:, :-1]
        position = state[:, -1].clamp(max=self.place.num_embeddings - 1)
        hidden = nn.functional.gelu(self.first(self.embedding(tokens).flatten(1)) + self.place(position))
        for layer in self.rest:
            hidden = nn.functional.gelu(layer(hidden))
        return hidden


class StateDecoder:
    """Slots of a network with a state (`lmgym.models.decoding.Decoder`): a step costs no forward over the past."""

    def __init__(self, network: Stateful, slots: int) -> None:
        self._network = network
        self._slots = slots
        self._state: Tensor | None = None
        self.logits = torch.empty(0)
        self.hidden = torch.empty(0)

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
        self._state = self._state[slots]
        self._slots = len(slots)
        self.logits = self.logits[slots]
        self.hidden = self.hidden[slots]

    def _read(self, state: Tensor) -> None:
        self.hidden = self._network.hidden(state)
        self.logits = self._network.head(self.hidden)


NETWORKS: dict[str, Any] = {"transformer": Transformer, "gru": GRU, "mlp": MLP}
