"""What the benchmarks print."""

import math
from pathlib import Path

from benchmarks.learning import beside, interval


def test_an_interval_over_two_seeds_is_students_with_one_degree_of_freedom() -> None:
    half = math.tan(0.475 * math.pi) * 0.1  # the law with one degree is Cauchy's; 0.2 / sqrt(2) / sqrt(2) is the error
    assert interval([0.4, 0.6]) == f"0.500 ± {half:.3f}"


def test_of_one_seed_there_is_no_interval() -> None:
    assert interval([0.25]) == "0.250"


def test_runs_with_other_overrides_stand_elsewhere() -> None:
    out = Path("runs/suite")
    assert beside(out, []) == out
    assert beside(out, ["agent.lr=1e-3"]) != beside(out, ["agent.lr=1e-4"])
    assert beside(out, ["a=1", "b=x/y"]) == beside(out, ["b=x/y", "a=1"])
    assert beside(out, ["task.prompts=a/b.txt", "x=[1,2]"]) == out / "task.prompts_a_b.txt__x__1_2_"
