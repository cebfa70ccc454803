"""Do critics help? Bias and variance with and without one, and runs of PPO at equal env steps.

Fixed before the ten tasks were measured: the methods, the numbers below, and the rule in `judge`. Learning rates were
chosen on four tasks that are not among these.

Shapes: B episodes, T response columns, X prompts, N_t prefixes of t tokens of one prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from agents.advantages import group_leave_one_out, whiten
from agents.algorithms.ppo import PPO, PPOConfig
from agents.algorithms.vineppo import VinePPO
from agents.exact import TableEstimators, TablePolicy, make_table_agent
from agents.on_policy import OnPolicyAgent
from agents.questions.page import make_table
from agents.questions.protocol import Found, Protocol, Verdict
from agents.questions.tasks import make_uneven_tree
from agents.runs.picture_style import BLUE, GREEN, MUTED, ORANGE, PURPLE, blank_figure, dress, legend_below
from lmgym.episodes import Episodes
from lmgym.intervals import Interval
from lmgym.optimum.anatomy import CriticError, GradientQuality, critic_targets, visits
from lmgym.optimum.tree import Tree

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HORIZON = 5
KL_COEF = 0.2
KINDS = {"random scores": False, "scores token by token": True}
UPDATES = 32  # of a run, on the line from the logits of the reference to those of pi*
POINTS = (16, 28)  # updates that the policy has had where estimators are measured
BEHIND = 4  # updates by which a critic lags
LAMBDAS = (1.0, 0.95, 0.0)
GAMMA = 0.9
GROUP = 4
ROLLOUTS = (1, 4)
BUDGETS = (512, 32768)  # env steps, for the error of a batch
UNBIASED = 1e-6  # of the length of the gradient
STEPS = 10_000  # of a run
BATCH = 64  # responses; VinePPO has fewer, for it also pays for rollouts
VINE_BATCH = 16
EPOCHS = 4
LR = 0.03
CRITIC_LR = 0.1
MARKS = 10  # of the curve of a run
TICKS = (1, 2, 5, 10, 20, 50, 100)  # percent of the gain

Values = Literal["learned", "frozen", "exact"]


@dataclass(frozen=True)
class GroupPPOConfig(PPOConfig):
    """PPO without a critic."""

    group_size: int = GROUP

    @property
    def responses(self) -> int:
        """Responses to each prompt of a batch."""
        return self.group_size


class GroupPPO(PPO):
    """PPO whose advantage is the whole return less the mean of the others in a group, as in RLOO."""

    Config = GroupPPOConfig
    config: GroupPPOConfig

    def advantages(self, episodes: Episodes, rewards: Tensor) -> tuple[Tensor, Tensor]:
        """(B, T) the same at every token of a response; whitened, as PPO's are."""
        found = group_leave_one_out(rewards.sum(1), self.config.group_size).unsqueeze(1)
        mask = episodes.response_mask
        return whiten(torch.where(mask, found, 0.0), mask), torch.zeros_like(rewards)


@dataclass(frozen=True)
class Run:
    """A way to train: whose values PPO gets, and with which lambda.

    Attributes:
        kind: the algorithm. gae_lambda: of PPO.
        values: "learned" by the value loss, "frozen" as they were at the start, or "exact", V^pi before each batch.
        pretrained: they start as V of the reference, and else as 0.
    """

    kind: type[OnPolicyAgent] = PPO
    gae_lambda: float = 0.95
    values: Values = "learned"
    pretrained: bool = False

    @property
    def numbers(self) -> dict[str, Any]:
        """The config of the agent."""
        shared = {"batch_size": BATCH, "epochs": EPOCHS, "minibatches": 1, "lr": LR, "critic_lr": CRITIC_LR}
        if self.kind is VinePPO:
            return shared | {"batch_size": VINE_BATCH, "critic_lr": None}
        weight = 0.5 if self.values == "learned" else 0.0
        return shared | {"gae_lambda": self.gae_lambda, "vf_coef": weight, "clip_range_value": None}


