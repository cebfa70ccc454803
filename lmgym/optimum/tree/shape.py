"""The shape of the tree of responses, which is the same for every prompt.

Shapes: A legal tokens, N_t prefixes of t tokens, C children of a prefix.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lmgym.models.causal import CausalLM
from lmgym.tasks.base import Task


class Level(NamedTuple):
    """The prefixes of t tokens, of each prompt.

    Attributes:
        nodes: N_t, how many.
        ending: (E,) indices among the legal tokens of those that end the response here.
        going: (A - E,) indices of those that lead on, to the prefixes of t + 1 tokens.
        start: index, among the responses of a prompt, of the first that ends here.
    """

    nodes: int
    ending: Tensor
    going: Tensor
    start: int

    @property
    def responses(self) -> slice:
        """Those of a prompt that end here."""
        return slice(self.start, self.start + self.nodes * len(self.ending))


def list_levels(task: Task, lm: CausalLM) -> list[Level]:
    """The levels of the tree over the legal tokens of a reference: T of them, fewer where all responses end before."""
    legal = lm.legal_table
    end_rule = task.end_rule(lm)
    levels: list[Level] = []
    nodes = 1
    start = 0
    for t in range(task.max_new_tokens):
        ends = end_rule.find_ending_tokens(t)[legal]
        level = Level(nodes, ends.nonzero().squeeze(1), (~ends).nonzero().squeeze(1), start)
        levels.append(level)
        nodes *= len(level.going)
        start = level.responses.stop
        if not nodes:
            break
    return levels


def count_responses(task: Task, lm: CausalLM) -> int:
    """How many responses there are to a prompt of a task with such a reference."""
    return list_levels(task, lm)[-1].responses.stop


def append_tokens(prefixes: Tensor, tokens: Tensor) -> Tensor:
    """(N * C, t + 1) from prefixes (N, t) and tokens (C,): each prefix with each token, those of a prefix together."""
    repeated = prefixes.repeat_interleave(len(tokens), dim=0)
    return torch.cat([repeated, tokens.repeat(len(prefixes)).unsqueeze(1)], dim=1)
