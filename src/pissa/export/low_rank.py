"""What training changed in one weight, as a product of two factors: exact, or the best of a lower rank.

Shapes: A, A0 (…, r, in), B, B0 (…, out, r), of AdaLoRA E, E0 (r,); experts lie along the leading dimension.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..decompose.product import product_svd
from ..live.factors import AdapterFactors


@dataclass(frozen=True)
class LowRank:
    """An exported weight's factors, with the relative error of leaving components out."""

    A: Tensor
    B: Tensor
    error: float = 0.0
    magnitude: Tensor | None = None
    E: Tensor | None = None


def optimal_low_rank(factors: AdapterFactors) -> tuple[Tensor, Tensor, Tensor]:
    """The SVD of ΔW, in fp64, without forming it.

    Returns:
        U (…, out, k), S (…, k) descending, Vh (…, k, in), k = min(2r, out, in). What rounding in fp64 alone
        could have made of a smaller singular value is 0.
    """
    change = factors.change()
    A, B = change.A.double(), change.B.double()
    U, S, Vh = product_svd(B, A, scale=change.scale)
    size = torch.linalg.matrix_norm(B) * torch.linalg.matrix_norm(A)
    noise = torch.finfo(S.dtype).eps * max(A.shape[-2:] + B.shape[-2:]) * change.scale * size[..., None]
    return U, torch.where(noise < S, S, 0.0), Vh


def truncate(factors: AdapterFactors, rank: int | None, tolerance: float) -> LowRank:
    """The best of a rank, or of the smallest rank whose relative error is within the tolerance."""
    U, S, Vh = optimal_low_rank(factors)
    # tails[k] is the norm of what is lost when k components are kept
    tails = torch.cat([S.square().flip(-1).cumsum(-1).flip(-1), S.new_zeros(*S.shape[:-1], 1)], dim=-1).sqrt()
    needed = (tails > tolerance * tails[..., :1]).sum(-1).max()  # of experts, the one that needs most
    kept = max(1, min(rank, S.shape[-1]) if rank is not None else int(needed))
    root = S[..., :kept].sqrt()
    total, lost = torch.linalg.vector_norm(tails[..., 0]), torch.linalg.vector_norm(tails[..., kept])
    error = float(lost / total) if total > 0 else 0.0
    A, B = (root[..., None] * Vh[..., :kept, :]).float(), (U[..., :kept] * root[..., None, :]).float()
    return LowRank(A, B, error, factors.magnitude)
