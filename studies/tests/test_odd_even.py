"""Invariants of the odd-even study."""

from __future__ import annotations

import statistics

import pytest
from passes import Quick

from studies.odd_even import METHODS, adapted_run, best_rate, parts_for, pretrained


def test_all_methods_start_from_the_same_function_and_batches(quick: Quick) -> None:
    results = quick("odd-even")["results"]
    for seed in (0, 1):
        starts = [row["losses"][0] for row in results["rows"] if row["seed"] == seed]
        assert starts == pytest.approx([starts[0]] * len(starts), rel=1e-4)
    for method in METHODS:
        best = [
            row for row in results["rows"] if (row["method"], row["rate"]) == (method, results["best_rate"][method])
        ]
        assert all(row["losses"][-1] < row["losses"][0] for row in best)


def test_the_best_rate_has_the_lowest_mean_loss(quick: Quick) -> None:
    rows = quick("odd-even")["results"]["rows"]
    for method in METHODS:
        means = {
            rate: statistics.fmean(r["mean_loss"] for r in rows if (r["method"], r["rate"]) == (method, rate))
            for rate in (1e-3, 1e-2)
        }
        assert best_rate(rows, method, 4) == min(means, key=means.__getitem__)


def test_a_run_repeats_and_leaves_the_pretrained_model_alone() -> None:
    before = [parameter.clone() for parameter in pretrained(None, 0).parameters()]
    first, second = (adapted_run(None, 4, 3, 1e-2, 0, "pissa") for _ in range(2))
    assert first == second
    assert all((a == b).all() for a, b in zip(before, pretrained(None, 0).parameters(), strict=True))


def test_digits_are_parted_by_parity() -> None:
    for odd in (True, False):
        train, test = parts_for(None, odd, 0)
        assert {int(label) % 2 for label in [*train[1], *test[1]]} == {int(odd)}
        assert len(train[1]) == pytest.approx(4 * len(test[1]), rel=0.01)
        assert float(train[0].abs().max()) <= 1
