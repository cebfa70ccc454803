"""GRPO: what is optimised instead, where advantages are divided by the group's deviation, or responses by their length?

The methods, the tasks, the numbers below and the rule in `judge` were fixed before the ten tasks were measured, but
after trials on the task of seed 0, which is one of them.

Shapes: B episodes, T response columns, n chosen tokens, X prompts, R responses of all prompts together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from agents.advantages import group_leave_one_out, group_standardised
from agents.batch import Minibatch
from agents.exact import find_fixed_point, make_table_agent
from agents.on_policy import OnPolicyAgent
from agents.on_policy_config import GroupConfig
from agents.questions.page import make_table
from agents.questions.protocol import Found, Protocol, Verdict
from agents.questions.tasks import make_binary_tree
from agents.runs.picture_style import BLUE, GREEN, INK, MUTED, ORANGE, PURPLE, blank_figure, dress
from agents.update import Loss
from lmgym.episodes import Episodes
from lmgym.intervals import Interval
from lmgym.kl import token_rewards
from lmgym.optimum.tree import Tree

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HORIZON = 3  # where lengths are free; 2 where they are all the same
ONE_LENGTH = 2
KL_COEF = 1.0
GROUP = 4
HARD = 0.05  # how often the reference scores, at least
EASY = 0.7
MIDDLE = 0.3
TOLERANCE = 1e-5
SKY = "#56B4E9"
AT_OPTIMUM = 0.01  # of the gain: a fixed point so close to V* is V*
SAME_WEIGHT = 0.02  # weights so close are the same
OTHER_WEIGHT = 0.05  # of a weight: prompts that differ by more on average are not treated alike


@dataclass(frozen=True)
class NormConfig(GroupConfig):
    """What the advantages are divided by."""

    leave_one_out: bool = False  # the mean of the others is subtracted, not that of the whole group
    by_deviation: bool = False
    by_length: bool = False
    kl_in_reward: bool = False  # so that what is divided is the return, with the KL in it


class NormAgent(OnPolicyAgent):
    """GRPO's loss at ratio 1, but with the right gradient of the KL, that of the whole response."""

    Config = NormConfig
    config: NormConfig

    @property
    def uses_critic(self) -> bool:
        """False."""
        return False

    def rewards(self, episodes: Episodes) -> Tensor:
        """(B, T) the score at the end, and k1 where the KL is in the reward."""
        return token_rewards(episodes, self.kl.value if self.config.kl_in_reward else 0.0)

    def advantages(self, episodes: Episodes, rewards: Tensor) -> tuple[Tensor, Tensor]:
        """(B, T) scores less a mean, and over the deviation of their group on demand."""
        config = self.config
        scores = rewards.sum(1)
        if config.leave_one_out:
            found = group_leave_one_out(scores, config.group_size)
        else:
            found = group_standardised(scores, config.group_size, scale=config.by_deviation)
        return torch.where(episodes.response_mask, found.unsqueeze(1), 0.0), torch.zeros_like(rewards)

    def loss(self, batch: Minibatch) -> Loss:
        """- mean over responses of (A - kl_coef log pi(y)/pi_ref(y)) log pi(y), each over its length on demand."""
        first = batch.positions == 0
        response = first.cumsum(0) - 1
        log_ratio = (batch.log_probs - batch.ref_log_probs).detach()
        whole = log_ratio.new_zeros(int(response[-1]) + 1).index_add(0, response, log_ratio)[response]
        weights = batch.episode_weights / batch.lengths if self.config.by_length else batch.episode_weights
        kl_coef = 0.0 if self.config.kl_in_reward else self.kl.value
        return -(weights * (batch.advantages - kl_coef * whole) * batch.log_probs).sum(), {}


METHODS: dict[str, dict[str, Any]] = {
    "others' mean": {"leave_one_out": True},
    "group mean": {},
    "group mean / deviation": {"by_deviation": True},
    "group mean / length": {"by_length": True},
    "group mean / deviation / length (GRPO)": {"by_deviation": True, "by_length": True},
    "GRPO with the KL in the reward": {"by_deviation": True, "by_length": True, "kl_in_reward": True},
}
KINDS: dict[str, dict[str, Any]] = {
    "one difficulty, one length": {"success": (MIDDLE, MIDDLE), "horizon": ONE_LENGTH, "same_length": True},
    "mixed difficulty, one length": {"success": (HARD, EASY), "horizon": ONE_LENGTH, "same_length": True},
    "one difficulty, free length": {"success": (MIDDLE, MIDDLE), "horizon": HORIZON},
    "mixed difficulty, free length": {"success": (HARD, EASY), "horizon": HORIZON},
}


