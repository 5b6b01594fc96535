"""CURA: exact where it must be, optimal where it says so, drawn as it says, and bad draws are seen."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from pissa import PissaConfig, split_weight
from pissa.config import CUR_CORES, CurCore
from pissa.decompose.cur import balanced, cur_approximation, drawn


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("core", CUR_CORES)
@pytest.mark.parametrize("shape", [(20, 14), (14, 20)])
def test_a_matrix_of_rank_r_is_reproduced(core: CurCore, shape: tuple[int, int]) -> None:
    W = normal(shape[0], 4) @ normal(4, shape[1], seed=1)
    for seed in range(5):
        A, B, certificate = cur_approximation(W, 4, core=core, seed=seed)
        torch.testing.assert_close(B @ A, W, rtol=1e-3, atol=1e-3)
        assert certificate.residual_norm is not None and certificate.residual_norm < 1e-4


@pytest.mark.parametrize("core", CUR_CORES)
def test_rows_and_columns_are_the_weight_s_own(core: CurCore) -> None:
    W, rank = normal(12, 10), 3
    A, B, _ = cur_approximation(W, rank, core=core, seed=2)
    cosines = torch.nn.functional.normalize(A, dim=1) @ torch.nn.functional.normalize(W, dim=1).mT
    rows = cosines.argmax(1)
    assert len(set(rows.tolist())) == rank and float(cosines.amax(1).min()) > 1 - 1e-5
    # B = C·M spans r of W's columns
    basis = torch.linalg.qr(B.double())[0]
    distance = (W.double() - basis @ (basis.mT @ W.double())).norm(dim=0) / W.double().norm(dim=0)
    assert int((distance < 1e-5).sum()) == rank
    if core == "intersection":
        columns = (distance < 1e-5).nonzero().flatten()
        inverse = torch.linalg.inv(W.double()[rows][:, columns])
        expected = W.double()[:, columns] @ inverse @ W.double()[rows]
        torch.testing.assert_close((B @ A).double(), expected, rtol=1e-4, atol=1e-4)


def test_the_optimal_core_is_the_least_squares_one() -> None:
    W, rank = normal(9, 8), 3
    A, B, _ = cur_approximation(W, rank, seed=4)
    # vec(C M R) = (C ⊗ Rᵀ) vec(M), solved as one dense least-squares problem; B and A span what C and R do
    system = torch.kron(B.double(), A.double().mT.contiguous())
    M = torch.linalg.lstsq(system, W.double().reshape(-1, 1)).solution.reshape(rank, rank)
    best = (W.double() - B.double() @ M @ A.double()).norm()
    assert float((W.double() - (B @ A).double()).norm()) == pytest.approx(float(best), rel=1e-5)
    torch.testing.assert_close(M, torch.eye(rank, dtype=torch.float64), rtol=1e-4, atol=1e-4)


def test_draws_follow_the_weights_without_replacement() -> None:
    weights = torch.tensor([4.0, 1.0, 3.0, 2.0])
    expected = torch.zeros(4)
    for first, second in itertools.permutations(range(4), 2):
        chance = weights[first] / 10 * weights[second] / (10 - weights[first])
        expected[first] += chance
        expected[second] += chance
    counts = torch.zeros(4)
    for seed in range(4000):
        chosen = drawn(weights, 2, torch.Generator().manual_seed(seed))
        assert len(set(chosen.tolist())) == 2
        counts[chosen] += 1
    torch.testing.assert_close(counts / 4000, expected, rtol=0, atol=0.04)


def test_zero_rows_and_columns_are_drawn_last() -> None:
    W = torch.zeros(6, 5)
    W[2, 3], W[4, 1] = 5.0, -2.0
    for core in CUR_CORES:
        A, B, _ = cur_approximation(W, 3, core=core)
        assert A.isfinite().all() and B.isfinite().all()
        torch.testing.assert_close(B @ A, W)
    A, B, certificate = cur_approximation(torch.zeros(4, 4), 2)
    assert not (B @ A).any() and certificate.residual_norm == 0


def test_factors_are_balanced_component_by_component() -> None:
    A, B, _ = cur_approximation(normal(30, 20), 5)
    torch.testing.assert_close(A.norm(dim=1), B.norm(dim=0), rtol=1e-5, atol=0)
    left, right = balanced(torch.zeros(2, 3), torch.ones(4, 2))
    assert not left.any() and torch.equal(right, torch.ones(4, 2))


@pytest.mark.parametrize("factor", [1e-30, 1.0, 1e25])
def test_weights_of_any_size_are_taken(factor: float) -> None:
    W = normal(10, 8)
    A, B, certificate = cur_approximation(W * factor, 3, seed=1)
    _, _, plain = cur_approximation(W, 3, seed=1)
    assert certificate.residual_norm == pytest.approx(plain.residual_norm, rel=1e-4)
    torch.testing.assert_close(A.norm(dim=1), B.norm(dim=0), rtol=1e-5, atol=0)


def nearly_singular() -> Tensor:
    """Every 2 × 2 intersection is nearly singular, and the weight is not."""
    return torch.ones(6, 6) + 1e-3 * normal(6, 6)


def test_a_bad_draw_is_reported_by_name_and_figure_and_rcond_mends_it() -> None:
    W = nearly_singular()
    with pytest.warns(UserWarning, match=r"layers\.0\.weight: a bad draw, the residual's norm is [\d.e+]+ times"):
        for seed in range(30):
            config = PissaConfig(4, method="cura", cur_core="intersection", seed=seed)
            split = split_weight(normal(40, 40, seed=seed), config, name="layers.0.weight")
            figure = split.certificate.residual_norm
            direct = float(split.residual.norm() / normal(40, 40, seed=seed).norm())
            assert figure == pytest.approx(direct, rel=1e-3)
    config = PissaConfig(4, method="cura", cur_core="intersection", cur_rcond=0.1)
    cut = split_weight(W, config).certificate.residual_norm
    assert cut is not None and cut < 0.1


def test_the_optimal_core_never_makes_the_residual_larger() -> None:
    for seed in range(20):
        _, _, certificate = cur_approximation(normal(25, 16, seed=seed), 5, seed=seed)
        assert certificate.residual_norm is not None and certificate.residual_norm <= 1
        assert certificate.bound == "upper bound"
