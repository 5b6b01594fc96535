"""Truncated singular value decomposition of weight matrices, with a certificate of its accuracy.

    W ≈ U · diag(S) · Vᵀ        U (m, r), S (r,) descending, Vh = Vᵀ (r, n)

This is the front door: it checks and scales W, turns it so that m ≥ n, picks an algorithm, fixes signs and writes the
certificate. The methods have files of their own:

    exact      LAPACK's full SVD                                                     gram.py
    gram       eigenvectors of the smaller Gram matrix; wins for small min(m, n)     gram.py
    chebyshev  a filtered subspace of that Gram matrix; wins for middling min(m, n)  chebyshev.py
    krylov     block Golub-Kahan with full reorthogonalisation; wins for the rest    krylov.py
    subspace   the paper's fast SVD with `niter`                                     subspace.py
    auto       one of the three by a cost model, exact when nothing less will do       cost.py

On a CPU the matrices of a batch are decomposed one after the other, so that a matrix has the same bits alone and in
any batch. On CUDA a batch of matrices of like magnitude is one set of batched kernels. Where the processor has units
for bf16 products, the first products of "krylov" run on them (`units.py`, `sketch.py`).
"""

from __future__ import annotations

import math
import time
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..config import ALGORITHMS
from ..errors import ConfigError, WeightError
from .certificate import Certificate
from .chebyshev import chebyshev_svd, filter_width
from .cost import choose
from .gram import exact_svd, gram_svd
from .krylov import block_krylov, block_width
from .precision import full_precision
from .ritz import Factorization
from .scale import energy, magnitude, scaled, share_a_scale, unscaled
from .sketch import sketched_start
from .subspace import OVERSAMPLING, subspace_svd
from .units import first_products

TOLERANCE = 1e-3
"""Captured-energy loss to aim for when nothing is said."""
PROBES = 8
"""Random columns added to a warm start, which find what a stale subspace has missed."""


class TruncatedSVD(NamedTuple):
    """The r largest singular triplets of a matrix, or of each of a batch, and what is proven about them."""

    U: Tensor
    """(m, r) or (b, m, r), orthonormal columns, fp32."""
    S: Tensor
    """(r,) or (b, r), descending, fp32."""
    Vh: Tensor
    """(r, n) or (b, r, n), orthonormal rows, fp32."""
    certificate: Any
    """A `Certificate`, or a tuple of them, one for each matrix of a batch."""


def truncated_svd(
    W: Tensor,
    rank: int,
    *,
    tolerance: float = TOLERANCE,
    algorithm: str = "auto",
    seed: int = 0,
    warm_start: Tensor | None = None,
    niter: int | None = None,
) -> TruncatedSVD:
    """The r largest singular triplets of a matrix or of a batch of equally shaped matrices.

    Args:
        W: (m, n) or (b, m, n), any float dtype, any strides; decomposed in fp32 and never modified.
        rank: r, 1 to min(m, n).
        tolerance: the captured-energy loss to aim for, in [0, 1). With "auto" and no warm start, below 6e-7 it means
            the exact SVD. A named algorithm comes as close as it can: on weights to 1e-6 and a little less, to 0 only
            "exact", and "subspace" gives up after 64 iterations. The certificate says what was reached.
        algorithm: "auto", "exact", "gram", "chebyshev", "krylov" or "subspace".
        seed: of the sketch, drawn from a generator of its own: the global one is left alone.
        warm_start: (n, k) right or (m, k) left subspace of a nearby matrix, with a leading b for a batch; for square W
            it is taken as right. One product there and one back (two in all) then usually suffice.
        niter: number of iterations of "subspace", as in the paper; None iterates until the tolerance is met.

    Returns:
        U, S, Vh and the certificate (a tuple of certificates for a batch). Signs: the entry of largest magnitude in
        each column of U is positive.

    Raises:
        WeightError: W is not a finite float matrix or batch of them, or its singular values exceed fp32's range.
        ConfigError: a rank, tolerance, algorithm or warm start that does not fit.

    Example:
        >>> import torch
        >>> from pissa import truncated_svd
        >>> U, S, Vh, certificate = truncated_svd(torch.diag(torch.tensor([3.0, 1.0, 2.0])), rank=2)
        >>> [round(value, 4) for value in S.tolist()]
        [3.0, 2.0]
        >>> certificate.captured_energy_loss < 1e-3
        True
    """
    check(W, rank, tolerance, algorithm, warm_start, niter)
    W = W.detach()
    if W.ndim == 2:
        return decompose(W, rank, tolerance, algorithm, seed, warm_start, niter)
    if W.device.type != "cpu" and share_a_scale(W):
        return decompose(W, rank, tolerance, algorithm, seed, warm_start, niter)
    starts = [None] * len(W) if warm_start is None else list(warm_start)
    parts = [decompose(w, rank, tolerance, algorithm, seed, s, niter) for w, s in zip(W, starts, strict=True)]
    return TruncatedSVD(
        torch.stack([part.U for part in parts]),
        torch.stack([part.S for part in parts]),
        torch.stack([part.Vh for part in parts]),
        tuple(part.certificate for part in parts),
    )


