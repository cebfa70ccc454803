"""The protocol of what makes a run wrong on purpose: where in the loop a fault may step in, and what it must say.

No agent knows of faults, and no fault knows of agents: they meet in the loop of `agents.on_policy`, which asks the
faults at every point named here. Without faults each of these is the identity.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, Literal, Protocol

from agents.batch import Batch
from agents.policies.actor_critic import TrainablePolicy
from lmgym.envs.vector import RLHFVectorEnv
from lmgym.episodes import Episodes
from lmgym.models.sampling import Sampler

# The checks of the loop that a fault must trip: "start" says that the first batch is of the reference, "ratio" that an
# update starts from the log-probs of what sampled. A fault that trips "ratio" has its batches checked when they are
# sampled, against what did sample them: a mistake that nobody has asked for is found as before.
Check = Literal["start", "ratio"]


class Learner(Protocol):
    """What a fault may look at of an agent."""

    envs: RLHFVectorEnv
    policy: TrainablePolicy
    sampler: Sampler
    config: Any
    faults: Faults

    @property
    def uses_critic(self) -> bool:
        """Whether values are learned."""


class Fault:
    """One way to be wrong. A fault overrides the points of the loop that it spoils.

    Attributes:
        key: the knob, as it is called in the config of a run.
        trips: the checks that it must trip; all others hold.
        metrics: of the last batch, for the curves of the run.
    """

    key: ClassVar[str]
    trips: ClassVar[frozenset[Check]] = frozenset()

    def __init__(self) -> None:
        self.metrics: dict[str, float] = {}

    def attach(self, learner: Learner) -> None:
        """Takes up the agent that it is to spoil, before the first batch.

        Raises:
            InvalidArgumentError: for one that cannot be spoiled like this.
        """
        self.learner = learner

    def change_sampler(self, sampler: Sampler) -> Sampler:
        """What tokens are drawn with, instead of the agent's own sampler."""
        return sampler

    def sampling(self) -> contextlib.AbstractContextManager[None]:
        """The block in which a batch is sampled."""
        return contextlib.nullcontext()

    def choose(self, sample: Callable[[], Episodes]) -> Episodes:
        """The batch that is learned from next; `sample` gives one of the policy as it is."""
        return sample()

    def tell(self, episodes: Episodes) -> Episodes:
        """What the learner is told of a batch: its scores, its reference."""
        return episodes

    def judge(self, episodes: Episodes) -> Episodes:
        """The same with the values (B, T) that advantages are computed from."""
        return episodes

    def filter(self, batch: Batch) -> Batch:
        """What the update sees of a batch with its advantages."""
        return batch

    def finish_update(self) -> None:
        """Is told that a batch has been learned from."""

    def state(self) -> dict[str, Any]:
        """What changes from batch to batch: tensors on the CPU, and JSON values."""
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Takes up what `state` gave."""


class Faults:
    """All faults of a run, in the order in which they step in. The methods are those of `Fault`."""

    def __init__(self, faults: Sequence[Fault] = ()) -> None:
        self._faults = tuple(faults)
        self._tripped = frozenset(check for fault in faults for check in fault.trips)

    def __len__(self) -> int:
        return len(self._faults)

    def attach(self, learner: Learner) -> None:
        for fault in self._faults:
            fault.attach(learner)

    def trips(self, check: Check) -> bool:
        """Whether one of them must trip a check."""
        return check in self._tripped

    @property
    def metrics(self) -> dict[str, float]:
        """Of the last batch."""
        return {name: value for fault in self._faults for name, value in fault.metrics.items()}

    def change_sampler(self, sampler: Sampler) -> Sampler:
        for fault in self._faults:
            sampler = fault.change_sampler(sampler)
        return sampler

    def sampling(self) -> contextlib.AbstractContextManager[Any]:
        blocks = contextlib.ExitStack()
        for fault in self._faults:
            blocks.enter_context(fault.sampling())
        return blocks

    def choose(self, sample: Callable[[], Episodes]) -> Episodes:
        for fault in self._faults:
            sample = partial(fault.choose, sample)
        return sample()

    def tell(self, episodes: Episodes) -> Episodes:
        for fault in self._faults:
            episodes = fault.tell(episodes)
        return episodes

    def judge(self, episodes: Episodes) -> Episodes:
        for fault in self._faults:
            episodes = fault.judge(episodes)
        return episodes

    def filter(self, batch: Batch) -> Batch:
        for fault in self._faults:
            batch = fault.filter(batch)
        return batch

    def finish_update(self) -> None:
        for fault in self._faults:
            fault.finish_update()

    def state(self) -> dict[str, Any]:
        """What `restore` takes up, flat: `staleness.0.scores`."""
        return {f"{fault.key}.{name}": x for fault in self._faults for name, x in fault.state().items()}

    def restore(self, state: Mapping[str, Any]) -> None:
        for fault in self._faults:
            start = f"{fault.key}."
            fault.restore({name.removeprefix(start): x for name, x in state.items() if name.startswith(start)})