# -- measuring -------------------------------------------------------------------------------------------------------


def measure(seeds: Sequence[int]) -> Found:
    """Fixed points of every method on a task of every kind and seed."""
    found: dict[str, Any] = {kind: {name: [] for name in METHODS} for kind in KINDS}
    for seed in seeds:
        for kind, shape in KINDS.items():
            tree = make_binary_tree(seed, kl_coef=KL_COEF, **shape)
            for name, config in METHODS.items():
                found[kind][name].append(_end_of(tree, config))
    return {"kinds": found}


def _end_of(tree: Tree, config: Mapping[str, Any]) -> dict[str, Any]:
    """Where a method ends: the gap, the weight of each prompt's score, and lengths beside those of pi*."""
    agent = make_table_agent(NormAgent, tree, group_size=GROUP, batch_size=GROUP, **config)
    end = find_fixed_point(agent, tree, tolerance=TOLERANCE)
    optimum = tree.solve()
    own = tree.responses.add_up(end.log_probs).exp()
    best = tree.responses.add_up(tree.solve_levels().log_probs).exp()
    reference = tree.responses.add_up(tree.reference).exp()
    solved = tree.scores > 0
    lengths = tree.episodes.lengths.view(tree.scores.shape).double()
    odds = [((p * solved).sum(1) / (p * ~solved).sum(1)).log() for p in (own, reference)]
    return {
        "gap": end.gap / (optimum.value - optimum.reference),
        "converged": end.converged,
        "weights": (KL_COEF * (odds[0] - odds[1])).tolist(),
        "success": [(p * solved).sum(1).tolist() for p in (reference, own, best)],
        "length": ((own - best) * lengths).sum(1).mean().item(),
        "wrong_length": (_mean_length(own * ~solved, lengths) - _mean_length(best * ~solved, lengths)).mean().item(),
    }


def _mean_length(mass: Tensor, lengths: Tensor) -> Tensor:
    """(X,) of the responses that have some mass."""
    return (mass * lengths).sum(1) / mass.sum(1)


# -- judging ---------------------------------------------------------------------------------------------------------


def judge(found: Found) -> Verdict:
    """The rule: a sign counts where the 95 % interval over tasks has it, and a fixed point is pi* within 1 %."""
    right = [name for name in METHODS if all(max(_column(found, kind, name, "gap")) < AT_OPTIMUM for kind in KINDS)]
    one = "one difficulty, one length"
    mixed = "mixed difficulty, one length"
    shrunk = _weights(found, mixed, "group mean")
    is_shrunk = bool(np.abs(shrunk - (GROUP - 1) / GROUP).max() < SAME_WEIGHT)
    scaled = _weights(found, mixed, "group mean / deviation")
    is_raised = bool(scaled.min() > 1)
    spread = np.log(scaled[:, 0] / scaled[:, 1])
    over_length = [_column(found, one, name, "gap") for name in ("group mean", "group mean / length")]
    is_idle = bool(np.abs(np.array(over_length[0]) - np.array(over_length[1])).max() < AT_OPTIMUM)
    length = _sign(_lengthening(found, "length"))
    wrong = _sign(_lengthening(found, "wrong_length"))
    favoured = _sign(spread) if abs(spread.mean()) > OTHER_WEIGHT else 0
    claims = (
        f"The fixed point is pi\\* on all tasks with {_join(right)}, and with no other.",
        f"The group mean, the response itself included, weighs every score by (G - 1) / G: {_said(is_shrunk)}.",
        f"The deviation weighs every prompt's score by more than 1, as a smaller `kl_coef` would: {_said(is_raised)}.",
        f"By the deviation, the weight is larger for {_favoured(favoured)}.",
        f"Where all responses have one length, dividing by it changes nothing: {_said(is_idle)}.",
        f"Where lengths are free, dividing by them makes responses {_longer(length)}.",
        f"It makes the wrong responses {_longer(wrong)}.",
    )
    return Verdict(f"The fixed point is pi\\* with {_join(right)}, and with nothing else.", claims)


def _column(found: Found, kind: str, name: str, key: str) -> list[float]:
    return [end[key] for end in found["kinds"][kind][name]]


def _weights(found: Found, kind: str, name: str) -> Any:
    """(seeds, 2) of the first prompt, which is the hard one where they differ, and of the second."""
    return np.array([end["weights"] for end in found["kinds"][kind][name]])