RUNS = {
    "no critic, mean of the batch": Run(gae_lambda=1.0, values="frozen"),
    f"no critic, mean of {GROUP} responses": Run(kind=GroupPPO, values="frozen"),
    "learned critic, lambda 1": Run(gae_lambda=1.0),
    "learned critic, lambda 0.95": Run(),
    "learned critic, lambda 0": Run(gae_lambda=0.0),
    "pre-trained critic, lambda 0.95": Run(pretrained=True),
    "exact critic, lambda 1": Run(gae_lambda=1.0, values="exact"),
    "exact critic, lambda 0.95": Run(values="exact"),
    "exact critic, lambda 0": Run(gae_lambda=0.0, values="exact"),
    "VinePPO": Run(kind=VinePPO),
}
BATCH_MEAN = "no critic, mean of the batch"
GROUP_MEAN = f"no critic, mean of {GROUP} responses"
LEARNED = "learned critic, lambda 0.95"
PRETRAINED = "pre-trained critic, lambda 0.95"
EXACT = "exact critic, lambda 0"
LONGEST = "exact critic, lambda 1"
VINE = "VinePPO"

PAIRS = {
    "learned": (LEARNED, BATCH_MEAN),
    "group": (LEARNED, GROUP_MEAN),
    "pretrained": (PRETRAINED, LEARNED),
    "lambda": ("learned critic, lambda 0", "learned critic, lambda 1"),
    "exact": (EXACT, GROUP_MEAN),
    "vine": (VINE, GROUP_MEAN),
}
CRITICS = ("critic of the reference", f"critic {BEHIND} updates old", "exact critic")


# -- measuring -------------------------------------------------------------------------------------------------------


def measure(seeds: Sequence[int]) -> Found:
    """Estimators at two points of a run, and runs, on a task of each kind for each seed."""
    found: dict[str, Any] = {kind: {"estimators": [], "runs": []} for kind in KINDS}
    for seed in seeds:
        for kind, token_by_token in KINDS.items():
            tree = make_uneven_tree(seed, horizon=HORIZON, kl_coef=KL_COEF, token_by_token=token_by_token)
            points = {str(updates): measure_point(tree, updates) for updates in POINTS}
            found[kind]["estimators"].append(points)
            found[kind]["runs"].append({name: learn(tree, run, seed) for name, run in RUNS.items()})
    return {"kinds": found}


def measure_point(tree: Tree, updates: int) -> dict[str, dict[str, float]]:
    """Bias, variance and env steps of one response with each method, after so many updates."""
    policy = TableEstimators(tree, policy_after(tree, updates))
    found = {
        BATCH_MEAN: _describe(policy.measure_batch_mean(), policy.steps),
        GROUP_MEAN: _describe(policy.measure_group(GROUP), policy.steps),
    }
    for name, age in zip(CRITICS, (updates, BEHIND, 0), strict=True):
        critic = critic_targets(tree, policy_after(tree, updates - age))
        for gae_lambda in LAMBDAS:
            quality = policy.measure(policy.gae(critic, gae_lambda))
            found[f"{name}, lambda {gae_lambda:g}"] = _describe(quality, policy.steps)
    discounted = policy.measure(policy.gae(critic, 1.0, GAMMA))
    found[f"exact critic, lambda 1, gamma {GAMMA:g}"] = _describe(discounted, policy.steps)
    for count in ROLLOUTS:
        found[f"VinePPO, K = {count}"] = _describe(policy.measure_rollouts(count), policy.rollout_steps(count))
    return found


def policy_after(tree: Tree, updates: int) -> list[Tensor]:
    """(X, N_t, A) log-probs of each level, on the line from the reference to pi*."""
    share = updates / UPDATES
    ends = zip(tree.reference, tree.solve_levels().log_probs, strict=True)
    return [((1 - share) * a + share * b).log_softmax(-1) for a, b in ends]


