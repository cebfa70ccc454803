"""PPO's details: which of them matter, and do they still matter at a better learning rate?

Fixed before the ten seeds were run: the tasks, the details, the numbers below, and the rule in `judge`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from agents.algorithms.ppo import PPO, PPOConfig
from agents.many_seeds import ManySeeds
from agents.questions.page import make_table
from agents.questions.protocol import Found, Protocol, Verdict
from agents.runs.picture_style import BLUE, INK, MUTED, ORANGE, blank_figure, dress, legend_below
from lmgym.envs.vector import RLHFVectorEnv
from lmgym.intervals import Interval
from lmgym.optimum.tree import Tree, make_episode_logits
from lmgym.tasks import make_task

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BUDGETS = {"echo-2": 3000, "brackets-1": 3000}  # env steps
RATES = (3e-3, 1e-2)
BASE: dict[str, Any] = {"width": 32, "layers": 1, "batch_size": 64, "minibatches": 2, "epochs": 2}
MATTERS = 0.05  # of the gain


@dataclass(frozen=True)
class Detail:
    """One choice that is made in another way than in the base.

    Attributes:
        agent, env: keys and values. kl_target: whether the adaptive coefficient aims at the KL of pi*.
        value_head: what the value of every state is at first: 0, that of the reference, or random.
    """

    agent: dict[str, Any] = field(default_factory=dict)
    env: dict[str, Any] = field(default_factory=dict)
    kl_target: bool = False
    value_head: str = "zero"


DETAILS = {
    "base": Detail(),
    "no whitening of advantages": Detail({"whiten_advantages": "none"}),
    "rewards scaled by their deviation": Detail({"whiten_rewards": True}),
    "no clip of the ratio": Detail({"clip_range": 1e6}),
    "clip of the ratio at 0.05": Detail({"clip_range": 0.05}),
    "no clip of the value": Detail({"clip_range_value": None}),
    "value starts at J of the reference": Detail(value_head="reference"),
    "value starts at random": Detail(value_head="random"),
    "value loss weighs 0.1": Detail({"vf_coef": 0.1}),
    "lambda 1": Detail({"gae_lambda": 1.0}),
    "1 epoch": Detail({"epochs": 1}),
    "4 epochs": Detail({"epochs": 4}),
    "adaptive KL": Detail({"kl_controller": "adaptive", "kl_horizon": 640.0}, kl_target=True),
    "KL with the last token": Detail(env={"dense_kl": False}),
    "penalty without an EOS": Detail(env={"missing_eos_penalty": 1.0}),
    "length limit is no end": Detail(env={"truncate": True}),
    "entropy bonus of 0.01": Detail({"entropy_coef": 0.01}),
    "mean over episodes": Detail({"loss_mean": "episode"}),
    "no clip of the gradient": Detail({"max_grad_norm": 0.0}),
    "constant learning rate": Detail({"lr_schedule": "constant"}),
}
OTHERS = [name for name in DETAILS if name != "base"]


# -- measuring -------------------------------------------------------------------------------------------------------


def measure(seeds: Sequence[int]) -> Found:
    """The normalised return at the end of every run: of each task, rate and detail, one a seed."""
    found: dict[str, Any] = {}
    for name in BUDGETS:
        tree = Tree.of(make_task(name), "train")
        found[name] = {}
        for rate in RATES:
            runs = {detail: run(tree, choice, rate, seeds) for detail, choice in DETAILS.items()}
            found[name][f"{rate:g}"] = runs
    return {"tasks": found}


def run(tree: Tree, detail: Detail, rate: float, seeds: Sequence[int]) -> list[float]:
    """A run of each seed, all at once; (J - J(reference)) / (V* - J(reference)) of each, exact."""
    optimum = tree.solve()
    numbers = {**BASE, "lr": rate, **detail.agent}
    if detail.kl_target:
        numbers["kl_target"] = optimum_kl(tree)
    config = PPOConfig(**numbers)
    agents = [PPO(_make_envs(tree, config, detail), config, seed=seed) for seed in seeds]
    for agent, seed in zip(agents, seeds, strict=True):
        head = agent.policy.value_head
        assert isinstance(head, nn.Linear)
        set_value_head(head, detail.value_head, optimum.reference, seed)
    ManySeeds(agents).learn(BUDGETS[tree.task.name], {agent: lambda steps, metrics: True for agent in agents})
    values = [tree.evaluate(make_episode_logits(agent.policy)).value for agent in agents]
    return [(value - optimum.reference) / (optimum.value - optimum.reference) for value in values]


def optimum_kl(tree: Tree) -> float:
    """KL of pi* to the reference, nats an episode."""
    log_probs = tree.responses.add_up(tree.solve_levels().log_probs)
    return ((log_probs.exp() * (log_probs - tree.responses.add_up(tree.reference))).sum() / len(tree.prompts)).item()


def _make_envs(tree: Tree, config: PPOConfig, detail: Detail) -> RLHFVectorEnv:
    return RLHFVectorEnv(
        config.num_envs, autoreset_mode="SameStep", task=tree.task, split="train", device="cpu", **detail.env
    )


@torch.no_grad()
def set_value_head(head: nn.Linear, start: str, reference: float, seed: int) -> None:
    """Has the value of every state start as a detail says (`Detail.value_head`)."""
    if start == "reference":
        head.bias.fill_(reference)
    elif start == "random":  # as layers of PyTorch start
        width = head.weight.shape[1]
        generator = torch.Generator().manual_seed(seed)
        head.weight.copy_((2 * torch.rand(head.weight.shape, generator=generator) - 1) / width**0.5)


# -- judging ---------------------------------------------------------------------------------------------------------


def judge(found: Found) -> Verdict:
    """The rule: an effect matters where its 95 % interval over seeds has one sign and its mean is above `MATTERS`."""
    signs = {name: [_sign(_effect(found, *case, name)) for case in _cases()] for name in OTHERS}
    helps = [name for name, each in signs.items() if max(each) > 0 and min(each) >= 0]
    harms = [name for name, each in signs.items() if min(each) < 0 and max(each) <= 0]
    both = [name for name, each in signs.items() if min(each) < 0 < max(each)]
    idle = [name for name, each in signs.items() if not any(each)]
    always = [name for name, each in signs.items() if len(set(each)) == 1 and any(each)]
    tuned = {name: [_sign(_tuned_effect(found, task, name)) for task in BUDGETS] for name in OTHERS}
    left = [name for name, each in tuned.items() if any(each)]
    rate = {task: _runs(found, task, RATES[1], "base") - _runs(found, task, RATES[0], "base") for task in BUDGETS}
    more = [name for name in OTHERS if all(_is_more(found, task, name, rate[task]) for task in BUDGETS)]
    claims = (
        f"Helps in some case and harms in none: {_join(helps)}.",
        f"Harms in some case and helps in none: {_join(harms)}.",
        f"Helps in one case and harms in another: {_join(both)}.",
        f"Matters in no case: {_join(idle)}.",
        f"Matters in every case, with one sign: {_join(always)}.",
        f"Where each has the better of both rates, these still matter on some task: {_join(left)}.",
        f"At the smaller rate, on every task more than the larger rate changes: {_join(more)}.",
    )
    short = f"Matters in every case, with one sign: {_join(always)}."
    return Verdict(short, claims)


def _cases() -> list[tuple[str, float]]:
    return [(task, rate) for task in BUDGETS for rate in RATES]


def _runs(found: Found, task: str, rate: float, name: str) -> Any:
    """(seeds,) normalised returns."""
    return np.array(found["tasks"][task][f"{rate:g}"][name])


def _effect(found: Found, task: str, rate: float, name: str) -> Any:
    """(seeds,) the normalised return less that of the base with the same seed."""
    return _runs(found, task, rate, name) - _runs(found, task, rate, "base")


def _tuned_effect(found: Found, task: str, name: str) -> Any:
    """The same where each of both is at the rate that has the better mean."""
    best = []
    for each in (name, "base"):
        best.append(max((_runs(found, task, rate, each) for rate in RATES), key=lambda runs: float(runs.mean())))
    return best[0] - best[1]


def _is_more(found: Found, task: str, name: str, rate: Any) -> bool:
    return bool(abs(_effect(found, task, RATES[0], name).mean()) > abs(rate.mean()))


def _sign(numbers: Any) -> int:
    if abs(numbers.mean()) < MATTERS:
        return 0
    interval = Interval.of(torch.tensor(numbers))
    return int(interval.low > 0) - int(interval.high < 0)


def _join(names: Sequence[str]) -> str:
    return "; ".join(f"*{name}*" for name in names) if names else "none"


# -- showing ---------------------------------------------------------------------------------------------------------


def texts(found: Found) -> dict[str, str]:
    """The tables and the numbers of the page."""
    heads = [f"`{task}`, {rate:g}" for task, rate in _cases()]
    bases = [_interval(_runs(found, *case, "base")) for case in _cases()]
    rows = [[name, *[_marked(_effect(found, *case, name)) for case in _cases()]] for name in OTHERS]
    tuned = [[name, *[_marked(_tuned_effect(found, task, name)) for task in BUDGETS]] for name in OTHERS]
    return {
        "effects": make_table(["detail", *heads], [["the base itself", *bases], *rows]),
        "tuned": make_table(["detail", *[f"`{task}`" for task in BUDGETS]], tuned),
        "budgets": ", ".join(f"{steps:,} on `{task}`" for task, steps in BUDGETS.items()),
        "batch": str(BASE["batch_size"]),
        "epochs": str(BASE["epochs"]),
        "minibatches": str(BASE["minibatches"]),
        "low": f"{RATES[0]:g}",
        "high": f"{RATES[1]:g}",
        "matters": f"{MATTERS:g}",
    }


def _interval(numbers: Any) -> str:
    interval = Interval.of(torch.tensor(numbers))
    return f"{interval.mean:.2f} [{interval.low:.2f}, {interval.high:.2f}]"


def _marked(numbers: Any) -> str:
    """An effect; bold where it matters."""
    interval = Interval.of(torch.tensor(numbers))
    text = f"{interval.mean:+.2f} [{interval.low:+.2f}, {interval.high:+.2f}]"
    return f"**{text}**" if _sign(numbers) else text


def draw(found: Found) -> dict[str, Figure]:
    """The effect of each detail, at both rates."""
    figure = blank_figure(10.5, 6.0)
    axes = figure.subplots(1, len(BUDGETS), sharey=True)
    heights = np.arange(len(OTHERS))[::-1]
    for each, task in zip(axes, BUDGETS, strict=True):
        dress(each, f"{task}: normalised return, less that of the base")
        each.axvline(0, color=INK, linewidth=0.8)
        each.axvspan(-MATTERS, MATTERS, color=MUTED, alpha=0.15)
        for rate, color, shift in zip(RATES, (BLUE, ORANGE), (0.14, -0.14), strict=True):
            intervals = [Interval.of(torch.tensor(_effect(found, task, rate, name))) for name in OTHERS]
            means = [interval.mean for interval in intervals]
            sides = [interval.high - interval.mean for interval in intervals]
            each.errorbar(
                means, heights + shift, xerr=sides, fmt="o", markersize=4, color=color, label=f"learning rate {rate:g}"
            )
    axes[0].set_yticks(heights, OTHERS, color=INK)
    legend_below(figure, axes[0], 2)
    return {"effects": figure}


PROTOCOL = Protocol(
    title="What matters in PPO: which details, and only at a poor learning rate?",
    seeds=range(10),
    measure=measure,
    judge=judge,
    texts=texts,
    draw=draw,
)
