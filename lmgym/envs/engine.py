"""The token MDP itself, N rows at a time; Gymnasium's single and vector environments are two skins over it.

Shapes: N rows, P prompt columns, T response columns, L = P + T, V vocabulary, B episodes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from gymnasium import spaces
from torch import Tensor

from lmgym.ending import EndRule
from lmgym.envs.fitting import fit_prompts
from lmgym.envs.meanings import decode_ids, name_actions
from lmgym.envs.prompts import Prompt, PromptSet
from lmgym.envs.reader import Reader
from lmgym.envs.settings import Settings
from lmgym.errors import InvalidActionError, InvalidArgumentError, RewardError
from lmgym.models.causal import CausalLM
from lmgym.models.padding import pad_left
from lmgym.models.policy import CausalPolicy
from lmgym.models.probes import check_language_model, check_prompts_are_finite
from lmgym.rewards.base import RewardFunction, bind_tokenizer, remove_noise, score
from lmgym.rewards.classifier import ClassifierReward
from lmgym.rewards.probe import leaves, try_out
from lmgym.tasks.base import Task

Bools = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

_MOST_IDS = 2**28  # that the rows of an env hold: 2 GiB
_PROBED_PROMPTS = 4  # whose logits must be finite before an episode begins
_REWARD_STREAM = 1  # spawn key: what is random in the reward draws other numbers than the prompts of any row


@dataclass(frozen=True)
class Transition:
    """What one step of the MDP gave. Rows that were not live are 0 or False throughout.

    Attributes:
        rewards: (N,) the env's own half of the reward (docs/mdp.md).
        ref_log_probs: (N,) nats, log pi_ref of the tokens this step paid for; None where it paid for none.
        terminated: (N,). truncated: (N,).
        ended: rows (n,) whose episode ended, in order; the lists below belong to them.
    """

    rewards: Floats
    ref_log_probs: Floats | None
    terminated: Bools
    truncated: Bools
    ended: Ints
    outcomes: Outcomes | None


@dataclass(frozen=True)
class Outcomes:
    """How n episodes ended. `scores` are as paid, a missing-EOS penalty already taken off."""

    scores: list[float]
    gold_scores: list[float] | None
    finish_reasons: list[str]
    prompts: list[str]
    responses: list[str]
    discounted_returns: list[float]

    def columns(self) -> dict[str, list[Any]]:
        """What `info` tells of them, by its keys."""
        gold = {} if self.gold_scores is None else {"gold_score": self.gold_scores}
        return {
            "score": self.scores,
            **gold,
            "finish_reason": self.finish_reasons,
            "prompt": self.prompts,
            "response": self.responses,
            "discounted_return": self.discounted_returns,
        }


@dataclass(frozen=True)
class Replay:
    """What stepping whole responses would have given, from one pass.

    Attributes:
        response_mask: (B, T) bool, True up to and including the end.
        rewards: (B, T) the env's own half of the reward, 0 off the mask.
        ref_log_probs: (B, T) nats, 0 off the mask and at `kl_coef=0`.
        terminated: (B,). truncated: (B,).
        outcomes: scores, texts and discounted returns of the B episodes.
    """

    response_mask: Bools
    rewards: Floats
    ref_log_probs: Floats
    terminated: Bools
    truncated: Bools
    outcomes: Outcomes


class Engine:
    """N rows of one task.

    The reference's forward is lazy: a token is fed when the next reward needs it, so the last token of an episode never
    costs one. Memory: a ring cache of N x (P + T) keys and values (decoding.py), and prompts read ahead for N rows.

    Attributes:
        task: the MDP. lm: its reference. reward: what it pays at the end. prompts: the split's prompts.
        input_ids: (N, L) int64 and attention_mask: (N, L) int8, the observations; `lengths` (N,) tokens chosen so far.
        is_eos: (V,) bool. is_legal: (V,) bool, the tokens that the tokenizer has.
        end_rule: when a response ends.
        prompt_texts: (N,) object, what `info` tells of the prompts that rows began with, "" where there is none.
        running: (N,) bool, rows inside an episode.
        returns, discounted: (N,) sum of the rewards of the episode so far, without and with gamma.
        starts: (N,) response tokens that came with the reset, which nobody pays for.
        ref_log_probs: (N, T) nats, of the tokens chosen so far; nan where the reference was not asked.
        final_hidden: (N, D), the hidden states of rows as the last step truncated them; None where they are not kept.
    """

    def __init__(self, settings: Settings, num_rows: int) -> None:
        task = settings.resolve()
        reward = task.reward_function(settings.device)  # first: an import path may lead nowhere
        self.lm: CausalLM = task.reference(settings.device, settings.dtype)
        self.split = settings.split
        check_language_model(self.lm)
        task = fit_prompts(task, self.lm, settings.on_long)
        self.task: Task = task
        self.prompts = PromptSet(task, settings.split, self.lm)
        check_prompts_are_finite(self.lm, self.prompts.spread(_PROBED_PROMPTS))
        self.reward = bind_tokenizer(reward, self.lm.tokenizer)
        for inside in leaves(self.reward):
            if isinstance(inside, ClassifierReward):
                inside.check_fits(self.lm, task.prompts.values(), self.prompts.width, task.max_new_tokens)
        if task.missing_eos_penalty and not self.lm.eos_token_ids:
            raise InvalidArgumentError("`missing_eos_penalty` must be 0: the model's tokenizer has no EOS.")
        self.num_rows, self.width, self.horizon = num_rows, self.prompts.width, task.max_new_tokens
        if num_rows * (self.width + self.horizon) > _MOST_IDS:
            raise InvalidArgumentError(
                f"`num_envs` must be at most {_MOST_IDS // (self.width + self.horizon)} for observations of "
                f"{self.width + self.horizon} tokens, got {num_rows}."
            )
        self.is_eos: Bools = self.lm.eos_table.numpy()
        self.is_legal: Bools = self.lm.legal_table.numpy()
        self.end_rule = EndRule(self.is_eos, task.min_new_tokens, task.max_new_tokens)
        self._all_legal = bool(self.is_legal.all())
        self.input_ids = np.full((num_rows, self.width + self.horizon), self.lm.pad_token_id, dtype=np.int64)
        self.attention_mask = np.zeros(self.input_ids.shape, dtype=np.int8)
        self.lengths = np.zeros(num_rows, dtype=np.int64)
        self.running = np.zeros(num_rows, dtype=np.bool_)
        self.starts = np.zeros(num_rows, dtype=np.int64)
        self.returns = np.zeros(num_rows)
        self.discounted = np.zeros(num_rows)
        self.ref_log_probs = np.full((num_rows, self.horizon), np.nan)
        self.current: list[Prompt | None] = [None] * num_rows
        self.prompt_texts = np.full(num_rows, "", dtype=object)
        self._discounts = task.gamma ** np.arange(self.horizon + 1)
        self._stepwise = task.kl_coef > 0 and task.dense_kl
        self._reader = Reader(self.lm, num_rows, self.width + self.horizon) if self._stepwise else None
        self.final_hidden: Tensor | None = None
        self._try_rewards()

    def _try_rewards(self) -> None:
        """Calls reward functions once, for the answer of one token to two prompts."""
        prompts = [self.prompts[0], self.prompts[len(self.prompts) - 1]]
        texts, ids = [p.text for p in prompts], [list(p.ids) for p in prompts]
        words = [i for i in reversed(ids[0]) if not self.is_eos[i]] or np.flatnonzero(self.is_legal).tolist()
        responses = [[words[0]], [words[0]]]
        columns: dict[str, Any] = {"prompt_ids": ids, "completion_ids": responses}
        for reward in (self.reward, self.task.gold):
            if reward is not None:
                try_out(reward, texts, self.lm.completions(ids, responses), columns)

    # -- starting ------------------------------------------------------------------------------------------------

    def begin(self, rows: Ints, prompts: Sequence[Prompt], ahead: Callable[[int], Prompt] | None = None) -> None:
        """Starts an episode in each of rows (n,).

        Args:
            rows: which. prompts: one each.
            ahead: gives the prompt a row will most likely start from next, so that prompts can be read in batches.
        """
        ids, mask = self.pad_prompts(prompts)
        self.input_ids[rows, : self.width] = ids.numpy()
        self.input_ids[rows, self.width :] = self.lm.pad_token_id
        self.attention_mask[rows, : self.width] = mask.numpy()
        self.attention_mask[rows, self.width :] = 0
        for row, prompt in zip(rows.tolist(), prompts, strict=True):
            self.current[row] = prompt
            self.prompt_texts[row] = str(prompt.text)
        self.lengths[rows] = self.starts[rows] = 0
        self.running[rows] = True
        self.returns[rows] = self.discounted[rows] = 0.0
        self.ref_log_probs[rows] = np.nan
        if self._reader is not None:
            sequences = {row: prompt.ids for row, prompt in zip(rows.tolist(), prompts, strict=True)}
            self._reader.start(sequences, None if ahead is None else _ids_of(ahead))

    def reseed(self, seed: int) -> None:
        """Begins anew what is random in the reward.

        Args:
            seed: of a row's prompts. The reward gets one of its own, derived from it and below 2^32.
        """
        if hasattr(self.reward, "reseed"):
            derived = np.random.SeedSequence(seed, spawn_key=(_REWARD_STREAM,)).generate_state(1)
            try:
                self.reward.reseed(int(derived[0]))
            except Exception as error:
                raise RewardError(
                    f"`reward.reseed` must take an int seed, and raised {type(error).__name__}: {error}. A method that "
                    "means something else needs another name."
                ) from error

    def abandon(self) -> None:
        """Ends every episode without an outcome: rows are as before their first start."""
        self.running[:] = False
        self.current = [None] * self.num_rows
        self.prompt_texts[:] = ""

    @contextlib.contextmanager
    def _abandoned_on_error(self) -> Iterator[None]:
        """Abandons every episode where a reward raises: half of a step has then been taken."""
        try:
            yield
        except InvalidActionError:  # nothing has been taken
            raise
        except BaseException:
            self.abandon()
            raise

    def resume(
        self, row: int, response_ids: Sequence[int], returns: tuple[float, float] | None, ref_log_probs: Floats | None
    ) -> None:
        """Puts a freshly begun row behind a prefix of a response.

        Args:
            row: which. response_ids: fewer than T tokens that do not end the episode.
            returns: the return and the discounted return so far; None earns 0, for a start in mid-air.
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

    def _token_ids(self, row: int) -> tuple[int, ...]:
        """Prompt and response so far of a row inside an episode."""
        prompt = self.current[row]
        assert prompt is not None
        return (*prompt.ids, *self.response_ids(row))

    def check_prefix(self, response_ids: Sequence[int]) -> None:
        """Raises `InvalidArgumentError` unless an episode can go on behind these response tokens."""
        if len(response_ids) >= self.horizon:
            raise InvalidArgumentError(
                f"`response_ids` must be shorter than {self.horizon} tokens, got {len(response_ids)}."
            )
        for t, i in enumerate(response_ids):
            if not self.lm.is_legal(int(i)):
                raise InvalidArgumentError(f"`response_ids` must hold token ids of the tokenizer, and {i} is none.")
            if self.end_rule.is_end(int(i), t):
                raise InvalidArgumentError(f"`response_ids` must not end the episode, and token {t} is an EOS.")

    # -- stepping ------------------------------------------------------------------------------------------------

    def check_actions(self, actions: Ints, live: Bools) -> None:
        """Raises `InvalidActionError` unless every live row's action is a token id of the tokenizer."""
        inside = (actions >= 0) & (actions < self.lm.vocab_size)
        if not self._all_legal:
            inside &= self.is_legal[np.where(inside, actions, 0)]
        if not (inside | ~live).all():
            bad = int(actions[np.flatnonzero(~inside & live)[0]])
            raise InvalidActionError(f"`action` must be a token id from 0 to {self.lm.vocab_size - 1}, got {bad}.")

    def step(self, actions: Ints, live: Bools) -> Transition:
        """Appends a token to each live row.

        Args:
            actions: (N,) int64 token ids, already checked; anything where not live.
            live: (N,) bool, a subset of `running`.
        """
        task, t = self.task, self.lengths.copy()
        rows = np.flatnonzero(live)
        tokens = actions[rows]
        rewards = np.zeros(self.num_rows)
        paid: Floats | None = None
        if self._reader is not None:
            paid = np.where(live, self._reader.log_probs(np.where(live, actions, 0)), 0.0)
            self.ref_log_probs[rows, t[rows]] = paid[rows]
            rewards = task.kl_coef * paid
        columns = self.width + t[rows]
        self.input_ids[rows, columns] = tokens
        self.attention_mask[rows, columns] = 1
        self.lengths[rows] += 1
        eos = np.zeros(self.num_rows, dtype=np.bool_)
        eos[rows] = self.end_rule.is_end_by_eos(tokens, t[rows])
        full = np.zeros(self.num_rows, dtype=np.bool_)
        full[rows] = self.end_rule.is_end(tokens, t[rows]) & ~eos[rows]
        ended = np.flatnonzero(eos | full)
        scores: _Scores | None = None
        if len(ended):
            with self._abandoned_on_error():
                scores = self._score(ended, eos[ended])
            if task.kl_coef > 0 and not task.dense_kl:
                paid = np.zeros(self.num_rows)
                paid[ended] = self._pay_at_end(ended)
                rewards += task.kl_coef * paid
            rewards[ended] += scores.scores
        self.returns += rewards
        self.discounted += self._discounts[t] * rewards
        self.running[ended] = False
        outcomes = scores.outcomes(self.discounted[ended]) if scores is not None else None
        truncated = full if task.truncate else np.zeros_like(full)
        if self._reader is not None and self._reader.keeps_hidden and truncated.any():
            # Now, because the rows may begin anew before anybody looks. Only a truncated state has a value.
            self.final_hidden = self._reader.hidden().clone()
        return Transition(rewards, paid, (eos | full) & ~truncated, truncated, ended, outcomes)

    def response_ids(self, row: int) -> list[int]:
        """The response tokens of a row so far."""
        return self.input_ids[row, self.width : self.width + self.lengths[row]].tolist()

    def reference_logits(self) -> Tensor:
        """(N, V) logits of the reference for each row's next token; the same forward that the next step will use.

        Raises:
            InvalidArgumentError: where stepping never runs the reference (`kl_coef=0`, or `dense_kl=False`).
        """
        return self._stepping_reader().logits()

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
        return self._stepping_reader().hidden()

    def keep_hidden(self) -> None:
        """Keeps hidden states from here on: free before the first reset, later a forward over each row's tokens so far.

        Raises:
            InvalidArgumentError: where stepping never runs the reference (`kl_coef=0`, or `dense_kl=False`).
        """
        if self._stepping_reader().keeps_hidden:
            return
        self._reader = Reader(self.lm, self.num_rows, self.width + self.horizon, keep_hidden=True)
        self._reader.start({row: self._token_ids(row) for row, p in enumerate(self.current) if p is not None}, None)

    def _stepping_reader(self) -> Reader:
        if self._reader is None:
            raise InvalidArgumentError(
                "`kl_coef` must be > 0 and `dense_kl` True for the reference to run at every step."
            )
        return self._reader

    def pad_prompts(self, prompts: Sequence[Prompt]) -> tuple[Tensor, Tensor]:
        """(B, P) int64 ids and bool mask of prompts, left-padded."""
        return pad_left([prompt.ids for prompt in prompts], self.lm.pad_token_id, self.width)

    # -- whole episodes --------------------------------------------------------------------------------------------

    def replay(self, prompts: Sequence[Prompt], response_ids: Ints) -> Replay:
        """What stepping responses (B, T) behind prompts would have given; the rows of the engine are not touched.

        Raises:
            InvalidActionError: for a token that is none, before the end of its response.
        """
        task, (b, horizon) = self.task, response_ids.shape
        if horizon != self.horizon or b != len(prompts):
            raise InvalidArgumentError(
                f"`response_ids` must have shape ({len(prompts)}, {self.horizon}), got {response_ids.shape}."
            )
        columns = np.arange(horizon)
        lengths, eos = self.end_rule.find_ends(response_ids)
        mask: Bools = columns < lengths[:, None]
        self.check_actions(response_ids.ravel(), mask.ravel())
        ref = np.zeros((b, horizon))
        if task.kl_coef > 0:
            response = torch.from_numpy(np.where(mask, response_ids, 0))
            log_probs = self.lm.response_log_probs(*self.pad_prompts(prompts), response, torch.from_numpy(mask))
            ref = log_probs.numpy().astype(np.float64)
        rewards = task.kl_coef * ref
        last = (np.arange(b), lengths - 1)
        if not task.dense_kl:
            total = rewards.sum(1)
            rewards[:] = 0.0
            rewards[last] = total
        responses = [response_ids[i, : lengths[i]].tolist() for i in range(b)]
        scores = self._score_texts(prompts, responses, eos)
        rewards[last] += scores.scores
        discounted = (rewards * task.gamma**columns).sum(1)
        truncated = ~eos & task.truncate
        return Replay(mask, rewards, ref, ~truncated, truncated, scores.outcomes(discounted))

    def mean_scores(
        self, prompts: Sequence[Prompt], responses: list[list[int]]
    ) -> tuple[list[float], list[float] | None]:
        """What whole responses score on average, and their gold scores: rewards without their noise.

        Args:
            prompts: B of them. responses: B lists of tokens, up to the end.

        Returns:
            B scores, a missing-EOS penalty taken off, and B gold scores if the task has such; from the reward as it is
            where nothing says what it pays on average (`lmgym.rewards.base.remove_noise`).
        """
        gold = None if self.task.gold is None else remove_noise(self.task.gold)
        eos = self.is_eos[[tokens[-1] for tokens in responses]]
        scores = self._score_with(remove_noise(self.reward), gold, prompts, responses, eos)
        return scores.scores.tolist(), scores.gold_scores

    def step_whole(self, responses: Ints, live: Bools) -> Transition:
        """Takes a whole response (N, T) in each live row: the bandit's step, whose reward is the discounted return."""
        rows = np.flatnonzero(live)
        rewards, paid, zeros = np.zeros(self.num_rows), np.zeros(self.num_rows), np.zeros(self.num_rows, dtype=np.bool_)
        if not len(rows):
            return Transition(rewards, None, zeros, zeros.copy(), rows, None)
        with self._abandoned_on_error():
            replay = self.replay([p for row in rows if (p := self.current[row]) is not None], responses[rows])
        mask = replay.response_mask
        self.input_ids[rows, self.width :] = np.where(mask, responses[rows], self.lm.pad_token_id)
        self.attention_mask[rows, self.width :] = mask
        self.lengths[rows] = mask.sum(1)
        self.running[rows] = False
        self.returns[rows], self.discounted[rows] = replay.rewards.sum(1), replay.outcomes.discounted_returns
        rewards[rows] = self.discounted[rows]
        if self.task.kl_coef > 0:
            paid[rows] = replay.ref_log_probs.sum(1)
            self.ref_log_probs[rows] = np.where(mask, replay.ref_log_probs, np.nan)
        terminated, truncated = zeros.copy(), zeros.copy()
        terminated[rows], truncated[rows] = replay.terminated, replay.truncated
        paid_for = paid if self.task.kl_coef > 0 else None
        return Transition(rewards, paid_for, terminated, truncated, rows, replay.outcomes)

    # -- the end of an episode -----------------------------------------------------------------------------------

    def _pay_at_end(self, rows: Ints) -> Floats:
        """(n,) nats: log pi_ref of whole responses, from one teacher-forced pass."""
        ids = torch.from_numpy(self.input_ids[rows])
        mask = torch.from_numpy(self.attention_mask[rows]).bool()
        p = self.width
        log_probs = self.lm.response_log_probs(ids[:, :p], mask[:, :p], ids[:, p:], mask[:, p:]).numpy()
        kept = np.where(mask[:, p:].numpy(), log_probs, np.nan)
        kept[np.arange(self.horizon) < self.starts[rows, None]] = np.nan
        self.ref_log_probs[rows] = kept
        return np.nansum(kept, axis=1, dtype=np.float64)

    def _score(self, rows: Ints, eos: Bools) -> _Scores:
        prompts = [self.current[row] for row in rows]
        return self._score_texts([p for p in prompts if p is not None], [self.response_ids(row) for row in rows], eos)

    def _score_texts(self, prompts: Sequence[Prompt], responses: list[list[int]], eos: Bools) -> _Scores:
        return self._score_with(self.reward, self.task.gold, prompts, responses, eos)

    def _score_with(
        self,
        reward: RewardFunction,
        gold_reward: RewardFunction | None,
        prompts: Sequence[Prompt],
        responses: list[list[int]],
        eos: Bools,
    ) -> _Scores:
        texts = [p.text for p in prompts]
        ids = [list(p.ids) for p in prompts]
        completions = self.lm.completions(ids, responses)
        columns: dict[str, Any] = {"prompt_ids": ids, "completion_ids": responses}
        scores = np.array(score(reward, texts, completions, **columns))
        scores = scores - self.task.missing_eos_penalty * ~eos
        gold = None if gold_reward is None else score(gold_reward, texts, completions, **columns)
        reasons = ["eos" if e else "length" for e in eos]
        return _Scores(scores, gold, reasons, [str(text) for text in texts], completions)


