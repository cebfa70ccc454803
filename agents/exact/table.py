"""A policy with a row of logits for every state of a small task: no class of functions stands in the way of a loss.

Shapes: S states (prefixes of all prompts), A legal tokens, B episodes, T response columns, n chosen tokens, V tokens.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from agents.on_policy import OnPolicyAgent
from agents.policies.actor_critic import Read, TrainablePolicy
from lmgym.envs.vector import RLHFVectorEnv
from lmgym.episodes import Episodes
from lmgym.errors import InvalidArgumentError
from lmgym.optimum.tree import Tree, TreePolicy
from lmgym.optimum.tree.policy import TreeState

_FILE = "table.pt"


class TablePolicy(TrainablePolicy):
    """A softmax over a row of logits for every prefix of a tree, and a value for each: float64, on the CPU.

    Args:
        tree: all responses. The policy starts as the reference, and the values are 0.

    Attributes:
        logits: (S, A). critic: (S,). Prefixes are numbered level by level, and by prompt in a level.
    """

    def __init__(self, tree: Tree) -> None:
        super().__init__()
        zeros = [level[..., 0] * 0.0 for level in tree.reference]
        self._nodes = TreePolicy(tree.responses, tree.reference, zeros)
        self.shapes = [level.shape for level in tree.reference]
        self.logits = nn.Parameter(self._nodes.log_probs.clone())
        self.critic = nn.Parameter(self._nodes.values.clone())

    @property
    def device(self) -> torch.device:
        return self.logits.device

    @property
    def dtype(self) -> torch.dtype:
        """Episodes hold log-probs in float32."""
        return torch.float32

    def begin(self, prompt_ids: Tensor, prompt_mask: Tensor, max_new_tokens: int) -> TreeState:
        """Reads prompts (B, P), left-padded, of the tree."""
        self._nodes.log_probs = self.logits.detach().log_softmax(-1)
        self._nodes.values = self.critic.detach().clone()
        return self._nodes.begin(prompt_ids, prompt_mask, max_new_tokens)

    def states(self, episodes: Episodes) -> Tensor:
        """(n,) int64, the state that each chosen token was drawn in; episodes are of prompts of the tree's split."""
        nodes = self._nodes
        node = episodes.prompt_index.clone()
        columns = []
        for t in range(episodes.response_ids.shape[1]):
            columns.append(node)
            level = min(t, len(nodes.branches) - 1)
            child = nodes.child[level, episodes.response_ids[:, t]]
            inside = (node - nodes.starts[level]) * nodes.branches[level] + child
            goes_on = episodes.response_mask[:, t] & (child >= 0)
            node = torch.where(goes_on, nodes.starts[level + 1] + inside, node)
        return torch.stack(columns, 1)[episodes.response_mask]

    def logits_of(self, table: Tensor, episodes: Episodes) -> Tensor:
        """(n, V) logits at every chosen token, from any table (S, A); differentiable."""
        rows = table[self.states(episodes)]
        return rows.new_full((len(rows), self._nodes.vocab_size), -torch.inf).index_copy(1, self._nodes.legal, rows)

    def read(self, episodes: Episodes) -> Read:
        """What it says at every chosen token; differentiable."""
        values = self.critic[self.states(episodes)]
        return Read(self.logits_of(self.logits, episodes), values, values.new_zeros(len(values), 0))

    @torch.no_grad()
    def values(self, episodes: Episodes) -> Tensor:
        """(B, T) V(s_t) before each chosen token, 0 off the mask."""
        values = self.critic.new_zeros(episodes.response_mask.shape)
        values[episodes.response_mask] = self.critic[self.states(episodes)]
        return values

    def read_at(self, ids: Tensor, rows: Tensor, columns: Tensor) -> Read:
        """Refuses: a table knows prompts and responses, not sequences."""
        raise InvalidArgumentError("`policy` must be a network to read sequences: a table reads episodes.")

    def critic_parameters(self) -> list[nn.Parameter]:
        return [self.critic]

    def split(self, numbers: Tensor) -> list[Tensor]:
        """(X, N_t, ...) of each level, from numbers (S, ...) of all states."""
        parts = numbers.split([shape[0] * shape[1] for shape in self.shapes])
        return [part.view(*shape[:2], *part.shape[1:]) for part, shape in zip(parts, self.shapes, strict=True)]

    def log_probs(self) -> list[Tensor]:
        """(X, N_t, A) of each level."""
        return self.split(self.logits.detach().log_softmax(-1))

    @torch.no_grad()
    def set_critic(self, values: Sequence[Tensor]) -> None:
        """Gives the critic values (X, N_t) of each level."""
        self.critic.copy_(torch.cat([level.flatten() for level in values]))

    def save(self, directory: str | os.PathLike[str]) -> None:
        torch.save(self.state_dict(), Path(directory) / _FILE)

    def load(self, directory: str | os.PathLike[str]) -> None:
        self.load_state_dict(torch.load(Path(directory) / _FILE, weights_only=True))


def make_table_agent(
    kind: type[OnPolicyAgent], tree: Tree, split: str = "test", *, seed: int = 0, **config: Any
) -> OnPolicyAgent:
    """An agent of any algorithm that learns a table of all states, which starts as the reference.

    Args:
        kind: the algorithm. tree: all responses. split: of the prompts of the tree.
        seed: of what the agent draws. config: the algorithm's numbers; a batch is one step unless they say otherwise.
    """
    network = {"policy": "mlp", "width": 2, "layers": 1}  # which is not used
    numbers: dict[str, Any] = {"epochs": 1, "minibatches": 1, **network, **config}
    made = kind.Config(**numbers)
    envs = RLHFVectorEnv(
        made.num_envs,
        group_size=made.responses,
        autoreset_mode="SameStep",
        task=tree.task,
        split=split,
        device="cpu",
    )
    agent = kind(envs, made, seed=seed)
    agent.policy = TablePolicy(tree)
    agent.updater = made.new_updater(agent.policy)
    return agent
