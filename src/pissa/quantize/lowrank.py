"""Matrices of rank r as a product of two factors, and their arithmetic without ever forming them.

L = left · right                                            left (out, r), right (r, in)
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..decompose.certificate import Certificate
from ..decompose.lapack import symmetric_eigen
from ..decompose.product import product_svd
from ..decompose.scale import energy, unscaled
from ..decompose.svd import fix_signs, truncated_svd
from .metric import Metric

OVERSAMPLING = 16
"""Columns beyond the rank in a subspace iteration; a few more cost less than another step."""
WARM_STEPS = 1
"""Subspace iterations from the previous fit."""
COLD_STEPS = 4
"""Subspace iterations from a random start."""
CANCELLING = 0.05
"""Where a fit leaves less than this share of the energy, what it leaves is not the difference of two sums in fp32."""


@dataclass(frozen=True)
class LowRank:
    """`left @ right`, both fp32."""

    left: Tensor
    """(out, r)."""
    right: Tensor
    """(r, in)."""
    warm_start: Tensor | None = None
    """(in, k), k ≥ r: spans the right singular vectors in the metric, where the next SVD begins."""
    certificate: Certificate | None = None
    """Of the SVD that it comes from, where that was a certified one."""
    error: float = 0.0
    """`‖E − L‖` in the metric, where L was fitted to E; by Pythagoras, since L is a projection of E."""

    def subtract_from(self, W: Tensor, out: Tensor | None = None) -> Tensor:
        """`W − left·right`, (out, in) fp32, written to `out` where that is given; W itself may be."""
        return torch.addmm(W, self.left, self.right, alpha=-1, out=out)


def best_fit(
    E: Tensor,
    rank: int,
    metric: Metric | None,
    previous: LowRank | None,
    *,
    tolerance: float,
    algorithm: str,
    seed: int,
    exponent: int = 0,
) -> LowRank:
    """The rank-r matrix closest to E in the metric, its SVD started from the previous fit's subspace.

    Args:
        E: (out, in) fp32.
        metric: None for the Frobenius norm.
        previous: a fit of a matrix near E, or None.
        tolerance, algorithm, seed: see `truncated_svd`.
        exponent: of the power of two that brings E to a size whose squares fit into fp32, see `safe_exponent`.
    """
    weighted = in_metric(E, metric, exponent)
    warm = previous.warm_start if previous is not None and algorithm not in ("exact", "gram") else None
    U, S, Vh, certificate = truncated_svd(
        weighted, rank, tolerance=tolerance, algorithm=algorithm, seed=seed, warm_start=warm
    )
    right = Vh if metric is None else metric.undo(Vh)
    error = left_out(weighted, U, S[:, None] * Vh, exponent)
    return LowRank(U * unscaled(S, exponent), right, Vh.mT.contiguous(), certificate, error)


def power_step(
    E: Tensor, rank: int, metric: Metric | None, previous: LowRank | None, seed: int, exponent: int = 0
) -> LowRank:
    """A rank-r matrix close to E in the metric: one subspace iteration from the previous fit, a few from a sketch.

    The alternation is itself an iteration, and its matrices change little from one to the next; a certified SVD of each
    would be work thrown away.
    """
    weighted = in_metric(E, metric, exponent)
    if previous is None or previous.warm_start is None:
        generator = torch.Generator().manual_seed(seed)
        width = min(rank + OVERSAMPLING, *E.shape)
        right = torch.randn(E.shape[1], width, generator=generator).to(E.device)
        steps = COLD_STEPS
    else:
        right, steps = previous.warm_start, WARM_STEPS
    for _ in range(steps):
        left = torch.linalg.qr(weighted @ unit_columns(right))[0]
        # the thin factor first: its rows are then read as they lie, and so are the matrix's
        right = (left.mT.contiguous() @ weighted).mT
    # Scaled by a power of two, at no loss, so that squares of very small or large weights stay in range.
    unit = (right / power_of_two(right)).double()
    _, turn = symmetric_eigen(unit.mT @ unit)
    turn = turn.flip(-1).float()
    left, right = left @ turn, right @ turn
    fitted = right[:, :rank].mT
    error = left_out(weighted, left[:, :rank], fitted, exponent)
    fitted = unscaled(fitted, exponent)
    fitted = fitted if metric is None else metric.undo(fitted)
    return LowRank(left[:, :rank], fitted, unit_columns(right), error=error)


def left_out(weighted: Tensor, U: Tensor, fitted: Tensor, exponent: int) -> float:
    """`‖E − L‖` where E, brought to size, is `weighted`, and L its projection: U (out, r) times `fitted` (r, in)."""
    whole = energy(weighted)
    left = whole - energy(fitted)
    if left < CANCELLING * whole:
        left = energy(torch.addmm(weighted, U, fitted, alpha=-1))
    return float(left.sqrt()) * 2.0**-exponent


def in_metric(E: Tensor, metric: Metric | None, exponent: int) -> Tensor:
    """`E·C·2^exponent`, (out, in) fp32."""
    E = unscaled(E, -exponent)
    return E if metric is None else metric.apply(E)


def unit_columns(X: Tensor) -> Tensor:
    """X with columns of norm 1, or 0."""
    X = X / power_of_two(X)
    return X / torch.linalg.vector_norm(X, dim=0).clamp_min(torch.finfo(X.dtype).tiny)


def power_of_two(X: Tensor) -> float:
    """The power of two next above the largest magnitude; 1 for X = 0."""
    largest = float(X.abs().amax())
    return 2.0 ** math.frexp(largest)[1] if largest > 0 else 1.0


def started(subspace: Tensor) -> LowRank:
    """Where a first fit begins when the right singular vectors (in, k) are known: the matrix 0, and them."""
    return LowRank(subspace.new_zeros(0, 0), subspace.new_zeros(0, 0), subspace)


def extrapolated(newest: LowRank, previous: LowRank, momentum: float) -> LowRank:
    """`L_t + β (L_t − L_{t−1})`, of rank 2r."""
    left = torch.cat([(1 + momentum) * newest.left, -momentum * previous.left], 1)
    return LowRank(left, torch.cat([newest.right, previous.right]), newest.warm_start)


def singular_triplets(L: LowRank, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """U (out, r), S (r,), Vh (r, in) of `left·right`, fp32; signs as `truncated_svd`'s."""
    U, S, Vh = product_svd(L.left, L.right, rank=rank)
    U, Vh = fix_signs(U.float(), Vh.float())
    return U, S.float(), Vh
