from __future__ import annotations

import copy
import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from agents.runs import picture, report
from agents.runs.recorder import Recorder


def interval(mean: float, half_width: float) -> dict[str, float]:
    return {"mean": mean, "low": mean - half_width, "high": mean + half_width}


SUMMARY: dict[str, Any] = {
    "before": {
        "return": interval(0.05, 0.045),
        "score": interval(0.05, 0.045),
        "gold_score": interval(0.1, 0.06),
        "kl": interval(0.0, 0.0),
        "length": interval(12.03, 0.2),
        "normalised": interval(0.0, 0.03),
    },
    "after": {
        "return": interval(1.1, 0.031),
        "score": interval(2.17, 0.03),
        "gold_score": interval(0.98, 0.05),
        "kl": interval(5.21, 0.12),
        "length": interval(110.14, 2.1),
        "normalised": interval(0.88, 0.025),
    },
    "optimum": {"lower": {"mean": 1.25, "low": 1.21, "high": 1.29}, "upper": None},
    "train_seconds": 61.34,
    "forward_tokens": 1234567,
    "backward_tokens": 890123,
    "total_timesteps": 102_400,
    "agent": "ppo",
    "task": "reviews",
    "seed": 3,
}


def changed(**parts: Any) -> dict[str, Any]:
    """The summary with some leaves replaced: `after__return=None`."""
    summary = copy.deepcopy(SUMMARY)
    for path, value in parts.items():
        *outer, last = path.split("__")
        target = summary
        for key in outer:
            target = target[key]
        target[last] = value
    return summary


def test_there_is_no_negative_zero_and_no_row_for_a_score_that_the_task_lacks() -> None:
    summary = changed(before__kl=interval(-0.0004, 0.0001))
    assert "-0.000" not in report.table(summary)
    assert "-0.001" in report.table(changed(before__kl=interval(-0.0006, 0.0001)))
    del summary["after"]["gold_score"], summary["before"]["gold_score"]
    assert "gold_score" not in report.table(summary)


def cells(row: dict[str, float]) -> list[str]:
    line = next(line for line in report.table(changed(after__score=row)).splitlines() if line.startswith("score"))
    return line.split()[4:]


def test_no_estimate_is_printed_as_if_it_were_certain() -> None:
    assert cells(interval(0.5, 0.0)) == ["0.500", "exact"]
    assert cells(interval(0.5, 4e-5)) == ["0.500", "±", "4e-05"]
    assert cells({"mean": 0.0, "low": 0.0, "high": 0.0009}) == ["0.000", "±", "0.001"]


def test_the_table_as_a_whole() -> None:
    assert report.table(SUMMARY) == "\n".join(
        [
            "ppo on reviews, seed 3, 102,400 tokens (mean ± 95 % interval)",
            "",
            "                           before             after",
            "return              0.050 ± 0.045     1.100 ± 0.031",
            "score               0.050 ± 0.045     2.170 ± 0.030",
            "gold_score          0.100 ± 0.060     0.980 ± 0.050",
            "kl (nats)           0.000 exact       5.210 ± 0.120",
            "length (tokens)     12.03 ± 0.20      110.1 ± 2.1",
            "normalised          0.000 ± 0.030     0.880 ± 0.025",
            "",
            "optimum           V* >= 1.25 [1.21, 1.29]",
            "                  V* itself is not known: the samples bound it from below alone",
            "train_seconds     61.3",
            "tokens read       1,234,567 forward, 890,123 backward",
            "",
            "J = 1.10 of V* >= 1.25: 0.88 of the gain",
        ]
    )


@pytest.mark.parametrize("unknown", [None, {"mean": None, "low": None, "high": None}, interval(math.nan, 0.0)])
def test_what_is_unknown_is_a_dash(unknown: Any) -> None:
    row = next(
        line for line in report.table(changed(after__gold_score=unknown)).splitlines() if line.startswith("gold_score")
    )
    assert row.split() == ["gold_score", "0.100", "±", "0.060", "-"]


