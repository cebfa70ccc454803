"""Which arguments of an algorithm of Stable-Baselines3 `kwargs` may hold; neither it nor torch is loaded here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from lmgym.errors import InvalidArgumentError, check_choice, unknown_name

# Arguments that come from elsewhere, and the key that sets them where there is one.
SET_ELSEWHERE = {
    "policy": None,
    "env": None,
    "learning_rate": "agent.learning_rate",
    "gamma": "env.gamma",
    "seed": "seed",
    "device": "device",
    "verbose": None,
    "tensorboard_log": None,
    "_init_setup_model": None,
    "n_epochs": "agent.n_epochs",
    "batch_size": "agent.batch_size",
}
POLICY_KWARGS = ("n_quantiles", "lstm_hidden_size", "n_lstm_layers")  # entries of `policy_kwargs` that may be given


def check_kwargs(kwargs: Mapping[str, Any], parameters: Iterable[str], argument: str = "kwargs") -> None:
    """Checks the names in `kwargs`, and those in its `policy_kwargs`.

    Args:
        kwargs: by SB3's names. parameters: that the algorithm takes. argument: what `kwargs` is called in a message.

    Raises:
        LmGymError: for a name that the algorithm does not take, or that another key sets.
    """
    accepted = [name for name in parameters if name not in SET_ELSEWHERE]
    for name in kwargs:
        key = SET_ELSEWHERE.get(name)
        if key is not None:
            raise InvalidArgumentError(f"`{argument}` must be without {name!r}, which `{key}` sets.")
        if name not in accepted:
            raise unknown_name(argument, name, accepted)
    policy_kwargs = kwargs.get("policy_kwargs", {})
    if not isinstance(policy_kwargs, Mapping):
        raise InvalidArgumentError(
            f"`{argument}.policy_kwargs` must be a mapping of names to values, got {policy_kwargs!r}."
        )
    for name in policy_kwargs:
        check_choice(f"{argument}.policy_kwargs", name, POLICY_KWARGS)
