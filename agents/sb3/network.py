"""The network that an algorithm of Stable-Baselines3 trains here: a language model.

`Trunk` is the features extractor, and `policy_class` an actor-critic whose heads are the trunk's.

Shapes: N rows, L columns, V vocabulary, D width of the hidden states, H width of an LSTM.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from gymnasium import spaces
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from torch import Tensor, nn

from agents.agent import TokenCount
from agents.policies.actor_critic import TrainablePolicy
from lmgym.models.padding import compact_left, compact_right
from lmgym.models.policy import PolicyState
from lmgym.models.sampling import check_finite_log_probs

_MIN_LOGIT = -1e4  # a probability of 0 in float32, without the NaN that -inf leaves in a KL


class Trunk(BaseFeaturesExtractor):
    """A language model as a features extractor: its outputs at the last token, one after the other.

    The outputs are, in this order: `logits` (V) and `value` (1) with `heads`, and the hidden state (D) with `hidden`.

    With the heads alone, steps of a rollout decode from a cache: a row continues in it if the row is what it was plus
    one token. Without the cache, a sequence that begins another one of the batch is not read on its own. It is read as
    a part of the longer one, and counts no tokens.

    Args:
        space: of the observations.
        make: builds the policy; a factory, since every network needs a policy of its own.
        heads: whether `logits` and `value` are among the features.
        hidden: whether the hidden state is.
        tokens: counts what is read.
    """

    def __init__(
        self,
        space: spaces.Space[Any],
        make: Callable[[], TrainablePolicy],
        heads: bool,
        hidden: bool,
        tokens: TokenCount,
    ) -> None:
        policy = make()
        self.vocab_size = int(cast(Any, space)["input_ids"].high.max()) + 1
        self.width: int = cast(Any, policy.value_head).in_features
        super().__init__(space, heads * (self.vocab_size + 1) + hidden * self.width)
        self.policy = policy
        self._heads = heads
        self._hidden = hidden
        self._tokens = tokens
        self._caches = False
        self._state: PolicyState | None = None
        self._seen: tuple[Tensor, Tensor] = (torch.empty(0), torch.empty(0))

    def train(self, mode: bool = True) -> Trunk:
        """Drops the cache, whose weights may be about to change. Dropout stays off in either mode."""
        self._state = None
        self._caches = self._heads and not self._hidden and not mode
        return super().train(False)

    def forward(self, observations: dict[str, Tensor]) -> Tensor:
        """(N, features) of ids (N, L) and masks (N, L)."""
        ids = observations["input_ids"].long()
        mask = observations["attention_mask"].bool()
        if self._caches and not torch.is_grad_enabled() and (self._state is None or len(ids) == len(self._seen[0])):
            return self._decode(ids, mask)
        sequences, rows, columns, which = _share_prefixes(ids, mask)
        read = self.policy.read_at(sequences.clamp(min=0), rows, columns)
        _check_logits(read.logits)
        parts = _join_heads(read.logits, read.values) if self._heads else []
        if self._hidden:
            parts.append(read.hidden)
        features = torch.cat(parts, dim=1)[which]
        size = int((sequences >= 0).sum())
        self._tokens.forward += size
        self._tokens.backward += size * features.requires_grad
        return features

    def _decode(self, ids: Tensor, mask: Tensor) -> Tensor:
        """(N, V + 1) logits and values from the cache."""
        if self._state is None:
            prompts, prompt_mask = _close_gaps(ids, mask)
            self._state = self.policy.begin(prompts, prompt_mask, ids.shape[1] - prompts.shape[1])
            self._tokens.forward += int(mask.sum())
        else:
            old_ids, old_mask = self._seen
            added = mask & ~old_mask
            continues = (added.sum(1) == 1) & (~old_mask | (mask & (ids == old_ids))).all(1)
            self._state.step(torch.where(continues, (ids * added).sum(1), 0))
            restarted = (~continues).nonzero().squeeze(1)
            if len(restarted):
                self._state.begin(restarted, *_close_gaps(ids[restarted], mask[restarted]))
            self._tokens.forward += int(continues.sum() + mask[restarted].sum())
        self._seen = (ids, mask)
        assert self._state.values is not None
        _check_logits(self._state.logits)
        return torch.cat(_join_heads(self._state.logits, self._state.values), dim=1)


def _join_heads(logits: Tensor, values: Tensor) -> list[Tensor]:
    """Logits (N, V), bounded from below, and values (N, 1), to be concatenated."""
    return [logits.float().clamp(min=_MIN_LOGIT), values.unsqueeze(1)]


def _check_logits(logits: Tensor) -> None:
    """Raises `NotFiniteError` for logits (N, V) that define no distribution, before SB3 draws from them."""
    check_finite_log_probs(logits.detach().amax(-1), logits.dtype)


def _close_gaps(ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Moves the tokens of sequences (n, L) with gaps to the right, and drops the columns that are empty then."""
    longest = int(mask.sum(1).max())
    return compact_right(ids, mask, longest), compact_right(mask, mask, longest)