def test_both_bounds_of_the_optimum() -> None:
    text = report.table(changed(optimum__upper={"mean": 1.4, "low": 1.35, "high": 1.45}))
    assert "V* >= 1.25 [1.21, 1.29]" in text
    assert "V* <= 1.40 [1.35, 1.45]" in text
    assert text.endswith("of the gain, and the gain is known to within 12.5 %")  # 0.15 of 1.2
    near = report.table(changed(optimum__upper={"mean": 1.26, "low": 1.26, "high": 1.26}))
    assert near.endswith("of the gain")  # less than 2 %


def test_a_return_above_the_upper_bound_is_said() -> None:
    upper = {"mean": 1.06, "low": 1.06, "high": 1.06}  # J is 1.1 +- 0.031
    assert "above the upper bound" in report.table(changed(optimum__upper=upper, optimum__value=1.05))
    for fine in (1.07, 1.4):  # within the interval, and above it
        upper = {"mean": fine, "low": fine, "high": fine}
        assert "above the upper bound" not in report.table(changed(optimum__upper=upper, optimum__value=1.05))
    exact = {"mean": 1.1, "low": 1.1, "high": 1.1}
    rounded = changed(optimum__upper=exact, optimum__lower=exact, after__return=interval(1.100001, 0.0))
    assert "above the upper bound" not in report.table(rounded)


def test_what_a_bound_takes_for_granted_is_said() -> None:
    assert "granted" not in report.table(changed(optimum__assumption=None))
    said = "no response " + "is long " * 12 + "here"
    text = report.table(changed(optimum__assumption=said))
    assert f"taken for granted: {said}" in " ".join(text.split())
    assert max(map(len, text.splitlines())) <= 100


def test_the_sentence_names_the_optimum_that_the_share_is_of() -> None:
    upper = {"mean": 1.4, "low": 1.4, "high": 1.4}
    text = report.table(changed(optimum__upper=upper, optimum__value=1.3))
    assert "J = 1.10 of V* ~ 1.30: 0.88 of the gain" in text
    text = report.table(changed(optimum__value=1.35, after__normalised=None))
    assert text.endswith(f"J = 1.10 of V* ~ 1.35: {1.05 / 1.3:.2f} of the gain")


def test_what_a_deterministic_policy_can_earn_is_said() -> None:
    assert "certain" not in report.table(changed(optimum__best_response=None))
    lines = report.table(changed(optimum__best_response=-0.537)).splitlines()
    (line,) = [line for line in lines if "certain" in line]
    assert line.strip() == "J <= -0.54 of a policy that is certain of every token"


def test_the_return_of_the_reference_is_said_and_no_estimate_stands_for_it() -> None:
    exact = changed(after__normalised=None, optimum__reference=interval(0.0243, 0.0), before__return=interval(0.5, 0.1))
    text = report.table(exact)
    assert "reference         J_ref = 0.0243\n" in text
    assert text.endswith(f"{(1.1 - 0.0243) / (1.25 - 0.0243):.2f} of the gain")  # not (1.1 - 0.5) / (1.25 - 0.5)
    assert "J_ref = 0.02 [0.01, 0.03]" in report.table(changed(optimum__reference=interval(0.02, 0.01)))
    assert "J_ref" not in report.table(SUMMARY)


def test_why_nothing_is_known_of_the_optimum_is_said() -> None:
    text = report.table(changed(optimum={"lower": None, "upper": None, "unknown": "the reward has noise"}))
    assert "optimum           V* is not known: the reward has noise\n" in text
    assert "V* is not known" not in report.table(SUMMARY)


def test_a_noisy_score_stands_beside_the_one_without_noise() -> None:
    assert "sampled score" not in report.table(SUMMARY)
    lines = report.table(changed(after__sampled_score=interval(2.0, 0.5))).splitlines()
    (line,) = [line for line in lines if line.startswith("sampled score")]
    assert line.split() == ["sampled", "score", "-", "2.000", "±", "0.500"]


def test_a_solved_task_has_an_equals_sign() -> None:
    exact = interval(1.25, 0.0)
    text = report.table(changed(optimum={"lower": exact, "upper": exact}))
    assert "V* = 1.2500\n" in text
    assert text.endswith("J = 1.10 of V* = 1.25: 0.88 of the gain")
    assert text.count("V* ") == 2


