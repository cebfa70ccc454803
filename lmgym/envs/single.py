"""Text generation as a Gymnasium environment: one token a step."""

from __future__ import annotations

import functools
import sys
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import numpy as np
import numpy.typing as npt
from gymnasium import spaces

from lmgym.envs.base import EngineBacked
from lmgym.envs.engine import Engine
from lmgym.envs.infos import info_columns, row_info
from lmgym.envs.options import RESET_OPTIONS, as_seed, choose_prompt
from lmgym.envs.outcomes import Outcomes, Transition
from lmgym.envs.prompts import Prompt, PromptOrder
from lmgym.envs.rendering import Frame, scale_costs, show, to_rgb, to_text, wait_for_turn
from lmgym.envs.settings import RENDER_MODES, Settings
from lmgym.envs.spaces import observation_space, observe
from lmgym.envs.token_ids import as_actions, refuse_text
from lmgym.errors import InvalidArgumentError

_ROW = np.zeros(1, dtype=np.int64)
_LIVE = np.ones(1, dtype=np.bool_)
_COPIED_ATTRIBUTES = ("_np_random", "_np_random_seed", "spec")


@dataclass(frozen=True)
class EnvState:
    """The state of an episode: enough to go on from it, because transitions are deterministic."""

    prompt: Prompt
    response_ids: tuple[int, ...]
    ref_log_probs: npt.NDArray[np.float64]
    returns: tuple[float, float]
    start: int
    running: bool
    outcomes: Outcomes | None


class RLHFEnv(EngineBacked, gym.Env[Any, int]):
    """The token MDP of RLHF (docs/mdp.md).

    ## Observation
    `Dict(input_ids=Box int64 (L,), attention_mask=Box int8 (L,))`, L = P + T: the prompt left-padded to P columns, then
    the response. With `obs_format="flat"` one `Box int64 (L,)`, -1 where there is no token.

    ## Action
    `Discrete(V)`: the next token. An int is a point mass, so the env's own reward carries the whole KL of that choice;
    a sampling policy adds `-kl_coef * log pi(a|s)` itself (`lmgym.wrappers.PolicyKL`).

    ## Reward
    `kl_coef * log pi_ref(a|s)` at every step, plus the score at the end.

    ## End
    EOS or T tokens, both `terminated`; `truncate=True` reports T tokens as `truncated`.

    ## Info
    The same keys at `reset` and at every step. Numbers are `np.float64`: `ref_log_prob` (nats, of the tokens this step
    charged; absent at `kl_coef=0`), and `score`, `discounted_return` and `gold_score` (if the task has one), which are
    0.0 before the end. `reward == kl_coef * ref_log_prob + score`. Texts, which `text_info=False` leaves out: `prompt`,
    and `response` and `finish_reason` ("eos" or "length"), which are empty before the end.

    ## Arguments
    See `lmgym.envs.settings.Settings`.

    ## Reset options
    `prompt` (text), `prompt_ids` or `prompt_index`, and `response_ids` to start after the first tokens of a response.
    """

    metadata = {"render_modes": list(RENDER_MODES), "render_fps": 8}

    reset_options: tuple[str, ...] = RESET_OPTIONS

    def __init__(self, **kwargs: Any) -> None:
        self.settings = Settings.of(kwargs, type(self).__name__)
        self.render_mode = self.settings.render_mode
        self._engine = Engine(self.settings, 1)
        self.observation_space = observation_space(self._engine, self.settings.obs_format)
        self.action_space: spaces.Space[Any] = spaces.Discrete(self._engine.lm.vocab_size)
        self._order = PromptOrder(self._engine.prompts, self.settings.prompt_order, lambda: self.np_random)
        self._outcomes: Outcomes | None = None
        self._drawn = 0  # lines of the terminal that the episode's block takes
        self._shown_at = 0.0  # when, in seconds of the monotonic clock

    def __reduce__(self) -> tuple[Any, ...]:
        # The engine holds a model: a copy builds its own from the arguments, then goes on from the state.
        state = self.clone_state() if self._engine.current[0] is not None else None
        attributes = {name: self.__dict__.get(name) for name in _COPIED_ATTRIBUTES}
        pickled = {"state": state, "order": self._order.position, "attributes": attributes}
        return functools.partial(type(self), **vars(self.settings)), (), pickled

    def __setstate__(self, pickled: dict[str, Any]) -> None:
        self.__dict__.update({name: value for name, value in pickled["attributes"].items() if value is not None})
        self._order.position = pickled["order"]
        if pickled["state"] is not None:
            self.restore_state(pickled["state"])

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Starts an episode from the next prompt, or from the one that `options` names.

        Raises:
            InvalidArgumentError: for an option with a value it cannot have.
            UnknownNameError: for an option that does not exist.
        """
        seed = as_seed(seed)
        super().reset(seed=seed)
        if seed is not None:
            self._order.restart()
            self._engine.reseed(seed)
        prompt, prefix = choose_prompt(self._engine, self._order, options, self.reset_options)
        self._engine.begin(_ROW, [prompt])
        if prefix:
            self._engine.resume(0, prefix, None, None)
        self._outcomes = None
        self._drawn = 0
        self._render_if_human()
        return self._observation(), row_info(info_columns(self._engine, self.settings.text_info))

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Appends a token.

        Args:
            action: a token id.

        Raises:
            gymnasium.error.ResetNeeded: before the first reset, and after the end of an episode.
            InvalidActionError: for anything that is not a token id of the tokenizer.
        """
        check_running(self._engine.running[0])
        step = self._advance(action)
        self._outcomes = step.outcomes
        info = row_info(info_columns(self._engine, self.settings.text_info, step))
        self._render_if_human()
        return self._observation(), float(step.rewards[0]), bool(step.terminated[0]), bool(step.truncated[0]), info

    def _advance(self, action: Any) -> Transition:
        refuse_text(self._engine.lm, action)
        actions = as_actions(action, ()).reshape(1)
        self._engine.check_actions(actions, _LIVE)
        return self._engine.step(actions, _LIVE)

    def clone_state(self) -> EnvState:
        """The present state of the episode; `restore_state` goes on from it, in any env of the same arguments.

        Raises:
            gymnasium.error.ResetNeeded: before the first reset.
        """
        state = row_state(self._engine, 0, self._outcomes)
        if state is None:
            raise gym.error.ResetNeeded("Cannot clone the state of an episode before `reset`.")
        return state

    def restore_state(self, state: EnvState) -> Any:
        """Goes back (or forth) to a cloned state; costs one forward over its tokens when the next step is taken.

        Returns:
            The observation there.
        """
        if not isinstance(state, EnvState):
            raise InvalidArgumentError(f"`state` must come from `clone_state`, got {state!r}.")
        restore_row(self._engine, 0, state)
        self._outcomes = state.outcomes
        return self._observation()

    def reference_log_probs(self) -> npt.NDArray[np.float32]:
        """(V,) nats: log pi_ref(.|s) at the state, from the forward that the next step will use.

        Raises:
            gymnasium.error.ResetNeeded: before the first reset.
            InvalidArgumentError: where stepping never runs the reference (`kl_coef=0`, or `dense_kl=False`).
        """
        check_running(self._engine.current[0] is not None)
        return self._engine.reference_log_probs()[0]

    def text(self) -> str:
        """Prompt and response so far, as one text without special tokens.

        Raises:
            gymnasium.error.ResetNeeded: before the first reset.
        """
        check_running(self._engine.current[0] is not None)
        return self._engine.text(0)

    def render(self) -> Any:
        """The episode so far: a string ("ansi"), a picture ("rgb_array"), or on the terminal at each step ("human")."""
        if self.render_mode is None:
            gym.logger.warn(
                "`render` was called and no `render_mode` was given: try gym.make(..., render_mode='ansi')."
            )
            return None
        check_running(self._engine.current[0] is not None)
        if self.render_mode == "human":
            return None
        return to_text(self._frame()) if self.render_mode == "ansi" else to_rgb(self._frame())

    def _render_if_human(self) -> None:
        if self.render_mode == "human":
            self._shown_at = wait_for_turn(self._shown_at, self.metadata["render_fps"], sys.stdout)
            self._drawn = show(self._frame(), sys.stdout, self._drawn)

    def _observation(self) -> Any:
        return observe(self._engine, self.settings.obs_format, 0)

    def _frame(self) -> Frame:
        return frame(self._engine, 0, self._outcomes)