def _share_prefixes(ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Drops every sequence (N, L) that begins another one: it is read as a part of the longer one.

    Of [3], [3, 4] and [5], only [3, 4] and [5] are read; [3] ends in column 0 of the first row.

    Returns:
        The B sequences that remain, ids (B, W) from column 0, -1 after the end; the row and the column (n,) of the
        last token of each of the n different sequences; and (N,) which of the n each sequence is.
    """
    longest = max(1, int(mask.sum(1).max()))
    marked = compact_left(torch.where(mask, ids, -1), mask, longest)
    unique, which = torch.unique(marked, dim=0, return_inverse=True)  # sorted: what begins with a row follows it
    begins = torch.zeros(len(unique), dtype=torch.bool, device=ids.device)
    begins[:-1] = ((unique[:-1] == unique[1:]) | (unique[:-1] < 0)).all(1)
    columns = ((unique >= 0).sum(1) - 1).clamp(min=0)  # RecurrentPPO pads with sequences of no token
    return unique[~begins], (~begins).cumsum(0) - (~begins).long(), columns, which


class _Head(nn.Module):
    """Columns [start, stop) of the features, plus a linear map of those from `rest` on (an LSTM's), which starts at 0.

    Args:
        start: of the columns. stop: of the columns.
        rest: the first column of the LSTM's output.
        width: H, columns of that output; 0 without an LSTM.
    """

    def __init__(self, start: int, stop: int, rest: int, width: int) -> None:
        super().__init__()
        self._columns = slice(start, stop)
        self._rest = rest
        self.more: nn.Linear | None = None
        if width:
            self.more = nn.utils.skip_init(nn.Linear, width, stop - start)
            nn.init.zeros_(self.more.weight)
            nn.init.zeros_(self.more.bias)

    def forward(self, features: Tensor) -> Tensor:
        chosen = features[:, self._columns]
        return chosen if self.more is None else chosen + self.more(features[:, self._rest :])


class _OnTrunk:
    """Mixed into an actor-critic policy of SB3: its two heads are those of the trunk, and nothing is drawn anew."""

    def _build(self: Any, lr_schedule: Callable[[float], float]) -> None:
        trunk = self.features_extractor
        width = getattr(self, "lstm_output_dim", 0)
        if width:
            self.features_dim = trunk.width  # what the LSTMs read
        self._build_mlp_extractor()
        v = trunk.vocab_size
        self.action_net = _Head(0, v, v + 1, width)
        self.value_net = _Head(v, v + 1, v + 1, width)
        self.optimizer = self.optimizer_class(self.parameters(), lr=lr_schedule(1), **self.optimizer_kwargs)


def policy_class(algorithm: Any) -> type:
    """The algorithm's own actor-critic policy, on a trunk."""
    aliases = algorithm.policy_aliases
    base = aliases["MlpLstmPolicy" if "MlpLstmPolicy" in aliases else "MlpPolicy"]
    members: dict[str, Any] = {}
    if hasattr(base, "_process_sequence"):

        def process(features: Tensor, states: Any, starts: Tensor, lstm: nn.LSTM) -> tuple[Tensor, Any]:
            """Runs the LSTM over the hidden states (last D features) and replaces them by its output (H)."""
            out, states = base._process_sequence(features[:, -lstm.input_size :], states, starts, lstm)
            return torch.cat([features[:, : -lstm.input_size], out], dim=1), states

        members["_process_sequence"] = staticmethod(process)
    return type(f"Token{base.__name__}", (_OnTrunk, base), members)


def critic_parameters(networks: Any) -> list[nn.Parameter]:
    """The parameters of an actor-critic policy that only its values depend on."""
    return [*networks.features_extractor.policy.value_head.parameters(), *networks.value_net.parameters()]
