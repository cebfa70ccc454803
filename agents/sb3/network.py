"""What an algorithm of Stable-Baselines3 learns on here, a language model, and how that acts without SB3.

`Trunk` is the features extractor, `policy_class` an actor-critic whose heads are the trunk's, `PrefixPolicy` and
`MaskedPolicy` a trained network as `lmgym` takes policies.

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
from agents.policies.actor_critic import MaskedState, TrainablePolicy
from lmgym.envs.engine import Engine
from lmgym.models.policy import CausalPolicy, Policy, PolicyState
from lmgym.models.sampling import Sampler, check_finite_log_probs
from lmgym.wrappers.action_mask import kept

_IMPOSSIBLE = -1e4  # nats: a probability of 0 in float32, without the NaN that -inf leaves in a KL
_POINT_MASS = 1e4  # logit of an action that is taken for certain


class Trunk(BaseFeaturesExtractor):
    """A language model as a features extractor: what it says of the last token's place, side by side.

    The parts, in this order: `logits` (V) and `value` (1) with `heads`, and the hidden state (D) with `hidden`. With
    the heads alone, steps of a rollout decode from a cache, in which a row goes on if it is what it was plus a token.
    Else a state that begins another of the batch is read on the way through that, and counts no tokens of its own.

    Args:
        space: of the observations. make: builds the policy; a factory, since every network needs one of its own.
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
        self.policy, self._heads, self._hidden, self._tokens = policy, heads, hidden, tokens
        self._caches = False
        self._state: PolicyState | None = None
        self._seen: tuple[Tensor, Tensor] = (torch.empty(0), torch.empty(0))

    def train(self, mode: bool = True) -> Trunk:
        """Drops the cache, whose weights may be about to change. Dropout stays off in either mode."""
        self._state, self._caches = None, self._heads and not self._hidden and not mode
        return super().train(False)

    def forward(self, observations: dict[str, Tensor]) -> Tensor:
        """(N, features) of ids (N, L) and masks (N, L)."""
        ids, mask = observations["input_ids"].long(), observations["attention_mask"].bool()
        if self._caches and not torch.is_grad_enabled() and (self._state is None or len(ids) == len(self._seen[0])):
            return self._decode(ids, mask)
        sequences, rows, columns, which = _shared(ids, mask)
        read = self.policy.read_at(sequences.clamp(min=0), rows, columns)
        _check_logits(read.logits)
        parts = _side_by_side(read.logits, read.values) if self._heads else []
        if self._hidden:
            parts.append(read.hidden)
        features, size = torch.cat(parts, dim=1)[which], int((sequences >= 0).sum())
        self._tokens.forward += size
        self._tokens.backward += size * features.requires_grad
        return features

    def _decode(self, ids: Tensor, mask: Tensor) -> Tensor:
        if self._state is None:
            prompts, prompt_mask = _left_padded(ids, mask)
            self._state = self.policy.begin(prompts, prompt_mask, ids.shape[1] - prompts.shape[1])
            self._tokens.forward += int(mask.sum())
        else:
            old_ids, old_mask = self._seen
            added = mask & ~old_mask
            goes_on = (added.sum(1) == 1) & (~old_mask | (mask & (ids == old_ids))).all(1)
            self._state.step(torch.where(goes_on, (ids * added).sum(1), 0))
            fresh = (~goes_on).nonzero().squeeze(1)
            if len(fresh):
                self._state.begin(fresh, *_left_padded(ids[fresh], mask[fresh]))
            self._tokens.forward += int(goes_on.sum() + mask[fresh].sum())
        self._seen = ids, mask
        assert self._state.values is not None
        _check_logits(self._state.logits)
        return torch.cat(_side_by_side(self._state.logits, self._state.values), dim=1)


def _side_by_side(logits: Tensor, values: Tensor) -> list[Tensor]:
    return [logits.float().clamp(min=_IMPOSSIBLE), values.unsqueeze(1)]


def _check_logits(logits: Tensor) -> None:
    """Raises `NotFiniteError` for logits (N, V) that are no law, before SB3 draws from them."""
    check_finite_log_probs(logits.detach().amax(-1))


