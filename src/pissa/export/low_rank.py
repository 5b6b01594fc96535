"""What training changed in one weight, as a product of two factors: exact, or the best of a lower rank.

Shapes: A, A0 (…, r, in), B, B0 (…, out, r), of AdaLoRA E, E0 (r,); experts lie along the leading dimension.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..live.state import AdapterFactors


@dataclass(frozen=True)
class LowRank:
    """An exported weight's factors, with the relative error of leaving components out."""

    A: Tensor
    B: Tensor
    error: float = 0.0
    magnitude: Tensor | None = None
    E: Tensor | None = None


def concatenated(factors: AdapterFactors) -> tuple[Tensor, Tensor]:
    """[A ; A0] (…, 2r, in) and [B | −B0] (…, out, 2r); A and B alone for a LoRA baseline."""
    if factors.A0 is None or factors.B0 is None:
        return factors.A.clone(), factors.B.clone()
    return torch.cat([factors.A, factors.A0], dim=-2), torch.cat([factors.B, -factors.B0], dim=-1)


def joined(E: Tensor | None, E0: Tensor | None) -> Tensor | None:
    """[E ; E0] (2r,), or E alone."""
    return torch.cat([E, E0]) if E is not None and E0 is not None else E


def optimal_low_rank(factors: AdapterFactors) -> tuple[Tensor, Tensor, Tensor]:
    """The SVD of ΔW from two thin QRs and a 2r × 2r core, in fp64.

    Returns:
        U (…, out, k), S (…, k) descending, Vh (…, k, in), k = min(2r, out, in). What rounding in fp64 alone
        could have made of a smaller singular value is 0.
    """
    A, B = (tensor.double() for tensor in concatenated(factors))
    Q_B, R_B = torch.linalg.qr(B)
    Q_A, R_A = torch.linalg.qr(A.mT)
    U, S, Vh = torch.linalg.svd(factors.scale * (R_B @ R_A.mT), full_matrices=False)
    size = torch.linalg.matrix_norm(R_B) * torch.linalg.matrix_norm(R_A)
    noise = torch.finfo(S.dtype).eps * max(A.shape[-2:] + B.shape[-2:]) * factors.scale * size[..., None]
    return Q_B @ U, torch.where(noise < S, S, 0.0), Vh @ Q_A.mT


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
