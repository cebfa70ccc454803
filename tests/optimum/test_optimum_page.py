"""The numbers that docs/optimum.md works out by hand: each cell says what it is, and the solvers say the same."""

from __future__ import annotations

import math
import types
from collections.abc import Callable

import pytest
import torch
from pages import ROOT, blocks, execute, table

from benchmarks import gradients
from lmgym.optimum import Optimum, solve
from lmgym.optimum.automaton import solve_automaton
from lmgym.optimum.tree import Tree, solve_tree
from lmgym.tasks import Task

PAGE = ROOT / "docs" / "optimum.md"
SETTINGS = [(1.0, True), (0.5, True), (0.5, False)]  # columns: gamma, dense_kl
EOS = 0
A = 1
ROUNDING = 5.1e-5  # of four digits
QUANTITIES = table(PAGE, "quantity")
RESPONSES = table(PAGE, "response")
SOLVERS = {"tree": solve_tree, "automaton": solve_automaton}


def number(cell: str) -> float:
    """What a cell says, `expression = decimal`, once the two agree."""
    expression, decimal = cell.split(" = ")
    names = {"ln": math.log, "sqrt": math.sqrt, "e": math.e}
    for name in ("u", "lam"):
        if name != expression and QUANTITIES[name][2].split(" = ")[0] != expression:
            names[name] = float(QUANTITIES[name][2].split(" = ")[1])
    value = eval(expression, {"__builtins__": {}}, names)
    assert float(decimal) == pytest.approx(value, abs=1.5e-4), cell  # u and lam are rounded themselves
    return float(decimal)


@pytest.fixture(scope="module")
def problem() -> Callable[[float, bool], Task]:
    """The page's own code."""
    (block,) = [block for block in blocks(PAGE) if block.language == "python" and "def problem" in block.code]
    module = types.ModuleType("by_hand")
    execute(block, module)
    return module.problem


def look(optimum: Optimum) -> dict[str, float]:
    """What a solver says, under the names of the page."""
    state = optimum.policy.begin(torch.tensor([[A]]), torch.tensor([[True]]), 2)
    found = {
        "V*(x)": optimum.value,
        "J(pi_ref)": optimum.reference,
        "V* - J(pi_ref)": optimum.value - optimum.reference,
    }
    for name in ("x", "x a"):
        log_pi = state.logits[0].log_softmax(-1)
        value = float(state.values[0])
        found |= {
            f"pi*(a) at {name}": math.exp(log_pi[A]),
            f"pi*(EOS) at {name}": math.exp(log_pi[EOS]),
            f"V*({name})": value,
        }
        for token, action in ((EOS, "EOS"), (A, "a")):
            found[f"Q*({name}, {action})"] = value + float(log_pi[token]) - math.log(1 / 2)  # (2), at b = 1
        if name == "x":
            state.step(torch.tensor([A]))
    found["V*(x)"] = optimum.value
    return found


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("column", range(3))
def test_the_quantities_are_those_of_the_solvers(
    problem: Callable[[float, bool], Task], solver: str, column: int
) -> None:
    found = look(SOLVERS[solver](problem(*SETTINGS[column])))
    compared = 0
    for name, cells in QUANTITIES.items():
        if name in found and cells[column]:
            assert found[name] == pytest.approx(number(cells[column]), abs=ROUNDING), name
            compared += 1
    assert compared == (10, 10, 5)[column]


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("column", range(3))
def test_the_responses_are_those_of_the_solvers(
    problem: Callable[[float, bool], Task], solver: str, column: int
) -> None:
    found = look(SOLVERS[solver](problem(*SETTINGS[column])))
    after_a = found["pi*(a) at x"]
    probs = {
        "EOS": found["pi*(EOS) at x"],
        "a EOS": after_a * found["pi*(EOS) at x a"],
        "a a": after_a * found["pi*(a) at x a"],
    }
    assert RESPONSES.keys() == probs.keys()
    for name, prob in probs.items():
        assert prob == pytest.approx(number(RESPONSES[name][2 + column]), abs=ROUNDING)