def _describe(quality: GradientQuality, steps: float) -> dict[str, float]:
    return {"bias": quality.bias, "variance": quality.variance, "steps": steps}


def learn(tree: Tree, run: Run, seed: int) -> dict[str, Any]:
    """The gap along a run, as shares of the gain; and of a critic that learns its last error, in the same unit."""
    agent = make_table_agent(run.kind, tree, seed=seed, **run.numbers)
    policy = agent.policy
    assert isinstance(policy, TablePolicy)
    optimum = tree.solve()
    gain = optimum.value - optimum.reference
    if run.pretrained:
        policy.set_critic(critic_targets(tree, tree.reference))
    gaps: list[float] = []
    while agent.num_timesteps < STEPS:
        if run.values == "exact":
            policy.set_critic(critic_targets(tree, policy.log_probs()))
        agent.updater.set_lr(agent.num_timesteps / STEPS)
        episodes = agent.collect()
        agent.learn_from(agent.shape(episodes))
        agent.num_timesteps += episodes.num_tokens
        value = tree.evaluate(partial(policy.logits_of, policy.logits.detach())).value
        reached = min(agent.num_timesteps * MARKS // STEPS, MARKS)
        gaps += [(optimum.value - value) / gain] * (reached - len(gaps))
    return {"gaps": gaps, "critic": _critic_error(tree, policy) / gain}


def _critic_error(tree: Tree, policy: TablePolicy) -> float:
    """Root mean square of a critic's errors, over the states that the policy visits."""
    own = policy.log_probs()
    critic = policy.split(policy.critic.detach())
    return CriticError.of(critic, critic_targets(tree, own), visits(tree.responses, own)).rmse


# -- judging ---------------------------------------------------------------------------------------------------------


def judge(found: Found) -> Verdict:
    """The rule: in runs a difference counts where the 95 % interval over tasks, of differences, leaves 0 out.

    What is exact has to hold on every task, with both kinds of score and at both points.
    """
    names = list(found["kinds"][next(iter(KINDS))]["estimators"][0][str(POINTS[0])])
    unbiased = [name for name in names if _every(found, name, "bias").max() < UNBIASED]
    last = POINTS[-1]
    biases = {name: [_column(found, kind, last, name, "bias").mean() for kind in KINDS] for name in names}
    misled = [name for name, of_kinds in biases.items() if np.mean(of_kinds) > 1]
    signs = {pair: {kind: _compare(found, kind, *names) for kind in KINDS} for pair, names in PAIRS.items()}
    stale = CRITICS[1]
    claims = (
        f"The expected update is the gradient at both points with {_join(unbiased)}, and with no other.",
        f"After {last} updates the bias is longer than the gradient, on average, with {_join(misled)}.",
        f"An exact critic has less variance than the mean of {GROUP} responses {_where(found, LONGEST, GROUP_MEAN)} "
        f"with lambda 1, and {_where(found, EXACT, GROUP_MEAN)} with lambda 0.",
        f"It has less variance with lambda 0 than with lambda 1 {_where(found, EXACT, LONGEST)}.",
        f"At equal env steps, *VinePPO, K = {ROLLOUTS[0]}* has less variance than the mean of {GROUP} responses "
        f"{_where(found, f'VinePPO, K = {ROLLOUTS[0]}', GROUP_MEAN)}.",
        f"Of the lambdas of a *{stale}*, the smallest error is that of "
        + " and ".join(f"{_best(found, stale, steps)} on {steps:,} env steps" for steps in BUDGETS)
        + ".",
        f"A run with a learned critic ends {_nearer(signs['learned'])} V\\* than one with the mean of the batch, and "
        f"{_nearer(signs['group'])} it than one with the mean of {GROUP} responses.",
        f"A pre-trained critic ends {_nearer(signs['pretrained'])} V\\* than one that starts at 0.",
        f"With lambda 0 a learned critic ends {_nearer(signs['lambda'])} V\\* than with lambda 1.",
        f"An exact critic with lambda 0 ends {_nearer(signs['exact'])} V\\* than the mean of {GROUP} responses.",
        f"VinePPO ends {_nearer(signs['vine'])} V\\* than the mean of {GROUP} responses.",
    )
    words = {"exact": "an exact critic", "group": "a learned one", "vine": "VinePPO"}
    better = [word for pair, word in words.items() if all(sign < 0 for sign in signs[pair].values())]
    short = (
        f"Of an exact critic, a learned one and VinePPO, {' and '.join(better) or 'none'} beats the mean of {GROUP} "
        f"responses at equal env steps."
    )
    return Verdict(short, claims)


def _column(found: Found, kind: str, updates: int, name: str, key: str) -> Any:
    """(seeds,) a number of an estimator."""
    return np.array([points[str(updates)][name][key] for points in found["kinds"][kind]["estimators"]])


def _every(found: Found, name: str, key: str) -> Any:
    """(K,) the same of all tasks and points."""
    return np.concatenate([_column(found, kind, updates, name, key) for kind in KINDS for updates in POINTS])


def _where(found: Found, a: str, b: str) -> str:
    """On which tasks and at which points a has less variance than b at equal env steps."""
    costs = [_every(found, name, "variance") * _every(found, name, "steps") for name in (a, b)]
    is_less = costs[0] < costs[1]
    if is_less.all():
        return "on every task"
    return "on some tasks, and not on others," if is_less.any() else "on no task"


def _errors(found: Found, kind: str, updates: int, name: str, budget: int) -> Any:
    """(seeds,) root mean square distance of an update on so many env steps from the gradient, in its lengths."""
    bias, variance, steps = (_column(found, kind, updates, name, key) for key in ("bias", "variance", "steps"))
    return np.sqrt(bias**2 + variance * steps / budget)


def _best(found: Found, critic: str, budget: int) -> str:
    """The lambda with the smallest mean error."""

    def error(gae_lambda: float) -> float:
        name = f"{critic}, lambda {gae_lambda:g}"
        return float(np.mean([_errors(found, kind, u, name, budget) for kind in KINDS for u in POINTS]))

    return f"{min(LAMBDAS, key=error):g}"


def _ends(found: Found, kind: str, name: str) -> Any:
    """(seeds,) the gap after a run."""
    return np.array([runs[name]["gaps"][-1] for runs in found["kinds"][kind]["runs"]])


def _compare(found: Found, kind: str, a: str, b: str) -> int:
    """-1 where runs with a end nearer to V* than with b, 1 where they end further off, 0 where that is not told."""
    interval = Interval.of(torch.tensor(_ends(found, kind, a) - _ends(found, kind, b)))
    return int(interval.low > 0) - int(interval.high < 0)


def _nearer(signs: dict[str, int]) -> str:
    words = {-1: "nearer to", 1: "further from", 0: "neither nearer to nor further from"}
    if len(set(signs.values())) == 1:
        return words[next(iter(signs.values()))]
    return " and ".join(f"({kind}) {words[sign]}" for kind, sign in signs.items())


def _join(names: Sequence[str]) -> str:
    if not names:
        return "no method"
    quoted = [f"*{name}*" for name in names]
    return quoted[0] if len(names) == 1 else "; ".join(quoted[:-1]) + " and " + quoted[-1]


# -- showing ---------------------------------------------------------------------------------------------------------


def texts(found: Found) -> dict[str, str]:
    """The tables and the numbers of the page."""
    names = list(found["kinds"][next(iter(KINDS))]["estimators"][0][str(POINTS[0])])
    first, last = POINTS
    rows = []
    for name in names:
        cells = [f"{_every(found, name, 'steps').mean():.0f}"]
        for kind in KINDS:
            worth = _column(found, kind, first, name, "variance") / _column(found, kind, first, EXACT, "variance")
            errors = [_interval(_errors(found, kind, first, name, n)) for n in BUDGETS]
            cells += [_interval(_column(found, kind, last, name, "bias")), _interval(worth), *errors]
        rows.append([name, *cells])
    tables = {}
    heads = [f"bias, {last} updates", f"variance, {first} updates", *[f"error, {n:,} steps" for n in BUDGETS]]
    for i, label in enumerate(("random", "token_by_token")):
        width = len(heads)
        cut = [[row[0], row[1], *row[2 + i * width : 2 + (i + 1) * width]] for row in rows]
        tables[label] = make_table(["method", "env steps", *heads], cut)
    runs = [[name, *[_percent(_ends(found, kind, name)) for kind in KINDS], _critic(found, name)] for name in RUNS]
    return {
        **tables,
        "runs": make_table(["PPO with", *KINDS, "error of the critic"], runs),
        "horizon": str(HORIZON),
        "kl_coef": f"{KL_COEF:g}",
        "updates": str(UPDATES),
        "first": str(first),
        "last": str(last),
        "behind": str(BEHIND),
        "gamma": f"{GAMMA:g}",
        "steps": f"{STEPS:,}",
        "batch": str(BATCH),
        "vine_batch": str(VINE_BATCH),
        "lr": f"{LR:g}",
        "critic_lr": f"{CRITIC_LR:g}",
        "epochs": str(EPOCHS),
    }


def _interval(numbers: Any) -> str:
    """Mean and 95 % interval over tasks."""
    interval = Interval.of(torch.tensor(numbers))
    if abs(interval.mean) < UNBIASED:
        return "0"
    digits = 2 if abs(interval.mean) < 10 else 0
    return f"{interval.mean:.{digits}f} [{interval.low:.{digits}f}, {interval.high:.{digits}f}]"


def _percent(gaps: Any) -> str:
    interval = Interval.of(torch.tensor(100 * gaps))
    return f"{interval.mean:.1f} % [{interval.low:.1f}, {interval.high:.1f}]"


def _critic(found: Found, name: str) -> str:
    """Of a critic that learns, as a share of the gain, over both kinds."""
    if RUNS[name].kind is not PPO or RUNS[name].values != "learned":
        return ""
    errors = [run[name]["critic"] for kind in KINDS for run in found["kinds"][kind]["runs"]]
    return f"{100 * np.mean(errors):.0f} %"


def draw(found: Found) -> dict[str, Figure]:
    """The gap along runs, means over tasks."""
    figure = blank_figure(10.5, 4.8)
    axes = figure.subplots(1, 2)
    styles: dict[str, dict[str, Any]] = {
        BATCH_MEAN: {"color": MUTED},
        GROUP_MEAN: {"color": BLUE},
        LEARNED: {"color": ORANGE},
        PRETRAINED: {"color": ORANGE, "linestyle": "--"},
        EXACT: {"color": GREEN},
        VINE: {"color": PURPLE},
    }
    steps = [STEPS * (i + 1) / MARKS for i in range(MARKS)]
    for each, kind in zip(axes, KINDS, strict=True):
        dress(each, f"gap to V*, percent of the gain: {kind}", label="env steps")
        for name, style in styles.items():
            gaps = 100 * np.mean([runs[name]["gaps"] for runs in found["kinds"][kind]["runs"]], 0)
            each.plot(steps, gaps, marker="o", markersize=3, label=name, **style)
        each.set_yscale("log")
        each.set_yticks([], minor=True)
        each.set_yticks(TICKS, [str(tick) for tick in TICKS])
        each.set_ylim(TICKS[0], TICKS[-1])
    legend_below(figure, axes[0], 3)
    return {"runs": figure}


PROTOCOL = Protocol(
    title="Do critics help?",
    seeds=range(10),
    measure=measure,
    judge=judge,
    texts=texts,
    draw=draw,
)