def decompose(
    W: Tensor,
    rank: int,
    tolerance: float,
    algorithm: str,
    seed: int,
    warm_start: Tensor | None = None,
    niter: int | None = None,
    *,
    sketch: torch.dtype | None = None,
    largest: float | None = None,
) -> TruncatedSVD:
    """One matrix (m, n), or a batch (b, m, n) as one set of batched operations; the arguments are already checked.

    `sketch` is the dtype of the first products of "krylov", None for what suits the processor (`units.py`). `largest`
    is W's largest magnitude where it is known, which saves a look at every entry.
    """
    start = time.perf_counter()
    with torch.no_grad(), full_precision():
        W, exponent = scaled(W.detach(), largest)
        flipped = W.shape[-2] < W.shape[-1]
        W = W.mT if flipped else W
        if algorithm == "auto":
            algorithm = choose(W.shape[-2], W.shape[-1], rank, tolerance, warm=warm_start is not None)
        sketch = first_products(W.device, tolerance) if sketch is None else sketch
        found = run(W, rank, tolerance, algorithm, seed, warm_start, niter, flipped, sketch)
        U, Vh = (found.Vh.mT, found.U.mT) if flipped else (found.U, found.Vh)
        U, Vh = fix_signs(U, Vh)
        S = unscaled(found.S, exponent)
        if not bool(torch.isfinite(S).all()):
            raise WeightError("the matrix has singular values beyond the range of fp32; scale it down")
        losses = [min(1.0, loss) for loss in found.loss.reshape(-1).tolist()]
    seconds = (time.perf_counter() - start) / max(len(losses), 1)
    certificates = tuple(Certificate(algorithm, found.passes, seconds, loss, found.bound) for loss in losses)
    return TruncatedSVD(U, S, Vh, certificates[0] if W.ndim == 2 else certificates)


def run(
    W: Tensor,
    rank: int,
    tolerance: float,
    algorithm: str,
    seed: int,
    warm_start: Tensor | None,
    niter: int | None,
    flipped: bool,
    sketch: torch.dtype,
) -> Factorization:
    """Hand W (..., m, n), m ≥ n, to the algorithm."""
    if algorithm == "exact":
        return exact_svd(W, rank)
    generator = torch.Generator(W.device).manual_seed(seed)
    if algorithm == "gram":
        return gram_svd(W, rank, tolerance, generator)
    if algorithm == "chebyshev":
        return chebyshev_svd(W, rank, tolerance, gaussian(W, filter_width(rank), seed), generator)
    total = energy(W)
    extra_passes = 0
    if warm_start is not None:
        begin, extra_passes = warm_block(W, rank, warm_start, seed, flipped)
    elif algorithm == "subspace":
        begin = gaussian(W, rank if niter is not None else rank + OVERSAMPLING, seed)
    elif sketch != torch.float32:
        begin, extra_passes = sketched_start(W, rank, gaussian(W, block_width(rank), seed), generator, sketch)
    else:
        begin = gaussian(W, block_width(rank), seed)
    if algorithm == "subspace":
        found = subspace_svd(W, rank, tolerance, begin, generator, total, niter)
    else:
        found = block_krylov(W, rank, tolerance, begin, generator, total)
    return Factorization(found.U, found.S, found.Vh, found.loss, found.passes + extra_passes, found.bound)


