"""How often an interval of an evaluation holds the truth: `python -m benchmarks.coverage [--tasks rare echo-4 ...]`.

On a task that is solved exactly, an episode of an optimal policy is a draw from a known distribution: its score has
one, and its log-ratio is a function of its score,

    log pi*/pi_ref (y)  =  (score(y) - V*(x)) / kl_coef

at gamma = 1. So evaluations are simulated by the thousand without a model, and graded by `lmgym.intervals.of_episodes`,
as `lmgym.evaluation.evaluate` does it. The policies are the reference, pi*, and one between: the one that is optimal at
8 times the price of a nat. `--write docs/trust.md` puts the table between its markers.

Shapes: X prompts, S samples a prompt, K outcomes.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.pages import fill
from lmgym.automata import Automaton
from lmgym.intervals import Interval, of_episodes
from lmgym.optimum.answer import expected_reward
from lmgym.optimum.automaton import AutomatonMDP, AutomatonPolicy, AutomatonSolution, ReferenceTable
from lmgym.optimum.verifiable import VerifiablePolicy
from lmgym.tasks import Task, make_task
from lmgym.tasks.registry import registered_tasks

EPISODES = 4096  # of an evaluation by default
SMALL = (8, 2)  # samples a prompt
POLICIES = {"reference": 0.0, "between": 1 / 8, "pi*": 1.0}  # what the score is multiplied by
NAMES = ("return", "score", "kl")
MARKER = "coverage"
_POOL = 1 << 14  # episodes a prompt that stand for all, where outcomes are too many to write down

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Population:
    """Every outcome of an episode, with its probability.

    Attributes:
        numbers: what an episode measures, by name, each (X, K) or (1, K).
        probs: (X, K).
    """

    numbers: dict[str, Floats]
    probs: Floats

    def mean(self, name: str) -> float:
        """The truth: what the mean over prompts of an evaluation is in expectation."""
        return float((self.probs * self.numbers[name]).sum(1).mean())

    def draw(self, samples: int, rng: np.random.Generator) -> dict[str, torch.Tensor]:
        """What S episodes of each prompt measure: (X, S) each."""
        prompts, outcomes = self.probs.shape
        uniforms = rng.random((prompts, samples))
        cumulative = self.probs.cumsum(1)
        rows = zip(cumulative, uniforms, strict=True)
        chosen = np.stack([np.searchsorted(row, u * row[-1], side="right") for row, u in rows]).clip(max=outcomes - 1)
        found = {}
        for name, x in self.numbers.items():
            found[name] = torch.from_numpy(np.take_along_axis(np.broadcast_to(x, self.probs.shape), chosen, 1))
        return found


def scores_of_reference(task: Task) -> tuple[Floats, Floats]:
    """(K,) scores of the test split and (X, K) how often the reference gets them, by dynamic programming."""
    reward = expected_reward(task)
    lm = task.reference("cpu")
    prompts = lm.encode_all(tuple(task.prompts["test"]))
    if hasattr(reward, "accepted_responses"):
        policy = VerifiablePolicy(task)
        success = np.exp([policy.table(ids).log_prob for ids in prompts])
        return np.array([0.0, 1.0]), np.stack([1 - success, success], 1)
    reference = ReferenceTable(lm)
    end_rule = task.end_rule(lm)
    solved: dict[int, AutomatonMDP] = {}
    found = []
    for ids in prompts:
        automaton = reward.for_prompt(ids)  # type: ignore[attr-defined]
        if id(automaton) not in solved:
            at_the_end = paid_at_the_end(automaton, task.max_new_tokens)
            solved[id(automaton)] = AutomatonMDP(reference, at_the_end, task, end_rule)
        scores, probs = solved[id(automaton)].score_distribution(torch.tensor([reference.first_context(ids)]))
        found.append((scores.numpy().round(9), probs[0].numpy()))
    every = np.unique(np.concatenate([scores for scores, _ in found]))
    table = np.zeros((len(found), len(every)))
    for row, (scores, probs) in zip(table, found, strict=True):
        np.add.at(row, np.searchsorted(every, scores), probs)
    return every, table


def paid_at_the_end(automaton: Automaton, horizon: int) -> Automaton:
    """An automaton that pays the same for up to T tokens, with what was collected on the way in its state."""
    if automaton.token_payments is None:
        return automaton
    start = (automaton.initial, 0.0)
    numbers = {start: 0}
    states = [start]
    depths = [0]
    transitions = []
    for state, collected in states:  # which grows
        number = len(transitions)
        row = []
        for column, after in enumerate(automaton.transitions[state]):
            reached = (int(after), round(collected + float(automaton.token_payments[state, column]), 9))
            if depths[number] == horizon:
                reached = (state, collected)  # never read on
            if reached not in numbers:
                numbers[reached] = len(states)
                states.append(reached)
                depths.append(depths[number] + 1)
            row.append(numbers[reached])
        transitions.append(row)
    payments = [float(automaton.payments[state]) + collected for state, collected in states]
    return Automaton(np.array(transitions), np.array(payments), automaton.classes)


def populations(task: Task) -> Iterator[Population]:
    """Those of `POLICIES`, in order."""
    if task.gamma < 1:
        yield from (_pool(task, strength) for strength in POLICIES.values())
        return
    scores, reference = scores_of_reference(task)
    for strength in POLICIES.values():
        log_weights = strength * scores / task.kl_coef
        with np.errstate(divide="ignore"):
            joint = np.log(reference) + log_weights
        log_z = np.logaddexp.reduce(joint, axis=1, keepdims=True)
        kl = log_weights - log_z
        numbers = {"score": scores[None], "kl": kl, "return": scores - task.kl_coef * kl}
        yield Population(numbers, np.exp(joint - log_z))


def _pool(task: Task, strength: float) -> Population:
    """Episodes of a policy that stand for all of its episodes: whatever they are, their mean is known."""
    lm = task.reference("cpu")
    prompts = lm.encode_all(tuple(task.prompts["test"]))
    policy = AutomatonPolicy(replace(task, kl_coef=task.kl_coef / max(strength, 1e-6), optima={}), prompts)
    solved = [(policy.solutions[policy.solution_index(ids)], policy.reference.first_context(ids)) for ids in prompts]
    generator = torch.Generator().manual_seed(0)
    rows = [_sample(task, solution, context, strength, generator) for solution, context in solved]
    numbers = {name: np.stack([row[name].numpy() for row in rows]) for name in rows[0]}
    return Population(numbers, np.full(numbers["score"].shape, 1 / _POOL))


def _sample(
    task: Task, solution: AutomatonSolution, context: int, strength: float, generator: torch.Generator
) -> dict[str, torch.Tensor]:
    """Return, score, KL and length of `_POOL` episodes of the reference (at strength 0) or of a solution."""
    mdp = solution.mdp
    contexts = torch.full((_POOL,), context)
    states = torch.full((_POOL,), mdp.automaton.initial)
    going = torch.ones(_POOL, dtype=torch.bool)
    returns, scores, kl, lengths = torch.zeros((4, _POOL), dtype=torch.float64)
    for t in range(mdp.horizon):
        log_ref = mdp.reference.probs(contexts).log()
        log_probs = solution.log_policy(t, contexts, states) if strength else log_ref
        tokens = torch.multinomial(log_probs.exp(), 1, generator=generator)
        log_ratio = (log_probs - log_ref).gather(1, tokens).squeeze(1)
        tokens = tokens.squeeze(1)
        ends = mdp.ends(t)[tokens, 0]
        paid = torch.where(ends, mdp.payments[tokens, states], 0.0)
        returns += going * task.gamma**t * (paid - task.kl_coef * log_ratio)
        scores += going * paid
        kl += going * log_ratio
        lengths += going
        states = mdp.delta[tokens, states]
        contexts = mdp.reference.next_contexts(contexts, tokens)
        going &= ~ends
    return {"return": returns, "score": scores, "kl": kl, "length": lengths}


def normal_interval(x: torch.Tensor) -> Interval:
    """1.96 standard errors of the samples, (X, S): what is wrong for few and for rare."""
    mean = x.mean().item()
    half = 1.96 * math.sqrt(x.var(1).mean().item() / x.numel())
    return Interval(mean, mean - half, mean + half)


@dataclass(frozen=True)
class Coverage:
    """How often intervals hold the truth, by the name of what is estimated; `normal` with 1.96 standard errors.

    `width` is the mean half-width of the interval of the return.
    """

    found: dict[str, float]
    normal: dict[str, float]
    width: float


def coverage(task: Task, population: Population, samples: int, replicates: int, rng: np.random.Generator) -> Coverage:
    """Simulates evaluations, S samples a prompt each."""
    scores = population.numbers["score"]
    held = dict.fromkeys(NAMES, 0)
    normal = dict.fromkeys(NAMES, 0)
    width = 0.0
    for _ in range(replicates):
        numbers = population.draw(samples, rng)
        intervals = of_episodes(
            numbers,
            kl_coef=task.kl_coef,
            gamma=task.gamma,
            horizon=task.max_new_tokens,
            score_range=(float(scores.min()), float(scores.max())),
        )
        for name in NAMES:
            truth = population.mean(name)
            held[name] += intervals[name].low <= truth <= intervals[name].high
            old = normal_interval(numbers[name])
            normal[name] += old.low - 1e-9 <= truth <= old.high + 1e-9
        width += (intervals["return"].high - intervals["return"].low) / 2
    shares = [{name: count / replicates for name, count in counts.items()} for counts in (held, normal)]
    return Coverage(shares[0], shares[1], width / replicates)


def exact_tasks(names: Sequence[str]) -> list[str]:
    """Those of the suite with a solved optimum, by name or by what stands before the "-"; all if none is named."""
    stored = {name: make_task(name).optima.get("test") for name in registered_tasks()}
    every = [name for name, optimum in stored.items() if optimum is not None and optimum.exact]
    return [name for name in every if not names or name in names or name.partition("-")[0] in names]


def row(name: str, replicates: int, few_replicates: int) -> str:
    """A line of the table: the lowest coverage of return, score and KL in each cell."""
    task = make_task(name)
    optimum = task.optima["test"]
    prompts = len(task.prompts["test"])
    samples = math.ceil(EPISODES / prompts)
    found = []
    small: dict[int, list[Coverage]] = {size: [] for size in SMALL}
    rng = np.random.default_rng(0)
    for population in populations(task):
        found.append(coverage(task, population, samples, replicates, rng))
        for size in SMALL:
            small[size].append(coverage(task, population, size, few_replicates, rng))
    width = 100 * found[-1].width / (optimum.value - optimum.reference)
    cells = [f"`{name}`", f"{prompts} x {samples}", *(f"{lowest([x.found]):.3f}" for x in found)]
    cells += [f"{width:.2g} %", f"{lowest([x.normal for x in found]):.3f}"]
    for size in SMALL:
        cells += [f"{lowest([x.found for x in small[size]]):.3f}", f"{lowest([x.normal for x in small[size]]):.3f}"]
    return f"| {' | '.join(cells)} |"


def lowest(shares: Sequence[dict[str, float]]) -> float:
    """Of several coverages."""
    return min(min(x.values()) for x in shares)


def table(names: Sequence[str], replicates: int, few_replicates: int) -> Iterator[str]:
    """The lines of the table."""
    heads = ["task", "prompts x samples", *POLICIES, "half-width at pi\\*", "1.96"]
    for size in SMALL:
        heads += [f"{size} samples", "1.96"]
    yield f"| {' | '.join(heads)} |".replace("| pi* |", "| pi\\* |")
    yield "|---" * len(heads) + "|"
    for name in names:
        yield row(name, replicates, few_replicates)


def main() -> None:
    """Simulates, and prints the table line by line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=[], help="by name, or by what stands before the '-'; default all")
    parser.add_argument("--replicates", type=int, default=1000, help="evaluations of the default size")
    parser.add_argument("--few-replicates", type=int, default=250, help="evaluations of 8 and of 2 samples a prompt")
    parser.add_argument("--write", type=Path, help="a page with the markers of the table")
    args = parser.parse_args()
    torch.set_num_threads(1)
    lines = []
    for line in table(exact_tasks(args.tasks), args.replicates, args.few_replicates):
        print(line, flush=True)
        lines.append(line)
    if args.write:
        fill(args.write, MARKER, lines)


if __name__ == "__main__":
    main()
