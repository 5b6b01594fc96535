"""What a decomposition can prove about itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal


@dataclass(frozen=True)
class Certificate:
    """How factors came about and how far they are from the best possible ones.

    The captured-energy loss of a rank-r approximation `W_r` is
    `1 − (‖W‖² − ‖W − W_r‖²) / (the same for the optimal W_r)`: the share of the energy (squared Frobenius norm) which
    the best rank-r approximation captures and this one misses. It is 0 for an exact truncated SVD and for `W = 0`,
    1 for factors that capture nothing, and more where taking them out makes W larger (a bad draw of CURA).

    Example:
        >>> import torch
        >>> from pissa import PissaConfig, split_weight
        >>> certificate = split_weight(torch.eye(8), PissaConfig(rank=2)).certificate
        >>> certificate.captured_energy_loss < 1e-3, certificate.rounding < 1e-6
        (True, True)
    """

    algorithm: str
    """Name of the algorithm that produced the factors."""
    passes: int
    """Products with W or Wᵀ, each a pass over the whole matrix (0 for factors that do not look at W)."""
    seconds: float
    """Wall-clock time of the decomposition."""
    captured_energy_loss: float
    """Computed, not assumed; dimensionless."""
    bound: Literal["exact", "upper bound", "estimate"]
    """How `captured_energy_loss` relates to the true loss."""
    rounding: float = 0.0
    """`‖W − (residual + scale·B·A)‖ / ‖W‖`: what rounding the residual to its storage dtype cost."""
    quantization_error: float | None = None
    """`‖W − (Q + scale·B·A)‖`, Frobenius; None where the residual is not quantised."""
    quantization_reduction: float | None = None
    """By how many percent that is below the plain format's `‖W − Q(W)‖`; 0 for W = 0."""
    output_reduction: float | None = None
    """By how many percent the expected error of the layer's output, on the text that the split was fitted to, is below
    the plain format's; None where it was fitted to none."""
    iterations: int | None = None
    """How many iterations the quantised split took; later ones were no better."""
    residual_norm: float | None = None
    """`‖W − scale·B·A‖ / ‖W‖`, Frobenius, where the factors may make the residual larger than W; else None."""
    mean_absolute_error: float | None = None
    """Mean of `|W − scale·B·A|` where that is what the factors minimise; else None."""


def worst(certificates: Sequence[Certificate]) -> Certificate:
    """One certificate that holds for each of several matrices; the seconds are those of all."""
    return replace(
        max(certificates, key=lambda certificate: certificate.captured_energy_loss),
        rounding=max(certificate.rounding for certificate in certificates),
        seconds=sum(certificate.seconds for certificate in certificates),
    )
