"""Invariants of the fast SVD's study."""

from __future__ import annotations

import pytest
import torch
from passes import Quick

from studies.fast_svd import EXACT, NITERS, OURS, parts_of, principal
from studies.judge import by_seed


def test_errors_fall_with_iterations_and_ours_is_near_the_exact_svd(quick: Quick) -> None:
    results = quick("fast-svd")["results"]
    for seed in (0, 1):
        errors = [by_seed(results["matrices"], "error", method=niter, rank=4, seed=seed)[0] for niter in NITERS]
        assert errors[0] > errors[2] > errors[4] > 0
        assert by_seed(results["matrices"], "error", method=EXACT, rank=4, seed=seed) == [0]
        assert by_seed(results["matrices"], "error", method=OURS, rank=4, seed=seed)[0] < errors[0]
    assert all(len(row["losses"]) == 6 for row in results["training"])


def test_the_same_batches_and_nearly_the_same_factors_give_nearly_the_same_loss(quick: Quick) -> None:
    training = quick("fast-svd")["results"]["training"]
    exact, ours = (by_seed(training, lambda row: row["losses"][0], method=method) for method in (EXACT, OURS))
    assert exact == pytest.approx(ours, rel=1e-4)


def test_ten_times_as_fast_means_more_than_ten() -> None:
    def speed(ratio: float) -> bool:
        rows = [
            {"seed": seed, "rank": 4, "method": method, "error": 1.0, "seconds": ratio if method == EXACT else 1.0}
            for seed in (0, 1)
            for method in (*NITERS, EXACT)
        ]
        losses = [{"seed": s, "rank": 4, "method": m, "final_loss": 1.0} for s in (0, 1) for m in ("1", "16", EXACT)]
        part = next(iter(parts_of(rows, losses, 4).values()))
        return part.above_zero

    assert speed(11.0) and not speed(9.0)


def test_a_fast_svd_leaves_the_global_generator_alone() -> None:
    before = torch.random.get_rng_state()
    W = torch.randn(12, 8, generator=torch.Generator().manual_seed(0))
    first, second = (principal(W, 3, "1", seed=5) for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(before, torch.random.get_rng_state())