def test_no_share_where_no_gain_can_be_told_from_noise() -> None:
    noise = changed(after__normalised=None, before__return=interval(1.2499, 0.1), optimum__value=None)
    assert report.table(noise).endswith("\n\nJ = 1.10 of V* >= 1.25")
    assert report.share_of_gain(noise) is None


def test_the_share_of_the_gain_is_worked_out_where_it_was_not_evaluated() -> None:
    text = report.table(changed(after__normalised=None, before__return=interval(0.75, 0.1)))
    assert text.endswith("J = 1.10 of V* >= 1.25: 0.70 of the gain")  # not 1.10 / 1.25 = 0.88


def test_no_share_where_the_bound_is_below_the_reference() -> None:
    text = report.table(changed(after__normalised=None, before__return=interval(1.3, 0.1)))
    assert text.endswith("J = 1.10 of V* >= 1.25")


@pytest.mark.parametrize("optimum", [None, {}, {"lower": None, "upper": None}])
def test_no_sentence_without_an_optimum(optimum: Any) -> None:
    assert "V*" not in report.table(changed(optimum=optimum))


def test_responses_fit_the_terminal() -> None:
    row = {
        "prompt": "the film was",
        "before": "dull " * 60,
        "before_score": -0.314,
        "after": "",
        "after_score": 12.0,
    }
    lines = report.samples_table([row, row]).splitlines()
    assert max(map(len, lines)) <= 100
    assert lines[:3] == ["         score   response", "", "prompt           the film was"]
    assert lines[3].startswith("before   -0.31   dull dull")
    assert lines[4].startswith("                 dull")
    assert lines.count("after   +12.00   (empty)") == 2
    assert lines.count("") == 2
    assert sum(line.count("dull") for line in lines) == 120


def test_a_response_cannot_drive_the_terminal() -> None:
    row = {"prompt": "a\nb", "before": "\x1b[31mred\r\n", "before_score": 0.0, "after": "x\ty", "after_score": 0.0}
    text = report.samples_table([row])
    assert "\x1b" not in text
    assert "\r" not in text
    assert [line[17:] for line in text.splitlines()[2:]] == ["a b", "[31mred", "x y"]


