"""A policy that is written down for every prefix of a responses.

Shapes: X prompts, R responses of all prompts together, T response columns, V vocabulary, A legal tokens, and N_t the
prefixes of t tokens of one prompt; B rows, P prompt columns.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lmgym.episodes import Episodes
from lmgym.errors import InvalidArgumentError
from lmgym.optimum.tree.responses import Responses


class TreePolicy:
    """A policy written down for every prefix of a tree (`lmgym.models.policy.Policy`).

    Prefixes are numbered through all levels and prompts, so that rows of a batch may be at prefixes of any length.

    Args:
        responses: the prompts and the shape of their tree.
        log_probs: (X, N_t, A) of each level.
        values: (X, N_t) of each level, the expected return from there on.

    Attributes:
        log_probs: (S, A) float64 of all S prefixes of all prompts; any logits will do.
        values: (S,) float64.
    """

    def __init__(self, responses: Responses, log_probs: Sequence[Tensor], values: Sequence[Tensor]) -> None:
        self.vocab_size = responses.vocab_size
        self.legal = responses.legal
        self.horizon = responses.horizon
        self.log_probs = torch.cat([x.flatten(0, 1) for x in log_probs])
        self.values = torch.cat([x.flatten() for x in values])
        self.roots = {ids: i for i, ids in enumerate(responses.prompts)}
        nodes = torch.tensor([0] + [len(responses.prompts) * level.nodes for level in responses.levels])
        self.starts = nodes.cumsum(0)  # the number of each level's first prefix
        self.branches = torch.tensor([len(level.going) for level in responses.levels])
        # By level and token: which child of a prefix the token leads to; -1 is none.
        self.child = torch.full((len(responses.levels), responses.vocab_size), -1)
        for t, level in enumerate(responses.levels):
            self.child[t, responses.legal[level.going]] = torch.arange(len(level.going))

    @property
    def device(self) -> torch.device:
        """The CPU, where V* was computed."""
        return self.log_probs.device

    def begin(self, prompt_ids: Tensor, prompt_mask: Tensor, max_new_tokens: int) -> TreeState:
        """Finds prompts (B, P), left-padded, among those of the tree.

        Raises:
            InvalidArgumentError: for a prompt that is not in the tree, or more tokens than its responses have.
        """
        if max_new_tokens > self.horizon:
            raise InvalidArgumentError(f"`max_new_tokens` must be at most {self.horizon}, got {max_new_tokens}.")
        state = TreeState(self, len(prompt_ids))
        state.begin(torch.arange(len(prompt_ids)), prompt_ids, prompt_mask)
        return state

    def values_along(self, episodes: Episodes) -> Tensor:
        """(B, T) float64 the values before each chosen token of episodes on the CPU, 0 off their mask."""
        state = self.begin(episodes.prompt_ids, episodes.prompt_mask, episodes.response_ids.shape[1])
        columns = [state.values]
        for t in range(episodes.response_ids.shape[1] - 1):
            state.step(episodes.response_ids[:, t])
            columns.append(state.values)
        return torch.stack(columns, 1) * episodes.response_mask


class TreeState:
    """B running responses of a `TreePolicy`. After the end of its response a row stays where it was."""

    def __init__(self, policy: TreePolicy, rows: int) -> None:
        self._policy = policy
        self._node = torch.zeros(rows, dtype=torch.int64)
        self._depth = torch.zeros(rows, dtype=torch.int64)

    @property
    def logits(self) -> Tensor:
        """(B, V) float64 log-probs of each response's next token."""
        logits = torch.full((len(self._node), self._policy.vocab_size), -torch.inf, dtype=torch.float64)
        logits[:, self._policy.legal] = self._policy.log_probs[self._node]
        return logits

    @property
    def values(self) -> Tensor:
        """(B,) float64, V(s)."""
        return self._policy.values[self._node]

    def begin(self, rows: Tensor, prompt_ids: Tensor, prompt_mask: Tensor) -> None:
        """Restarts rows (n,) from prompts (n, P), left-padded."""
        found = []
        for ids, mask in zip(prompt_ids, prompt_mask.bool(), strict=True):
            prompt = tuple(ids[mask].tolist())
            if prompt not in self._policy.roots:
                raise InvalidArgumentError(f"`prompt_ids` must be a prompt of the tree, got {list(prompt)}.")
            found.append(self._policy.roots[prompt])
        self._node[rows] = torch.tensor(found)
        self._depth[rows] = 0

    def step(self, tokens: Tensor) -> None:
        """Appends a token (B,) to every response."""
        policy = self._policy
        depth = self._depth
        child = policy.child[depth, tokens]
        inside = (self._node - policy.starts[depth]) * policy.branches[depth] + child
        self._node = torch.where(child >= 0, policy.starts[depth + 1] + inside, self._node)
        self._depth = depth + (child >= 0)

    def keep(self, rows: Tensor) -> None:
        """Keeps only these rows (n,), in this order."""
        self._node = self._node[rows]
        self._depth = self._depth[rows]
