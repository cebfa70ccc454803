"""The token MDP of a task: what actions are legal, when responses end, and what whole responses earn.

It has no rows and no state of an episode; `Engine` adds these.

Shapes: N rows, P prompt columns, T response columns, V vocabulary, B episodes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lmgym.ending import EndRule
from lmgym.envs.fitting import fit_prompts
from lmgym.envs.outcomes import Bools, Floats, Ints, Outcomes, Replay
from lmgym.envs.prompts import Prompt, PromptSet
from lmgym.envs.settings import Settings
from lmgym.errors import InvalidActionError, InvalidArgumentError, RewardError
from lmgym.models.causal import CausalLM
from lmgym.models.padding import pad_left
from lmgym.models.probes import check_language_model, check_log_probs, check_prompts_are_finite
from lmgym.rewards.base import RewardFunction, bind_tokenizer, remove_noise, score
from lmgym.rewards.classifier import ClassifierReward
from lmgym.rewards.probe import find_leaves, try_out
from lmgym.tasks.base import Task

_PROBED_PROMPTS = 4  # whose logits must be finite before an episode begins
_REWARD_STREAM = 1  # spawn key: what is random in the reward draws other numbers than the prompts of any row


class TokenMDP:
    """The MDP of one task, with its models loaded and checked.

    Attributes:
        task: what the arguments resolved to. split: the name of its prompts. prompts: those of the split.
        lm: the reference. reward: what scores responses.
        width: P. horizon: T.
        is_eos: (V,) bool. is_legal: (V,) bool, the tokens that the tokenizer has.
        end_rule: when a response ends.
    """

    def __init__(self, settings: Settings) -> None:
        task = settings.resolve()
        reward = task.reward_function(settings.device)  # first: an import path may lead nowhere
        self.split = settings.split
        self.lm: CausalLM = task.reference(settings.device, settings.dtype)
        check_language_model(self.lm)
        self.task: Task = fit_prompts(task, self.lm, tell=settings.on_long is not None)
        self.prompts = PromptSet(self.task, settings.split, self.lm)
        check_prompts_are_finite(self.lm, self.prompts.spread(_PROBED_PROMPTS))
        self.width = self.prompts.width
        self.horizon = self.task.max_new_tokens
        self.is_eos: Bools = self.lm.eos_table.numpy()
        self.is_legal: Bools = self.lm.legal_table.numpy()
        self.end_rule = EndRule(self.is_eos, self.task.min_new_tokens, self.horizon)
        self.reward: RewardFunction = bind_tokenizer(reward, self.lm.tokenizer)
        self._all_legal = bool(self.is_legal.all())
        self._check_rewards()

    def _check_rewards(self) -> None:
        """Checks that the rewards fit, and calls each once, for a response of one token to two prompts."""
        task = self.task
        if task.missing_eos_penalty and not self.lm.eos_token_ids:
            raise InvalidArgumentError("`missing_eos_penalty` must be 0: the model's tokenizer has no EOS.")
        for inside in find_leaves(self.reward):
            if isinstance(inside, ClassifierReward):
                inside.check_fits(self.lm, task.prompts.values(), self.width, self.horizon)
        prompts = [self.prompts[0], self.prompts[len(self.prompts) - 1]]
        texts = [prompt.text for prompt in prompts]
        ids = [list(prompt.ids) for prompt in prompts]
        words = [i for i in reversed(ids[0]) if not self.is_eos[i]] or np.flatnonzero(self.is_legal).tolist()
        responses = [[words[0]], [words[0]]]
        columns: dict[str, Any] = {"prompt_ids": ids, "completion_ids": responses}
        for reward in (self.reward, task.gold):
            if reward is not None:
                try_out(reward, texts, self.lm.completions(ids, responses), columns)

    def reseed(self, seed: int) -> None:
        """Restarts what is random in the reward.

        Args:
            seed: of a row's prompts. The reward gets a seed of its own, derived from it and below 2^32.
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

    def check_prefix(self, response_ids: Sequence[int]) -> None:
        """Raises `InvalidArgumentError` unless an episode can go on after these response tokens."""
        if len(response_ids) >= self.horizon:
            raise InvalidArgumentError(
                f"`response_ids` must be shorter than {self.horizon} tokens, got {len(response_ids)}."
            )
        for t, i in enumerate(response_ids):
            if not self.lm.is_legal(int(i)):
                raise InvalidArgumentError(f"`response_ids` must hold token ids of the tokenizer, got {i}.")
            if self.end_rule.is_end(int(i), t):
                raise InvalidArgumentError(f"`response_ids` must not end the episode, and token {t} is an EOS.")

    def check_actions(self, actions: Ints, live: Bools) -> None:
        """Raises `InvalidActionError` unless every live action is a token id of the tokenizer.

        Args:
            actions: (n,) int64. live: (n,) bool; the other actions do not matter.
        """
        inside = (actions >= 0) & (actions < self.lm.vocab_size)
        if not self._all_legal:
            inside &= self.is_legal[np.where(inside, actions, 0)]
        if not (inside | ~live).all():
            bad = int(actions[np.flatnonzero(~inside & live)[0]])
            raise InvalidActionError(f"`action` must be a token id from 0 to {self.lm.vocab_size - 1}, got {bad}.")

    def pad_prompts(self, prompts: Sequence[Prompt]) -> tuple[Tensor, Tensor]:
        """(B, P) int64 ids and bool mask of prompts, left-padded."""
        return pad_left([prompt.ids for prompt in prompts], self.lm.pad_token_id, self.width)

    def replay(
        self,
        prompts: Sequence[Prompt],
        response_ids: Ints,
        ref_log_probs: npt.NDArray[np.floating[Any]] | None = None,
    ) -> Replay:
        """What stepping responses (B, T) after prompts would have given; no row is touched.

        Args:
            prompts: B of them. response_ids: (B, T).
            ref_log_probs: (B, T) nats of the tokens under the reference, where they are known: it is then not run.

        Raises:
            InvalidActionError: for a number before the end of a response that is no token id.
        """
        b, horizon = response_ids.shape
        if horizon != self.horizon or b != len(prompts):
            raise InvalidArgumentError(
                f"`response_ids` must have shape ({len(prompts)}, {self.horizon}), got {response_ids.shape}."
            )
        columns = np.arange(horizon)
        lengths, by_eos = self.end_rule.find_ends(response_ids)
        mask: Bools = columns < lengths[:, None]
        self.check_actions(response_ids.ravel(), mask.ravel())
        if ref_log_probs is None or self.task.kl_coef == 0:
            charged = self._read_reference(prompts, response_ids, mask)
        else:
            charged = np.where(mask, ref_log_probs, 0.0).astype(np.float64)
        rewards = self.task.kl_coef * charged
        last = (np.arange(b), lengths - 1)
        if not self.task.dense_kl:
            total = rewards.sum(1)
            rewards[:] = 0.0
            rewards[last] = total
        responses = [response_ids[i, : lengths[i]].tolist() for i in range(b)]
        outcomes = self.grade(prompts, responses, by_eos)
        rewards[last] += outcomes.scores
        discounted = (rewards * self.task.gamma**columns).sum(1)
        truncated = ~by_eos & self.task.truncate
        outcomes = replace(outcomes, discounted_returns=discounted.tolist())
        return Replay(mask, rewards, charged, ~truncated, truncated, outcomes)

    def _read_reference(self, prompts: Sequence[Prompt], response_ids: Ints, mask: Bools) -> Floats:
        """(B, T) nats: log pi_ref of the tokens on the mask, 0 elsewhere and at `kl_coef=0`."""
        if self.task.kl_coef == 0:
            return np.zeros(response_ids.shape)
        response = torch.from_numpy(np.where(mask, response_ids, 0))
        log_probs = self.lm.response_log_probs(*self.pad_prompts(prompts), response, torch.from_numpy(mask))
        found = log_probs.numpy().astype(np.float64)
        check_log_probs(self.lm, found)
        return found

    def grade(self, prompts: Sequence[Prompt], responses: list[list[int]], by_eos: Bools) -> Outcomes:
        """Scores whole responses; their discounted returns are left empty.

        Args:
            prompts: B of them. responses: B lists of tokens, up to the end. by_eos: (B,) whether that is an EOS.
        """
        return self._grade_with(self.reward, self.task.gold, prompts, responses, by_eos)

    def mean_scores(
        self, prompts: Sequence[Prompt], responses: list[list[int]]
    ) -> tuple[list[float], list[float] | None]:
        """What whole responses score on average, and their gold scores: rewards without their noise.

        Args:
            prompts: B of them. responses: B lists of tokens, up to the end.

        Returns:
            B scores, a missing-EOS penalty taken off, and B gold scores if the task has such. A reward that does not
            say what it gives on average (`lmgym.rewards.base.remove_noise`) is asked as it is.
        """
        gold = None if self.task.gold is None else remove_noise(self.task.gold)
        by_eos = self.is_eos[[tokens[-1] for tokens in responses]]
        outcomes = self._grade_with(remove_noise(self.reward), gold, prompts, responses, by_eos)
        return outcomes.scores, outcomes.gold_scores

    def _grade_with(
        self,
        reward: RewardFunction,
        gold_reward: RewardFunction | None,
        prompts: Sequence[Prompt],
        responses: list[list[int]],
        by_eos: Bools,
    ) -> Outcomes:
        texts = [prompt.text for prompt in prompts]
        ids = [list(prompt.ids) for prompt in prompts]
        completions = self.lm.completions(ids, responses)
        columns: dict[str, Any] = {"prompt_ids": ids, "completion_ids": responses}
        scores = np.array(score(reward, texts, completions, **columns))
        scores = scores - self.task.missing_eos_penalty * ~by_eos
        gold_scores = None if gold_reward is None else score(gold_reward, texts, completions, **columns)
        reasons = ["eos" if by else "length" for by in by_eos]
        return Outcomes(scores.tolist(), gold_scores, reasons, [str(text) for text in texts], completions)
