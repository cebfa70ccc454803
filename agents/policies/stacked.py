"""The policies of S seeds as one: they decode and read together, each sequence with the weights of its own seed.

Rows are seed by seed: of S * B rows, those of seed s are s * B to (s + 1) * B - 1.

Shapes: S seeds, B rows a seed, P prompt columns, L columns, n positions a seed, V vocabulary, W width, N numbers that
a seed's weights have.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from agents.policies.actor_critic import ActorCritic, Read, TrainablePolicy
from agents.policies.networks import Transformer
from agents.policies.residual import ResidualPolicy
from agents.policies.stacked_gpt2 import (
    StackedCache,
    Weights,
    causal_attention,
    find_shape,
    head_logits,
    read_stacked,
    take,
)
from lmgym.errors import InvalidArgumentError
from lmgym.models.causal import CausalLM
from lmgym.models.decoding import Decoder, make_decoder
from lmgym.models.padding import compact_left


class StackedPolicy:
    """S policies of one shape, whose weights are copied from them, and back to them on demand.

    Args:
        policies: fine-tuned copies of a GPT-2, or residuals of that shape on one reference; their critics shared.

    Attributes:
        weights: (S, N) float32, what learns; the numbers that values alone depend on are the last `critic_size` ones.

    Raises:
        InvalidArgumentError: for policies whose weights cannot be stacked.
    """

    def __init__(self, policies: Sequence[TrainablePolicy]) -> None:
        self._seeds = len(policies)
        first = policies[0]
        self._lm, prefix, self._reference = _parts(first)
        self._shape = find_shape(self._lm.model)
        critic = {id(weight) for weight in first.critic_parameters()}
        named = sorted(first.named_parameters(), key=lambda item: id(item[1]) in critic)  # stable: the critic last
        self._names = [name for name, _ in named]
        self._keys = [name.removeprefix(prefix) for name in self._names]
        self._shapes = [weight.shape for _, weight in named]
        self.critic_size = sum(weight.numel() for weight in first.critic_parameters())
        rows = [torch.cat([weight.detach().flatten() for weight in self.ordered(policy)]) for policy in policies]
        self.weights = torch.stack(rows).requires_grad_(True)
        self._targets: list[Tensor] = [weight for policy in policies for weight in self.ordered(policy)]
        self._sources = [weight for row in self.weights.detach() for weight in self.split(row)]

    def __len__(self) -> int:
        return self._seeds

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.weights.device

    def ordered(self, policy: TrainablePolicy) -> list[nn.Parameter]:
        """The weights of one of the policies, in the order in which a row of `weights` has them."""
        found = dict(policy.named_parameters())
        return [found[name] for name in self._names]

    def split(self, rows: Tensor) -> list[Tensor]:
        """Numbers (..., N) as weights (..., shape), one for each name."""
        pieces = rows.split([shape.numel() for shape in self._shapes], dim=-1)
        return [piece.unflatten(-1, shape) for piece, shape in zip(pieces, self._shapes, strict=True)]

    @torch.no_grad()
    def copy_back(self) -> None:
        """Gives the policies the weights that are here."""
        torch._foreach_copy_(self._targets, self._sources)

    def _by_name(self) -> Weights:
        return dict(zip(self._keys, self.split(self.weights), strict=True))

    @torch.no_grad()
    def begin(self, prompt_ids: Tensor, prompt_mask: Tensor, max_new_tokens: int) -> StackedState:
        """Reads prompts (S * B, P), left-padded (`lmgym.models.policy.Policy`)."""
        rows, width = prompt_ids.shape
        lengths = prompt_mask.sum(-1)
        ids = compact_left(prompt_ids, prompt_mask, max(int(lengths.max()), 1))
        cache = StackedCache(
            self._by_name(), self._shape, ids.view(len(self), -1, ids.shape[1]), lengths, ids.shape[1] + max_new_tokens
        )
        reference = None
        if self._reference is not None:
            reference = make_decoder(self._reference, rows, width + max_new_tokens)
            reference.begin(torch.arange(rows, device=ids.device), prompt_ids, prompt_mask)
        return StackedState(self, cache, reference)

    def read_at(self, ids: Tensor, columns: Tensor) -> Read:
        """What each seed says at chosen positions of its sequences, from one forward; differentiable.

        Args:
            ids: (S, b, L) int64, sequences from column 0, right-padded.
            columns: (S, n) int64, row * L + column of the last tokens read.

        Returns:
            (S, n, V) logits, (S, n) values, (S, n, W) hidden states.
        """
        s, b, length = ids.shape
        weights = self._by_name()
        positions = torch.arange(length, device=ids.device).repeat(b).expand(s, b * length)
        attend = causal_attention(self._shape.heads, length)
        hidden = take(read_stacked(weights, self._shape, ids.flatten(1), positions, attend), columns)
        logits = self._logits(weights, hidden)
        if self._reference is not None:
            flat = columns + torch.arange(s, device=ids.device)[:, None] * b * length
            with torch.no_grad():
                reference = self._reference.read_at(
                    ids.flatten(0, 1), flat.flatten() // length, flat.flatten() % length
                )[1]
            logits = logits + reference.float().view(logits.shape)
        return Read(logits, self._values(weights, hidden), hidden)

    def _logits(self, weights: Weights, hidden: Tensor) -> Tensor:
        return self._lm.legal_logits(head_logits(weights, hidden))

    def _values(self, weights: Weights, hidden: Tensor) -> Tensor:
        head = weights["value_head.weight"].transpose(1, 2)
        return torch.baddbmm(weights["value_head.bias"].unsqueeze(1), hidden, head).squeeze(-1)

    def say(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """(S, m, V) logits, without those of the reference, and (S, m) values of hidden states (S, m, W)."""
        weights = self._by_name()
        return self._logits(weights, hidden), self._values(weights, hidden)


class StackedState:
    """Running responses of S seeds (`lmgym.models.policy.PolicyState`), seed by seed at first.

    Seeds have as many slots each as the one with the most running responses; slots beyond those of a seed run idly.
    """

    def __init__(self, policy: StackedPolicy, cache: StackedCache, reference: Decoder | None) -> None:
        self._policy = policy
        self._cache = cache
        self._reference = reference
        s, m = cache.hidden.shape[:2]
        self._slots = torch.arange(s * m, device=cache.hidden.device)  # of each row, s * m + its number there
        self._say()

    @property
    def logits(self) -> Tensor:
        """(n, V) of each response's next token."""
        own = self._logits.flatten(0, 1)[self._slots]
        return own if self._reference is None else self._reference.logits.float() + own

    @property
    def values(self) -> Tensor:
        """(n,) the value heads' estimates."""
        return self._values.flatten()[self._slots]

    def begin(self, rows: Tensor, prompt_ids: Tensor, prompt_mask: Tensor) -> None:
        """Raises: rows of several seeds begin together, by `StackedPolicy.begin`."""
        raise NotImplementedError("`begin` must be `StackedPolicy.begin`: the rows of all seeds begin together.")

    @torch.no_grad()
    def step(self, tokens: Tensor) -> None:
        """Appends a token (n,) to every response."""
        s, m = self._cache.hidden.shape[:2]
        placed = torch.zeros(s * m, dtype=torch.int64, device=tokens.device)
        placed[self._slots] = tokens
        self._cache.step(placed.view(s, m))
        if self._reference is not None:
            self._reference.step(tokens)
        self._say()

    @torch.no_grad()
    def keep(self, rows: Tensor) -> None:
        """Keeps only these rows (n,), in this order."""
        s, m = self._cache.hidden.shape[:2]
        kept = self._slots[rows]
        seeds = kept // m
        counts = torch.bincount(seeds, minlength=s)
        widest = int(counts.max())
        order = seeds.argsort(stable=True)
        starts = counts.cumsum(0) - counts
        number = torch.empty_like(kept)
        number[order] = torch.arange(len(kept), device=kept.device) - starts[seeds[order]]
        source = (torch.arange(s, device=kept.device) * m)[:, None].repeat(1, widest)
        source[seeds, number] = kept
        self._cache.keep(source)
        self._slots = seeds * widest + number
        if self._reference is not None:
            self._reference.keep(rows)
        self._say()

    def _say(self) -> None:
        with torch.no_grad():
            self._logits, self._values = self._policy.say(self._cache.hidden)


def _parts(policy: TrainablePolicy) -> tuple[CausalLM, str, CausalLM | None]:
    """The network of a policy that can be stacked, how its weights' names begin, and the reference it is added to."""
    if isinstance(policy, ResidualPolicy) and isinstance(policy.network, Transformer):
        return policy.network.lm, "network.model.", policy.reference
    if type(policy) is ActorCritic and policy.critic is None:
        return policy.lm, "actor.", None
    raise InvalidArgumentError(
        "`agent.policy` must be 'auto', 'finetune' or 'transformer', and `agent.critic` 'shared', with `seeds` above 1."
    )