def test_the_reference_and_the_scores_are_those_of_the_task(problem: Callable[[float, bool], Task]) -> None:
    tree = Tree.of(problem(1.0, True))
    names = [" ".join(["EOS", "a"][i] for i in ids[:n]) for ids, n in zip(*_ids(tree), strict=True)]
    probs = tree.episodes.ref_log_probs.sum(1).exp().tolist()
    said = {name: [number(cell) for cell in cells[:2]] for name, cells in RESPONSES.items()}
    for name, prob, score in zip(names, probs, tree.scores[0].tolist(), strict=True):
        assert said.pop(name) == pytest.approx([prob, score], abs=ROUNDING)
    assert not said


def _ids(tree: Tree) -> tuple[list[list[int]], list[int]]:
    return tree.episodes.response_ids.tolist(), tree.episodes.lengths.tolist()


def test_the_gap_is_a_kl() -> None:
    """Equation (4), and (5a), from the numbers on the page alone."""
    said = {name: [number(cell) for cell in cells] for name, cells in RESPONSES.items()}
    for column in (0, 1):
        assert number(QUANTITIES["by (4)"][column]) == pytest.approx(number(QUANTITIES["V* - J(pi_ref)"][column]))
    kl = sum(cells[0] * math.log(cells[0] / cells[2]) for cells in said.values())
    assert kl == pytest.approx(number(QUANTITIES["by (4)"][0]), abs=1e-3)
    late = sum(
        (1.0 if name == "EOS" else 0.5) * (cells[0] * math.log(cells[0] / cells[4]) - cells[0] + cells[4])
        for name, cells in said.items()
    )
    assert late == pytest.approx(number(QUANTITIES["V* - J(pi_ref)"][2]), abs=1e-3)


def test_the_multiplier_makes_the_responses_sum_to_1() -> None:
    """Equation (5), from the numbers on the page alone."""
    lam = number(QUANTITIES["lam"][2])
    assert math.exp(-lam) == pytest.approx(number(QUANTITIES["u"][2]), abs=1e-4)
    for name, cells in RESPONSES.items():
        reference, score, late = (number(cells[i]) for i in (0, 1, 4))
        d = 1.0 if name == "EOS" else 0.5
        assert reference * math.exp(score - 1 - lam / d) == pytest.approx(late, abs=2e-4)
    assert sum(number(cells[4]) for cells in RESPONSES.values()) == pytest.approx(1, abs=2e-4)


def test_every_cell_is_read() -> None:
    for cells in [*QUANTITIES.values(), *RESPONSES.values()]:
        for cell in filter(None, cells):
            number(cell)
    assert len(QUANTITIES) == 13


def test_solve_takes_the_automaton(problem: Callable[[float, bool], Task]) -> None:
    assert [solve(problem(*setting)).method for setting in SETTINGS] == ["automaton"] * 3


def test_the_fields_are_those_of_an_optimum() -> None:
    assert table(PAGE, "field of `Optimum`").keys() == Optimum.__dataclass_fields__.keys()


@pytest.mark.slow
def test_the_gradients_are_those_of_the_benchmark() -> None:
    measured = {
        (name, f"{nats:g}"): [bias, cosine, variance, with_value]
        for nats, name, bias, cosine, variance, with_value in gradients.measure()
    }
    lines = [line.strip("| ").split(" | ") for line in PAGE.read_text(encoding="utf-8").splitlines()]
    written = {(cells[1], cells[0]): cells[2:] for cells in lines if len(cells) == 6 and cells[0] in ("0.1", "1", "3")}
    assert written.keys() == measured.keys()
    for key, numbers in measured.items():
        said = [float(cell) for cell in written[key]]
        assert said[:2] == pytest.approx(numbers[:2], abs=2e-3), key
        assert said[2:] == pytest.approx(numbers[2:], rel=5e-3, abs=0.06), key