def _sign(numbers: Any) -> int:
    interval = Interval.of(torch.tensor(numbers))
    return int(interval.low > 0) - int(interval.high < 0)


def _said(holds: bool) -> str:
    return "yes" if holds else "no"


def _lengthening(found: Found, key: str) -> Any:
    """(seeds,) tokens by which dividing by the length makes responses longer."""
    kind = "one difficulty, free length"
    lengths = [_column(found, kind, name, key) for name in ("group mean / length", "group mean")]
    return np.array(lengths[0]) - np.array(lengths[1])


def _longer(sign: int) -> str:
    return {1: "longer", -1: "shorter", 0: "neither longer nor shorter"}[sign]


def _favoured(sign: int) -> str:
    return {1: "the hard prompt", -1: "the easy prompt", 0: "neither prompt"}[sign]


def _join(names: Sequence[str]) -> str:
    if not names:
        return "none"
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]


# -- showing ---------------------------------------------------------------------------------------------------------


def texts(found: Found) -> dict[str, str]:
    """The tables and the numbers of the page."""
    gaps = [[name, *[_percent(_column(found, kind, name, "gap")) for kind in KINDS]] for name in METHODS]
    rows = []
    for name in METHODS:
        weights = _weights(found, "mixed difficulty, one length", name)
        lengths = [
            _number(_column(found, "one difficulty, free length", name, key)) for key in ("length", "wrong_length")
        ]
        rows.append([name, _number(weights[:, 0]), _number(weights[:, 1]), *lengths])
    success = np.array(_column(found, "mixed difficulty, one length", "others' mean", "success")).mean(0)
    return {
        "gaps": make_table(["advantages: scores less the", *KINDS], gaps),
        "weights": make_table(
            ["advantages: scores less the", "weight, hard prompt", "weight, easy prompt", "length", "length, wrong"],
            rows,
        ),
        "hard": f"{success[0][0]:.2f}",
        "easy": f"{success[0][1]:.2f}",
        "group": str(GROUP),
        "kl_coef": f"{KL_COEF:g}",
        "horizon": str(HORIZON),
        "one_length": str(ONE_LENGTH),
        "at_optimum": f"{AT_OPTIMUM:.0%}",
    }


def _percent(numbers: Sequence[float]) -> str:
    interval = Interval.of(torch.tensor(numbers))
    if max(numbers) < AT_OPTIMUM / 10:
        return "0.0 %"
    return f"{100 * interval.mean:.1f} % [{100 * interval.low:.1f}, {100 * interval.high:.1f}]"


def _number(numbers: Any) -> str:
    interval = Interval.of(torch.tensor(numbers))
    text = f"{interval.mean:.2f} [{interval.low:.2f}, {interval.high:.2f}]"
    return text.replace("-0.00", "0.00")


def draw(found: Found) -> dict[str, Figure]:
    """Success of the fixed points by that of the reference; and the gap, kind by kind."""
    figure = blank_figure(10.5, 4.4)
    axes = figure.subplots(1, 2)
    dress(axes[0], "weight of the score at the fixed point", label="how often the policy scores there")
    colors = (BLUE, MUTED, ORANGE, GREEN, PURPLE, SKY)
    for (name, color), marker in zip(zip(METHODS, colors, strict=True), "osD^vP", strict=True):
        for kind in ("one difficulty, one length", "mixed difficulty, one length"):
            success = np.array(_column(found, kind, name, "success"))[:, 1].flatten()
            axes[0].plot(success, _weights(found, kind, name).flatten(), marker, color=color, markersize=4, alpha=0.6)
        axes[0].plot([], [], marker, color=color, label=name)
    axes[0].axhline(1, color=INK, linewidth=0.8)
    dress(axes[1], "gap to V* at the fixed point, percent of the gain")
    heights = np.arange(len(KINDS))[::-1]
    for i, (name, color) in enumerate(zip(METHODS, colors, strict=True)):
        means = [100 * np.mean(_column(found, kind, name, "gap")) for kind in KINDS]
        axes[1].barh(heights + 0.35 - 0.14 * i, means, height=0.13, color=color)
    axes[1].set_yticks(heights, [kind.replace(", ", ",\n") for kind in KINDS], color=INK)
    figure.legend(
        *axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False, fontsize=9.5
    )
    return {"weights": figure}


PROTOCOL = Protocol(
    title="GRPO: what does dividing by the deviation and by the length optimise instead?",
    seeds=range(10),
    measure=measure,
    judge=judge,
    texts=texts,
    draw=draw,
)
