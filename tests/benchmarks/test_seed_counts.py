"""The tables of how many seeds a comparison needs: they are made, and say that more seeds help."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.seed_counts import coverage_of_aggregates, coverage_of_improvement, coverage_table, power_lines


def test_widened_intervals_hold_the_truth_more_often_than_plain_ones() -> None:
    shares = coverage_of_aggregates(3, 3, 100, np.random.default_rng(0))
    assert min(shares[0] - shares[1], shares[2] - shares[3]) >= 0
    assert min(shares[0], shares[2]) >= 0.8
    assert min(coverage_of_improvement(3, 5, 50, np.random.default_rng(0))) >= 0.8


def test_every_line_has_every_cell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.seed_counts.RESAMPLES", 40)
    rng = np.random.default_rng(0)
    for lines in (list(coverage_table(2, rng)), list(power_lines(20, rng))):
        assert len({line.count("|") for line in lines}) == 1