def _left_padded(ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Sequences (n, L) with gaps, moved to the right and cut to the longest."""
    order = mask.to(torch.uint8).argsort(dim=1, stable=True)[:, -int(mask.sum(1).max()) :]
    return ids.gather(1, order), mask.gather(1, order)


def _shared(ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sequences (N, L) with gaps, in as few as will do: one that begins another is read on the way through that.

    Returns:
        ids (B, W) from column 0, -1 behind the end; the row and column (n,) of the last token of each that differs; and
        which of those (N,) each sequence is.
    """
    order = (~mask).to(torch.uint8).argsort(dim=1, stable=True)[:, : max(1, int(mask.sum(1).max()))]
    marked = torch.where(mask, ids, -1).gather(1, order)
    unique, which = torch.unique(marked, dim=0, return_inverse=True)  # sorted: what begins with a row comes behind it
    begins = torch.zeros(len(unique), dtype=torch.bool, device=ids.device)
    begins[:-1] = ((unique[:-1] == unique[1:]) | (unique[:-1] < 0)).all(1)
    columns = ((unique >= 0).sum(1) - 1).clamp(min=0)  # RecurrentPPO pads with sequences of no token
    return unique[~begins], (~begins).cumsum(0) - (~begins).long(), columns, which


class _Head(nn.Module):
    """Columns [start, stop) of the features, plus a linear map, 0 at first, of those from `rest` on (an LSTM's)."""

    def __init__(self, start: int, stop: int, rest: int, width: int) -> None:
        super().__init__()
        self._columns, self._rest, self.more = slice(start, stop), rest, None
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
        trunk, width = self.features_extractor, getattr(self, "lstm_output_dim", 0)
        if width:
            self.features_dim = trunk.width  # what the LSTMs read
        self._build_mlp_extractor()
        v = trunk.vocab_size
        self.action_net, self.value_net = _Head(0, v, v + 1, width), _Head(v, v + 1, v + 1, width)
        self.optimizer = self.optimizer_class(self.parameters(), lr=lr_schedule(1), **self.optimizer_kwargs)


def policy_class(algorithm: Any) -> type:
    """The algorithm's own actor-critic policy, on a trunk."""
    aliases = algorithm.policy_aliases
    base = aliases["MlpLstmPolicy" if "MlpLstmPolicy" in aliases else "MlpPolicy"]
    members: dict[str, Any] = {}
    if hasattr(base, "_process_sequence"):

        def process(features: Tensor, states: Any, starts: Tensor, lstm: nn.LSTM) -> tuple[Tensor, Any]:
            """Runs the LSTM over the hidden states (last D features) and puts what it says (H) in their place."""
            out, states = base._process_sequence(features[:, -lstm.input_size :], states, starts, lstm)
            return torch.cat([features[:, : -lstm.input_size], out], dim=1), states

        members["_process_sequence"] = staticmethod(process)
    return type(f"Token{base.__name__}", (_OnTrunk, base), members)


def critic_parameters(networks: Any) -> list[nn.Parameter]:
    """Those of an actor-critic policy that only its values depend on."""
    return [*networks.features_extractor.policy.value_head.parameters(), *networks.value_net.parameters()]


# -- acting without SB3 ------------------------------------------------------------------------------------------------


class MaskedPolicy:
    """What MaskablePPO does under a `VectorActionMask`: the policy's law among the tokens that the mask leaves.

    Args:
        policy: the network. engine: of the env, whose reference the mask is of. sampler: that of the mask.
    """

    def __init__(self, policy: Policy, engine: Engine, sampler: Sampler) -> None:
        self._policy, self._reference = policy, CausalPolicy(engine.lm)
        self._is_eos, self._sampler = torch.as_tensor(engine.is_eos, device=engine.lm.device), sampler

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self._policy.device

    def begin(self, prompt_ids: Tensor, prompt_mask: Tensor, max_new_tokens: int) -> MaskedState:
        """Reads prompts (B, P), left-padded."""
        prompts = prompt_ids, prompt_mask, max_new_tokens
        return MaskedState(self._policy.begin(*prompts), self._reference.begin(*prompts), self._among)

    def _among(self, logits: Tensor, reference: Tensor) -> Tensor:
        return logits.masked_fill(~kept(reference, self._sampler, self._is_eos), -torch.inf)


class PrefixPolicy:
    """What DQN, QRDQN or RecurrentPPO does, as a policy: a full forward over what has been written a token.

    Of the first two the law is a point mass on the token of the highest Q.

    Args:
        model: SB3's object.
        tokens: what the networks count when they read; acting is no cost of training, and is taken off again.
    """

    def __init__(self, model: Any, tokens: TokenCount) -> None:
        self._networks, self._tokens = model.policy, tokens

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self._networks.device

    def begin(self, prompt_ids: Tensor, prompt_mask: Tensor, max_new_tokens: int) -> PrefixState:
        """Reads prompts (B, P), left-padded."""
        self._networks.set_training_mode(False)
        state = PrefixState(self._read, prompt_ids[:, :0], prompt_mask[:, :0].bool())
        state.begin(torch.arange(len(prompt_ids), device=prompt_ids.device), prompt_ids, prompt_mask)
        return state

    @torch.no_grad()
    def _read(self, ids: Tensor, mask: Tensor, memory: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """(n, V) logits behind sequences (n, W), and an LSTM's memory (n, layers, 2H) behind that before them."""
        spent = self._tokens.forward
        try:
            return self._logits(ids, mask, memory)
        finally:
            self._tokens.forward = spent

    def _logits(self, ids: Tensor, mask: Tensor, memory: Tensor | None) -> tuple[Tensor, Tensor | None]:
        observation = {"input_ids": ids, "attention_mask": mask}
        if hasattr(self._networks, "lstm_actor"):
            layers, _, h = self._networks.lstm_hidden_state_shape
            if memory is None:
                memory = torch.zeros((len(ids), layers, 2 * h), device=ids.device)
            both = [x.transpose(0, 1).contiguous() for x in memory.split(h, dim=-1)]
            starts = torch.zeros(len(ids), device=ids.device)
            law, both = self._networks.get_distribution(observation, tuple(both), starts)
            return law.distribution.logits, torch.cat([x.transpose(0, 1) for x in both], dim=-1)
        if hasattr(self._networks, "q_net"):
            q = self._networks.q_net(observation)
        else:
            q = self._networks.quantile_net(observation).mean(1)
        best, chosen = q.amax(1, keepdim=True), q.argmax(1, keepdim=True)
        return torch.zeros_like(q).scatter_(1, chosen, _POINT_MASS + (best - best)), None  # NaN stays NaN


class PrefixState:
    """Running responses (`lmgym.models.policy.PolicyState`), read anew with every token."""

    def __init__(self, read: Callable[..., tuple[Tensor, Tensor | None]], ids: Tensor, mask: Tensor) -> None:
        self._read, self._ids, self._mask = read, ids, mask
        self._memory: Tensor | None = None
        self.logits: Tensor = torch.empty(0)
        self.values: Tensor | None = None

    def begin(self, rows: Tensor, prompt_ids: Tensor, prompt_mask: Tensor) -> None:
        """Restarts rows (n,) from prompts (n, P), left-padded."""
        width = max(self._ids.shape[1], prompt_ids.shape[1])
        self._ids, prompt_ids = (nn.functional.pad(x, (width - x.shape[1], 0)) for x in (self._ids, prompt_ids))
        self._mask, prompt_mask = (
            nn.functional.pad(x.bool(), (width - x.shape[1], 0)) for x in (self._mask, prompt_mask)
        )
        self._ids[rows], self._mask[rows] = prompt_ids, prompt_mask
        logits, memory = self._read(prompt_ids, prompt_mask, None)
        if not len(self.logits):
            self.logits = logits.new_zeros((len(self._ids), logits.shape[1]))
            self._memory = None if memory is None else memory.new_zeros((len(self._ids), *memory.shape[1:]))
        self.logits[rows] = logits
        if self._memory is not None:
            self._memory[rows] = cast(Tensor, memory)

    def step(self, tokens: Tensor) -> None:
        """Appends a token (B,) to every response."""
        self._ids = torch.cat([self._ids, tokens.unsqueeze(1)], dim=1)
        self._mask = nn.functional.pad(self._mask, (0, 1), value=True)
        self.logits, self._memory = self._read(self._ids, self._mask, self._memory)

    def keep(self, rows: Tensor) -> None:
        """Keeps only these rows (n,), in this order."""
        self._ids, self._mask, self.logits = self._ids[rows], self._mask[rows], self.logits[rows]
        self._memory = None if self._memory is None else self._memory[rows]
