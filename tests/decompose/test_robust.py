"""Robust PiSSA: the report's example, never worse than the SVD, and close to what brute force finds."""

from __future__ import annotations

import statistics

import pytest
import torch
from torch import Tensor

from pissa.decompose.robust import l1_approximation
from pissa.decompose.svd import TruncatedSVD, truncated_svd

EXAMPLE = torch.tensor([[3.0, 0, 0], [0, 1, 1], [0, 1, 1]])


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def dense(found: TruncatedSVD) -> Tensor:
    return (found.U * found.S) @ found.Vh


def l1(W: Tensor, approximation: Tensor) -> float:
    return float((W.double() - approximation.double()).abs().sum())


def test_the_report_s_example_holds() -> None:
    assert l1(EXAMPLE, dense(truncated_svd(EXAMPLE, 1))) == pytest.approx(4, abs=1e-5)
    assert l1(EXAMPLE, dense(l1_approximation(EXAMPLE, 1))) == pytest.approx(3, abs=1e-4)


@pytest.mark.parametrize("rank", [1, 4, 12])
@pytest.mark.parametrize("shape", [(40, 24), (24, 40)])
def test_the_error_is_never_above_the_truncated_svd_s_and_is_stated(shape: tuple[int, int], rank: int) -> None:
    for seed in range(4):
        W = normal(*shape, seed=seed) * torch.logspace(0, -1, shape[1])
        found = l1_approximation(W, rank)
        error = l1(W, dense(found))
        assert error < l1(W, dense(truncated_svd(W, rank)))
        assert found.certificate.mean_absolute_error == pytest.approx(error / W.numel(), rel=1e-4)
        assert torch.linalg.matrix_rank(dense(found).double(), rtol=1e-5) == rank
        assert (found.S.diff() <= 0).all()
        torch.testing.assert_close(found.U.mT @ found.U, torch.eye(rank), rtol=0, atol=1e-5)


def test_sparse_outliers_are_left_in_the_residual() -> None:
    generator = torch.Generator().manual_seed(3)
    L = normal(120, 5) @ normal(5, 90, seed=1)
    outliers = torch.rand(120, 90, generator=generator) < 0.05
    W = L + outliers * 50 * torch.randn(120, 90, generator=generator)
    found = l1_approximation(W, 5, iterations=200)
    assert float((dense(found) - L).norm() / L.norm()) < 0.02
    assert float((dense(truncated_svd(W, 5)) - L).norm() / L.norm()) > 0.5


def by_weighted_medians(W: Tensor, starts: int) -> float:
    """The best rank-1 l1 error that alternating exact fits find: for fixed u each entry of v is a weighted median."""

    def fit(M: Tensor, u: Tensor) -> Tensor:
        ratios, order = (M / u[:, None]).sort(0)
        weights = u.abs()[order].cumsum(0)
        return ratios.gather(0, (weights >= weights[-1:] / 2).int().argmax(0, keepdim=True))[0]

    best = float("inf")
    for seed in range(starts):
        u = normal(W.shape[0], seed=seed).double()
        for _ in range(50):
            v = fit(W, u.where(u != 0, 1e-12))
            u = fit(W.mT, v.where(v != 0, 1e-12))
        best = min(best, float((W - torch.outer(u, v)).abs().sum()))
    return best


def test_rank_one_is_close_to_the_best_of_many_exact_alternations() -> None:
    ratios = []
    for seed in range(12):
        W = normal(7, 6, seed=seed) + 3 * (normal(7, 6, seed=100 + seed) > 1)
        ratios.append(l1(W, dense(l1_approximation(W, 1))) / by_weighted_medians(W.double(), 60))
    assert min(ratios) > 1 - 1e-6, "the oracle must be at least as good"
    assert statistics.median(ratios) < 1.03 and max(ratios) < 1.15


def test_a_matrix_of_rank_r_is_reproduced_and_zero_stays_zero() -> None:
    W = normal(20, 3) @ normal(3, 15, seed=1)
    assert l1(W, dense(l1_approximation(W, 3))) < 1e-3
    assert l1(W, dense(l1_approximation(W, 6))) < 1e-3
    assert not dense(l1_approximation(torch.zeros(5, 4), 2)).any()


@pytest.mark.parametrize("factor", [1e-30, 1e25])
def test_weights_of_any_size_are_taken(factor: float) -> None:
    W = normal(16, 12)
    found, plain = l1_approximation(W * factor, 3), l1_approximation(W, 3)
    assert found.certificate.mean_absolute_error == pytest.approx(factor * plain.certificate.mean_absolute_error, 1e-2)
