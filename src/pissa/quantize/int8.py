"""LLM.int8()'s storage: 8-bit integers with one scale per row (arXiv 2208.07339).

    dequantised = code · SCB / 127                        SCB (out,): the row's largest magnitude

The grid is symmetric, so a scale's sign changes nothing; a smaller scale that clips the largest values can lower a
row's error.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..config import ScaleSearch

LEVELS = 127
INVERSE = 7.874015718698502e-3
"""1 / 127 as bitsandbytes writes it."""
SHRINKS = tuple(1 - step / 50 for step in range(26))
"""Multiples of absmax among which a searched scale is found."""
ROWS = 256


@dataclass(frozen=True)
class PackedInt8:
    """A matrix in LLM.int8()'s format."""

    codes: Tensor
    """(out, in) int8: bitsandbytes' `CB`."""
    absmax: Tensor
    """(out,) fp32: bitsandbytes' `SCB`."""
    dtype: torch.dtype
    """Of the dequantised matrix."""

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.codes.shape[0], self.codes.shape[1]

    def dequantize(self) -> Tensor:
        """(out, in) in `dtype`, the same bits as bitsandbytes."""
        return (self.codes * self.absmax[:, None] * INVERSE).to(self.dtype)


def quantize_int8(
    W: Tensor,
    *,
    scale_search: ScaleSearch = "absmax",
    weights: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> PackedInt8:
    """A matrix in INT8. With `scale_search="absmax"` codes and scales are bitsandbytes' own.

    Args:
        W: (out, in), finite.
        scale_search: "absmax", or search the scale of least error; "signed" does the same as "unsigned".
        weights: (in,) positive weights of the columns' squared errors in the search; None for all alike.
        dtype: of the dequantised matrix; None for W's own.
    """
    codes = torch.empty(W.shape, dtype=torch.int8, device=W.device)
    absmax = torch.empty(W.shape[0], device=W.device)
    for top in range(0, W.shape[0], ROWS):
        rows = W.detach()[top : top + ROWS].float()
        largest = rows.abs().amax(1)
        best = largest if scale_search == "absmax" else search_rows(rows, largest, weights)
        codes[top : top + ROWS], absmax[top : top + ROWS] = rounded(rows, best).to(torch.int8), best
    return PackedInt8(codes, absmax, dtype or W.dtype)


def rounded(rows: Tensor, absmax: Tensor) -> Tensor:
    """Integers in −127 … 127, fp32; an all-zero row stays zero."""
    factor = torch.where(absmax > 0, LEVELS / absmax.clamp(min=1e-36), 0.0)
    return (rows * factor[:, None]).round_().clamp_(-LEVELS, LEVELS)


def search_rows(rows: Tensor, largest: Tensor, weights: Tensor | None) -> Tensor:
    """The best of a grid of scales for each row, (rows,)."""
    best, least = largest.clone(), torch.full_like(largest, torch.inf)
    unit = rows * (1 / largest.clamp(min=1e-36))[:, None]
    for shrink in SHRINKS:
        trial = torch.full_like(largest, shrink)
        error = (unit - rounded(unit, trial) * (shrink / LEVELS)).square_()
        error = error.sum(1) if weights is None else error @ weights
        better = error < least
        best, least = torch.where(better, shrink * largest, best), torch.where(better, error, least)
    return best
