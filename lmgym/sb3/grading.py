"""J of a model of Stable-Baselines3, with its whole KL, and how much of the possible gain that is.

Shapes: N rows, K actions, X prompts, S samples a prompt.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from gymnasium.vector import AutoresetMode, VectorEnv
from torch import Tensor

from lmgym.envs.vector import RLHFVectorEnv
from lmgym.errors import InvalidArgumentError, check_int
from lmgym.evaluation import intervals
from lmgym.intervals import Interval
from lmgym.models.sampling import inverse_cdf
from lmgym.optimum import find_known
from lmgym.scores import normalised, reference_return
from lmgym.tasks.stored import StoredOptimum

Floats = npt.NDArray[np.float64]
Act = Callable[[Any, Any], tuple[npt.NDArray[np.int64], Floats]]  # observations and infos to actions and log-probs


@dataclass(frozen=True)
class Grade:
    """What a model earns on a split, each number with a 95 % interval.

    Attributes:
        metrics: `return` (J: discounted, with both halves of the KL), `score`, `kl` (nats an episode, where the
            reference is asked) and `length` (tokens).
        optimum: what is known of V* on the split; None where nothing is.
        normalised: (J - J_ref) / (V* - J_ref), 0 for the reference and 1 for the optimum; None where V* is not known.
    """

    metrics: dict[str, Interval]
    optimum: StoredOptimum | None
    normalised: Interval | None


def evaluate(
    model: Any,
    envs: VectorEnv[Any, Any, Any],
    *,
    samples: int = 32,
    prompts: int | None = None,
    deterministic: bool = False,
    seed: int = 0,
) -> Grade:
    """Samples every prompt of the env's split (or the first `prompts` of them) a number of times, and grades.

    A model with a distribution over actions (PPO, A2C, TRPO, MaskablePPO) is sampled from it, and `kl_coef * log pi` of
    each action is subtracted from its reward. Any other (DQN, QRDQN, RecurrentPPO), and any with `deterministic`, takes
    the action that `predict` gives: log pi is 0, and the env's own return is all of J.

    Args:
        model: of Stable-Baselines3 or sb3-contrib, or any object with their `predict`; or, of whatever library, a
            function that makes logits (N, K) of observations, a tensor (N, ...) or a dict of them.
        envs: the wrappers that the model was trained in around `gym.make_vec(..., autoreset_mode="SameStep")`; another
            one than it trains on, for its episodes are left where they stand.
        samples: episodes a prompt. prompts: how many prompts; None is all.
        deterministic: grade the model's likeliest actions.
        seed: of the actions.

    Raises:
        InvalidArgumentError: for an env that does not reset in the same step.
    """
    check_int("samples", samples, 1)
    if envs.metadata["autoreset_mode"] != AutoresetMode.SAME_STEP:
        raise InvalidArgumentError(
            f"`envs` must have the autoreset_mode 'SameStep', got {envs.metadata['autoreset_mode'].value!r}."
        )
    base = cast(RLHFVectorEnv, envs.unwrapped)
    available = len(base.engine.prompts)
    count = available if prompts is None else min(prompts, available)
    act = _sample_actions(model, seed) if _has_distribution(model) and not deterministic else _best_actions(model)
    rounds = -(-samples // envs.num_envs)
    columns: dict[str, list[Tensor]] = {}
    for index in range(count):
        parts = [_play_episodes(envs, base, index, act) for _ in range(rounds)]
        for name in parts[0]:
            values = np.concatenate([part[name] for part in parts])[:samples]
            columns.setdefault(name, []).append(torch.from_numpy(values))
    metrics = intervals({name: torch.stack(rows) for name, rows in columns.items()}, base)
    optimum = find_known(base.task, base.settings.split) if count == available else None
    share = None if optimum is None else normalised(metrics["return"], reference_return(optimum), optimum)
    return Grade(metrics, optimum, share)


def _play_episodes(envs: VectorEnv[Any, Any, Any], base: RLHFVectorEnv, index: int, act: Act) -> dict[str, Floats]:
    """Plays one episode in every row, all from one prompt, and returns its numbers (N,) by name."""
    task = base.task
    rows = envs.num_envs
    observation, infos = envs.reset(options={"prompt_index": index})
    found = {name: np.zeros(rows) for name in ("return", "score", "kl", "length")}
    owed = np.zeros(rows)
    running = np.ones(rows, dtype=np.bool_)
    t = 0
    while running.any():
        actions, log_probs = act(observation, infos)
        observation, rewards, terminated, truncated, infos = envs.step(actions)
        ended = (terminated | truncated) & running
        owed += log_probs
        due = running if task.dense_kl else ended
        rewards = rewards - task.kl_coef * owed * due
        found["return"] += np.where(running, task.gamma**t * rewards, 0.0)
        found["kl"] += np.where(running, log_probs - _read_info(infos, "ref_log_prob", ended), 0.0)
        found["score"] += np.where(ended, _read_info(infos, "score", ended), 0.0)
        found["length"] += running
        owed[due] = 0.0
        running &= ~ended
        t += 1
    if task.kl_coef == 0:
        del found["kl"]  # at kl_coef=0 the reference is not run
    return found


def _read_info(infos: dict[str, Any], name: str, ended: npt.NDArray[np.bool_]) -> Any:
    """A number (N,) of the step; of rows that ended, the one from before their reset."""
    if name not in infos:
        return 0.0
    return np.where(ended, infos["final_info"][name], infos[name]) if ended.any() else infos[name]


def _has_distribution(model: Any) -> bool:
    """Whether the model gives log-probs of its actions without a memory of its own."""
    policy = getattr(model, "policy", None)
    return not hasattr(model, "predict") or (hasattr(policy, "get_distribution") and not hasattr(policy, "lstm_actor"))


def _sample_actions(model: Any, seed: int) -> Act:
    """Samples from the distribution of a policy, and gives the log-prob of what was sampled."""
    generator = torch.Generator().manual_seed(seed)
    if hasattr(model, "predict"):
        model.policy.set_training_mode(False)

    @torch.no_grad()
    def act(observation: Any, infos: Any) -> tuple[npt.NDArray[np.int64], Floats]:
        if hasattr(model, "predict"):
            inputs, _ = model.policy.obs_to_tensor(observation)
            masks = {"action_masks": infos["action_mask"]} if "action_mask" in infos else {}
            logits = model.policy.get_distribution(inputs, **masks).distribution.logits
        else:
            logits = model(_as_tensors(observation))
        uniforms = torch.rand(len(logits), generator=generator, dtype=torch.float64)
        actions, log_probs = inverse_cdf(logits.float(), uniforms)
        return actions.cpu().numpy(), log_probs.cpu().numpy().astype(np.float64)

    return act


def _as_tensors(observation: Any) -> Any:
    if isinstance(observation, dict):
        return {name: torch.from_numpy(values) for name, values in observation.items()}
    return torch.from_numpy(observation)


def _best_actions(model: Any) -> Act:
    """The action that `predict` gives with `deterministic=True`, at a log-prob of 0."""
    memory: dict[str, Any] = {"state": None}

    def act(observation: Any, infos: Any) -> tuple[npt.NDArray[np.int64], Floats]:
        actions, memory["state"] = model.predict(observation, state=memory["state"], deterministic=True)
        return np.asarray(actions), np.zeros(len(actions))

    return act
