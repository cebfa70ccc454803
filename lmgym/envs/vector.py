"""N token MDPs in one: a batched, cached forward of the reference a step."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, cast

import gymnasium as gym
import numpy as np
import numpy.typing as npt
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from lmgym.envs.base import EngineBacked, SharedAttributes
from lmgym.envs.engine import Engine
from lmgym.envs.infos import info_columns, vector_infos
from lmgym.envs.options import RESET_OPTIONS, as_options, as_reset_mask, as_seeds, choose_prompt
from lmgym.envs.outcomes import Outcomes, Replay, Transition
from lmgym.envs.prompts import Prompt
from lmgym.envs.rendering import to_rgb, to_text
from lmgym.envs.settings import Settings
from lmgym.envs.single import check_running, frame, restore_row, row_state
from lmgym.envs.spaces import observation_space, observe
from lmgym.envs.streams import PromptStreams
from lmgym.envs.token_ids import as_actions, refuse_text
from lmgym.errors import InvalidArgumentError, check_choice, check_int

AUTORESET_MODES = tuple(mode.value for mode in AutoresetMode)
_COPIED_ATTRIBUTES = ("_outcomes", "last_outcomes", "_to_reset", "spec", "_np_random", "_np_random_seed")


class RLHFVectorEnv(SharedAttributes, EngineBacked, VectorEnv[Any, Any, Any]):
    """`RLHFEnv` N times over, with the results of N of them and one forward a step.

    Args:
        num_envs: N.
        autoreset_mode: "NextStep", "SameStep" or "Disabled" (`gymnasium.vector.AutoresetMode`, or its value).
        group_size: k; rows i*k .. i*k + k - 1 draw the same prompts in the same order, each at its own pace.
        **kwargs: those of `RLHFEnv`, see `lmgym.envs.settings.Settings`.

    A sequential `prompt_order` deals the prompts out (`lmgym.envs.streams.PromptStreams`).

    Attributes:
        last_outcomes: of the episodes that the last step ended, in the order of their rows; None where it ended none.

    Raises:
        InvalidArgumentError: for a value that cannot be, before anything loads.
    """

    metadata = {"render_modes": ["ansi", "rgb_array"], "render_fps": 8, "autoreset_mode": AutoresetMode.NEXT_STEP}

    reset_options: tuple[str, ...] = RESET_OPTIONS

    def __init__(
        self,
        num_envs: int = 1,
        *,
        autoreset_mode: str | AutoresetMode = "NextStep",
        group_size: int = 1,
        **kwargs: Any,
    ) -> None:
        check_int("num_envs", num_envs, 1)
        check_int("group_size", group_size, 1)
        if num_envs % group_size:
            raise InvalidArgumentError(f"`group_size` must divide `num_envs`={num_envs}, got {group_size}.")
        mode = autoreset_mode.value if isinstance(autoreset_mode, AutoresetMode) else autoreset_mode
        check_choice("autoreset_mode", mode, AUTORESET_MODES)
        self.settings = Settings.of(kwargs, type(self).__name__)
        if self.settings.render_mode is not None:
            check_choice("render_mode", self.settings.render_mode, self.metadata["render_modes"])
        self.num_envs = num_envs
        self.group_size = group_size
        self.render_mode = self.settings.render_mode
        self.autoreset_mode = AutoresetMode(mode)
        self.metadata = {**self.metadata, "autoreset_mode": self.autoreset_mode}
        self._engine = Engine(self.settings, num_envs)
        self.single_observation_space = observation_space(self._engine, self.settings.obs_format)
        self.single_action_space: gym.Space[Any] = gym.spaces.Discrete(self._engine.lm.vocab_size)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self._streams = PromptStreams(self._engine.prompts, self.settings.prompt_order, num_envs, group_size)
        self._outcomes: list[tuple[Outcomes, int] | None] = [None] * num_envs
        self.last_outcomes: Outcomes | None = None
        self._to_reset = np.zeros(num_envs, dtype=np.bool_)

    def __reduce__(self) -> tuple[Any, ...]:
        # The engine holds a model: a copy builds its own from the arguments, then goes on from the state.
        mode: dict[str, Any] = {"autoreset_mode": self.autoreset_mode.value, "group_size": self.group_size}
        build = functools.partial(type(self), self.num_envs, **mode, **vars(self.settings))
        return (
            build,
            (),
            {
                "rows": [row_state(self._engine, row, None) for row in range(self.num_envs)],
                "streams": self.get_state(),
                "attributes": {name: self.__dict__[name] for name in _COPIED_ATTRIBUTES if name in self.__dict__},
            },
        )

    def __setstate__(self, pickled: dict[str, Any]) -> None:
        self.__dict__.update(pickled["attributes"])
        self.set_state(pickled["streams"])
        for row, state in enumerate(pickled["rows"]):
            if state is not None:
                restore_row(self._engine, row, state)

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Starts an episode in every row, or in those of `options["reset_mask"]` (N,) bool.

        Args:
            seed: row i is seeded with seed + i, or with its own of N.
            options: those of `RLHFEnv.reset`, for every row that is reset; and `reset_mask`.

        Raises:
            InvalidArgumentError: for an option with a value it cannot have.
        """
        options = as_options(options)
        mask = as_reset_mask(options.pop("reset_mask", None), self.num_envs)
        if seed is not None:
            seeds = as_seeds(seed, self.num_envs)
            self._streams.seed(seeds, mask)
            if seeds[0] is not None:
                self._engine.reseed(seeds[0])
        self._begin(np.flatnonzero(mask), options)
        self._to_reset[mask] = False
        return self._observe(), self._infos(mask)

    @property
    def _ready(self) -> bool:
        """Whether every row has begun; none has after a reward raised."""
        return None not in self._engine.current

    def _begin(self, rows: npt.NDArray[np.int64], options: dict[str, Any] | None = None) -> None:
        chosen = [choose_prompt(self._engine, self._streams[row], options, self.reset_options) for row in rows]
        self._engine.begin(rows, [prompt for prompt, _ in chosen], lambda row: self._streams[row].peek())
        for row, (_, prefix) in zip(rows, chosen, strict=True):
            if prefix:
                self._engine.resume(int(row), prefix, None, None)
            self._outcomes[row] = None

    def step(self, actions: Any) -> tuple[Any, npt.NDArray[np.float64], Any, Any, dict[str, Any]]:
        """Appends a token to every row.

        Args:
            actions: (N,) token ids.

        Raises:
            gymnasium.error.ResetNeeded: before the first reset, and after an end with autoreset disabled.
            InvalidActionError: for anything that is not a token id of the tokenizer.
        """
        check_running(self._ready)
        live = self._engine.running
        if self.autoreset_mode == AutoresetMode.DISABLED:
            check_running(bool(live.all()))
        live = live.copy()
        step = self._advance(actions, live)
        if step.outcomes is not None:
            for i, row in enumerate(step.ended):
                self._outcomes[row] = (step.outcomes, i)
        self.last_outcomes = step.outcomes
        infos = self._final(step)
        if self.autoreset_mode == AutoresetMode.NEXT_STEP:
            if self._to_reset.any():
                self._begin(np.flatnonzero(self._to_reset))
            self._to_reset = step.terminated | step.truncated
        elif self.autoreset_mode == AutoresetMode.SAME_STEP and len(step.ended):
            self._begin(step.ended)
        infos |= self._infos(np.ones(self.num_envs, dtype=np.bool_), step)
        return self._observe(), step.rewards, step.terminated, step.truncated, infos

    def _advance(self, actions: Any, live: npt.NDArray[np.bool_]) -> Transition:
        refuse_text(self._engine.lm, actions)
        tokens = as_actions(actions, (self.num_envs,))
        self._engine.check_actions(tokens, live)
        return self._engine.step(tokens, live)

    def _final(self, step: Transition) -> dict[str, Any]:
        """What "SameStep" infos say of the rows that ended, which are about to begin again."""
        if self.autoreset_mode != AutoresetMode.SAME_STEP or not len(step.ended):
            return {}
        ended = np.zeros(self.num_envs, dtype=np.bool_)
        ended[step.ended] = True
        observations = np.full(self.num_envs, None, dtype=object)
        for row in step.ended:
            observations[row] = observe(self._engine, self.settings.obs_format, int(row))
        columns = info_columns(self._engine, self.settings.text_info, step)
        return {
            "final_obs": observations,
            "_final_obs": ended,
            "final_info": vector_infos(columns, ended),
            "_final_info": ended.copy(),
        }

    def _infos(self, rows: npt.NDArray[np.bool_], step: Transition | None = None) -> dict[str, Any]:
        """Infos of rows (N,) bool; rows that have just begun again report that, and not their last step."""
        reporting = None
        if step is not None and len(step.ended) and self.autoreset_mode == AutoresetMode.SAME_STEP:
            reporting = np.ones(self.num_envs, dtype=np.bool_)
            reporting[step.ended] = False
        return vector_infos(info_columns(self._engine, self.settings.text_info, step, reporting), rows)

    def _observe(self) -> Any:
        return observe(self._engine, self.settings.obs_format, slice(None))

    def replay(
        self,
        prompts: Sequence[Prompt],
        response_ids: npt.NDArray[np.int64],
        ref_log_probs: npt.NDArray[np.floating[Any]] | None = None,
    ) -> Replay:
        """What stepping whole responses would have returned, from one teacher-forced pass; no row is touched.

        Args:
            prompts: B of them (`prompts[i]` of the env's `prompts`).
            response_ids: (B, T) int64; tokens after the end of a response do not matter.
            ref_log_probs: (B, T) nats of the tokens under the reference, where they are known: it is then not run.
        """
        return self._engine.replay(prompts, response_ids, ref_log_probs)

    def next_prompts(self, episodes: int) -> list[Prompt]:
        """Takes the next prompts of the rows' own streams, row by row: what `episodes` resets would start from."""
        check_int("episodes", episodes, 1)
        return self._streams.take(episodes)

    def reference_log_probs(self) -> npt.NDArray[np.float32]:
        """(N, V) nats: log pi_ref(.|s) at each row's state, from the forward that the next step will use.

        Raises:
            gymnasium.error.ResetNeeded: before the first reset.
            InvalidArgumentError: where stepping never runs the reference (`kl_coef=0`, or `dense_kl=False`).
        """
        check_running(self._ready)
        return self.engine.reference_log_probs()

    def get_state(self) -> dict[str, Any]:
        """Where the streams of randomness stand, as JSON values: what a resumed run needs to draw the same again.

        They are each row's stream of prompts, and the reward's noise where it has any. Running episodes are no part.
        """
        state = self.streams()
        for row in state["prompts"]:
            row["epoch"] = None if row["epoch"] is None else row["epoch"].tolist()
        return state

    def streams(self) -> dict[str, Any]:
        """`get_state` with the rows' orders of prompts as the arrays that the env has: cheap enough for every batch."""
        state: dict[str, Any] = {"prompts": self._streams.state()}
        if hasattr(self.engine.reward, "get_state"):
            state["reward"] = self.engine.reward.get_state()
        return state

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Puts the streams back where `get_state`, or `streams`, found them.

        Raises:
            InvalidArgumentError: for the state of another number of rows.
        """
        self._streams.set_state(state["prompts"])
        if "reward" in state:
            cast(Any, self.engine.reward).set_state(state["reward"])

    def text(self) -> tuple[str, ...]:
        """Prompt and response so far of each row, as one text without special tokens.

        Raises:
            gymnasium.error.ResetNeeded: before the first reset.
        """
        check_running(self._ready)
        return tuple(self._engine.text(row) for row in range(self.num_envs))

    def render(self) -> tuple[Any, ...] | None:
        """One string ("ansi") or picture ("rgb_array") a row."""
        if self.render_mode is None:
            gym.logger.warn(
                "`render` was called and no `render_mode` was given: try make_vec(..., render_mode='ansi')."
            )
            return None
        check_running(self._ready)
        draw = to_text if self.render_mode == "ansi" else to_rgb
        frames = []
        for row in range(self.num_envs):
            outcomes, i = self._outcomes[row] or (None, 0)
            frames.append(draw(frame(self._engine, row, outcomes, i)))
        return tuple(frames)
