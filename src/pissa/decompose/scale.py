"""Matrices brought to a size whose squares fit into fp32, and their energy.

The power of two is exact, so that scaling costs no accuracy. The same look at every entry finds NaN and Inf.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..errors import WeightError

SAFE_MAGNITUDE = (1e-6, 1e6)
"""Matrices whose largest entry lies outside are scaled by a power of two, so that no square over- or underflows."""


def scaled(W: Tensor, largest: float | None = None) -> tuple[Tensor, int]:
    """W in fp32 with one unit stride, times a power of two where squares would not fit; and the power's exponent.

    Args:
        W: (..., m, n), any float dtype.
        largest: its `magnitude` where that is known, which saves a look at every entry.

    Raises:
        WeightError: W holds NaN or Inf.
    """
    largest = magnitude(W) if largest is None else largest
    if not math.isfinite(largest):
        raise WeightError("the matrix holds NaN or Inf; repair or reload the weight")
    exponent = safe_exponent(largest)
    if exponent:
        W = unscaled(W.double(), -exponent)
    W = W.float()
    return (W if 1 in W.stride()[-2:] else W.contiguous()), exponent


def safe_exponent(largest: float) -> int:
    """The power of two that brings a matrix of this magnitude to a size whose squares fit; 0 where they do already."""
    fits = largest == 0 or SAFE_MAGNITUDE[0] <= largest <= SAFE_MAGNITUDE[1]
    return 0 if fits else -math.frexp(largest)[1]


def share_a_scale(W: Tensor) -> bool:
    """Whether one power of two suits all matrices of a batch (b, m, n); else the squares of some would underflow."""
    low, high = torch.aminmax(W.detach().flatten(1), dim=1)
    sizes = torch.maximum(-low, high).tolist()
    return len({safe_exponent(size) for size in sizes if size > 0 and math.isfinite(size)}) <= 1


def magnitude(W: Tensor) -> float:
    """The largest absolute value in W; NaN or Inf where W holds one. An order faster than `isfinite` entry by entry."""
    if W.numel() == 0:
        return 0.0
    low, high = torch.aminmax(W.detach())
    return float(torch.maximum(-low, high))


def unscaled(values: Tensor, exponent: int) -> Tensor:
    """`values · 2^−exponent`, in two steps because the power itself may not fit."""
    if exponent == 0:
        return values
    half = -exponent // 2
    return values * 2.0**half * 2.0 ** (-exponent - half)


def energy(W: Tensor) -> Tensor:
    """‖W‖² (...,), fp64: fp32 within a row or column, fp64 across them."""
    along = -1 if W.stride(-1) == 1 else -2
    return torch.linalg.vector_norm(W, dim=along).double().square().sum(-1)
