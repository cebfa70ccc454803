"""DPO or PPO: what do the pairs have to cover, what does noise cost, and does it matter that chosen responses fall?

Fixed before the ten tasks were measured: the tasks, the numbers below, and the rule in `judge`.

Shapes: C tasks, R responses to a prompt, S states, A tokens, N pairs, F features.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from agents.algorithms.dpo import dpo_loss
from agents.algorithms.ipo import TAU, ipo_loss
from agents.algorithms.ppo import PPO
from agents.exact import make_table_agent
from agents.exact.updates import policy_logits
from agents.questions.page import make_table
from agents.questions.protocol import Found, Protocol, Verdict
from agents.questions.tasks import make_random_tree, score_anew
from agents.runs.picture_style import BLUE, GREEN, INK, ORANGE, PURPLE, blank_figure, dress, legend_below
from lmgym.intervals import Interval
from lmgym.optimum.tree import Tree

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HORIZON = 3  # 15 responses to a prompt
KL_COEF = 0.2
TEMPERATURE = 0.2  # of the labels
BETA = KL_COEF / TEMPERATURE  # with which DPO has pi* for its optimum
LIKELIHOOD = 0.2  # weight of -log pi(chosen) beside the loss of DPO
PENALTY = 5.0  # lambda of DPOP
LABELS = (64, 256, 1024)
FEW = LABELS[0]
SOME = LABELS[1]
MANY = LABELS[2]
NOISE = (0.0, 0.1, 0.2, 0.4)  # share of labels that are turned round
NOISY = 0.2
HELD_OUT = 2  # one label more for every two
ROUNDS = 4
STEPS = 400  # of Adam on all labels
LR = 0.05
LONG_STEPS = 1500  # under all labels, over which the rate falls to 0
EXACT = 0.01  # of the gain
PPO_NUMBERS: dict[str, Any] = {"batch_size": 64, "minibatches": 2, "epochs": 2, "gae_lambda": 1.0, "lr": 0.05}
PPO_TOKENS = 10_000
SAMPLED = 0.05  # of the gain: a sampled run so close to the fixed point is there

DATA = ("reference", "mixture", "pi\\*")
OWN = "its own, in rounds"
LOSSES = ("DPO", "IPO", "DPO + likelihood", "DPOP")
LEARNERS = {"DPO": "any", "DPO + likelihood": "any", "PPO": "any", "DPO, simple": "simple", "PPO, simple": "simple"}


# -- tasks -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tasks:
    """C tasks.

    Attributes:
        trees: C. table: (C, S, A) log-probs of the reference. tokens: (R, S * A), which a response has.
        reference: (C, R) log-probs. scores: (C, R). features: (R, F).
    """

    trees: list[Tree]
    table: Tensor
    tokens: Tensor
    reference: Tensor
    scores: Tensor
    features: Tensor

    @property
    def optimum(self) -> Tensor:
        """(C, R) log-probs of pi*."""
        return (self.reference + self.scores / KL_COEF).log_softmax(-1)

    def value(self, log_probs: Tensor) -> Tensor:
        """(C,) J of policies (C, R)."""
        return (log_probs.exp() * (self.scores - KL_COEF * (log_probs - self.reference))).sum(-1)

    def gap(self, log_probs: Tensor) -> Tensor:
        """(C,) V* - J, of the gain."""
        best = self.value(self.optimum)
        return (best - self.value(log_probs)) / (best - self.value(self.reference))


def make_tasks(seeds: Sequence[int], kind: str) -> Tasks:
    """A task for each seed: with any scores, or with scores that are a sum over tokens."""
    trees = [make_random_tree(seed, horizon=HORIZON, kl_coef=KL_COEF) for seed in seeds]
    first = trees[0]
    sizes = [level.shape[1:] for level in first.reference]
    units = torch.eye(sum(n * a for n, a in sizes), dtype=torch.float64)
    tokens = []
    for unit in units:
        parts = unit.split([n * a for n, a in sizes])
        levels = [
            part.view(1, *size).expand(len(first.prompts), *size) for part, size in zip(parts, sizes, strict=True)
        ]
        tokens.append(first.responses.add_up(levels)[0])
    count = len(tokens[0])
    ids = first.episodes.response_ids[:count]
    mask = first.episodes.response_mask[:count]
    legal = first.responses.legal
    features = torch.stack([((ids == token) & mask).sum(1) for token in legal], 1).double()
    scores = torch.stack([tree.scores[0].double() for tree in trees])
    if kind == "simple":
        sums = torch.stack([features @ torch.from_numpy(np.random.default_rng(seed).normal(size=3)) for seed in seeds])
        scores = (sums - sums.amin(1, keepdim=True)) / (sums.amax(1, keepdim=True) - sums.amin(1, keepdim=True))
    return Tasks(
        trees=trees,
        table=torch.stack([torch.cat([level[0] for level in tree.reference]) for tree in trees]),
        tokens=torch.stack(tokens, 1),
        reference=torch.stack([tree.responses.add_up(tree.reference)[0] for tree in trees]),
        scores=scores,
        features=features,
    )


# -- labels ----------------------------------------------------------------------------------------------------------


def preferences(tasks: Tasks, noise: float = 0.0) -> Tensor:
    """(C, R, R) the probability with which the first of two responses is preferred."""
    exact = torch.sigmoid((tasks.scores.unsqueeze(2) - tasks.scores.unsqueeze(1)) / TEMPERATURE)
    return (1 - noise) * exact + noise * (1 - exact)


def label_rates(tasks: Tasks, log_probs: Tensor) -> Tensor:
    """(C, R, R) how often the first is chosen and the second rejected, both from a policy (C, R)."""
    probs = log_probs.exp()
    either = 2 * probs.unsqueeze(2) * probs.unsqueeze(1)
    return either * preferences(tasks)


def draw_labels(
    tasks: Tasks, log_probs: Tensor, count: int, noise: float, generators: Sequence[torch.Generator]
) -> Tensor:
    """(C, R, R) of so many pairs of a policy (C, R), how many have the first chosen and the second rejected."""
    likes = preferences(tasks, noise)
    size = log_probs.shape[1]
    wins = torch.zeros(len(log_probs), size * size, dtype=torch.float64)
    for row, generator in enumerate(generators):
        pairs = log_probs[row].exp().multinomial(2 * count, replacement=True, generator=generator).view(2, -1)
        first = torch.rand(count, generator=generator, dtype=torch.float64) < likes[row][pairs[0], pairs[1]]
        chosen = torch.where(first, pairs[0], pairs[1])
        rejected = torch.where(first, pairs[1], pairs[0])
        wins[row].index_add_(0, chosen * size + rejected, torch.ones(count, dtype=torch.float64))
    return wins.view(likes.shape)


# -- learners --------------------------------------------------------------------------------------------------------


def pair_losses(name: str, log_ratios: Tensor) -> Tensor:
    """(C, R, R) the loss where the first is chosen and the second rejected, from log-ratios (C, R)."""
    chosen = log_ratios.unsqueeze(2)
    rejected = log_ratios.unsqueeze(1)
    if name == "IPO":
        return ipo_loss(chosen, rejected, TAU * BETA)
    if name == "DPOP":
        return dpo_loss(chosen - PENALTY * (-chosen).clamp(min=0), rejected, BETA)
    losses = dpo_loss(chosen, rejected, BETA)
    return losses - LIKELIHOOD * chosen if name == "DPO + likelihood" else losses


def fit(
    tasks: Tasks,
    learner: str,
    wins: Tensor,
    held_out: Tensor | None = None,
    steps: int = STEPS,
    *,
    falling: bool = False,
) -> tuple[Tensor, Tensor]:
    """Adam on all labels at once, from the reference on.

    Args:
        learner: of `LEARNERS` or `LOSSES`. wins: (C, R, R) labels. held_out: (C, R, R) others. falling: the rate.

    Returns:
        (C, R) log-probs of the policy with the least loss on the labels held out, and of that at the end.
    """
    is_policy = not learner.startswith("PPO")
    if is_policy:
        weights = tasks.table.clone()
    else:  # rewards: of every response, or of features
        width = tasks.features.shape[1] if learner == "PPO, simple" else tasks.reference.shape[1]
        weights = tasks.reference.new_zeros(len(tasks.reference), width)
    weights.requires_grad_()
    loss_name = learner.removesuffix(", simple") if is_policy else "DPO"
    share = wins / wins.sum((1, 2), keepdim=True)
    adam = torch.optim.Adam([weights], LR)
    least = torch.full((len(wins),), torch.inf, dtype=torch.float64)
    best = tasks.reference.clone()
    for step in range(steps + 1):
        log_probs = policy_of(tasks, learner, weights)
        losses = pair_losses(loss_name, log_probs - tasks.reference)
        if held_out is not None:
            missed = (held_out * losses.detach()).sum((1, 2))
            best = torch.where((missed < least).unsqueeze(1), log_probs.detach(), best)
            least = torch.minimum(missed, least)
        if step < steps:
            adam.param_groups[0]["lr"] = LR * (1 - step / steps) if falling else LR
            adam.zero_grad()
            (share * losses).sum().backward()
            adam.step()
    return best, log_probs.detach()


def policy_of(tasks: Tasks, learner: str, weights: Tensor) -> Tensor:
    """(C, R) log-probs: of a table of logits, or of pi* of the rewards that are learned, where PPO ends."""
    if not learner.startswith("PPO"):
        return weights.log_softmax(-1).flatten(1) @ tasks.tokens.T
    rewards = weights @ tasks.features.T if learner == "PPO, simple" else weights
    return (tasks.reference + rewards / KL_COEF).log_softmax(-1)


# -- measuring -------------------------------------------------------------------------------------------------------


def measure(seeds: Sequence[int]) -> Found:
    """Fixed points under all labels; and what learners reach with some labels."""
    kinds = {kind: make_tasks(seeds, kind) for kind in ("any", "simple")}
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    found: dict[str, Any] = {"fixed_points": _fixed_points(kinds["any"]), "learners": {}, "noise": {}}
    rewards = None
    for learner, kind in LEARNERS.items():
        tasks = kinds[kind]
        rows = found["learners"][learner] = {}
        for data in (*DATA, OWN):
            rows[data] = {str(n): _learn(tasks, learner, data, n, 0.0, generators)[0] for n in LABELS}
        noisy = found["noise"][learner] = {}
        for data in DATA:
            noisy[data] = {str(e): _learn(tasks, learner, data, MANY, e, generators)[0] for e in NOISE}
        if learner == "PPO":
            rewards = _learn(tasks, learner, "mixture", MANY, 0.0, generators)[1]
    assert rewards is not None
    return found | {"sampled": _sample_runs(kinds["any"], rewards, seeds)}


def _distributions(tasks: Tasks) -> dict[str, Tensor]:
    """(C, R) log-probs of what pairs are drawn from."""
    both = torch.logaddexp(tasks.reference, tasks.optimum) - np.log(2)
    return dict(zip(DATA, (tasks.reference, both, tasks.optimum), strict=True))


def _fixed_points(tasks: Tasks) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for data, log_probs in _distributions(tasks).items():
        labels = label_rates(tasks, log_probs)
        found[data] = {"at pi\\*": _chosen(labels, tasks.optimum - tasks.reference)}
        for name in LOSSES:
            end = fit(tasks, name, labels, steps=LONG_STEPS, falling=True)[1]
            numbers = {"gap": tasks.gap(end).tolist(), "chosen": _chosen(labels, end - tasks.reference)}
            found[data][name] = numbers
    return found


def _chosen(labels: Tensor, log_ratios: Tensor) -> list[float]:
    """(C,) the mean log-ratio of the chosen responses, nats."""
    means = (labels * log_ratios.unsqueeze(2)).sum((1, 2)) / labels.sum((1, 2))
    return [float(x) for x in means]


def _learn(
    tasks: Tasks, learner: str, data: str, count: int, noise: float, generators: Sequence[torch.Generator]
) -> tuple[dict[str, Any], Tensor]:
    """What a learner reaches with so many labels, and (C, R) its policy where it stops."""
    rounds = ROUNDS if data == OWN else 1
    policy = tasks.reference if data == OWN else _distributions(tasks)[data]
    wins = torch.zeros_like(preferences(tasks))
    held_out = torch.zeros_like(wins)
    for _ in range(rounds):
        wins = wins + draw_labels(tasks, policy, count // rounds, noise, generators)
        held_out = held_out + draw_labels(tasks, policy, count // rounds // HELD_OUT, noise, generators)
        policy, end = fit(tasks, learner, wins, held_out)
    numbers: dict[str, Any] = {}
    for name, log_probs in (("stopped", policy), ("end", end)):
        log_ratios = log_probs - tasks.reference
        numbers[name] = {"gap": tasks.gap(log_probs).tolist(), "chosen": _chosen(wins, log_ratios)}
    return numbers, policy


def _sample_runs(tasks: Tasks, policies: Tensor, seeds: Sequence[int]) -> dict[str, list[float]]:
    """PPO on the rewards whose pi* are `policies` (C, R): the gaps where runs end, and those of the fixed points."""
    ends = []
    for row, seed in enumerate(seeds):
        rewards = KL_COEF * (policies[row] - tasks.reference[row])
        tree = score_anew(tasks.trees[row], rewards - (tasks.reference[row].exp() * rewards).sum())
        agent = make_table_agent(PPO, tree, seed=seed, **PPO_NUMBERS)
        agent.learn(PPO_TOKENS)
        ends.append(tree.evaluate(policy_logits(agent)).log_probs.flatten())
    return {"run": tasks.gap(torch.stack(ends)).tolist(), "fixed_point": tasks.gap(policies).tolist()}


# -- judging ---------------------------------------------------------------------------------------------------------


def judge(found: Found) -> Verdict:
    """The rule: a fixed point is pi* where it is on every task; a difference counts where its interval has the sign.

    A few labels may lead far off on a task, so that the interval is that of the median; at pi* it is that of the mean.
    """
    points = found["fixed_points"]
    right = [name for name in LOSSES if all(max(points[data][name]["gap"]) < EXACT for data in DATA)]
    at_optimum = {data: _sign(Interval.of(torch.tensor(points[data]["at pi\\*"]))) for data in DATA}
    runs = np.abs(np.subtract(found["sampled"]["run"], found["sampled"]["fixed_point"]))
    claims = (
        f"The fixed point is pi\\*, whatever the pairs are drawn from, with {_join(right)}, and with no other loss.",
        f"At pi\\* itself the chosen responses are less likely than under the reference {_with(at_optimum, -1)}, and "
        f"more likely {_with(at_optimum, 1)}.",
        f"Past the stop, with {FEW} labels, DPO lowers the chosen responses further "
        f"{_with(_beyond(found, 'chosen'), -1)}, and its gap grows {_with(_beyond(found, 'gap'), 1)}.",
        f"The likelihood of the chosen lowers the gap of DPO with {FEW} labels {_with(_change(found, FEW), -1)}, and "
        f"raises it with {MANY} {_with(_change(found, MANY), 1)}.",
        f"With {MANY} labels, pairs from pi\\* alone leave more than pairs from the mixture with DPO: "
        f"{_said(_is_worse(found, 'DPO'))}; with PPO: {_said(_is_worse(found, 'PPO'))}.",
        f"With a reward for each response and {SOME} labels, PPO leaves less than DPO "
        f"{_with(_against(found, 'PPO', 'DPO'), -1)}, and more {_with(_against(found, 'PPO', 'DPO'), 1)}.",
        f"With a reward of the form of the score it leaves less {_with(_simple(found), -1)}, and more "
        f"{_with(_simple(found), 1)}.",
        f"With {MANY} labels, noise of {NOISY:.0%} raises the gap of DPO {_with(_harm(found, 'DPO'), 1)}, and that "
        f"of PPO {_with(_harm(found, 'PPO'), 1)}.",
        f"On every task a sampled run of PPO ends within {SAMPLED:.0%} of the fixed point: "
        f"{_said(runs.max() < SAMPLED)}.",
    )
    short = (
        f"The fixed point is pi\\* with {_join(right)}, whatever the pairs cover, and with no other loss. There the "
        f"chosen responses have fallen {_with(at_optimum, -1)}."
    )
    return Verdict(short, claims)


def _numbers(found: Found, learner: str, data: str, count: int, when: str = "stopped", key: str = "gap") -> Any:
    return np.array(found["learners"][learner][data][str(count)][when][key])


def _beyond(found: Found, key: str) -> dict[str, int]:
    """What the steps after the stop do to DPO."""
    ends = {data: _numbers(found, "DPO", data, FEW, "end", key) for data in DATA}
    return {data: _sign(around(end - _numbers(found, "DPO", data, FEW, "stopped", key))) for data, end in ends.items()}


def _change(found: Found, count: int) -> dict[str, int]:
    return _against(found, "DPO + likelihood", "DPO", count)


def _is_worse(found: Found, learner: str) -> bool:
    gaps = [_numbers(found, learner, data, MANY) for data in ("pi\\*", "mixture")]
    return _sign(around(gaps[0] - gaps[1])) > 0


def _simple(found: Found) -> dict[str, int]:
    return _against(found, "PPO, simple", "DPO, simple")


def _against(found: Found, one: str, other: str, count: int = SOME) -> dict[str, int]:
    """Whether the gap of one learner is above that of another, by data."""
    names = DATA if "likelihood" in one else (*DATA, OWN)
    pairs = {data: [_numbers(found, learner, data, count) for learner in (one, other)] for data in names}
    return {data: _sign(around(gaps[0] - gaps[1])) for data, gaps in pairs.items()}


def _harm(found: Found, learner: str) -> dict[str, int]:
    rows = found["noise"][learner]
    gaps = {data: [np.array(rows[data][str(e)]["stopped"]["gap"]) for e in (NOISY, 0.0)] for data in DATA}
    return {data: _sign(around(pair[0] - pair[1])) for data, pair in gaps.items()}


def around(numbers: Any) -> Interval:
    """The median, and the two numbers of a sample that are on its sides with at least 95 % where there are six."""
    count = len(numbers)
    ordered = np.sort(numbers)
    tails = np.cumsum([math.comb(count, k) for k in range(count)]) / 2**count
    rank = max(int((tails <= 0.025).sum()) - 1, 0)
    return Interval(float(np.median(ordered)), float(ordered[rank]), float(ordered[count - 1 - rank]))


def _sign(interval: Interval) -> int:
    return int(interval.low > 0) - int(interval.high < 0)


def _with(signs: dict[str, int], sign: int) -> str:
    """The data with which a difference has a sign."""
    names = [data for data, found in signs.items() if found == sign]
    return f"with pairs from {_join(names)}" if names else "with none"


def _said(holds: bool) -> str:
    return "yes" if holds else "no"


def _join(names: Sequence[str]) -> str:
    if not names:
        return "none"
    return names[0] if len(names) == 1 else "; ".join(names[:-1]) + " and " + names[-1]


# -- showing ---------------------------------------------------------------------------------------------------------


def texts(found: Found) -> dict[str, str]:
    """The tables and the numbers of the page."""
    points = found["fixed_points"]
    rows = [["pi\\*", *["0" for _ in DATA], *[_nats(points[data]["at pi\\*"]) for data in DATA]]]
    for name in LOSSES:
        gaps = [_percent(points[data][name]["gap"]) for data in DATA]
        rows.append([name, *gaps, *[_nats(points[data][name]["chosen"]) for data in DATA]])
    heads = [f"gap, {data}" for data in DATA] + [f"chosen, {data}" for data in DATA]
    labels = [
        [learner, data, *[_percent(_numbers(found, learner, data, n)) for n in LABELS]]
        for learner in LEARNERS
        for data in (*DATA, OWN)
    ]
    noise = [
        [learner, data, *[_percent(found["noise"][learner][data][str(e)]["stopped"]["gap"]) for e in NOISE]]
        for learner in LEARNERS
        for data in DATA
    ]
    past = []
    for data in DATA:
        pairs = [
            _numbers(found, "DPO", data, FEW, when, key) for key in ("chosen", "gap") for when in ("stopped", "end")
        ]
        past.append([data, *map(_nats, pairs[:2]), *map(_percent, pairs[2:])])
    return {
        "fixed_points": make_table(["loss", *heads], rows),
        "labels": make_table(["learner", "pairs from", *[f"{n} labels" for n in LABELS]], labels),
        "noise": make_table(["learner", "pairs from", *[f"{e:.0%} turned" for e in NOISE]], noise),
        "past": make_table(["pairs from", "chosen, stop", "chosen, end", "gap, stop", "gap, end"], past),
        "few": str(FEW),
        "many": str(MANY),
        "responses": str(2 ** (HORIZON + 1) - 1),
        "horizon": str(HORIZON),
        "kl_coef": f"{KL_COEF:g}",
        "temperature": f"{TEMPERATURE:g}",
        "likelihood": f"{LIKELIHOOD:g}",
        "penalty": f"{PENALTY:g}",
        "rounds": str(ROUNDS),
        "steps": str(STEPS),
        "held_out": str(HELD_OUT),
        "exact": f"{EXACT:.0%}",
        "tokens": f"{PPO_TOKENS:,}",
        "sampled": _percent(np.abs(np.subtract(found["sampled"]["run"], found["sampled"]["fixed_point"]))),
    }


def _percent(numbers: Any) -> str:
    """Median and 95 % interval over tasks, of the gain."""
    if max(numbers) < EXACT / 10:
        return "0"
    interval = around(numbers)
    return f"{100 * interval.mean:.0f} % [{100 * interval.low:.0f}, {100 * interval.high:.0f}]".replace("-0", "0")


def _nats(numbers: Any) -> str:
    interval = around(numbers)
    return f"{interval.mean:+.2f} [{interval.low:+.2f}, {interval.high:+.2f}]"


def draw(found: Found) -> dict[str, Figure]:
    """The gap by the labels, of each kind of data."""
    figure = blank_figure(10.5, 4.2)
    axes = figure.subplots(1, len(DATA), sharey=True)
    colors = dict(zip(LEARNERS, (BLUE, GREEN, ORANGE, BLUE, PURPLE), strict=True))
    for each, data in zip(axes, DATA, strict=True):
        dress(each, f"pairs from {data}".replace("\\", ""), label="labels")
        for learner, color in colors.items():
            medians = [100 * np.median(_numbers(found, learner, data, n)) for n in LABELS]
            style = "--" if "simple" in learner else "-"
            each.plot(LABELS, medians, style, marker="o", markersize=4, color=color, label=learner)
        each.set_xscale("log", base=2)
        each.set_yscale("log")
        each.set_xticks(LABELS, [str(n) for n in LABELS])
        each.axhline(100, color=INK, linewidth=0.8)
    axes[0].set_ylabel("gap, percent of the gain")
    legend_below(figure, axes[0], 5)
    return {"labels": figure}


PROTOCOL = Protocol(
    title="DPO or PPO: what must pairs cover, and does it matter that chosen responses fall?",
    seeds=range(20, 40),
    measure=measure,
    judge=judge,
    texts=texts,
    draw=draw,
)
