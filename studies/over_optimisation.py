"""Over-optimisation: how does the gold score go with the KL, and is best-of-n kinder than the best policy at its KL?

Fixed before the ten seeds were sampled: the numbers below, and the rule in `judge`.

Shapes: X prompts, M responses of the reference to each, N numbers of candidates.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from agents.algorithms.best_of_n import kl_bound
from agents.questions.page import make_table
from agents.questions.protocol import Found, Protocol, Verdict
from agents.runs.picture_style import BLUE, GREEN, INK, ORANGE, blank_figure, dress, legend_below
from lmgym.envs.vector import RLHFVectorEnv
from lmgym.intervals import Interval
from lmgym.models.policy import CausalPolicy
from lmgym.rollout import collect
from lmgym.tasks.proxy import SETTINGS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PROMPTS = 2  # a seed
RESPONSES = 2048  # to each
AT_ONCE = 1024  # responses that are decoded together
CANDIDATES = tuple(2**k for k in range(1, 10))
SHOWN = (2, 8, 32, 128, 512)
LATE = 32  # from which on a rise is asked for
PROXIES = tuple(f"proxy-{rankings}" for rankings in SETTINGS)
WAYS = ("best-of-n", "best policy")
FORMS: dict[str, Callable[[Any], Any]] = {"d (a - b d)": lambda d: d * d, "d (a - b log d)": lambda d: d * np.log(d)}


# -- measuring -------------------------------------------------------------------------------------------------------


def measure(seeds: Sequence[int]) -> Found:
    """Gold and proxy score of best-of-n, and of the best policy at the same KL, each less that of the reference."""
    envs = {name: make_envs(name) for name in PROXIES}
    proxies_found: dict[str, Any] = {name: {way: [] for way in WAYS} for name in PROXIES}
    most = []
    for seed in seeds:
        proxies, gold = sample(envs, seed)
        most.append([tilt_to(gold, gold, kl_bound(n))["gold"] for n in CANDIDATES])
        for name, scores in proxies.items():
            best = [best_of(scores, gold, n) for n in CANDIDATES]
            tilted = [tilt_to(scores, gold, kl_bound(n)) for n in CANDIDATES]
            for way, rows in zip(WAYS, (best, tilted), strict=True):
                numbers = {key: [row[key] for row in rows] for key in ("proxy", "gold")}
                proxies_found[name][way].append(numbers)
    return {"proxies": proxies_found, "most": most}


def make_envs(name: str) -> RLHFVectorEnv:
    """The env of a task, which pays for responses."""
    return RLHFVectorEnv(1, autoreset_mode="SameStep", task=name, split="train", device="cpu")


def sample(envs: dict[str, RLHFVectorEnv], seed: int) -> tuple[dict[str, Tensor], Tensor]:
    """(X, M) scores of each proxy, and (X, M) gold scores, of responses of the reference."""
    generator = torch.Generator().manual_seed(seed)
    first = envs[PROXIES[0]]
    chosen = torch.randperm(len(first.engine.prompts), generator=generator)[:PROMPTS].tolist()
    scores: dict[str, list[Tensor]] = {name: [] for name in PROXIES}
    gold = []
    for i in chosen:
        for _ in range(0, RESPONSES, AT_ONCE):
            prompts = [first.engine.prompts[i]] * AT_ONCE
            episodes = collect(first, CausalPolicy(first.engine.lm), prompts, None, generator)
            assert episodes.gold_scores is not None
            gold.append(episodes.gold_scores)
            scores[PROXIES[0]].append(episodes.scores)
            ids = episodes.response_ids.numpy()
            for name in PROXIES[1:]:
                own = [envs[name].engine.prompts[i]] * AT_ONCE
                paid = envs[name].replay(own, ids, episodes.ref_log_probs.numpy())
                scores[name].append(torch.tensor(paid.outcomes.scores))
    shape = (PROMPTS, RESPONSES)
    return {name: torch.cat(x).double().view(shape) for name, x in scores.items()}, torch.cat(gold).double().view(shape)


def best_of(proxy: Tensor, gold: Tensor, n: int) -> dict[str, float]:
    """Means of the best of n by proxy (X, M), over all ways to draw n of the M, each less that of the reference."""
    weights = chances_of_ranks(proxy.shape[1], n)
    order = proxy.argsort(1)
    return {
        name: ((x.gather(1, order) * weights).sum(1).mean() - x.mean()).item()
        for name, x in (("proxy", proxy), ("gold", gold))
    }


@cache
def chances_of_ranks(size: int, n: int) -> Tensor:
    """(M,) the probability that the best of n out of M has a rank, the lowest first: C(rank, n - 1) / C(M, n)."""
    chances = [math.comb(rank, n - 1) / math.comb(size, n) for rank in range(size)]
    return torch.tensor(chances, dtype=torch.float64)


def tilt_to(proxy: Tensor, gold: Tensor, kl: float) -> dict[str, float]:
    """The same of pi_ref exp(proxy / b) / Z at the b with this KL on average over prompts: importance weights."""
    low = 0.0
    high = 1e2
    for _ in range(60):
        middle = (low + high) / 2
        log_weights = (middle * proxy).log_softmax(1)
        weights = log_weights.exp()
        found = (weights * (log_weights + math.log(proxy.shape[1]))).sum(1).mean()
        if found < kl:
            low = middle
        else:
            high = middle
    return {name: ((weights * x).sum(1).mean() - x.mean()).item() for name, x in (("proxy", proxy), ("gold", gold))}


# -- judging ---------------------------------------------------------------------------------------------------------


def judge(found: Found) -> Verdict:
    """The rule: a difference counts where its 95 % interval over seeds has one sign."""
    falls = {way: all(_sign(_fall(found, name, way)) > 0 for name in PROXIES) for way in WAYS}
    own = [name for name in PROXIES if all(_sign(_rise(found, name, way, "proxy")) > 0 for way in WAYS)]
    more = [name for name in PROXIES if any(_sign(_lost(found, name, way)) < 0 for way in WAYS)]
    ends = {name: _shares(found, name, "best-of-n")[:, -1] for name in PROXIES}
    order = [_sign(ends[many] - ends[few]) for few, many in pairwise(PROXIES)]
    differences = {name: _shares(found, name, "best-of-n") - _shares(found, name, "best policy") for name in PROXIES}
    claims = [
        f"After its largest mean and up to n = {CANDIDATES[-1]}, the gold score falls for every proxy along best-of-n: "
        f"{_said(falls['best-of-n'])}; along the best policies: {_said(falls['best policy'])}.",
        f"From n = {LATE} on the proxy score still rises {_for(own)} along both, and the gold score by more "
        f"{_for(more)}.",
        f"Best-of-n has a larger gold score with more rankings at n = {CANDIDATES[-1]}, each time: "
        f"{_said(min(order) > 0)}.",
    ]
    for n in (SHOWN[0], SHOWN[-1]):
        signs = {name: _sign(numbers[:, CANDIDATES.index(n)]) for name, numbers in differences.items()}
        claims.append(
            f"At the KL of n = {n}, the gold score of best-of-n is above that of the best policy "
            f"{_for([name for name, sign in signs.items() if sign > 0])}, and below it "
            f"{_for([name for name, sign in signs.items() if sign < 0])}."
        )
    fits = {way: {form: _errors(found, way, form) for form in FORMS} for way in WAYS}
    for way in WAYS:
        claims.append(f"Of the two forms, the curve of {way} is nearer to {_best_form(fits[way])}.")
    forms = [_best_form(fits[way]) for way in WAYS]
    short = (
        f"The gold score goes like {forms[0]} along best-of-n, and like {forms[1]} along the best policies, d being "
        "the root of the KL."
    )
    return Verdict(short, tuple(claims))


def _numbers(found: Found, name: str, way: str, key: str = "gold") -> Any:
    """(seeds, N) scores less that of the reference."""
    return np.array([row[key] for row in found["proxies"][name][way]])


def _shares(found: Found, name: str, way: str) -> Any:
    """(seeds, N) gold scores, of the most there is at the largest KL, on average over seeds."""
    return _numbers(found, name, way) / np.array(found["most"])[:, -1].mean()


def _fall(found: Found, name: str, way: str) -> Any:
    """(seeds,) by how much the gold score at the end is below that where its mean is largest."""
    shares = _shares(found, name, way)
    return shares[:, shares.mean(0).argmax()] - shares[:, -1]


def _rise(found: Found, name: str, way: str, key: str) -> Any:
    """(seeds,) by how much a score at the end is above that at `LATE`."""
    scores = _numbers(found, name, way, key)
    return scores[:, -1] - scores[:, CANDIDATES.index(LATE)]


def _lost(found: Found, name: str, way: str) -> Any:
    """(seeds,) what the proxy score rises by from `LATE` on, and the gold score does not."""
    return _rise(found, name, way, "proxy") - _rise(found, name, way, "gold")


def distances() -> Any:
    """(N,) d, the root of the KL."""
    return np.sqrt([kl_bound(n) for n in CANDIDATES])


def fit_form(roots: Any, gains: Any, form: str) -> tuple[Any, Any]:
    """Least squares: the numbers a and b of a form, and the curve (N,)."""
    columns = np.stack([roots, -FORMS[form](roots)], 1)
    numbers = np.linalg.lstsq(columns, gains, rcond=None)[0]
    return numbers, columns @ numbers


def _errors(found: Found, way: str, form: str) -> Any:
    """(proxies,) mean distance of a form from the mean curve, of the most there is."""
    errors = []
    for name in PROXIES:
        gains = _shares(found, name, way).mean(0)
        errors.append(np.abs(fit_form(distances(), gains, form)[1] - gains).mean())
    return np.array(errors)


def _best_form(errors: dict[str, Any]) -> str:
    """The form with the least error, on average over proxies."""
    return min(errors, key=lambda form: float(errors[form].mean()))


def _sign(numbers: Any) -> int:
    if np.abs(numbers).max() == 0:
        return 0
    interval = Interval.of(torch.tensor(numbers))
    return int(interval.low > 0) - int(interval.high < 0)


def _said(holds: bool) -> str:
    return "yes" if holds else "no"


def _for(names: Sequence[str]) -> str:
    return f"for {_join([f'`{name}`' for name in names])}" if names else "for no proxy"


def _join(names: Sequence[str]) -> str:
    if not names:
        return "none"
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]


# -- showing ---------------------------------------------------------------------------------------------------------


def texts(found: Found) -> dict[str, str]:
    """The tables and the numbers of the page."""
    columns = [CANDIDATES.index(n) for n in SHOWN]
    most = np.array(found["most"])
    rows = [["the gold score itself", "best policy", *[_percent(most[:, i] / most[:, -1].mean()) for i in columns]]]
    proxies = []
    fits = []
    for name in PROXIES:
        for way in WAYS:
            shares = _shares(found, name, way)
            rows.append([f"`{name}`", way, *[_percent(shares[:, i]) for i in columns]])
            scores = _numbers(found, name, way, "proxy")
            proxies.append([f"`{name}`", way, *[f"{scores[:, i].mean():.2f}" for i in columns]])
            line = [f"`{name}`", way]
            for form in FORMS:
                (a, b), curve = fit_form(distances(), shares.mean(0), form)
                line.append(f"a = {a:.2f}, b = {b:.2f}; {100 * np.abs(curve - shares.mean(0)).mean():.1f} %")
            fits.append(line)
    heads = [f"n = {n}" for n in SHOWN]
    kls = ["log n - (n - 1) / n, nats", "", *[f"{kl_bound(n):.2f}" for n in SHOWN]]
    return {
        "gold": make_table(["chosen by", "way", *heads], [*rows, kls]),
        "proxy": make_table(["chosen by", "way", *heads], proxies),
        "fits": make_table(["chosen by", "way", *FORMS], fits),
        "prompts": str(PROMPTS),
        "responses": f"{RESPONSES:,}",
        "last": f"{CANDIDATES[-1]:,}",
    }


def _percent(numbers: Any) -> str:
    """Mean and 95 % interval over seeds."""
    interval = Interval.of(torch.tensor(numbers))
    return f"{100 * interval.mean:.0f} % [{100 * interval.low:.0f}, {100 * interval.high:.0f}]"


def draw(found: Found) -> dict[str, Figure]:
    """Gold and proxy score by the root of the KL."""
    figure = blank_figure(10.5, 4.2)
    axes = figure.subplots(1, 2, sharey=True)
    roots = distances()
    most = np.array(found["most"])
    for each, way in zip(axes, WAYS, strict=True):
        dress(each, f"{way}: score less that of the reference", label="root of the KL, nats^0.5")
        each.plot(roots, most.mean(0), color=INK, linewidth=0.8, label="gold, chosen by itself")
        for name, color in zip(PROXIES, (ORANGE, GREEN, BLUE), strict=True):
            gold = _numbers(found, name, way)
            each.plot(roots, gold.mean(0), marker="o", markersize=4, color=color, label=f"gold, {name}")
            proxy = _numbers(found, name, way, "proxy")
            each.plot(roots, proxy.mean(0), "--", color=color, linewidth=1, label=f"{name} itself")
    legend_below(figure, axes[0], 4)
    return {"gold": figure}


PROTOCOL = Protocol(
    title="Over-optimisation: how does the gold score go with the KL, and is best-of-n kinder than PPO at equal KL?",
    seeds=range(10),
    measure=measure,
    judge=judge,
    texts=texts,
    draw=draw,
)
