"""All responses to some prompts, and numbers of their prefixes.

Shapes: X prompts, R responses of all prompts together, T response columns, V vocabulary, A legal tokens, D levels, and
N_t the prefixes of t tokens of one prompt. The R / X responses of a prompt are ordered by their length, then by their
prefix, then by their last token; the children of a prefix are contiguous.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from lmgym.episodes import Episodes
from lmgym.errors import InvalidArgumentError, LmGymError
from lmgym.models.causal import CausalLM
from lmgym.models.padding import pad_left
from lmgym.optimum.tree.logits import EpisodeLogits
from lmgym.optimum.tree.shape import Level, append_tokens
from lmgym.rewards.base import RewardFunction, score
from lmgym.tasks.base import Task

MAX_LOGITS_AT_ONCE = 2**22  # that are asked for in one call, the prompt's columns counted as well
MAX_ROWS_AT_ONCE = 4096  # responses whose logits, or scores, are asked for in one call
_MAX_MISSED = 1e-6  # nats by which the legal tokens may miss a probability of 1


class Responses:
    """Every response to each of X prompts.

    Args:
        task: whose responses. lm: its reference. prompts: X prompts as token ids. levels: the shape of the tree.

    Attributes:
        prompts: the X prompts' token ids. levels: as given.
        legal: (A,) int64, the ids that are actions. vocab_size: V. horizon: T.
        episodes: the R responses, prompt by prompt, on the CPU; their log-probs and scores are 0.
    """

    def __init__(self, task: Task, lm: CausalLM, prompts: Sequence[Sequence[int]], levels: list[Level]) -> None:
        self.prompts = [tuple(ids) for ids in prompts]
        self.levels = levels
        self.legal = lm.legal_table.nonzero().squeeze(1)
        self.vocab_size = lm.vocab_size
        self.horizon = task.max_new_tokens
        self.episodes = self._enumerate(lm)

    @property
    def per_prompt(self) -> int:
        """R / X, how many responses there are to each prompt."""
        return self.levels[-1].responses.stop

    def prefix(self, t: int, node: int) -> list[int]:
        """The t tokens of a prefix, by its number among those of its level."""
        last = self.levels[-1]
        row = last.start + node * (last.nodes // self.levels[t].nodes) * len(last.ending)
        tokens: list[int] = self.episodes.response_ids[row, :t].tolist()
        return tokens

    def _enumerate(self, lm: CausalLM) -> Episodes:
        ids = torch.full((self.per_prompt, self.horizon), lm.pad_token_id)
        mask = torch.zeros(ids.shape, dtype=torch.bool)
        prefixes = torch.zeros((1, 0), dtype=torch.int64)
        for t, level in enumerate(self.levels):
            ids[level.responses, : t + 1] = append_tokens(prefixes, self.legal[level.ending])
            mask[level.responses, : t + 1] = True
            prefixes = append_tokens(prefixes, self.legal[level.going])
        prompt_ids, prompt_mask = pad_left(self.prompts, lm.pad_token_id)
        x = len(self.prompts)
        index = torch.arange(x).repeat_interleave(self.per_prompt)
        return Episodes(
            prompt_ids=prompt_ids[index],
            prompt_mask=prompt_mask[index],
            response_ids=ids.repeat(x, 1),
            response_mask=mask.repeat(x, 1),
            log_probs=torch.zeros(()).expand(len(index), self.horizon),
            ref_log_probs=torch.zeros(()).expand(len(index), self.horizon),
            scores=torch.zeros(()).expand(len(index)),
            values=None,
            terminated=torch.ones(len(index), dtype=torch.bool),
            prompt_index=index,
        )

    def score(self, lm: CausalLM, reward: RewardFunction, texts: Sequence[str], rows: Tensor) -> Tensor:
        """(n,) float64: what a reward function pays for responses (n,), in batches.

        Args:
            lm: the reference. reward: the function. texts: of the X prompts. rows: (n,) int64, which responses.
        """
        scores: list[float] = []
        for few in rows.split(MAX_ROWS_AT_ONCE):
            index = self.episodes.prompt_index[few].tolist()
            prompts = [texts[i] for i in index]
            prompt_ids = [list(self.prompts[i]) for i in index]
            lengths = self.episodes.lengths[few].tolist()
            padded = self.episodes.response_ids[few].tolist()
            responses = [tokens[:n] for tokens, n in zip(padded, lengths, strict=True)]
            completions = lm.completions(prompt_ids, responses)
            scores += score(reward, prompts, completions, prompt_ids=prompt_ids, completion_ids=responses)
        return torch.tensor(scores, dtype=torch.float64)

    # -- log-probs of every prefix -----------------------------------------------------------------------------------

    def read_chunks(self, episode_logits: EpisodeLogits) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Asks for the logits of one response through each of the longest prefixes; differentiable.

        Every position of such a response gives the logits after a shorter prefix.

        Yields:
            the index of the first prefix of the chunk, counted through all prompts; the rows (c,) of `episodes` that go
            through the chunk's prefixes; and log pi (c, D, A) float64 of the legal tokens at each of their D positions.

        Raises:
            InvalidArgumentError: for logits of another shape.
            LmGymError: where the probabilities of the legal tokens do not sum to 1.
        """
        depth = len(self.levels)
        for first, chunk in self._list_chunks():
            logits = episode_logits(self.episodes[chunk]).cpu().double()
            expected = (len(chunk) * depth, self.vocab_size)
            if logits.shape != expected:
                raise InvalidArgumentError(
                    "`episode_logits` must give one row of logits for each chosen token, of shape "
                    f"{expected}, got {tuple(logits.shape)}."
                )
            log_probs = logits.log_softmax(-1)[:, self.legal]
            missed = log_probs.detach().logsumexp(-1).abs().max().item()
            if not missed <= _MAX_MISSED:
                raise LmGymError(
                    "The probabilities of the legal tokens that `episode_logits` gives must sum to 1, and at some "
                    f"position they miss it by {missed:.3g} nats: an id that is no token has some, or a logit is nan."
                )
            yield first, chunk, log_probs.view(len(chunk), depth, -1)

    def _list_chunks(self) -> Iterator[tuple[int, Tensor]]:
        """Yields the rows of one response through each of the longest prefixes, and the number of the first of them."""
        last = self.levels[-1]
        of_prompt = last.start + torch.arange(last.nodes) * len(last.ending)
        rows = (torch.arange(len(self.prompts)).unsqueeze(1) * self.per_prompt + of_prompt).flatten()
        width = self.episodes.prompt_ids.shape[1] + len(self.levels)
        size = min(max(MAX_LOGITS_AT_ONCE // (width * self.vocab_size), 1), MAX_ROWS_AT_ONCE)
        for first in range(0, len(rows), size):
            yield first, rows[first : first + size]

    def find_first_rows(self, first: int, count: int) -> Iterator[tuple[Level, slice, slice]]:
        """Finds, for each level, which of the longest prefixes are the first that go through a prefix of that level.

        Args:
            first: index of the first of the longest prefixes. count: how many follow it, itself counted.

        Yields:
            the level, the slice of these longest prefixes, and the slice of the X * N_t prefixes of the level.
        """
        for level in self.levels:
            stride = self.levels[-1].nodes // level.nodes
            skip = -first % stride
            begin = (first + skip) // stride
            yield level, slice(skip, None, stride), slice(begin, begin + len(range(skip, count, stride)))

    def read(self, episode_logits: EpisodeLogits) -> list[Tensor]:
        """log pi of the legal tokens after every prefix: (X, N_t, A) float64 of each level."""
        x = len(self.prompts)
        result = [torch.empty((x * level.nodes, len(self.legal)), dtype=torch.float64) for level in self.levels]
        for first, rows, log_probs in self.read_chunks(episode_logits):
            for t, (_, chosen, nodes) in enumerate(self.find_first_rows(first, len(rows))):
                result[t][nodes] = log_probs[chosen, t]
        return [table.view(x, -1, len(self.legal)) for table in result]

    def read_values(self, episode_values: Callable[[Episodes], Tensor]) -> list[Tensor]:
        """A number of every prefix, (X, N_t) float64 of each level.

        Args:
            episode_values: gives (n, T) numbers, one before each token of n episodes.
        """
        result = [torch.empty(len(self.prompts) * level.nodes, dtype=torch.float64) for level in self.levels]
        for first, rows in self._list_chunks():
            values = episode_values(self.episodes[rows]).cpu().double()
            for t, (_, chosen, nodes) in enumerate(self.find_first_rows(first, len(rows))):
                result[t][nodes] = values[chosen, t]
        return [numbers.view(len(self.prompts), -1) for numbers in result]

    # -- numbers of prefixes and of responses ------------------------------------------------------------------------

    def add_up(self, numbers: Sequence[Tensor], rate: float = 1.0) -> Tensor:
        """(X, R / X): sum_t rate^t * number(s_t, a_t) of every response, from (X, N_t, A) numbers of each level."""
        before = torch.zeros((len(self.prompts), 1), dtype=torch.float64)
        parts = []
        for t, level in enumerate(self.levels):
            so_far = before.unsqueeze(-1) + rate**t * numbers[t]
            parts.append(so_far[..., level.ending].flatten(1))
            before = so_far[..., level.going].flatten(1)
        return torch.cat(parts, dim=1)

    def pick_column(self, numbers: Sequence[Tensor], t: int) -> Tensor:
        """(X, R / X): the number of the t-th token of every response, 0 where it has none."""
        return self.add_up([x if k == t else torch.zeros_like(x) for k, x in enumerate(numbers)])

    def join_actions(self, t: int, at_end: Tensor, after: Tensor) -> Tensor:
        """(X, N_t, A) from numbers of the responses (X, R / X) and of the prefixes one token longer (X, N_(t+1))."""
        level = self.levels[t]
        x = len(self.prompts)
        result = torch.empty((x, level.nodes, len(self.legal)), dtype=torch.float64)
        result[..., level.ending] = at_end[:, level.responses].view(x, level.nodes, -1)
        result[..., level.going] = after.view(x, level.nodes, -1)
        return result
