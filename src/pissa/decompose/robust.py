"""Robust PiSSA: the initial adapter that leaves the smallest sum of absolute values (the report's section 5).

    min over A (r, n), B (m, r) of ‖W − B·A‖₁ = Σ |W − B·A|ᵢⱼ

Squares let a few large entries of W decide what its principal components are; absolute values do not. In
[[3, 0, 0], [0, 1, 1], [0, 1, 1]] the SVD of rank 1 takes the single 3 and leaves an error of 4, the l1 optimum takes
the block of ones and leaves 3. The problem is NP-hard (Gillis and Vavasis, 2018); what can be had is a good local
optimum.

`l1_approximation` is ours; the report's Algorithm 1 is gradient descent on the Huber loss from random factors.
Ours starts from an SVD: of W, or of W with its large entries clipped, whichever leaves less. From there it takes
subgradient steps in the metric of the factors,

    B ← B + η·sign(E)·Aᵀ (A·Aᵀ)⁻¹        A ← A + η·(BᵀB)⁻¹ Bᵀ·sign(E)        E = W − B·A

(Tong, Ma and Chi, arXiv 2010.13364), which to first order moves the product `B·A` by projections of η·sign(E) itself,
however badly conditioned A and B are. η shrinks geometrically from twice the mean absolute error; the best iterate is
kept. An iteration is three products of r columns with a matrix of W's size. `studies/robust_solvers.py` compares it
with Algorithm 1 (`studies/huber_descent.py`) and with a sketching algorithm (`studies/l1_sketch.py`).
"""

from __future__ import annotations

import math
import time

import torch
from torch import Tensor

from .certificate import Certificate
from .lapack import pseudo_inverse
from .product import product_svd
from .scale import energy, magnitude, scaled, unscaled
from .svd import TOLERANCE, TruncatedSVD, decompose, fix_signs

ITERATIONS = 150
FIRST_STEP, LAST_STEP = 2.0, 0.02
"""Of η, in units of the starting point's mean absolute error."""
CLIP = 2.0
"""Entries are clipped at this multiple of the mean magnitude for the second starting point."""
RIDGE = 1e-7
"""Of the trace of a factor's Gram matrix, added to its diagonal: columns may vanish."""


def l1_approximation(
    W: Tensor, rank: int, *, iterations: int = ITERATIONS, seed: int = 0, largest: float | None = None
) -> TruncatedSVD:
    """A rank-r matrix that is close to W in the entrywise l1 norm.

    Args:
        W: (m, n), any float dtype.
        rank: r, 1 to min(m, n).
        iterations: subgradient steps; 0 for the better of the two starting points.
        seed: of the SVDs' sketches.
        largest: W's largest magnitude where it is known, which saves a look at every entry.

    Returns:
        U (m, r), S (r,) descending, Vh (r, n) of the approximation, fp32, and the certificate with its
        `mean_absolute_error`, never larger than that of W's truncated SVD as computed. The captured-energy loss is an
        upper bound, measured against all of W's energy.
    """
    start = time.perf_counter()
    largest = magnitude(W) if largest is None else largest
    W, exponent = scaled(W, largest)
    # signs of rounding errors decide the steps: the bits must not depend on the layout
    W = W.contiguous()
    if not W.any():
        U, S, Vh, _ = decompose(W, rank, TOLERANCE, "auto", seed, largest=0.0)
        return TruncatedSVD(U, S, Vh, _certificate(W, W, start, exponent))
    A, B = starting_point(W, rank, seed, math.ldexp(largest, exponent))
    A, B = descended(W, A, B, iterations)
    certificate = _certificate(W, torch.addmm(W, B, A, alpha=-1), start, exponent)
    U, S, Vh = (tensor.float() for tensor in product_svd(B, A))
    U, Vh = fix_signs(U, Vh)
    return TruncatedSVD(U, unscaled(S, exponent), Vh, certificate)


def starting_point(W: Tensor, rank: int, seed: int, largest: float) -> tuple[Tensor, Tensor]:
    """A and B of the better of two truncated SVDs: of W, and of W with its large entries clipped."""
    limit = CLIP * float(W.abs().mean())
    tried = []
    for matrix, most in ((W, largest), (W.clamp(-limit, limit), min(largest, limit))):
        U, S, Vh, _ = decompose(matrix, rank, TOLERANCE, "auto", seed, largest=most)
        root = S.sqrt()
        A, B = root[:, None] * Vh, U * root
        tried.append((mean_absolute(torch.addmm(W, B, A, alpha=-1)), A, B))
    _, A, B = min(tried, key=lambda found: found[0])
    return A, B


def descended(W: Tensor, A: Tensor, B: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
    """Scaled subgradient steps from A (r, n) and B (m, r); the best pair that is met."""
    best, least = (A, B), float("inf")
    first, E = 0.0, torch.empty_like(W)
    for step in range(iterations + 1):
        torch.addmm(W, B, A, alpha=-1, out=E)
        error = mean_absolute(E)
        if not error < float("inf"):
            break
        if error < least:
            best, least = (A, B), error
        if step == iterations or error == 0:
            break
        first = first or FIRST_STEP * error
        eta = first * (LAST_STEP / FIRST_STEP) ** (step / iterations)
        direction = E.sign_()
        A, B = (
            torch.addmm(A, inverse_gram(B.mT), B.mT @ direction, alpha=eta),
            torch.addmm(B, direction @ A.mT, inverse_gram(A), alpha=eta),
        )
    return best


def inverse_gram(A: Tensor) -> Tensor:
    """`(A·Aᵀ)⁻¹` (r, r) for A (r, n), with a little on the diagonal."""
    G = A @ A.mT
    G.diagonal().add_(RIDGE * G.trace())
    inverse, info = torch.linalg.inv_ex(G.double())
    return (inverse if int(info) == 0 else pseudo_inverse(G.double())).to(A.dtype)


def mean_absolute(E: Tensor) -> float:
    """Mean of `|E|`."""
    # several times as fast as the norm of order 1
    return float(E.abs().mean())


def _certificate(W: Tensor, E: Tensor, start: float, exponent: int) -> Certificate:
    total = float(energy(W))
    loss = float(energy(E)) / total if total > 0 else 0.0
    error = float(unscaled(torch.tensor(mean_absolute(E), dtype=torch.float64), exponent))
    seconds = time.perf_counter() - start
    return Certificate("l1-subgradient", 0, seconds, loss, "upper bound", mean_absolute_error=error)
