"""Best-of-n: is log n - (n - 1) / n its KL, and is it as good as pi* at the same KL?

Fixed before the ten tasks were measured: the tasks, the numbers below, and the rule in `judge`.

Shapes: R responses to a prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from agents.algorithms.best_of_n import best_of_n_log_probs, kl_bound
from agents.questions.page import make_table
from agents.questions.protocol import Found, Protocol, Verdict
from agents.questions.tasks import make_binary_tree, make_random_tree
from agents.runs.picture_style import BLUE, GREEN, INK, ORANGE, blank_figure, dress, legend_below
from lmgym.intervals import Interval
from lmgym.optimum.tree import Tree

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CANDIDATES = (2, 4, 8, 16)
FEW = 3  # tokens at most: 15 responses to a prompt
MANY = 7  # 255
SUCCESS = 0.3  # how often the reference has a score of 1, at least, where scores are 0 and 1
EXACT = 1e-6  # of the gain, and nats
CLOSE = 0.01  # of the bound: a KL so close is the bound
AS_GOOD = 0.95  # of the gain of pi*

KINDS: dict[str, Callable[[int], Tree]] = {
    "two scores": lambda seed: make_binary_tree(seed, (SUCCESS, SUCCESS), horizon=FEW, kl_coef=1.0),
    "few responses, no ties": lambda seed: make_random_tree(seed, horizon=FEW, kl_coef=1.0),
    "many responses, no ties": lambda seed: make_random_tree(seed, horizon=MANY, kl_coef=1.0),
}


# -- measuring -------------------------------------------------------------------------------------------------------


def measure(seeds: Sequence[int]) -> Found:
    """The KL of the best of n, and its gain over that of pi* at the same KL, for the first prompt of each task."""
    found: dict[str, Any] = {kind: {str(n): [] for n in CANDIDATES} for kind in KINDS}
    for seed in seeds:
        for kind, make in KINDS.items():
            tree = make(seed)
            reference = tree.responses.add_up(tree.reference)[0]
            scores = tree.scores[0].double()
            for n in CANDIDATES:
                found[kind][str(n)].append(_compare(reference, scores, n))
    return {"kinds": found}


def _compare(reference: Tensor, scores: Tensor, n: int) -> dict[str, float]:
    """Of (R,) log-probs of the reference and (R,) scores."""
    best = best_of_n_log_probs(reference, scores, n)
    kl = divergence(best, reference)
    start = (reference.exp() * scores).sum()
    gain = (best.exp() * scores).sum() - start
    most = (tilt(reference, scores, kl).exp() * scores).sum() - start
    return {"kl": kl, "share": (gain / most).item()}


def divergence(log_probs: Tensor, reference: Tensor) -> float:
    """KL of (R,) log-probs to the reference, nats."""
    return (log_probs.exp() * (log_probs - reference)).sum().item()


def tilt(reference: Tensor, scores: Tensor, kl: float) -> Tensor:
    """(R,) log-probs of the policy with the highest score at a KL: pi* of the `kl_coef` that has it, by bisection."""
    low = 0.0
    high = 1e3
    for _ in range(200):
        middle = (low + high) / 2
        found = (reference + middle * scores).log_softmax(-1)
        if divergence(found, reference) < kl:
            low = middle
        else:
            high = middle
    return found


# -- judging ---------------------------------------------------------------------------------------------------------


def judge(found: Found) -> Verdict:
    """The rule: a bound or an equality has to hold on every task and at every n; other numbers are means over tasks."""
    shares = {kind: np.array([_shares_of_bound(found, kind, n) for n in CANDIDATES]) for kind in KINDS}
    is_bound = all((share <= 1 + EXACT).all() for share in shares.values())
    equal = [kind for kind, share in shares.items() if (share > 1 - CLOSE).all()]
    gains = {kind: np.array([_column(found, kind, n, "share") for n in CANDIDATES]) for kind in KINDS}
    never_more = all((gain <= 1 + EXACT).all() for gain in gains.values())
    same = [kind for kind, gain in gains.items() if (abs(gain - 1) < EXACT).all()]
    good = [kind for kind, gain in gains.items() if (gain.mean(1) >= AS_GOOD).all()]
    order = sorted(KINDS, key=lambda kind: float(shares[kind][-1].mean()))
    claims = (
        f"The KL is never above log n - (n - 1) / n: {_said(is_bound)}.",
        f"It is equal to it, within {CLOSE:.0%}, with {_join(equal)}.",
        f"At n = {CANDIDATES[-1]} it is furthest below with {order[0]}, and nearest with {order[-1]}.",
        f"Best-of-n never gains more than pi\\* at the same KL: {_said(never_more)}.",
        f"It is as good as pi\\* on every task and at every n with {_join(same)}.",
        f"It has {AS_GOOD:.0%} of the gain of pi\\* or more, on average at every n, with {_join(good)}.",
    )
    short = (
        f"log n - (n - 1) / n is a bound: {_said(is_bound)}; the KL itself with {_join(equal)}. At equal KL, best-of-n "
        f"is pi\\* with {_join(same)}."
    )
    return Verdict(short, claims)


def _column(found: Found, kind: str, n: int, key: str) -> list[float]:
    return [numbers[key] for numbers in found["kinds"][kind][str(n)]]


def _shares_of_bound(found: Found, kind: str, n: int) -> Any:
    """(seeds,) the KL over the bound."""
    return np.array(_column(found, kind, n, "kl")) / kl_bound(n)


def _said(holds: bool) -> str:
    return "yes" if holds else "no"


def _join(names: Sequence[str]) -> str:
    if not names:
        return "no kind of task"
    return names[0] if len(names) == 1 else "; ".join(names[:-1]) + " and " + names[-1]


# -- showing ---------------------------------------------------------------------------------------------------------


def texts(found: Found) -> dict[str, str]:
    """The tables and the numbers of the page."""
    heads = [f"n = {n}" for n in CANDIDATES]
    bounds = ["log n - (n - 1) / n, nats", *[f"{kl_bound(n):.3f}" for n in CANDIDATES]]
    kls = [[kind, *[_interval(_shares_of_bound(found, kind, n)) for n in CANDIDATES]] for kind in KINDS]
    gains = [[kind, *[_interval(_column(found, kind, n, "share")) for n in CANDIDATES]] for kind in KINDS]
    return {
        "kls": make_table(["KL over the bound", *heads], [*kls, bounds]),
        "gains": make_table(["gain over that of pi\\*", *heads], gains),
        "few": str(2 ** (FEW + 1) - 1),
        "many": str(2 ** (MANY + 1) - 1),
        "success": f"{SUCCESS:g}",
        "close": f"{CLOSE:.0%}",
    }


def _interval(numbers: Any) -> str:
    """Mean and 95 % interval over tasks."""
    interval = Interval.of(torch.tensor(numbers))
    return f"{interval.mean:.3f} [{interval.low:.3f}, {interval.high:.3f}]"


def draw(found: Found) -> dict[str, Figure]:
    """The KL over the bound, and the gain over that of pi*, a dot a task."""
    figure = blank_figure(10.5, 4.2)
    axes = figure.subplots(1, 2)
    dress(axes[0], "KL of best-of-n over log n - (n - 1) / n", label="n")
    dress(axes[1], "gain in score over that of pi* at the same KL", label="n")
    for kind, color in zip(KINDS, (ORANGE, GREEN, BLUE), strict=True):
        numbers = [_shares_of_bound(found, kind, n) for n in CANDIDATES]
        gains = [np.array(_column(found, kind, n, "share")) for n in CANDIDATES]
        for each, rows in zip(axes, (numbers, gains), strict=True):
            for n, row in zip(CANDIDATES, rows, strict=True):
                each.plot(np.full(len(row), n), row, ".", color=color, alpha=0.4)
            each.plot(CANDIDATES, [row.mean() for row in rows], color=color, label=kind)
    for each in axes:
        each.set_xscale("log", base=2)
        each.set_xticks(CANDIDATES, [str(n) for n in CANDIDATES])
        each.axhline(1, color=INK, linewidth=0.8)
    legend_below(figure, axes[0], 3)
    return {"kl": figure}


PROTOCOL = Protocol(
    title="Best-of-n: what is its KL, and does it have the best score at that KL?",
    seeds=range(10),
    measure=measure,
    judge=judge,
    texts=texts,
    draw=draw,
)
