"""A policy that starts from any reference and learns a correction of its logits: logits(s) = log pi_ref(.|s) + f(s).

f is a fresh network over the tokens of prompt and response whose last layer is zero at first, so that KL to the
reference is exactly 0 at the start. The optimum has this form too: log pi* = log pi_ref + Q / kl_coef up to a constant
a state (docs/optimum.md, (2)), so what f learns is a Q function.

Shapes: N slots, B sequences, L columns, n positions read, V vocabulary, W width of f.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from agents.policies.actor_critic import Read, TrainablePolicy, new_value_head
from agents.policies.networks import NETWORKS, Network, Stateful, Transformer
from lmgym.errors import InvalidArgumentError, check_choice, check_int
from lmgym.models.causal import CausalLM
from lmgym.models.decoding import Decoder, make_decoder


class ResidualState:
    """Running responses (`lmgym.models.policy.PolicyState`): the reference's decoder and that of f, side by side."""

    def __init__(self, reference: Decoder, residual: Decoder, value_head: nn.Module) -> None:
        self._reference = reference
        self._residual = residual
        self._value_head = value_head

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
        check_choice("network", network, NETWORKS)
        for name, number in (("width", width), ("layers", layers), ("positions", positions)):
            check_int(name, number, 1)
        self.reference = reference
        self.shape: dict[str, Any] = {"network": network, "width": width, "layers": layers, "positions": positions}
        self.shape["vocab_size"] = reference.vocab_size
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.network: Transformer | Stateful = NETWORKS[network](reference, width, layers, positions)
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
            reference = self.reference.read_at(ids, rows, columns)[1]
        hidden, residual = self.network.hidden_at(ids, rows, columns)
        return Read(reference.float() + residual, self.value_head(hidden).squeeze(-1), hidden)

    def models(self) -> list[nn.Module]:
        return [self, self.reference.model]

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