def test_json_is_whole_and_strict(tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    report.write_json(path, {"kl": math.nan, "rows": [1, (math.inf, 2.5)], "name": "µ", "yes": True})
    assert json.loads(path.read_text()) == {"kl": None, "rows": [1, [None, 2.5]], "name": "µ", "yes": True}
    with pytest.raises(TypeError, match="not JSON serializable"):
        report.write_json(path, {"model": object()})
    assert json.loads(path.read_text())["yes"], "a failed write harmed the old file"
    assert [file.name for file in tmp_path.iterdir()] == ["summary.json"]


def write_metrics(directory: Path, names: list[str], rows: int) -> Path:
    rng = np.random.default_rng(0)
    with Recorder(directory, total=max(1, rows) * 1280, progress=False) as recorder:
        for row in range(1, rows + 1):
            values = {name: 1 - math.exp(-row / 10) + rng.normal(0, 0.05) for name in names}
            recorder.record(row * 1280, values)
    return recorder.path


NAMES = ["rollout/return", "rollout/score", "rollout/gold_score", "rollout/kl", "rollout/length", "train/entropy"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("names", "rows", "summary"),
    [
        (NAMES, 60, SUMMARY),
        (NAMES, 1, SUMMARY),
        (NAMES, 0, SUMMARY),
        (["rollout/return"], 10, changed(optimum=None, after__gold_score=None, before__return=None)),
    ],
    ids=["full", "one row", "no row", "return alone"],
)
def test_a_picture_of_whatever_was_recorded(tmp_path: Path, names: list[str], rows: int, summary: dict) -> None:
    metrics = write_metrics(tmp_path, names, rows)
    picture.curves(metrics, summary, tmp_path / "curves.png")
    with Image.open(tmp_path / "curves.png") as image:
        assert image.format == "PNG"
        assert image.size == (1500, 960)
        assert len(image.convert("RGB").getcolors(1 << 24) or []) > 10, "an empty picture"


def shown(figure: Any) -> list[str]:
    """Titles of the axes that are visible."""
    axes = [axes for axes in figure.axes if axes.get_visible()]
    return [axes.get_title(loc) for axes in axes for loc in ("left", "right") if axes.get_title(loc)]


def row(step: int, **values: float) -> dict[str, Any]:
    return {"step": step, **{name.replace("__", "/"): value for name, value in values.items()}}


def test_an_agent_that_learns_nothing_is_a_point_beside_the_reference() -> None:
    figure = picture.figure_of([], SUMMARY)
    figure.draw_without_rendering()
    assert shown(figure)[-1] == "response length (tokens)"
    for axes in figure.axes[2:]:
        assert [tick.get_text() for tick in axes.get_xticklabels()] == ["reference", "ppo"]
        assert axes.get_lines(), "empty axes"


def test_an_agent_that_fits_examples_shows_its_loss() -> None:
    rows = [row(step, train__loss=2.0 / step, train__reference_loss=2.0) for step in (1, 2, 3)]
    assert shown(picture.figure_of(rows, SUMMARY))[-1] == "loss"
    rows = [row(step, train__loss=0.7, train__accuracy=0.5) for step in (1, 2, 3)]
    assert shown(picture.figure_of(rows, SUMMARY))[-2:] == ["loss", "accuracy"]


def test_what_was_neither_recorded_nor_graded_has_no_axes() -> None:
    summary = changed()
    for when in ("before", "after"):
        del summary[when]["kl"]
    rows = [row(1, rollout__return=0.1, rollout__score=0.1)]
    figure = picture.figure_of(rows, summary)
    assert shown(figure) == ["return per episode", "score", "response length (tokens)"]
    figure.draw_without_rendering()
    steps = [tick.get_text() for axes in figure.axes for tick in axes.get_xticklabels()]
    assert not [text for text in steps if text.endswith("m")]  # thousandths of a token


def test_the_title_names_what_stands_in_place_of_the_tasks_own() -> None:
    replaced = {"model": os.sep.join(["", "home", "me", "models", "mine"]), "reward": "my_rewards:brevity"}
    assert report.problem(SUMMARY) == "reviews"
    named = "reviews with model models/mine, reward my_rewards:brevity"
    assert report.problem(changed(replaced=replaced)) == named
    assert named in report.table(changed(replaced=replaced)).splitlines()[0]
    assert named in picture.figure_of([], changed(replaced=replaced)).get_suptitle()


def test_less_than_the_reference_is_said_in_words() -> None:
    worse = changed(after__return=interval(-36, 1), after__normalised=interval(-30, 1))
    assert report.table(worse).endswith("-30.00 of the gain, worse than the reference")
    assert picture.figure_of([], worse).get_suptitle() == "ppo on reviews, seed 3: J = -36.00, below the reference"
    alike = changed(after__return=interval(0.04, 0.1), after__normalised=interval(-0.01, 0.1))
    assert report.table(alike).endswith("-0.01 of the gain, no better than the reference")


def test_a_value_that_was_not_finite_is_a_gap_in_the_curve() -> None:
    rows = [{"step": 1, "train/entropy": 2.0}, {"step": 2, "train/entropy": None}, {"step": 3, "train/entropy": 1.0}]
    steps, values = picture._series(rows, "train/entropy")
    assert steps.tolist() == [1, 3]
    assert values.tolist() == [2.0, 1.0]


def test_the_running_mean_keeps_a_constant_and_a_line_in_the_middle() -> None:
    assert picture._running_mean(np.full(200, 3.0)) == pytest.approx(np.full(200, 3.0))
    line = np.arange(200.0)
    assert picture._running_mean(line)[5:-5] == pytest.approx(line[5:-5])
    assert picture._running_mean(line)[0] == pytest.approx(2.5)  # the mean of 0..5, what there is of the window
    assert picture._running_mean(np.array([7.0])).tolist() == [7.0]


def test_the_picture_leaves_pyplot_alone(tmp_path: Path) -> None:
    import matplotlib
    from matplotlib import pyplot

    before = dict(matplotlib.rcParams)
    picture.curves(write_metrics(tmp_path, NAMES, 5), SUMMARY, tmp_path / "curves.png")
    assert pyplot.get_fignums() == []
    assert dict(matplotlib.rcParams) == before
