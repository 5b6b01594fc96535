"""Entrywise l1 low-rank approximation by Cauchy sketches, as a comparison (Song, Woodruff, Zhong, arXiv 1611.00898).

The l1 norm of `W` times a matrix of Cauchy variables is, up to a logarithmic factor, the l1 norm of W (the Cauchy
distribution is 1-stable), so the rows of a short `S·W` span a good rank-r approximation, and so do columns of
`W·R`. What is left is a small problem between two more sketches, which may be solved in the Frobenius norm at the
price of another factor that is polynomial in r:

    Z* = argmin over rank-r Z of ‖T₁ (W·R) Z (S·W) T₂ − T₁ W T₂‖        W_r = (W·R) Z* (S·W)

The minimum has a closed form (Friedland and Torokhti, 2007): with P = T₁WR and Q = SWT₂, `Z* = P⁺ [P P⁺ N Q⁺ Q]_r Q⁺`,
N = T₁WT₂. It is the first algorithm with a proven factor; the factor is large, and it shows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pissa.decompose.lapack import pseudo_inverse
from pissa.decompose.svd import truncated_svd


def cauchy_sketch(W: Tensor, rank: int, *, oversampling: float = 2.0, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A rank-r approximation of W whose l1 error is within a proven factor of the best.

    Args:
        W: (m, n).
        rank: r.
        oversampling: S and R have `oversampling · r` rows and columns, T₁ and T₂ twice as many; never more than W has.
        seed: of the sketches.

    Returns:
        A (r, n) and B (m, r), fp32.
    """
    m, n = W.shape
    W = W.detach().double()
    generator = torch.Generator().manual_seed(seed)

    def cauchy(rows: int, columns: int) -> Tensor:
        return torch.empty(rows, columns, dtype=W.dtype).cauchy_(generator=generator).to(W.device)

    inner, outer = max(rank, int(oversampling * rank)), max(rank, int(2 * oversampling * rank))
    columns = W @ cauchy(n, min(inner, n))
    rows = cauchy(min(inner, m), m) @ W
    left, right = cauchy(min(outer, m), m), cauchy(n, min(outer, n))
    # orthonormal bases of the same spans keep the heavy tails out of the small problem
    columns, rows = torch.linalg.qr(columns)[0], torch.linalg.qr(rows.mT)[0].mT
    P, Q, N = left @ columns, rows @ right, left @ W @ right
    P_inverse, Q_inverse = pseudo_inverse(P), pseudo_inverse(Q)
    U, S, Vh, _ = truncated_svd(P @ P_inverse @ N @ Q_inverse @ Q, rank, algorithm="exact")
    B = columns @ P_inverse @ U.double()
    A = S.double()[:, None] * Vh.double() @ Q_inverse @ rows
    return A.float(), B.float()
