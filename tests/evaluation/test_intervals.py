"""Intervals against published values and against a normal approximation."""

from __future__ import annotations

import statistics

import numpy as np
import pytest

from pissa.evaluation.intervals import bootstrap, wilson


@pytest.mark.parametrize(
    ("successes", "count", "low", "high"), [(0, 10, 0.0, 0.2775), (5, 10, 0.2366, 0.7634), (10, 10, 0.7225, 1.0)]
)
def test_wilson_interval_has_its_published_values(successes: int, count: int, low: float, high: float) -> None:
    assert wilson(successes, count) == pytest.approx((low, high), abs=2e-4)


@pytest.mark.parametrize(("successes", "count"), [(0, 10), (5, 10), (10, 10), (37.5, 150.2)])
def test_wilson_is_the_inverted_score_test(successes: float, count: float) -> None:
    for bound in wilson(successes, count):
        share = successes / count
        assert (share - bound) ** 2 == pytest.approx(1.96**2 * bound * (1 - bound) / count, abs=1e-12)


def test_bootstrap_of_a_mean_is_near_the_normal_interval() -> None:
    rows = list(np.random.default_rng(0).normal(3.0, 2.0, 400))
    found = bootstrap(rows, statistics.fmean)
    assert found is not None
    half = 1.96 * statistics.pstdev(rows) / 20
    assert found == pytest.approx((statistics.fmean(rows) - half, statistics.fmean(rows) + half), abs=0.03)
    assert found == bootstrap(rows, statistics.fmean)


def test_bootstrap_says_nothing_where_nothing_can_be_said() -> None:
    assert bootstrap([1.0], statistics.fmean) is None
    assert bootstrap([1.0, 2.0], lambda rows: float("nan")) is None
