"""What the gap V* - J of a policy is made of, in plain numbers."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lmgym.errors import InvalidArgumentError
from lmgym.intervals import Interval
from lmgym.models.texts import Texts
from lmgym.optimum.answer import check_solvable
from lmgym.optimum.lengths import is_late
from lmgym.tasks.base import Task

MOST_STATES = 20  # that are listed
LEAST_SHARE = 1e-12  # of a state that is listed: less is rounding


@dataclass(frozen=True)
class TokenOdds:
    """A token, how likely a policy makes it at a state, and how likely pi* does."""

    token: str
    probability: float
    optimal: float


@dataclass(frozen=True)
class StateGap:
    """What one state adds to the gap.

    Attributes:
        prompt: its text; None where the state stands for those of several prompts.
        response: the text so far; of a state of an automaton the last token alone.
        step: how many tokens of the response there are.
        automaton_state: that of the automaton which pays; None where states are written down as texts.
        visits: the share of all responses of the policy that come through, over all prompts.
        kl: nats, KL(pi(.|s) || pi*(.|s)).
        share: in units of the score, kl_coef gamma^step visits kl. Those of all states add up to the gap.
        too_likely: the token that the policy prefers most beyond pi*, by the difference of the probabilities.
        too_unlikely: the token that it neglects most.
    """

    prompt: str | None
    response: str
    step: int
    automaton_state: int | None
    visits: float
    kl: float
    share: Interval
    too_likely: TokenOdds
    too_unlikely: TokenOdds


@dataclass(frozen=True)
class Masses:
    """Probabilities of responses; the means over prompts.

    A best response has the highest score that any response to its prompt has.

    Attributes:
        best: of the best responses under the policy: its pass@1.
        optimal_best: under pi*. reference_best: under the reference.
        lost: what pi* has in responses that it makes likelier than the policy does: their total variation distance.
        overconfident: the part of `lost` in responses that the policy has made less likely than the reference.
        underexplored: the part in responses that it has left as likely, or raised, and not far enough.
    """

    best: float | None
    optimal_best: float | None
    reference_best: float | None
    lost: float | None
    overconfident: float | None
    underexplored: float | None


@dataclass(frozen=True)
class GapAnatomy:
    """Where V* - J comes from: kl_coef E_pi sum_t gamma^t KL(pi(.|s_t) || pi*(.|s_t)) (docs/optimum.md, (4)).

    All but `gap` and intervals of shares are means over the prompts. Shares are in units of the score.

    Attributes:
        method: "tree" (all responses), "automaton" (all states of its MDP) or "samples".
        optimum: V*. value: J; V* less the gap where both are from samples.
        gap: V* - J; from samples an interval.
        by_step: T, the share of each step; they add up to the gap.
        by_prompt: X by T, the share of each step in the gap of each prompt.
        running: T, the share of responses that have not ended before a step.
        entropy: T, nats, of the policy at the states of a step that it visits; None where all responses have ended.
        optimal_entropy: T, nats, of pi* at the same states.
        states: those with the largest shares, largest first.
        masses: of whole responses.
    """

    method: str
    optimum: float
    value: float
    gap: Interval
    by_step: list[Interval]
    by_prompt: list[list[float]]
    running: list[float]
    entropy: list[float | None]
    optimal_entropy: list[float | None]
    states: list[StateGap]
    masses: Masses


def check_additive(task: Task) -> None:
    """Raises `InvalidArgumentError` where the gap is no sum over states."""
    check_solvable(task)
    if is_late(task):
        raise InvalidArgumentError(
            f"`gamma` must be 1 where `dense_kl` is False for the gap to be a sum over states, got {task.gamma!r}: the "
            "KL of a token is then discounted by the length of its whole response, which the state does not know."
        )


def compare_tokens(lm: Texts, tokens: Tensor, log_probs: Tensor, optimal: Tensor) -> tuple[TokenOdds, TokenOdds]:
    """The token that a policy prefers most beyond pi*, and the one that it neglects most.

    Args:
        lm: gives their texts. tokens: (n,) ids. log_probs: (n,) of the policy. optimal: (n,) of pi*.
    """
    own = log_probs.exp()
    best = optimal.exp()
    found = []
    for i in (int((own - best).argmax()), int((best - own).argmax())):
        text = lm.pieces([], [int(tokens[i])])[0]
        found.append(TokenOdds(text, own[i].item(), best[i].item()))
    return found[0], found[1]


def divide(sums: Tensor, weights: Tensor) -> list[float | None]:
    """The mean of each step from (T,) sums and their (T,) weights; None where the weight is 0."""
    return [s / w if w > 0 else None for s, w in zip(sums.tolist(), weights.tolist(), strict=True)]
