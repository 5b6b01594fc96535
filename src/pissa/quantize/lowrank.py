"""Matrices of rank r as a product of two factors, and their arithmetic without ever forming them.

L = left · right                                            left (out, r), right (r, in)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..decompose.svd import fix_signs, truncated_svd
from .metric import Metric


@dataclass(frozen=True)
class LowRank:
    """`left @ right`, both fp32."""

    left: Tensor
    """(out, r)."""
    right: Tensor
    """(r, in)."""
    warm_start: Tensor | None = None
    """(in, r): right singular vectors in the metric, where the next SVD begins."""
    energy: float = 0.0
    """Squared Frobenius norm in the metric."""

    def subtract_from(self, W: Tensor) -> Tensor:
        """`W − left·right`, (out, in) fp32."""
        return torch.addmm(W, self.left, self.right, alpha=-1)


def best_fit(
    E: Tensor,
    rank: int,
    metric: Metric | None,
    previous: LowRank | None,
    *,
    tolerance: float,
    algorithm: str,
    seed: int,
) -> LowRank:
    """The rank-r matrix closest to E in the metric, its SVD started from the previous fit's subspace.

    Args:
        E: (out, in) fp32.
        metric: None for the Frobenius norm.
        previous: a fit of a matrix near E, or None.
        tolerance, algorithm, seed: see `truncated_svd`.
    """
    weighted = E if metric is None else metric.apply(E)
    warm = previous.warm_start if previous is not None and algorithm not in ("exact", "gram") else None
    U, S, Vh, _ = truncated_svd(weighted, rank, tolerance=tolerance, algorithm=algorithm, seed=seed, warm_start=warm)
    right = Vh if metric is None else metric.undo(Vh)
    return LowRank(U * S, right, Vh.mT.contiguous(), float(S.double().square().sum()))


def extrapolated(newest: LowRank, previous: LowRank, momentum: float) -> LowRank:
    """`L_t + β (L_t − L_{t−1})`, of rank 2r."""
    left = torch.cat([(1 + momentum) * newest.left, -momentum * previous.left], 1)
    return LowRank(left, torch.cat([newest.right, previous.right]), newest.warm_start)


def singular_triplets(L: LowRank, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """U (out, r), S (r,), Vh (r, in) of `left·right`, from two thin QRs and a small core; signs as `truncated_svd`'s."""
    left, R = torch.linalg.qr(L.left.double())
    right, T = torch.linalg.qr(L.right.double().mT)
    u, S, vh = torch.linalg.svd(R @ T.mT)
    U, Vh = fix_signs((left @ u[:, :rank]).float(), (vh[:rank] @ right.mT).float())
    return U, S[:rank].float(), Vh
