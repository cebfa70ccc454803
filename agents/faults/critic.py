"""A critic that is poor, or perfect: the values that advantages are computed from are not the learned ones."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from agents.batch import Batch
from agents.faults.config import CRITIC_VALUES, parse_setting
from agents.faults.fault import Fault, Learner
from agents.losses import explained_variance
from agents.seeds import RANDOM_CRITIC, torch_generator
from lmgym.episodes import Episodes
from lmgym.errors import InvalidArgumentError
from lmgym.optimum.anatomy.parts import check_additive
from lmgym.optimum.anatomy.tree import critic_targets
from lmgym.optimum.exact import MAX_RESPONSES, make_sampled_logits
from lmgym.optimum.tree import Tree, TreePolicy

_NUMBERS = 1 << 16
_FACTOR = 1_000_003
_MODULUS = 2**31 - 1  # a prime: products with the factor stay below 2^63


class CriticValues(Fault):
    """Advantages are of other values than the critic's, which then learns nothing.

    Args:
        setting: "frozen" is the critic of the start, which says 0 of every state. "random:SIGMA" draws a value of
            standard deviation SIGMA for each state, once for the whole run. "exact" is V^pi of the policy before each
            update, by enumeration of all responses.
        seed: of the random values.
    """

    key = "critic_values"

    def __init__(self, setting: str, seed: int = 0) -> None:
        super().__init__()
        self._kind, self._sigma = parse_setting(self.key, setting, CRITIC_VALUES)
        self._seed = seed
        self._learned: Tensor | None = None
        self._tree: Tree | None = None

    def attach(self, learner: Learner) -> None:
        super().attach(learner)
        task = learner.envs.task
        if task.truncate:
            raise InvalidArgumentError(f"`{self.key}` must be null with `env.truncate`: the end is bootstrapped.")
        if self._kind == "exact":
            if task.kl_coef > 0:
                check_additive(task)
            self._tree = Tree.of(task, learner.envs.settings.split, MAX_RESPONSES)

    def judge(self, episodes: Episodes) -> Episodes:
        self._learned = episodes.values
        assert self._learned is not None
        return replace(episodes, values=self._values(episodes).to(self._learned))

    def _values(self, episodes: Episodes) -> Tensor:
        if self._kind == "frozen":
            return torch.zeros_like(episodes.log_probs)
        if self._kind == "random":
            return self._sigma * state_noise(episodes, self._seed) * episodes.response_mask
        assert self._tree is not None
        return exact_values(self._tree, self.learner, episodes)

    def filter(self, batch: Batch) -> Batch:
        """The critic is asked for what it says already: its loss is 0, and so is the gradient of it."""
        mask = batch.episodes.response_mask
        values = batch.episodes.values
        assert values is not None
        assert self._learned is not None
        self.metrics = {"train/explained_variance": explained_variance(values[mask], batch.returns[mask])}
        return replace(batch, episodes=replace(batch.episodes, values=self._learned), returns=self._learned)


def state_noise(episodes: Episodes, seed: int) -> Tensor:
    """(B, T) of a standard normal, a function of the seed and of all tokens before each chosen one.

    States are told apart by a polynomial hash of their tokens, which chooses one of 65,536 numbers.
    """
    ids = episodes.input_ids
    numbers = torch.randn(_NUMBERS, generator=torch_generator(seed, RANDOM_CRITIC)).to(ids.device)
    width = episodes.prompt_ids.shape[1]
    state = torch.ones_like(ids[:, 0])
    columns = []
    for column in range(ids.shape[1]):
        if column >= width:
            columns.append(numbers[state % _NUMBERS])
        after = (state * _FACTOR + ids[:, column] + 1) % _MODULUS
        state = torch.where(episodes.attention_mask[:, column], after, state)
    return torch.stack(columns, dim=1)


@torch.no_grad()
def exact_values(tree: Tree, learner: Learner, episodes: Episodes) -> Tensor:
    """(B, T) V^pi before each chosen token, of a learner's policy and sampler; 0 off the mask."""
    logits = make_sampled_logits(learner.policy, learner.sampler, tree.task.max_new_tokens)
    log_probs = tree.responses.read(logits)
    table = TreePolicy(tree.responses, log_probs, critic_targets(tree, log_probs))
    return table.values_along(episodes.to("cpu"))
