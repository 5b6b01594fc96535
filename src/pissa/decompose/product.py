"""The SVD of a product of two thin factors, without the product.

    B·A = Q_B (R_B·R_Aᵀ) Q_Aᵀ        thin QRs B = Q_B·R_B and Aᵀ = Q_A·R_A

The core R_B·R_Aᵀ is r × r, and Q_B and Q_A have orthonormal columns, so its singular values are those of the product
and its vectors become the product's by one multiplication. In fp64: QR of an fp32 factor then costs no accuracy.

Shapes: B (…, m, r), A (…, r, n); leading dimensions are a batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .lapack import thin_svd


def product_svd(B: Tensor, A: Tensor, *, scale: float = 1.0, rank: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """The SVD of `scale·B·A`, computed in fp64.

    Args:
        B: (…, m, r), of any floating dtype.
        A: (…, r, n).
        scale: a factor of the product.
        rank: how many of the largest triplets are wanted; None for all min(m, r, n).

    Returns:
        U (…, m, k), S (…, k) descending and Vh (…, k, n), all fp64; the vectors' signs are whatever LAPACK gave.

    Raises:
        WeightError: a factor is not finite.
    """
    left, upper = torch.linalg.qr(B.double())
    right, lower = torch.linalg.qr(A.double().mT)
    u, S, vh = thin_svd(scale * (upper @ lower.mT))
    return left @ u[..., :rank], S[..., :rank], vh[..., :rank, :] @ right.mT
