"""The certificate against the truth: never optimistic by more than a stated factor."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from spectra import energy_loss, optimal_energy, zoo

from pissa.decompose.krylov import GolubKahan
from pissa.decompose.svd import energy, gaussian, truncated_svd

OPTIMISM = 2.0
"""A certificate given is at least the true loss divided by this (and the rounding of fp32)."""
FIXED_NITER_OPTIMISM = 3.0
"""The same for a fixed number of subspace iterations without oversampling, as the paper has it."""
ROUNDING = 2e-6


def assert_honest(name, W, rank, found, best, optimism=OPTIMISM):
    loss = energy_loss(W, found.U, found.S, found.Vh, best)
    certified = found.certificate.captured_energy_loss
    assert loss <= optimism * certified + ROUNDING, f"{name}: lost {loss:.2e}, certified {certified:.2e}"


def sampled(name, values, seeds):
    """Parameters (value, seeds of the zoo, turn): a third of the first seed for each value, and, slow, all in whole."""
    some = [pytest.param(value, range(1), turn % 3) for turn, value in enumerate(values)]
    whole = [pytest.param(value, range(seeds), None, marks=pytest.mark.slow) for value in values]
    return pytest.mark.parametrize((name, "seeds", "turn"), some + whole)


@sampled("rank", [5, 24, 48], 2)
def test_the_certificate_is_not_optimistic_on_the_zoo(rank, seeds, turn):
    """In whole 3 ranks × 78 matrices × 5 runs."""
    for name, W in zoo(seeds, turn):
        best = optimal_energy(W, rank)
        runs: tuple[dict[str, Any], ...] = (
            {"algorithm": "krylov"},
            {"algorithm": "krylov", "tolerance": 0.1},
            {"algorithm": "krylov", "tolerance": 1e-5},
            {"algorithm": "gram"},
            {"algorithm": "chebyshev"},
        )
        for arguments in runs:
            assert_honest(f"{name} rank {rank} {arguments}", W, rank, truncated_svd(W, rank, **arguments), best)


@sampled("niter", [0, 1, 4, 16], 1)
def test_the_certificate_of_the_papers_fast_svd_is_not_optimistic(niter, seeds, turn):
    rank = 24
    for name, W in zoo(seeds, turn):
        found = truncated_svd(W, rank, algorithm="subspace", niter=niter)
        assert_honest(f"{name} niter {niter}", W, rank, found, optimal_energy(W, rank), FIXED_NITER_OPTIMISM)


def test_the_certificate_is_the_right_order_of_magnitude():
    """A bound of 1 would be honest too; a useful one is within two orders of magnitude at the tolerance."""
    ratios = []
    for _, W in zoo(range(1)):
        found = truncated_svd(W, 24, algorithm="krylov", tolerance=0.05)
        loss = energy_loss(W, found.U, found.S, found.Vh)
        if loss > 1e-5:
            ratios.append(found.certificate.captured_energy_loss / loss)
    assert torch.tensor(ratios).median() < 30


def test_an_exact_bound_of_the_missed_energy_makes_a_rigorous_bound():
    """With the true ‖(I − UUᵀ)W‖² in place of its estimate, the loss is never above the bound."""
    from pissa.decompose import ritz

    rank = 12
    for name, W in zoo(range(1)):
        W = W if W.shape[0] >= W.shape[1] else W.T
        state = GolubKahan(W, gaussian(W, 16, 0), torch.Generator().manual_seed(0), 64)
        best = optimal_energy(W, rank)
        for _ in range(3):
            state.advance()
            U = state.U.filled.double()
            true = torch.linalg.matrix_norm(W.double() - U @ (U.T @ W.double()), 2).square()
            T = state.core()
            energies = torch.linalg.eigvalsh(T @ T.T).flip(-1)
            A = T.T @ T
            A.diagonal()[-state.newest.shape[-1] :] += true
            bound = torch.linalg.eigvalsh(A)[-rank:].clamp_min(true).sum()
            assert float(bound) >= best * (1 - 1e-6), name
            loss = ritz.certify(T, rank, 16, 16, energy(W), W.shape[1] - state.U.count).loss
            assert 0 <= float(loss) <= 1 + 1e-5
            assert float(energies[:rank].sum()) <= best * (1 + 1e-5)
