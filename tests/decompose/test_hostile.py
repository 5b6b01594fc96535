"""No matrix and no rounding ends in an assertion or in LAPACK's error, and what comes back is right."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from spectra import deviation_from_identity, energy_loss
from torch import Tensor

from hostile import OtherRounding, hostile_matrices, noise
from pissa.config import ALGORITHMS
from pissa.decompose.lapack import damped_cholesky, pseudo_inverse, symmetric_eigen, thin_svd
from pissa.decompose.orthogonal import orthonormalize
from pissa.decompose.scale import scaled
from pissa.decompose.svd import truncated_svd
from pissa.errors import WeightError
from sampled import thinned

ROUNDINGS = ("own", "random", "up", "down")
BLOCKS = hostile_matrices(110, 20)
MATRICES = hostile_matrices(70, 50)


def rounding(kind: str, seed: int = 0) -> AbstractContextManager[object]:
    return nullcontext() if kind == "own" else OtherRounding(kind, seed)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def check_block(Y: Tensor, basis: Tensor | None) -> None:
    Q, C, R = orthonormalize(Y.clone(), basis, generator())
    whole = Q if basis is None else torch.cat([basis, Q], 1)
    assert deviation_from_identity(whole) < 5e-6
    again = Q.double() @ R.double()
    if basis is not None and C is not None:
        again += basis.double() @ C.double()
    assert float((again - Y.double()).norm()) <= 1e-5 * float(Y.double().norm()) + 1e-37


@pytest.mark.parametrize(("name", "kind"), thinned(BLOCKS, ROUNDINGS, always=["own"]))
def test_every_block_becomes_orthonormal_to_any_basis_and_is_reproduced(name: str, kind: str) -> None:
    Y = BLOCKS[name]
    inside = torch.linalg.qr(noise(110, 30, seed=1))[0]
    nearly = inside[:, :20] + 1e-6 * noise(110, 20, seed=2) + 1e-12 * Y.clamp(-1, 1)
    own = torch.linalg.qr(Y.double())[0].float()
    with rounding(kind):
        check_block(Y, None)
        check_block(Y, inside)
        check_block(Y, own)
        check_block(nearly, inside)
        check_block(inside[:, :20] * 1e7 + own, inside)


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 40),
    data=st.data(),
    name=st.sampled_from(sorted(BLOCKS)),
    kind=st.sampled_from(ROUNDINGS),
    seed=st.integers(0, 99),
)
def test_blocks_that_fill_the_space_become_orthonormal(
    n: int, data: st.DataObject, name: str, kind: str, seed: int
) -> None:
    b = data.draw(st.integers(1, n))
    k = data.draw(st.integers(0, n - b))
    basis = torch.linalg.qr(noise(n, k, seed=seed))[0] if k else None
    with rounding(kind, seed):
        check_block(hostile_matrices(n, b)[name], basis)


def test_what_has_failed_elsewhere_repeated_columns_whose_rounding_error_is_parallel_to_them() -> None:
    """Ones, thrice, beside random columns: the block on which eight rounds of CholeskyQR did not end."""
    Y = torch.cat([torch.ones(110, 3), noise(110, 17)], 1)
    for kind in ROUNDINGS:
        with rounding(kind):
            check_block(Y, None)


def test_a_block_that_is_not_finite_is_refused_in_words() -> None:
    with pytest.raises(WeightError, match="overflowed"):
        orthonormalize(torch.full((9, 2), float("nan")), None, generator())


def check_svd(W: Tensor, rank: int, algorithm: str) -> None:
    U, S, Vh, certificate = truncated_svd(W, rank, algorithm=algorithm)
    assert deviation_from_identity(U) < 1e-5 and deviation_from_identity(Vh.mT) < 1e-5
    assert bool(torch.isfinite(S).all()) and bool((S >= 0).all()) and bool((S[:-1] >= S[1:]).all())
    unit, exponent = scaled(W)
    if not unit.any():
        return
    loss = energy_loss(unit, U, (S.double() * 2.0**exponent).float(), Vh)
    assert loss <= max(certificate.captured_energy_loss, 3e-6)
    assert loss <= 1e-3


@pytest.mark.parametrize(("name", "algorithm", "kind"), thinned(MATRICES, ALGORITHMS, ROUNDINGS, always=["own"]))
def test_every_matrix_is_decomposed_and_its_certificate_holds(name: str, kind: str, algorithm: str) -> None:
    with rounding(kind):
        for W in (MATRICES[name], MATRICES[name].mT):
            for rank in (1, 12):
                check_svd(W, rank, algorithm)


@settings(max_examples=60, deadline=None)
@given(
    m=st.integers(1, 48),
    n=st.integers(1, 48),
    data=st.data(),
    name=st.sampled_from(sorted(MATRICES)),
    algorithm=st.sampled_from(ALGORITHMS),
    kind=st.sampled_from(ROUNDINGS),
)
def test_every_shape_and_rank_is_decomposed(
    m: int, n: int, data: st.DataObject, name: str, algorithm: str, kind: str
) -> None:
    rank = data.draw(st.integers(1, min(m, n)))
    with rounding(kind):
        check_svd(hostile_matrices(m, n)[name], rank, algorithm)


@pytest.mark.parametrize(("name", "kind"), thinned(BLOCKS, ROUNDINGS, always=["own"]))
def test_every_warm_start_costs_time_not_accuracy(name: str, kind: str) -> None:
    W = noise(150, 110) * torch.logspace(0, -2, 110)
    with rounding(kind):
        for start in (BLOCKS[name], BLOCKS[name] * 1e8, BLOCKS[name][:, :3]):
            found = truncated_svd(W, 12, warm_start=start.clamp(-3e38, 3e38))
            assert deviation_from_identity(found.U) < 1e-5
            assert energy_loss(W, found.U, found.S, found.Vh) <= 1e-3


def test_singular_values_beyond_fp32_are_refused_in_words() -> None:
    with pytest.raises(WeightError, match="beyond the range of fp32"):
        truncated_svd(torch.full((40, 30), 3e38), 2)


@pytest.mark.parametrize("times", [1, 2])
def test_where_lapack_gives_up_another_way_is_taken(monkeypatch: pytest.MonkeyPatch, times: int) -> None:
    A, G = noise(30, 20), noise(20, 20)
    G = G @ G.mT
    exact = torch.linalg.svdvals(A.double())
    energies = torch.linalg.eigvalsh(G.double())
    left = {"svd": times, "eigh": times}

    def wrapped(name: str):
        own = getattr(torch.linalg, name)

        def run(*args: object, **kwargs: object) -> object:
            if left[name]:
                left[name] -= 1
                raise torch.linalg.LinAlgError("failed to converge")  # pyright: ignore[reportPrivateImportUsage]
            return own(*args, **kwargs)

        return run

    monkeypatch.setattr(torch.linalg, "svd", wrapped("svd"))
    monkeypatch.setattr(torch.linalg, "eigh", wrapped("eigh"))
    U, S, Vh = thin_svd(A)
    assert left["svd"] == 0
    torch.testing.assert_close(S.double(), exact, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(U * S @ Vh, A, rtol=1e-4, atol=1e-4)
    values, vectors = symmetric_eigen(G)
    assert left["eigh"] == 0
    torch.testing.assert_close(values.double(), energies, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close((vectors * values) @ vectors.mT, G, rtol=1e-4, atol=1e-3)


def test_what_no_way_leads_to_is_a_weight_error() -> None:
    bad = torch.full((4, 4), float("nan"))
    for factorise in (thin_svd, symmetric_eigen, pseudo_inverse):
        with pytest.raises(WeightError, match="no factorisation"):
            factorise(bad)
    with pytest.raises(WeightError, match="not positive definite"):
        damped_cholesky(-torch.eye(3))


def test_a_pseudo_inverse_is_torch_s() -> None:
    A = noise(9, 5).double() @ noise(5, 7, seed=1).double()
    torch.testing.assert_close(pseudo_inverse(A), torch.linalg.pinv(A))
    torch.testing.assert_close(pseudo_inverse(A, 0.3), torch.linalg.pinv(A, rtol=0.3))


def test_a_nearly_singular_matrix_is_damped_as_little_as_helps() -> None:
    A = noise(30, 10).double()
    M = A @ A.mT
    L = damped_cholesky(M)
    torch.testing.assert_close(L @ L.mT, M, rtol=0, atol=1e-6 * float(M.abs().max()))
