"""GLUE's metrics on cases that can be counted by hand, and what is said where a package is missing."""

from __future__ import annotations

import math
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pissa.errors import MissingExtraError
from pissa.evaluation.metrics import METRICS, accuracy, check_metrics, f1, matthews, pearson, spearman

# 4 right of 6: two hits, two right rejections, one miss, one false alarm
LABELS, GUESSES = [1, 1, 1, 0, 0, 0], [1, 1, 0, 1, 0, 0]


def test_metrics_of_classes_are_what_one_counts_by_hand() -> None:
    assert accuracy(GUESSES, LABELS) == pytest.approx(4 / 6)
    assert f1(GUESSES, LABELS) == pytest.approx(2 * 2 / (3 + 3))
    assert matthews(GUESSES, LABELS) == pytest.approx((2 * 2 - 1 * 1) / math.sqrt(3 * 3 * 3 * 3))


def test_correlations_are_what_one_counts_by_hand_also_with_ties() -> None:
    values, labels = [1.0, 2.0, 2.0, 4.0], [0.0, 1.0, 2.0, 3.0]
    assert pearson(values, labels) == pytest.approx(4.5 / math.sqrt(4.75 * 5))
    assert spearman(values, labels) == pytest.approx(4.5 / math.sqrt(4.5 * 5))  # ranks 1, 2.5, 2.5, 4


@pytest.mark.parametrize("name", ["pearson", "spearman", "matthews"])
@pytest.mark.parametrize("count", [1, 3])
def test_a_constant_side_correlates_with_nothing(name: str, count: int) -> None:
    assert METRICS[name]([1.0] * count, [0.0, 1.0, 1.0][:count]) == 0.0
    assert METRICS[name]([0.0, 1.0, 1.0][:count], [1.0] * count) == 0.0


def test_a_class_that_is_nowhere_has_an_f1_of_0() -> None:
    assert f1([0, 0], [0, 0]) == 0.0


@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), min_size=1, max_size=30))
def test_every_metric_is_a_finite_number_within_its_range(pairs: list[tuple[int, int]]) -> None:
    guesses, labels = zip(*pairs, strict=True)
    for name, metric in METRICS.items():
        assert -1.0000001 <= metric(guesses, labels) <= 1.0000001, name
    assert accuracy(labels, labels) == 1.0


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy.stats", None)
    with pytest.raises(MissingExtraError, match=r"scipy: pip install 'pissa\[eval\]'"):
        check_metrics()