def row_state(engine: Engine, row: int, outcomes: Outcomes | None) -> EnvState | None:
    """The state of a row's episode; None where the row has never begun."""
    prompt = engine.current[row]
    if prompt is None:
        return None
    returns = (float(engine.returns[row]), float(engine.discounted[row]))
    tokens = tuple(engine.response_ids(row))
    return EnvState(
        prompt=prompt,
        response_ids=tokens,
        ref_log_probs=engine.ref_log_probs[row].copy(),
        returns=returns,
        start=int(engine.starts[row]),
        running=bool(engine.running[row]),
        outcomes=outcomes,
    )


def restore_row(engine: Engine, row: int, state: EnvState) -> None:
    """Puts a row where an episode was."""
    engine.begin(np.array([row]), [state.prompt])
    engine.resume(row, state.response_ids, state.returns, state.ref_log_probs)
    engine.starts[row] = state.start
    engine.running[row] = state.running


def check_running(running: bool | np.bool_) -> None:
    """Raises Gymnasium's `ResetNeeded` outside an episode."""
    if not running:
        raise gym.error.ResetNeeded("Cannot call `step` (or look at an episode) before `reset`, or after its end.")


def frame(engine: Engine, row: int, outcomes: Outcomes | None, i: int = 0) -> Frame:
    """The picture of a row's episode; once it has ended, with the i-th episode of `outcomes`."""
    prompt = engine.current[row]
    assert prompt is not None
    response = engine.response_ids(row)
    ref = engine.ref_log_probs[row, : len(response)]
    costs = [] if np.isnan(ref).any() else (engine.task.kl_coef * ref).tolist()
    return Frame(
        prompt=prompt.text,
        tokens=engine.lm.pieces(prompt.ids, response),
        costs=costs,
        score=None if outcomes is None else outcomes.scores[i],
        episode_return=float(engine.returns[row]),
        finish_reason=None if outcomes is None else outcomes.finish_reasons[i],
        max_new_tokens=engine.horizon,
        cost_scale=scale_costs(engine.task.kl_coef, ref),
    )
