"""The direction of a step against the dense formula, and what it must not depend on."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import Tensor

from pissa.optimizers.product import direction, inverse_root, whitener

EXACT = 0.0
"""Damping with which nothing but rounding is left."""


def drawn(seed: int, *, rank: int = 3, inner: int = 9, outer: int = 7, count: int = 2) -> tuple[Tensor, ...]:
    """A (count, rank, inner), B (count, outer, rank) and the dense gradient G (count, outer, inner), in fp64."""
    draw = torch.Generator().manual_seed(seed)
    shapes = ((count, rank, inner), (count, outer, rank), (count, outer, inner))
    return tuple(torch.randn(shape, generator=draw, dtype=torch.float64) for shape in shapes)


def stepped(A: Tensor, B: Tensor, G: Tensor, damping: float = EXACT) -> Tensor:
    """B·D_A + D_B·A for a dense gradient."""
    found = direction(A, B, B.mT @ G, G @ A.mT, damping)
    return B @ found.D_A + found.D_B @ A


def polar(matrix: Tensor) -> Tensor:
    """The matrix with all of its singular values that are not 0 set to 1, by its SVD."""
    U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    kept = S.gt(1e-9 * S.max().clamp_min(1e-300)).to(S.dtype)
    return U @ torch.diag(kept) @ Vh


def dense(A: Tensor, B: Tensor, G: Tensor) -> Tensor:
    """The formula with projections onto whole spaces, one matrix: nothing of it is r × r."""
    onto_B, onto_A = B @ torch.linalg.pinv(B), torch.linalg.pinv(A) @ A
    change = polar(onto_B @ G) + polar(G @ onto_A)
    norm = torch.linalg.matrix_norm(change, 2)
    return change / norm if norm > 0 else change


@given(seed=st.integers(0, 10_000), rank=st.integers(1, 4), inner=st.integers(1, 9), outer=st.integers(1, 9))
def test_step_is_the_dense_formula(seed: int, rank: int, inner: int, outer: int) -> None:
    rank = min(rank, inner, outer)
    A, B, G = drawn(seed, rank=rank, inner=inner, outer=outer, count=1)
    if max(torch.linalg.cond(A[0]), torch.linalg.cond(B[0]), torch.linalg.cond(B[0].mT @ G[0])) > 1e3:
        return  # rounding of Gram matrices is all that is seen there
    assert torch.allclose(stepped(A, B, G)[0], dense(A[0], B[0], G[0]), atol=1e-6)


@pytest.mark.parametrize("damping", [EXACT, 1e-4, 1e-1])
def test_the_product_changes_by_spectral_norm_one(damping: float) -> None:
    A, B, G = drawn(0)
    assert torch.allclose(torch.linalg.matrix_norm(stepped(A, B, G, damping), 2), torch.ones(2).double(), atol=1e-6)


def test_no_gauge_changes_the_step() -> None:
    A, B, G = drawn(1)
    T = torch.randn(2, 3, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    assert torch.allclose(stepped(T @ A, B @ torch.linalg.inv(T), G), stepped(A, B, G), atol=1e-8)


def test_no_length_of_factors_or_gradients_changes_the_step() -> None:
    A, B, G = drawn(3)
    usual = stepped(A, B, G, 1e-4)
    for a, b, g in ((1e-6, 1.0, 1.0), (1.0, 1e-6, 1.0), (1e3, 1e-3, 1.0), (1.0, 1.0, 1e-30), (1.0, 1.0, 1e30)):
        assert torch.allclose(stepped(a * A, b * B, g * G, 1e-4), usual, atol=1e-8), (a, b, g)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_where_b_is_zero_only_b_moves(dtype: torch.dtype) -> None:
    A, _, G = (tensor.to(dtype) for tensor in drawn(4))
    B = torch.zeros(2, 7, 3, dtype=dtype)
    found = direction(A, B, B.mT @ G, G @ A.mT)
    assert not found.D_A.any()
    assert torch.allclose(torch.linalg.matrix_norm(found.D_B @ A, 2), torch.ones(2, dtype=dtype), atol=1e-3)


def test_one_of_a_batch_does_not_touch_another() -> None:
    A, B, G = drawn(5)
    B[1] = 0
    alone = torch.cat([stepped(A[i : i + 1], B[i : i + 1], G[i : i + 1]) for i in range(2)])
    assert torch.allclose(stepped(A, B, G), alone, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_of_low_rank_and_none(dtype: torch.dtype) -> None:
    A, B, G = drawn(6)
    low = G[:, :, :1] @ G[:, :1, :]
    change = stepped(A.to(dtype), B.to(dtype), low.to(dtype), 1e-4)
    assert torch.allclose(torch.linalg.matrix_norm(change, 2), torch.ones(2, dtype=dtype), atol=1e-3)
    expected = torch.stack([dense(*parts) for parts in ((A[0], B[0], low[0]), (A[1], B[1], low[1]))])
    assert torch.allclose(change.double(), expected, atol=1e-3)
    assert not stepped(A.to(dtype), B.to(dtype), 0 * G.to(dtype), 1e-4).any()


def test_factors_of_low_rank_stay_finite() -> None:
    A, B, G = (tensor.float() for tensor in drawn(7))
    A[:, 2], B[:, :, 1] = A[:, 1], 0
    change = stepped(A, B, G, 1e-4)
    assert torch.allclose(torch.linalg.matrix_norm(change, 2), torch.ones(2), atol=1e-3)


@given(seed=st.integers(0, 1000), power=st.integers(-12, 12))
def test_roots_invert_what_they_are_of(seed: int, power: int) -> None:
    A = 10.0**power * drawn(seed)[0]
    gram = A @ A.mT
    if torch.linalg.cond(gram).max() > 1e6:
        return
    identity = torch.eye(3, dtype=torch.float64).expand(2, 3, 3)
    for found in (whitener(gram, 0.0), inverse_root(gram, 0.0)):
        assert torch.allclose(found.root.mT @ gram @ found.root, identity, atol=1e-6)
        assert torch.allclose(found.kept, identity, atol=1e-6)


def test_descent() -> None:
    """Uphill is uphill: the change has a positive inner product with the gradient."""
    A, B, G = drawn(8)
    assert ((stepped(A, B, G, 1e-4) * G).sum((-2, -1)) > 0).all()
