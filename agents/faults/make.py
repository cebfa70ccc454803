"""The faults that a config asks for."""

from __future__ import annotations

from collections.abc import Iterator

from agents.faults.config import FaultConfig
from agents.faults.critic import CriticValues
from agents.faults.drift import ReferenceDrift
from agents.faults.fault import Fault, Faults, Learner
from agents.faults.length_bias import LengthBias
from agents.faults.mismatch import SamplerMismatch
from agents.faults.noise import RewardNoise
from agents.faults.overlong import OverlongFilter
from agents.faults.staleness import Staleness


def add_faults(agent: Learner, config: FaultConfig, seed: int = 0) -> None:
    """Makes an agent wrong on purpose, before its first batch and before it is loaded.

    Args:
        agent: that learns from its own episodes. config: the knobs. seed: of what is random in them.

    Raises:
        InvalidArgumentError: for an agent that cannot be wrong like this.
    """
    faults = Faults(list(_make(config, seed)))
    faults.attach(agent)
    agent.faults = faults


def _make(config: FaultConfig, seed: int) -> Iterator[Fault]:
    """Yields the faults that are on, in the order in which they step in."""
    if config.staleness:
        yield Staleness(config.staleness)
    if config.sampler_mismatch is not None:
        yield SamplerMismatch(config.sampler_mismatch)
    if config.critic_values is not None:
        yield CriticValues(config.critic_values, seed)
    if config.reference_drift is not None:
        yield ReferenceDrift(config.reference_drift)
    if config.reward_noise:
        yield RewardNoise(config.reward_noise, seed)
    if config.length_bias:
        yield LengthBias(config.length_bias)
    if config.overlong is not None:
        yield OverlongFilter()
