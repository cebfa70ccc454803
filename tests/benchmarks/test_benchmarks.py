"""What the benchmarks print."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.pages import fill, has_markers, markers, table
from benchmarks.tables import best, estimate, find_runs, leaderboard, results, row, time_to_goal
from lmgym.errors import InvalidArgumentError
from lmgym.tasks import make_task


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


def test_runs_of_a_directory_are_found_on_the_scale_that_is_known_now(tmp_path: Path) -> None:
    optimum = make_task("echo-4").optima["test"]
    halfway = (optimum.reference + optimum.value) / 2
    graded = {"return": point(halfway), "score": point(halfway), "kl": point(0.0), "normalised": point(0.9)}
    summary = {"before": graded, "after": graded, "optimum": {}, "train_seconds": 1.0, "total_timesteps": 9}
    summary |= {"forward_tokens": 1, "backward_tokens": 1}
    config = {"task": "echo-4", "seed": 3, "total_timesteps": 9, "env": {}, "evaluation": {"split": "test"}}
    run = tmp_path / "ppo-echo-4-3"  # as the command has called them before there was a comparison
    run.mkdir()
    (run / "summary.json").write_text(json.dumps(summary))
    (run / "config.yaml").write_text(json.dumps({**config, "agent": {"_target_": "agents.algorithms.ppo.PPO"}}))
    (found,) = find_runs([tmp_path], ["ppo"], ["echo-4"])["ppo", "echo-4"]
    assert found["after"]["normalised"]["mean"] == pytest.approx(0.5, abs=1e-9)
    assert row("ppo", "echo-4", [found]).endswith("**0.500** |")
    with pytest.raises(InvalidArgumentError, match="must hold finished runs of rloo on echo-4"):
        find_runs([tmp_path], ["rloo"], ["echo-4"])


def test_a_seed_that_never_gets_there_counts_in_the_time_of_a_speedrun() -> None:
    def ended(seconds: float | None) -> dict[str, Any]:
        point = None if seconds is None else {"step": 10, "seconds": seconds, "forward_tokens": 1e6 * seconds}
        return {"solved_at": {"0.5": None, "0.9": point}}

    assert time_to_goal([ended(3.0), ended(1.0), ended(2.0)]) == "2.0 s, 2.00 M (3 of 3 seeds)"
    assert time_to_goal([ended(1.0), ended(None), ended(2.0)]) == "2.0 s, 2.00 M (2 of 3 seeds)"
    assert time_to_goal([ended(1.0), ended(None), ended(None)]) == "not reached (1 of 3 seeds)"
    assert time_to_goal([{"solved_at": None}]) == "not reached (0 of 1 seeds)"
