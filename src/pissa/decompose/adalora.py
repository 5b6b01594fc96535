"""AdaLoRA's parametrisation, started from the weight (arXiv 2303.10512, section 3.1; paper, appendix A).

    s·Q·diag(E)·P        Q (out, r) and P (r, in) with orthonormal columns and rows, E (r,)

LoRA's two factors can shrink and grow against each other, and their singular values are nowhere to be seen. AdaLoRA
trains singular values as a vector of their own and keeps the vectors nearly orthonormal by a penalty,

    R = ‖P·Pᵀ − I‖² + ‖QᵀQ − I‖²

Under PiSSA P, E and Q start at the weight's own triplets, where the penalty and its gradient are zero. (PEFT leaves the
square out. Its gradient does not vanish there: it is as large as ever, in the direction of rounding errors.) AdaLoRA's
pruning of ranks is left out, as in the paper.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .product import product_svd


def orthonormal_factors(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """P (r, in), Q (out, r) and E (r,) descending, all fp32, with `Q·diag(E)·P = B·A`, for A (r, in) and B (out, r)."""
    U, S, Vh = product_svd(B, A)
    return Vh.float().contiguous(), U.float().contiguous(), S.float()


def random_factors(A: Tensor, B: Tensor, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """AdaLoRA's own start for factors of these shapes: normal P and Q with a deviation of 0.02, and E = 0."""
    generator = torch.Generator().manual_seed(seed)
    P, Q = (torch.empty(T.shape).normal_(0, 0.02, generator=generator).to(T.device) for T in (A, B))
    return P, Q, torch.zeros(A.shape[0], device=A.device)


def orthogonality(P: Tensor, Q: Tensor) -> Tensor:
    """`‖P·Pᵀ − I‖² + ‖QᵀQ − I‖²` (Frobenius), for P (r, in) and Q (out, r)."""
    eye = torch.eye(P.shape[0], dtype=P.dtype, device=P.device)
    return (P @ P.mT - eye).square().sum() + (Q.mT @ Q - eye).square().sum()
