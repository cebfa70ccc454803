"""What the benchmarks print."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from benchmarks.learning import beside, best, estimate, interval
from benchmarks.pages import fill, has_markers, markers, table
from benchmarks.suite import leaderboard, regraded, results, row, run
from lmgym.tasks import make_task


def test_an_interval_over_two_seeds_is_students_with_one_degree_of_freedom() -> None:
    half = math.tan(0.475 * math.pi) * 0.1  # Cauchy's distribution; 0.2 / sqrt(2) / sqrt(2) is the error
    assert interval([0.4, 0.6]) == f"0.500 ± {half:.3f}"


def test_of_one_seed_there_is_no_interval() -> None:
    assert interval([0.25]) == "0.250"


def test_runs_with_other_overrides_stand_elsewhere() -> None:
    out = Path("runs/suite")
    assert beside(out, []) == out
    assert beside(out, ["agent.lr=1e-3"]) != beside(out, ["agent.lr=1e-4"])
    assert beside(out, ["a=1", "b=x/y"]) == beside(out, ["b=x/y", "a=1"])
    assert beside(out, ["env.prompts=a/b.txt", "x=[1,2]"]) == out / "env.prompts_a_b.txt__x__1_2_"


def point(mean: float, half: float = 0.0) -> dict[str, float]:
    return {"mean": mean, "low": mean - half, "high": mean + half}


@pytest.mark.parametrize(
    ("lower", "upper", "value", "printed"),
    [
        (0.5, 0.5, 0.5, "0.5000"),
        (0.5, 0.75, 0.6, "0.6000 (0.5000 to 0.7500)"),
        (0.5, None, 0.51, "0.5100 (>= 0.5000)"),
        (0.5, None, None, ">= 0.5000"),  # not known to be above the reference
        (None, None, None, "unknown"),
    ],
)
def test_the_optimum_of_a_share_is_printed_and_its_bounds(
    lower: float | None, upper: float | None, value: float | None, printed: str
) -> None:
    ends = [None if end is None else point(end) for end in (lower, upper)]
    assert best({"lower": ends[0], "upper": ends[1], "value": value}) == printed


def test_the_reference_of_a_table_is_the_known_one_not_what_the_first_run_measured() -> None:
    after = {"return": point(0.4), "score": point(0.7), "kl": point(1.0), "normalised": point(0.8)}
    optimum = {"reference": point(0.0243), "lower": point(0.5), "upper": point(0.5), "value": 0.5}
    summary: dict[str, Any] = {"before": {"return": point(0.3)}, "after": after, "optimum": optimum}
    summary |= {"total_timesteps": 100, "train_seconds": 1.0}
    cells = [cell.strip() for cell in row("ppo", "noise-1", [summary]).split("|")]
    assert cells[1:8] == ["`ppo`", "`noise-1`", "0.0243", "0.5000", "0.400", "0.700", "1.000"]
    assert estimate(point(0.0243, 0.002)) == "0.0243 ± 0.0020"


def test_tables_go_between_their_markers(tmp_path: Path) -> None:
    after = {"return": point(0.4), "score": point(0.7), "kl": point(1.0), "normalised": point(0.8)}
    optimum = {"reference": point(0.0243), "lower": point(0.5), "upper": point(0.5), "value": 0.5}
    summary: dict[str, Any] = {"after": after, "optimum": optimum, "forward_tokens": 2_000_000, "backward_tokens": 0}
    runs = {("ppo", "noise-1"): [summary]}
    page = tmp_path / "page.md"
    start, end = markers("leaderboard")
    page.write_text(f"above\n{start}\nold\n{end}\nbelow\n")
    assert has_markers(page, "leaderboard")
    assert not has_markers(page, "results")
    fill(page, "leaderboard", leaderboard(["ppo"], ["noise-1"], runs))
    head, rule, line = table(page, "leaderboard")
    assert head.count("|") == rule.count("|") == line.count("|")
    assert line == "| `ppo` | 0.800 | 2.00 | 0.00 |"
    text = page.read_text()
    assert text.startswith(f"above\n{start}\n")
    assert text.endswith(f"{end}\nbelow\n")
    assert "old" not in text
    with pytest.raises(ValueError, match="must have the lines <!-- results -->"):
        fill(page, "results", results(["ppo"], ["noise-1"], runs))


def test_a_finished_run_is_graded_on_the_scale_that_is_known_now() -> None:
    optimum = make_task("echo-4").optima["test"]
    halfway = (optimum.reference + optimum.value) / 2
    after = {"return": point(halfway), "normalised": point(0.9)}
    summary: dict[str, Any] = {"after": after, "optimum": {"lower": point(9.0), "best_response": None}}
    again = regraded(summary, "echo-4")
    assert again["after"]["normalised"]["mean"] == pytest.approx(0.5, abs=1e-9)
    assert again["optimum"]["lower"]["mean"] == optimum.lower
    assert again["optimum"]["best_response"] is None
    assert summary["after"]["normalised"]["mean"] == 0.9


@pytest.mark.parametrize(
    ("override", "kept"),
    [
        ("agent.lr=1e-3", False),
        ("experiment=trl", True),
        ("+env.kl_coef=0.05", True),
        ("evaluation.split=train", True),
    ],
)
def test_a_run_of_another_problem_keeps_its_own_grade(tmp_path: Path, override: str, kept: bool) -> None:
    summary = {"after": {"return": point(1.0), "normalised": point(0.9)}, "optimum": {}}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    found = run(tmp_path, "echo-4", "ppo", 0, [override])
    assert (found["after"]["normalised"]["mean"] == 0.9) == kept
