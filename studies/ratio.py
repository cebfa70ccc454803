"""The ratio of stale samples, of tokens or of responses, clipped or not: its bias and its variance.

Fixed before the ten tasks were measured: the methods, the numbers below, and the rule in `judge`.

Shapes: n chosen tokens, B episodes, T response columns, S states, A legal tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from agents.batch import Minibatch
from agents.exact import TablePolicy, exact_gradient, expected_update, make_table_agent, measure_updates
from agents.losses import (
    clipped_policy_loss,
    clipped_sequence_loss,
    clipped_weight_loss,
    masked_importance,
    policy_gradient_loss,
    response_means,
    soft_gated_loss,
    truncated_importance,
)
from agents.on_policy import OnPolicyAgent
from agents.on_policy_config import OnPolicyConfig
from agents.questions.page import make_table
from agents.questions.protocol import Found, Protocol, Verdict
from agents.questions.tasks import make_random_tree
from agents.runs.picture_style import BLUE, GREEN, INK, MUTED, ORANGE, PURPLE, blank_figure, dress, legend_below
from agents.update import Loss
from lmgym.episodes import Episodes
from lmgym.intervals import Interval
from lmgym.kl import token_rewards
from lmgym.optimum.anatomy import critic_targets
from lmgym.optimum.tree import Tree

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HORIZON = 4
KL_COEF = 0.2
UPDATES = 32  # of a run, on the line from the logits of the reference to those of pi*
LEARNER = 16  # updates that the policy has had which learns
STALENESS = (1, 2, 4, 8, 16)  # updates by which the sampler is behind it
MIDDLE = 4  # of these
ADDED = 0.1  # lengths of the gradient: a bound on a ratio that adds so much bias in the middle matters
BATCHES = (64, 4096)  # responses, for the error of a batch
UNBIASED = 1e-6  # of the length of the gradient
AT_REST = 1e-6  # the same
CLIP = 0.2  # PPO's
CLIP_RESPONSE = 0.05  # GSPO's, below and above
CLIP_WEIGHT = 0.28  # CISPO's, above
GATE = (1.0, 1.05)  # SAPO's temperatures, of a positive and of a negative advantage
CAP = 2.0  # of truncated importance sampling
BAND = (0.5, 5.0)  # of IcePop


@dataclass(frozen=True)
class RatioConfig(OnPolicyConfig):
    """What a token of a stale sample weighs: a name of `METHODS`."""

    ratio: str = "no ratio"


class RatioAgent(OnPolicyAgent):
    """A policy gradient on the return of the whole response less the exact V^pi of the prompt, a sum over tokens.

    The KL in the return is that of the policy which learns, so that nothing but the ratio is stale.
    """

    Config = RatioConfig
    config: RatioConfig

    def rewards(self, episodes: Episodes) -> Tensor:
        """(B, T) the score at the end, less the KL of the policy now."""
        mask = episodes.response_mask
        with torch.no_grad():
            logits = self.policy.read(episodes).logits
            own = logits.log_softmax(-1).gather(1, episodes.response_ids[mask].unsqueeze(1)).squeeze(1)
        log_ratio = torch.zeros_like(episodes.log_probs).masked_scatter(mask, own) - episodes.ref_log_probs
        return token_rewards(episodes, 0.0) - self.kl.value * log_ratio * mask

    def advantages(self, episodes: Episodes, rewards: Tensor) -> tuple[Tensor, Tensor]:
        """(B, T) the same at every token of a response."""
        assert episodes.values is not None
        found = rewards.sum(1, keepdim=True) - episodes.values[:, :1]
        return torch.where(episodes.response_mask, found, 0.0), torch.zeros_like(rewards)

    def loss(self, batch: Minibatch) -> Loss:
        """The mean over responses of the sum over tokens, with the loss of each method as its agent has it."""
        return METHODS[self.config.ratio](batch), {}


def _weighted(weights: Tensor, batch: Minibatch) -> Tensor:
    """The policy gradient with a constant weight (n,) for each token."""
    return policy_gradient_loss(batch.log_probs, weights.detach() * batch.advantages, batch.episode_weights)


def _log_ratio(batch: Minibatch) -> Tensor:
    return batch.log_probs - batch.old_log_probs


def _mean_log_ratio(batch: Minibatch) -> Tensor:
    """(n,) of each token, that of its response a token."""
    return response_means(_log_ratio(batch), batch.positions, batch.lengths, batch.episode_weights > 0)


def _response_log_ratio(batch: Minibatch) -> Tensor:
    """(n,) of each token, that of its whole response."""
    return _mean_log_ratio(batch) * batch.lengths


def _ppo(batch: Minibatch) -> Tensor:
    ratio = (batch.log_probs, batch.old_log_probs, batch.advantages)
    return clipped_policy_loss(*ratio, batch.episode_weights, CLIP).loss


def _gspo(batch: Minibatch) -> Tensor:
    ratio = (_mean_log_ratio(batch), batch.advantages)
    return clipped_sequence_loss(*ratio, batch.episode_weights, CLIP_RESPONSE, CLIP_RESPONSE).loss


def _cispo(batch: Minibatch) -> Tensor:
    ratio = (batch.log_probs, batch.old_log_probs, batch.advantages)
    return clipped_weight_loss(*ratio, batch.episode_weights, CLIP_WEIGHT).loss


def _sapo(batch: Minibatch) -> Tensor:
    ratio = (batch.log_probs, batch.old_log_probs, batch.advantages)
    return soft_gated_loss(*ratio, batch.episode_weights, *GATE).loss


METHODS: dict[str, Callable[[Minibatch], Tensor]] = {
    "no ratio": lambda batch: _weighted(torch.ones_like(batch.log_probs), batch),
    "response": lambda batch: _weighted(_response_log_ratio(batch).exp(), batch),
    "response, truncated": lambda batch: _weighted(truncated_importance(_response_log_ratio(batch), CAP), batch),
    "geometric mean": lambda batch: _weighted(_mean_log_ratio(batch).exp(), batch),
    "geometric mean, clipped (GSPO)": _gspo,
    "token": lambda batch: _weighted(_log_ratio(batch).exp(), batch),
    "token, clipped (PPO)": _ppo,
    "token, soft gate (SAPO)": _sapo,
    "token, clipped weight (CISPO)": _cispo,
    "token, truncated (TIS)": lambda batch: _weighted(truncated_importance(_log_ratio(batch), CAP), batch),
    "token, masked (IcePop)": lambda batch: _weighted(masked_importance(_log_ratio(batch), *BAND), batch),
}
PLAIN = {  # what a method would be without its cap, clip or gate
    "response, truncated": "response",
    "geometric mean, clipped (GSPO)": "geometric mean",
    "token, clipped (PPO)": "token",
    "token, soft gate (SAPO)": "token",
    "token, clipped weight (CISPO)": "token",
    "token, truncated (TIS)": "token",
    "token, masked (IcePop)": "token",
}


# -- measuring -------------------------------------------------------------------------------------------------------


def measure(seeds: Sequence[int]) -> Found:
    """Bias, cosine and variance of the update of one response, for each method, staleness and task."""
    found: dict[str, Any] = {name: {str(k): [] for k in STALENESS} for name in METHODS}
    on_policy = []
    at_rest: dict[str, list[float]] = {name: [] for name in METHODS}
    kl: dict[str, list[float]] = {str(k): [] for k in STALENESS}
    for seed in seeds:
        tree = make_random_tree(seed, horizon=HORIZON, kl_coef=KL_COEF)
        agent = make_agent(tree, "no ratio", LEARNER)
        size = exact_gradient(agent, tree).norm().item()
        on_policy.append(measure_updates(agent, tree).variance)
        for k in STALENESS:
            kl[str(k)].append(_divergence(tree, LEARNER, LEARNER - k))
        for name in METHODS:
            agent = make_agent(tree, name, LEARNER)
            for k in STALENESS:
                quality = measure_updates(agent, tree, behaviour=sampler(tree, agent, LEARNER - k))
                numbers = {"bias": quality.bias, "cosine": quality.cosine, "variance": quality.variance}
                found[name][str(k)].append(numbers)
            optimal = make_agent(tree, name, UPDATES)
            rest = expected_update(optimal, tree, sampler(tree, optimal, UPDATES - max(STALENESS)))
            at_rest[name].append(rest.norm().item() / size)
    return {"methods": found, "on_policy": on_policy, "at_rest": at_rest, "kl": kl}


def make_agent(tree: Tree, ratio: str, updates: int) -> OnPolicyAgent:
    """A table after so many updates, with its exact critic."""
    agent = make_table_agent(RatioAgent, tree, ratio=ratio, batch_size=1)
    policy = agent.policy
    assert isinstance(policy, TablePolicy)
    with torch.no_grad():
        policy.logits.copy_(_table(tree, updates))
    policy.set_critic(critic_targets(tree, policy.log_probs()))
    return agent


def sampler(tree: Tree, agent: OnPolicyAgent, updates: int) -> Any:
    """The policy after so many updates, as what samples."""
    assert isinstance(agent.policy, TablePolicy)
    return partial(agent.policy.logits_of, _table(tree, updates))


def _table(tree: Tree, updates: int) -> Tensor:
    """(S, A) log-probs on the line from the reference to pi*."""
    ends = zip(tree.reference, tree.solve_levels().log_probs, strict=True)
    share = updates / UPDATES
    return torch.cat([((1 - share) * a + share * b).log_softmax(-1).flatten(0, 1) for a, b in ends])


def _divergence(tree: Tree, learner: int, behind: int) -> float:
    """KL(learner || sampler), nats a response."""
    policy = make_agent(tree, "no ratio", learner).policy
    assert isinstance(policy, TablePolicy)
    own = tree.responses.add_up(policy.log_probs())
    other = tree.responses.add_up(policy.split(_table(tree, behind)))
    return (own.exp() * (own - other)).sum(1).mean().item()


# -- judging ---------------------------------------------------------------------------------------------------------


def judge(found: Found) -> Verdict:
    """The rule: a difference counts where the 95 % interval over tasks, of differences task by task, leaves 0 out."""
    last = STALENESS[-1]
    unbiased = [name for name in METHODS if max(max(_column(found, name, k, "bias")) for k in STALENESS) < UNBIASED]
    downhill = [name for name in METHODS if min(min(_column(found, name, k, "cosine")) for k in STALENESS) < 0]
    rest = [name for name in METHODS if max(found["at_rest"][name]) < AT_REST]
    bias = {name: np.array(_column(found, name, last, "bias")) for name in METHODS}
    middle = {name: np.mean(_column(found, name, MIDDLE, "bias")) for name in METHODS}
    bounded = [name for name, plain in PLAIN.items() if middle[name] - middle[plain] > ADDED]
    costly = [name for name, plain in PLAIN.items() if _sign(bias[name] - bias[plain]) > 0]
    variance = {name: np.log(_column(found, name, last, "variance")) - np.log(found["on_policy"]) for name in METHODS}
    noisier = [name for name in METHODS if _sign(variance[name]) > 0]
    calmer = [name for name in METHODS if _sign(variance[name]) < 0]
    claims = (
        f"The expected update is the gradient at every staleness with {_join(unbiased)}, and with no other.",
        f"It points downhill, on some task and at some staleness, with {_join(downhill)}.",
        f"At pi\\* it is 0, whatever samples, with {_all_or(rest)}.",
        f"After {last} updates the ratio of tokens has {_more(bias['token'] - bias['no ratio'])} bias than no ratio.",
        f"The geometric mean then has {_more(bias['geometric mean'] - bias['token'])} bias than the ratio of tokens.",
        f"After {MIDDLE} updates a bound on the ratio adds more than {ADDED} to the mean bias with {_join(bounded)}.",
        f"After {last} updates a bound adds bias with {_join(costly)}.",
        f"The variance is then above that of fresh samples with {_join(noisier)}, and below with {_join(calmer)}.",
        *(f"A batch of {size} then has the smallest error with {_best(found, size, last)}." for size in BATCHES),
    )
    short = (
        f"Without bias only with {_join(unbiased)}. A bound on the ratio adds much bias after {MIDDLE} updates with "
        f"{_join(bounded)}."
    )
    return Verdict(short, claims)


def _column(found: Found, name: str, staleness: int, key: str) -> list[float]:
    return [numbers[key] for numbers in found["methods"][name][str(staleness)]]


def _errors(found: Found, name: str, staleness: int, size: int) -> Any:
    """(seeds,) root mean square distance of the update of a batch from the gradient, in lengths of the gradient."""
    bias = np.array(_column(found, name, staleness, "bias"))
    variance = np.array(_column(found, name, staleness, "variance"))
    return np.sqrt(bias**2 + variance / size)


def _best(found: Found, size: int, staleness: int) -> str:
    """The method with the smallest error on average, and those that are not told apart from it."""
    errors = {name: np.log(_errors(found, name, staleness, size)) for name in METHODS}
    first = min(errors, key=lambda name: float(errors[name].mean()))
    alike = [name for name in METHODS if name != first and _sign(errors[name] - errors[first]) <= 0]
    return f"*{first}*" + (f", not told apart from {_join(alike)}" if alike else "")


def _sign(numbers: Any) -> int:
    interval = Interval.of(torch.tensor(numbers))
    return int(interval.low > 0) - int(interval.high < 0)


def _more(differences: Any) -> str:
    return {1: "more", -1: "less", 0: "neither more nor less"}[_sign(differences)]


def _join(names: Sequence[str]) -> str:
    if not names:
        return "no method"
    quoted = [f"*{name}*" for name in names]
    return quoted[0] if len(names) == 1 else ", ".join(quoted[:-1]) + " and " + quoted[-1]


def _all_or(names: Sequence[str]) -> str:
    return "all of them" if len(names) == len(METHODS) else f"{_join(names)}, and with no other"


# -- showing ---------------------------------------------------------------------------------------------------------


def texts(found: Found) -> dict[str, str]:
    """The tables and the numbers of the page."""
    heads = [f"{k}" for k in STALENESS]
    biases = [[name, *[_interval(_column(found, name, k, "bias")) for k in STALENESS]] for name in METHODS]
    last = STALENESS[-1]
    on_policy = np.array(found["on_policy"])
    rows = []
    for name in METHODS:
        variance = np.array(_column(found, name, last, "variance")) / on_policy
        errors = [_interval(_errors(found, name, last, size)) for size in BATCHES]
        rows.append([name, _interval(_column(found, name, last, "cosine")), _interval(variance), *errors])
    return {
        "biases": make_table(["what a token weighs", *heads], biases),
        "after": make_table(
            ["what a token weighs", "cosine", "variance", *[f"error, batch of {size}" for size in BATCHES]], rows
        ),
        "kl": ", ".join(f"{np.mean(found['kl'][str(k)]):.2g}" for k in STALENESS),
        "staleness": ", ".join(heads[:-1]) + f" or {last}",
        "last": str(last),
        "middle": str(MIDDLE),
        "added": f"{ADDED:g}",
        "learner": str(LEARNER),
        "updates": str(UPDATES),
        "kl_coef": f"{KL_COEF:g}",
        "horizon": str(HORIZON),
        "clip": f"{CLIP:g}",
        "clip_response": f"{CLIP_RESPONSE:g}",
        "clip_weight": f"{1 + CLIP_WEIGHT:g}",
        "cap": f"{CAP:g}",
        "band": f"[{BAND[0]:g}, {BAND[1]:g}]",
        "gate": f"{GATE[0]:g} and {GATE[1]:g}",
    }


def _interval(numbers: Any) -> str:
    """Mean and 95 % interval over tasks."""
    interval = Interval.of(torch.tensor(numbers))
    if abs(interval.mean) < UNBIASED:
        return "0"
    digits = 2 if abs(interval.mean) < 10 else 0
    return f"{interval.mean:.{digits}f} [{interval.low:.{digits}f}, {interval.high:.{digits}f}]"


def draw(found: Found) -> dict[str, Figure]:
    """Bias and variance by staleness, means over tasks."""
    figure = blank_figure(10.5, 5.2)
    axes = figure.subplots(1, 2)
    colors = {"no ratio": MUTED, "response": BLUE, "geometric mean": GREEN, "token": ORANGE}
    styles = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 3)))
    seen = dict.fromkeys(colors, 0)
    for name in METHODS:
        family = name.split(",")[0]
        line: dict[str, Any] = {"color": colors[family], "linestyle": styles[seen[family]], "label": name}
        seen[family] += 1
        if name == "token, clipped (PPO)":
            line["color"] = PURPLE
        bias = [np.mean(_column(found, name, k, "bias")) for k in STALENESS]
        ratios = [np.log(np.array(_column(found, name, k, "variance")) / found["on_policy"]) for k in STALENESS]
        axes[0].plot(STALENESS, [max(x, 1e-4) for x in bias], marker="o", markersize=3, **line)
        axes[1].plot(STALENESS, [math.exp(x.mean()) for x in ratios], marker="o", markersize=3, **line)
    dress(axes[0], "bias, in lengths of the gradient (0 is drawn at 1e-4)", label="updates that the sampler is behind")
    dress(axes[1], "variance, over that of fresh samples", label="updates that the sampler is behind")
    for each in axes:
        each.set_xscale("log", base=2)
        each.set_xticks(STALENESS, [str(k) for k in STALENESS])
        each.set_yscale("log")
    axes[1].axhline(1, color=INK, linewidth=0.8)
    legend_below(figure, axes[0], 3)
    return {"bias": figure}


PROTOCOL = Protocol(
    title="Stale samples: the ratio of a token, of a response, or a clipped weight?",
    seeds=range(10),
    measure=measure,
    judge=judge,
    texts=texts,
    draw=draw,
)
