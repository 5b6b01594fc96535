"""Which errors matter: the expected output error of a layer, and low-rank fits in that metric.

    E ‖x Eᵀ‖² = tr(E M Eᵀ) = ‖E C‖²_F             M = E[xᵀx] (in, in), the second moment of a layer's input;  M = C Cᵀ
    argmin over rank-r L of ‖(W − Q − L) C‖_F  =  SVD_r((W − Q) C) · C⁻¹            (QERA, arXiv 2410.06040)

C is the Cholesky factor of M. A moment from few tokens is rank-deficient: M is damped by a share of its mean
diagonal, so that directions which the calibration text never showed still count a little, and C⁻¹ exists.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..decompose.lapack import symmetric_eigen
from ..errors import WeightError

DAMPING = 0.05
"""Share of the mean diagonal that is added to the diagonal, five times GPTQ's: of a few thousand tokens that is closest
to the moment of other text (docs/few-bits.md)."""
COLUMNS, PARTS = 64, 4
"""A product with C leaves out what is zero in so many parts of at least so many columns."""
ASYMMETRY = 1e-3
"""Largest relative asymmetry, and relative negative eigenvalue, that passes as rounding."""


@dataclass(frozen=True)
class Metric:
    """A damped second moment M and its Cholesky factor, M = C Cᵀ."""

    moment: Tensor
    """(in, in) fp64, damped, scaled to a mean diagonal of 1."""
    factor: Tensor
    """C: (in, in) fp64, lower triangular."""

    @property
    def weights(self) -> Tensor:
        """(in,) fp32: how much an error in each column costs by itself."""
        return self.moment.diagonal().float()

    @cached_property
    def _single(self) -> Tensor:
        return self.factor.float()

    def apply(self, E: Tensor) -> Tensor:
        """`E C`, (out, in) fp32."""
        C, n = self._single, len(self.factor)
        result = torch.empty(len(E), n, device=E.device)
        step = max(COLUMNS, -(-n // PARTS))
        for left in range(0, n, step):  # C is zero above its diagonal
            right = min(left + step, n)
            torch.mm(E[:, left:], C[left:, left:right], out=result[:, left:right])
        return result

    def undo(self, Vh: Tensor) -> Tensor:
        """`Vh C⁻¹`, (r, in) fp32."""
        return torch.linalg.solve_triangular(self.factor, Vh.double(), upper=False, left=False).float()


def metric(moment: Tensor, columns: int, *, name: str = "the weight", damping: float = DAMPING) -> Metric:
    """The metric of a second moment.

    Args:
        moment: (in, in), symmetric positive semidefinite, any scale; rank-deficient is fine.
        columns: in, of the weight that it belongs to.
        name: of that weight, for messages.
        damping: share of the mean diagonal added to the diagonal.

    Raises:
        WeightError: a wrong shape, NaN or Inf, asymmetric, not positive semidefinite, or zero.
    """
    if moment.shape != (columns, columns) or not moment.is_floating_point():
        raise WeightError(
            f"the second moment for {name} is {moment.dtype} of shape {tuple(moment.shape)}; {columns} inputs need a "
            f"float matrix of shape ({columns}, {columns})"
        )
    M = moment.detach().double()
    if not bool(torch.isfinite(M).all()):
        raise WeightError(f"the second moment for {name} holds NaN or Inf; check the calibration run's activations")
    scale = float(M.diagonal().mean())
    if not math.isfinite(scale):
        raise WeightError(f"the second moment for {name} is too large; scale it down, its scale does not matter")
    if scale <= 0:
        raise WeightError(f"the second moment for {name} has no positive diagonal; did calibration see any text?")
    M = M / scale
    if float((M - M.mT).abs().max()) > ASYMMETRY * float(M.abs().max()):
        raise WeightError(f"the second moment for {name} is not symmetric; give E[xᵀx]")
    M = (M + M.mT) / 2
    factor, failed = damped_factor(M, damping)
    if failed:
        energies, vectors = symmetric_eigen(M)
        if float(energies[0]) < -ASYMMETRY * float(energies[-1]):
            raise WeightError(f"the second moment for {name} has negative eigenvalues; give E[xᵀx]")
        M = (vectors * energies.clamp_min(0)) @ vectors.mT
        factor, failed = damped_factor(M, max(damping, 1e-6))
        if failed:
            raise WeightError(
                f"the second moment for {name} is too ill-conditioned; take more calibration text, or leave it out"
            )
    M.diagonal().add_(damping)
    return Metric(M, factor)


def damped_factor(M: Tensor, damping: float) -> tuple[Tensor, bool]:
    """The Cholesky factor of `M + damping·I` and whether there is none."""
    factor, info = torch.linalg.cholesky_ex(M + damping * torch.eye(len(M), dtype=M.dtype, device=M.device))
    return factor, bool(info != 0)