def check(W: Tensor, rank: int, tolerance: float, algorithm: str, warm_start: Tensor | None, niter: int | None) -> None:
    """Refuse what cannot be decomposed, but for NaN and Inf, which `scaled` finds on its way."""
    if W.ndim not in (2, 3) or not W.is_floating_point():
        raise WeightError(f"a float matrix or a batch of them is needed, got {W.dtype} of shape {tuple(W.shape)}")
    limit = min(W.shape[-2:])
    if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= limit:
        raise ConfigError(f"rank is {rank!r}; allowed: 1 to {limit} for a matrix of shape {tuple(W.shape[-2:])}")
    if not 0 <= tolerance < 1:
        raise ConfigError(f"tolerance is {tolerance!r}; allowed: 0 up to, not including, 1")
    if algorithm not in ALGORITHMS:
        raise ConfigError(f"algorithm is {algorithm!r}; allowed: {', '.join(ALGORITHMS)}")
    if niter is not None and (algorithm != "subspace" or niter < 0):
        raise ConfigError(f'niter is {niter!r}; it is a number from 0 for algorithm "subspace", leave it out otherwise')
    if warm_start is None:
        return
    fits = warm_start.ndim == W.ndim and warm_start.shape[:-2] == W.shape[:-2] and warm_start.is_floating_point()
    if not fits or warm_start.shape[-2] not in W.shape[-2:] or not 1 <= warm_start.shape[-1] <= limit:
        raise ConfigError(
            f"warm_start is {warm_start.dtype} of shape {tuple(warm_start.shape)}; a matrix of shape {tuple(W.shape)} "
            f"takes (n, k) or (m, k), with the same leading batch, k from 1 to {limit}"
        )
    if algorithm in ("exact", "gram", "chebyshev"):
        raise ConfigError(f'algorithm "{algorithm}" cannot use a warm start; take "auto" or "krylov"')
    if not math.isfinite(magnitude(warm_start)):
        raise ConfigError("warm_start holds NaN or Inf; leave it out for a fresh start")


def gaussian(W: Tensor, columns: int, seed: int) -> Tensor:
    """A sketch (..., n, k) from the seed alone, the same for every matrix of a batch."""
    n = W.shape[-1]
    generator = torch.Generator().manual_seed(seed)
    sketch = torch.randn(n, min(columns, n), generator=generator).to(W.device)
    return sketch.expand(*W.shape[:-2], *sketch.shape).clone()


def warm_block(W: Tensor, rank: int, warm_start: Tensor, seed: int, flipped: bool) -> tuple[Tensor, int]:
    """The first block (..., n, k) that a warm start gives, widened by random probes; and the products it took."""
    m, n = W.shape[-2:]
    known = warm_start.detach()
    largest = magnitude(known)
    known = unscaled(known, math.frexp(largest)[1] if largest > 0 else 0).to(W.device, torch.float32)
    is_right = known.shape[-2] == (m if flipped else n)
    passes = 0
    if is_right == flipped:
        # The subspace is on the long side: one product brings it to the short one.
        known, passes = W.mT @ known, 1
    probes = gaussian(W, min(n - known.shape[-1], max(PROBES, rank + PROBES - known.shape[-1])), seed)
    probes = probes * (torch.linalg.vector_norm(known, dim=(-2, -1), keepdim=True) / n**0.5)
    return torch.cat([known, probes], -1), passes


def fix_signs(U: Tensor, Vh: Tensor) -> tuple[Tensor, Tensor]:
    """Flip triplets so that the entry of largest magnitude in each column of U is positive."""
    pivot = U.gather(-2, U.abs().argmax(-2, keepdim=True))
    signs = torch.where(pivot < 0, -1.0, 1.0).to(U.dtype)
    return U * signs, Vh * signs.mT