def _ids_of(choose: Callable[[int], Prompt]) -> Callable[[int], tuple[int, ...]]:
    """What gives the token ids of the prompts that `choose` gives."""
    return lambda row: choose(row).ids


class EngineBacked:
    """What every environment over an engine tells of itself."""

    _engine: Engine

    @property
    def engine(self) -> Engine:
        """The MDP behind the skin: what the whole-episode path and the wrappers read, such as `reference_logits()`."""
        return self._engine

    def get_action_meanings(self) -> list[str]:
        """V texts: what each action, a token id, says (the name is that of Gymnasium's Atari environments)."""
        return name_actions(self._engine.lm)

    def decode(self, ids: Any) -> str:
        """The text of a token id, of several (n,), or of one row's observation; special tokens by their names."""
        return decode_ids(self._engine.lm, ids)

    @property
    def task(self) -> Task:
        """The MDP, as resolved from the arguments."""
        return self._engine.task

    @property
    def kl_coef(self) -> float:
        """Price of a nat, in units of the score."""
        return self._engine.task.kl_coef

    @property
    def dense_kl(self) -> bool:
        """Whether the KL is paid with every token, not with the last one for the whole episode."""
        return self._engine.task.dense_kl

    @property
    def gamma(self) -> float:
        """Discount a token, which agents read."""
        return self._engine.task.gamma

    def reference_policy(self) -> CausalPolicy:
        """The reference as a policy, with the env's own weights: what training starts from, and J_ref is the J of."""
        return CausalPolicy(self._engine.lm)

    @property
    def tokenizer(self) -> Any:
        """The reference's Hugging Face tokenizer."""
        return self._engine.lm.tokenizer


