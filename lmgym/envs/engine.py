"""N episodes of the token MDP at a time; Gymnasium's single and vector environments are two skins over it.

Shapes: N rows, P prompt columns, T response columns, L = P + T, V vocabulary, D width of the model.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lmgym.envs.mdp import TokenMDP
from lmgym.envs.outcomes import Bools, Floats, Ints, Outcomes, Transition
from lmgym.envs.prompts import Prompt
from lmgym.envs.reader import Reader
from lmgym.envs.settings import Settings
from lmgym.errors import InvalidActionError, InvalidArgumentError
from lmgym.models.probes import check_log_probs

_MAX_TOKEN_IDS = 2**28  # that the rows of an env hold: 2 GiB


class Engine(TokenMDP):
    """N rows of one task.

    The forward of the reference is lazy: a token is fed when the next reward needs it, so that the last token of an
    episode never costs one. Memory: a ring cache of N x (P + T) keys and values (`lmgym/models/ring.py`), and prompts
    that are read ahead for N rows.

    Attributes:
        num_rows: N.
        input_ids: (N, L) int64 and attention_mask: (N, L) int8, the observations; `lengths` (N,) tokens chosen so far.
        current: N prompts, None where a row has never begun.
        prompt_texts: (N,) object, texts of the prompts that rows began with, "" where there is none.
        running: (N,) bool, rows inside an episode.
        returns, discounted: (N,) sum of the rewards of the episode so far, without and with gamma.
        starts: (N,) response tokens that came with the reset, for which no reward is given.
        ref_log_probs: (N, T) nats, of the tokens chosen so far; nan where the reference was not asked.
        final_hidden: (N, D), the hidden states of rows when the last step truncated them; None where they are not kept.
    """

    def __init__(self, settings: Settings, num_rows: int) -> None:
        super().__init__(settings)
        length = self.width + self.horizon
        if num_rows * length > _MAX_TOKEN_IDS:
            raise InvalidArgumentError(
                f"`num_envs` must be at most {_MAX_TOKEN_IDS // length} for observations of {length} tokens, got "
                f"{num_rows}."
            )
        self.num_rows = num_rows
        self.input_ids = np.full((num_rows, length), self.lm.pad_token_id, dtype=np.int64)
        self.attention_mask = np.zeros(self.input_ids.shape, dtype=np.int8)
        self.lengths = np.zeros(num_rows, dtype=np.int64)
        self.running = np.zeros(num_rows, dtype=np.bool_)
        self.starts = np.zeros(num_rows, dtype=np.int64)
        self.returns = np.zeros(num_rows)
        self.discounted = np.zeros(num_rows)
        self.ref_log_probs = np.full((num_rows, self.horizon), np.nan)
        self.current: list[Prompt | None] = [None] * num_rows
        self.prompt_texts = np.full(num_rows, "", dtype=object)
        self.final_hidden: Tensor | None = None
        self._discounts = self.task.gamma ** np.arange(self.horizon + 1)
        is_dense = self.task.kl_coef > 0 and self.task.dense_kl
        self._reader = Reader(self.lm, num_rows, length) if is_dense else None

    # -- starting ------------------------------------------------------------------------------------------------

    def begin(self, rows: Ints, prompts: Sequence[Prompt], upcoming: Callable[[int], Prompt] | None = None) -> None:
        """Starts an episode in each of rows (n,).

        Args:
            rows: which. prompts: one each.
            upcoming: the prompt that a row will most likely start from next, so that prompts can be read in batches.
        """
        ids, mask = self.pad_prompts(prompts)
        self.input_ids[rows, : self.width] = ids.numpy()
        self.input_ids[rows, self.width :] = self.lm.pad_token_id
        self.attention_mask[rows, : self.width] = mask.numpy()
        self.attention_mask[rows, self.width :] = 0
        for row, prompt in zip(rows.tolist(), prompts, strict=True):
            self.current[row] = prompt
            self.prompt_texts[row] = str(prompt.text)
        self.lengths[rows] = 0
        self.starts[rows] = 0
        self.running[rows] = True
        self.returns[rows] = 0.0
        self.discounted[rows] = 0.0
        self.ref_log_probs[rows] = np.nan
        if self._reader is not None:
            sequences = {row: prompt.ids for row, prompt in zip(rows.tolist(), prompts, strict=True)}
            self._reader.start(sequences, None if upcoming is None else _ids_of(upcoming))

    def resume(
        self, row: int, response_ids: Sequence[int], returns: tuple[float, float] | None, ref_log_probs: Floats | None
    ) -> None:
        """Moves a row that has just begun to where some response tokens have been chosen.

        Args:
            row: which. response_ids: fewer than T tokens that do not end the episode.
            returns: the return and the discounted return so far; None for 0, where the tokens came with the reset.
            ref_log_probs: (T,) of the tokens, or None for unknown.
        """
        n = len(response_ids)
        self.input_ids[row, self.width : self.width + n] = response_ids
        self.attention_mask[row, self.width : self.width + n] = 1
        self.lengths[row] = n
        self.starts[row] = n if returns is None else 0
        self.returns[row], self.discounted[row] = returns or (0.0, 0.0)
        if ref_log_probs is not None:
            self.ref_log_probs[row] = ref_log_probs
        if self._reader is not None and n:
            self._reader.restart(row, self._token_ids(row))

    def abandon(self) -> None:
        """Ends every episode without an outcome: rows are as before their first start."""
        self.running[:] = False
        self.current = [None] * self.num_rows
        self.prompt_texts[:] = ""

    @contextlib.contextmanager
    def _abandoned_on_error(self) -> Iterator[None]:
        """Abandons every episode where a reward or the reference fails: half of a step has then been taken."""
        try:
            yield
        except InvalidActionError:  # no step has been taken
            raise
        except BaseException:
            self.abandon()
            raise

    # -- stepping ------------------------------------------------------------------------------------------------

    def step(self, actions: Ints, live: Bools) -> Transition:
        """Appends a token to each live row.

        Args:
            actions: (N,) int64 token ids, already checked; anything where not live.
            live: (N,) bool, a subset of `running`.
        """
        t = self.lengths.copy()
        rows = np.flatnonzero(live)
        tokens = actions[rows]
        rewards = np.zeros(self.num_rows)
        charged: Floats | None = None
        if self._reader is not None:
            with self._abandoned_on_error():
                charged = np.where(live, self._reader.log_probs(np.where(live, actions, 0)), 0.0)
                check_log_probs(self.lm, charged)
            self.ref_log_probs[rows, t[rows]] = charged[rows]
            rewards = self.task.kl_coef * charged
        self._append(rows, tokens)
        by_eos = np.zeros(self.num_rows, dtype=np.bool_)
        by_eos[rows] = self.end_rule.is_end_by_eos(tokens, t[rows])
        by_length = np.zeros(self.num_rows, dtype=np.bool_)
        by_length[rows] = self.end_rule.is_end(tokens, t[rows]) & ~by_eos[rows]
        ended = np.flatnonzero(by_eos | by_length)
        outcomes: Outcomes | None = None
        if len(ended):
            with self._abandoned_on_error():
                outcomes = self._grade_rows(ended, by_eos[ended])
                if self.task.kl_coef > 0 and not self.task.dense_kl:
                    charged = np.zeros(self.num_rows)
                    charged[ended] = self._read_whole_rows(ended)
                    rewards += self.task.kl_coef * charged
            rewards[ended] += outcomes.scores
        self.returns += rewards
        self.discounted += self._discounts[t] * rewards
        self.running[ended] = False
        if outcomes is not None:
            outcomes = replace(outcomes, discounted_returns=self.discounted[ended].tolist())
        truncated = by_length if self.task.truncate else np.zeros_like(by_length)
        self._keep_final_hidden(truncated)
        return Transition(rewards, charged, (by_eos | by_length) & ~truncated, truncated, ended, outcomes)

    def _append(self, rows: Ints, tokens: Ints) -> None:
        """Writes a token (n,) after the last one of each of rows (n,)."""
        columns = self.width + self.lengths[rows]
        self.input_ids[rows, columns] = tokens
        self.attention_mask[rows, columns] = 1
        self.lengths[rows] += 1

    def step_whole(self, responses: Ints, live: Bools) -> Transition:
        """Takes a whole response (N, T) in each live row: the bandit's step, whose reward is the discounted return."""
        rows = np.flatnonzero(live)
        rewards = np.zeros(self.num_rows)
        terminated = np.zeros(self.num_rows, dtype=np.bool_)
        truncated = np.zeros(self.num_rows, dtype=np.bool_)
        if not len(rows):
            return Transition(rewards, None, terminated, truncated, rows, None)
        with self._abandoned_on_error():
            replay = self.replay([p for row in rows if (p := self.current[row]) is not None], responses[rows])
        mask = replay.response_mask
        self.input_ids[rows, self.width :] = np.where(mask, responses[rows], self.lm.pad_token_id)
        self.attention_mask[rows, self.width :] = mask
        self.lengths[rows] = mask.sum(1)
        self.running[rows] = False
        self.returns[rows] = replay.rewards.sum(1)
        self.discounted[rows] = replay.outcomes.discounted_returns
        rewards[rows] = self.discounted[rows]
        charged: Floats | None = None
        if self.task.kl_coef > 0:
            charged = np.zeros(self.num_rows)
            charged[rows] = replay.ref_log_probs.sum(1)
            self.ref_log_probs[rows] = np.where(mask, replay.ref_log_probs, np.nan)
        terminated[rows] = replay.terminated
        truncated[rows] = replay.truncated
        return Transition(rewards, charged, terminated, truncated, rows, replay.outcomes)

    def _grade_rows(self, rows: Ints, by_eos: Bools) -> Outcomes:
        """Scores the responses of rows (n,) that have ended."""
        prompts = [prompt for row in rows if (prompt := self.current[row]) is not None]
        return self.grade(prompts, [self.response_ids(row) for row in rows], by_eos)

    def _read_whole_rows(self, rows: Ints) -> Floats:
        """(n,) nats: log pi_ref of whole responses, from one teacher-forced pass."""
        ids = torch.from_numpy(self.input_ids[rows])
        mask = torch.from_numpy(self.attention_mask[rows]).bool()
        p = self.width
        log_probs = self.lm.response_log_probs(ids[:, :p], mask[:, :p], ids[:, p:], mask[:, p:]).numpy()
        check_log_probs(self.lm, log_probs)
        charged = np.where(mask[:, p:].numpy(), log_probs, np.nan)
        charged[np.arange(self.horizon) < self.starts[rows, None]] = np.nan
        self.ref_log_probs[rows] = charged
        return np.nansum(charged, axis=1, dtype=np.float64)

    def _keep_final_hidden(self, truncated: Bools) -> None:
        """Keeps the hidden states of truncated rows (N,), which have a value, before these rows begin again."""
        if self._reader is not None and self._reader.keeps_hidden and truncated.any():
            self.final_hidden = self._reader.hidden().clone()

    # -- looking -------------------------------------------------------------------------------------------------

    def response_ids(self, row: int) -> list[int]:
        """The response tokens of a row so far."""
        return self.input_ids[row, self.width : self.width + self.lengths[row]].tolist()

    def text(self, row: int) -> str:
        """Prompt and response so far of a row that has begun, as one text without special tokens."""
        return self.lm.decode(self._token_ids(row))

    def _token_ids(self, row: int) -> tuple[int, ...]:
        prompt = self.current[row]
        assert prompt is not None
        return (*prompt.ids, *self.response_ids(row))

    def reference_logits(self) -> Tensor:
        """(N, V) logits of the reference for each row's next token; the same forward that the next step will use.

        Raises:
            InvalidArgumentError: where stepping never runs the reference (`kl_coef=0`, or `dense_kl=False`).
        """
        return self.stepping_reader().logits()

    def reference_log_probs(self) -> npt.NDArray[np.float32]:
        """(N, V) nats: log pi_ref(.|s) at each row's state, from the forward of `reference_logits`.

        Raises:
            InvalidArgumentError: where stepping never runs the reference (`kl_coef=0`, or `dense_kl=False`).
        """
        return self.reference_logits().float().log_softmax(-1).cpu().numpy()

    def reference_hidden(self) -> Tensor:
        """(N, D) input of the reference's LM head at each row's state, from the forward of `reference_logits`.

        Raises:
            InvalidArgumentError: where stepping never runs the reference (`kl_coef=0`, or `dense_kl=False`).
        """
        self.keep_hidden()
        return self.stepping_reader().hidden()

    def keep_hidden(self) -> None:
        """Keeps hidden states from now on: free before the first reset, later a forward over each row's tokens so far.

        Raises:
            InvalidArgumentError: where stepping never runs the reference (`kl_coef=0`, or `dense_kl=False`).
        """
        if self.stepping_reader().keeps_hidden:
            return
        self._reader = Reader(self.lm, self.num_rows, self.width + self.horizon, keep_hidden=True)
        begun = [row for row, prompt in enumerate(self.current) if prompt is not None]
        self._reader.start({row: self._token_ids(row) for row in begun}, None)

    def stepping_reader(self) -> Reader:
        """What reads the reference at every step.

        Raises:
            InvalidArgumentError: where stepping never runs the reference (`kl_coef=0`, or `dense_kl=False`).
        """
        if self._reader is None:
            raise InvalidArgumentError(
                "`kl_coef` must be > 0 and `dense_kl` True for the reference to run at every step."
            )
        return self._reader


def _ids_of(choose: Callable[[int], Prompt]) -> Callable[[int], tuple[int, ...]]:
    """What gives the token ids of the prompts that `choose` gives."""
    return lambda row: choose(row).ids
