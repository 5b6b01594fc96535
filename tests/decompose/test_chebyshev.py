"""The filter and its proof: a bound that is never below the optimum, and the full eigenproblem where it fails."""

from __future__ import annotations

import pytest
import torch
from spectra import energy_loss, optimal_energy, spectra, white_noise, with_spectrum, zoo

from pissa.decompose import chebyshev
from pissa.decompose.chebyshev import chebyshev_svd, coupling, first_filter, project, proven_energy
from pissa.decompose.gram import gram_matrix
from pissa.decompose.svd import truncated_svd


@pytest.mark.parametrize("n", [1, 255, 256, 301])
def test_panels_give_the_gram_matrix(n):
    A = white_noise(70, n)
    G = gram_matrix(A)
    torch.testing.assert_close(G, A.T @ A)
    torch.testing.assert_close(G, G.T)


def test_a_proven_energy_is_never_below_the_optimum():
    """Also where the subspace is poor, and with a tolerance that lets any gain through."""
    proven, rank = 0, 12
    for name, W in zoo(range(1)):
        W = W if W.shape[0] >= W.shape[1] else W.T
        generator = torch.Generator().manual_seed(0)
        G = gram_matrix(W)
        Q, Z, theta = project(G, first_filter(G, torch.randn(G.shape[0], 28, generator=generator)), generator)
        H, _ = coupling(Q, Z, theta, rank)
        best = proven_energy(G, Q, H, theta, rank, 1e-3)
        if best is not None:
            proven += 1
            assert float(best) >= optimal_energy(W, rank) * (1 - 1e-6), name
    assert proven > 10


def test_a_subspace_that_misses_a_strong_direction_is_not_proven():
    values = torch.full((80,), 0.1)
    values[:20] = 1.0
    W = with_spectrum(values, 100, 80)
    G = gram_matrix(W)
    V = torch.linalg.svd(W)[2].T
    generator = torch.Generator().manual_seed(0)
    Q, Z, theta = project(G, torch.cat([V[:, 1:20], V[:, 40:60]], -1), generator)
    H, gain = coupling(Q, Z, theta, 20)
    assert gain < 1e-6
    assert proven_energy(G, Q, H, theta, 20, 1e-3) is None


def test_the_full_eigenproblem_takes_over_where_filters_end(monkeypatch):
    monkeypatch.setattr(chebyshev, "MAX_STAGES", 0)
    W = with_spectrum(spectra(80)["1/i"], 100, 80)
    found = truncated_svd(W, 8, algorithm="chebyshev")
    assert energy_loss(W, found.U, found.S, found.Vh) <= 1e-6


def test_tolerances_out_of_fp32s_reach_are_met_by_the_full_eigenproblem():
    W = with_spectrum(spectra(80)["slow"], 100, 80)
    generator = torch.Generator().manual_seed(0)
    found = chebyshev_svd(W, 8, 1e-6, torch.randn(80, 24, generator=generator), generator)
    assert float(found.loss) <= 1e-6