def engine_of(env: Any) -> Engine:
    """The engine behind a wrapped environment, single or vector.

    Raises:
        InvalidArgumentError: for an environment that is not of lmgym.
    """
    if not isinstance(env.unwrapped, EngineBacked):
        raise InvalidArgumentError(
            f"`env` must be an environment of lmgym, got {env.unwrapped}. Of a vector of single ones, wrap these."
        )
    return env.unwrapped.engine


def stepping_engine_of(env: Any) -> Engine:
    """The engine behind a wrapped environment whose reference runs at every step.

    Raises:
        InvalidArgumentError: for any other environment (a bandit, `kl_coef=0`, `dense_kl=False`).
    """
    engine = engine_of(env)
    base = env.unwrapped
    actions = getattr(base, "single_action_space", base.action_space)
    if not isinstance(actions, spaces.Discrete):
        raise InvalidArgumentError(f"`env` must take one token a step, got one with the actions {actions}.")
    engine._stepping_reader()
    return engine


@dataclass(frozen=True)
class _Scores:
    scores: Floats
    gold_scores: list[float] | None
    finish_reasons: list[str]
    prompts: list[str]
    responses: list[str]

    def outcomes(self, discounted: Floats) -> Outcomes:
        return Outcomes(
            self.scores.tolist(),
            self.gold_scores,
            self.finish_reasons,
            self.prompts,
            self.responses,
            discounted.tolist(),
        )
