"""Invariants of the l1 solvers' study."""

from __future__ import annotations

import math

import pytest
import torch
from passes import Quick

from studies.judge import verdict_of
from studies.robust_solvers import DESCENT, OURS, SKETCH, SOLVERS, best_of, parts_of


def test_ours_is_never_worse_than_the_svd(quick: Quick) -> None:
    results = quick("robust-solvers")["results"]
    assert {row["layer"].rpartition(".")[2] for row in results["rows"]} == {"q_proj", "v_proj", "up_proj"}
    for row in results["rows"]:
        assert row[OURS]["error"] <= 1 + 1e-6 < row[SKETCH]["error"]
        assert all(row[solver]["seconds"] > 0 for solver in SOLVERS)
    assert len(results["matrices"]) == len(results["rows"]) / 2  # two seeds


def test_the_error_is_the_mean_magnitude_and_the_best_run_counts() -> None:
    W = torch.tensor([[3.0, 0, 0], [0, 1, 1], [0, 1, 1]])
    spike = torch.tensor([[1.0, 0, 0]]), torch.tensor([[3.0], [0], [0]])
    block = torch.tensor([[0.0, 1, 1]]), torch.tensor([[0.0], [1], [1]])
    error, seconds = best_of(W, [lambda: spike, lambda: block])
    assert error == pytest.approx(3 / 9)
    assert seconds >= 0


@pytest.mark.parametrize(
    ("error", "seconds", "verdict"),
    [(0.5, 0.5, "holds"), (0.5, 9, "holds in part"), (9, 0.5, "holds in part"), (9, 9, "does not hold here")],
)
def test_both_halves_of_the_claim_count(error: float, seconds: float, verdict: str) -> None:
    matrices = [
        {solver: {"error": 1.0, "seconds": 1.0} for solver in SOLVERS}
        | {DESCENT: {"error": error * nudge, "seconds": seconds * nudge}}
        for nudge in (0.9, 1.0, 1 / 0.9)
    ]
    parts = parts_of(matrices)
    assert [part.mean for part in parts.values()] == pytest.approx([-math.log10(error), -math.log10(seconds)])
    assert verdict_of(parts) == verdict


def test_solvers_are_timed_in_one_thread() -> None:
    before, seen = torch.get_num_threads(), []

    def look() -> tuple[torch.Tensor, torch.Tensor]:
        seen.append(torch.get_num_threads())
        return torch.ones(1, 2), torch.ones(2, 1)

    try:
        torch.set_num_threads(2)
        best_of(torch.ones(2, 2), [look])
        assert (seen, torch.get_num_threads()) == ([1], 2)
    finally:
        torch.set_num_threads(before)
