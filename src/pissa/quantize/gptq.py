"""4-bit integers with a scale and a zero point per group of inputs, stored as GPTQ checkpoints store them.

    dequantised = (code − zero) · scale                  one (scale, zero) per output and group of consecutive inputs

The solver is GPTQ's (arXiv 2210.17323): columns are rounded in order and each error is carried on to the columns
still to come, `feedback.py`. Inputs may be taken in order of falling energy ("act order"), so that those that matter
most are rounded while there is most left to compensate with; `g_idx` then says which group an input belongs to. A
group's grid is laid when its first column is reached, over the values as the errors before have left them.
Without a second moment every code is the nearest one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..config import ScaleSearch
from ..errors import WeightError
from .feedback import round_with_feedback

LEVELS = 15
SHRINKS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)
"""Multiples of a group's range among which a searched scale is found."""
PER_WORD = 8
"""4-bit codes in an int32."""


@dataclass(frozen=True)
class PackedGPTQ:
    """A matrix in GPTQ's format (version 1: zero points are stored less one)."""

    qweight: Tensor
    """(in / 8, out) int32, eight inputs a word, the earliest in the lowest bits."""
    qzeros: Tensor
    """(groups, out / 8) int32, eight outputs a word; the zero point less one."""
    scales: Tensor
    """(groups, out) fp16."""
    g_idx: Tensor
    """(in,) int32: the group of each input."""
    dtype: torch.dtype
    """Of the dequantised matrix."""

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.qweight.shape[1], self.qweight.shape[0] * PER_WORD

    def dequantize(self) -> Tensor:
        """(out, in) in `dtype`."""
        codes = unpack_rows(self.qweight)
        zeros = (unpack_rows(self.qzeros.mT).mT + 1) & LEVELS
        group = self.g_idx.long()
        return ((codes - zeros[group]).float() * self.scales.float()[group]).mT.contiguous().to(self.dtype)


def quantize_gptq(
    W: Tensor,
    moment: Tensor | None = None,
    *,
    group_size: int = 128,
    act_order: bool = False,
    scale_search: ScaleSearch = "absmax",
    weights: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> PackedGPTQ:
    """A matrix in 4-bit GPTQ.

    Args:
        W: (out, in), finite; both sides multiples of 8.
        moment: (in, in) positive definite (damped) second moment of the inputs; None rounds to nearest.
        group_size: inputs that share scale and zero point; the last group may be smaller.
        act_order: take inputs in order of falling second moment.
        scale_search: "absmax" spans each group's range; the others search the shrunk range of least error.
        weights: (in,) positive weights of the columns' squared errors in the search; None for all alike.
        dtype: of the dequantised matrix; None for W's own.

    Raises:
        WeightError: a side that is not a multiple of 8.
    """
    out, n = W.shape
    if out % PER_WORD or n % PER_WORD:
        raise WeightError(
            f"GPTQ packs 8 codes a word and {tuple(W.shape)} has a side that is no multiple of 8; exclude the layer or "
            'take format "nf4"'
        )
    order = torch.arange(n, device=W.device)
    if act_order and moment is not None:
        order = moment.diagonal().argsort(descending=True, stable=True)
    w = W.detach().float()[:, order]
    importance = None if weights is None else weights[order]
    groups = torch.arange(n, device=W.device) // group_size
    count = -(-n // group_size)
    scale = torch.empty(count, out, dtype=torch.float16, device=W.device)
    zero = torch.empty(count, out, device=W.device)
    codes = torch.empty(n, out, dtype=torch.int32, device=W.device)

    def begin_group(first: int, columns: Tensor) -> None:
        here = None if importance is None else importance[first : first + columns.shape[1]]
        g = first // group_size
        scale[g], zero[g] = group_grid(columns, scale_search, here)

    def round_column(j: int, column: Tensor) -> Tensor:
        s, z = scale[groups[j]].float(), zero[groups[j]]
        code = ((column / s).round_() + z).clamp_(0, LEVELS)
        codes[order[j]] = code.to(torch.int32)
        return (code - z) * s

    if moment is None:
        for first in range(0, n, group_size):
            begin_group(first, w[:, first : first + group_size])
        for j in range(n):
            round_column(j, w[:, j])
    else:
        by_energy = moment[order][:, order]
        round_with_feedback(w, by_energy, round_column, width=group_size, begin_block=begin_group)
    g_idx = torch.empty(n, dtype=torch.int32, device=W.device)
    g_idx[order] = groups.to(torch.int32)
    stored = (zero.to(torch.int32) - 1) & LEVELS
    return PackedGPTQ(pack_rows(codes), pack_rows(stored.mT).mT.contiguous(), scale, g_idx, dtype or W.dtype)


def group_grid(w: Tensor, scale_search: ScaleSearch, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """Scale (out,) fp16 and zero point (out,) fp32 in 0 … 15 for one group (out, k) of inputs."""
    low, high = w.amin(1).clamp_(max=0), w.amax(1).clamp_(min=0)
    best, error = grid_of(low, high), None
    if scale_search == "absmax":
        return best
    for shrink in SHRINKS:
        scale, zero = grid_of(low * shrink, high * shrink)
        s, z = scale.float()[:, None], zero[:, None]
        found = ((((w / s).round_() + z).clamp_(0, LEVELS) - z) * s - w).square_()
        found = found.sum(1) if weights is None else found @ weights
        better = found < (torch.full_like(found, torch.inf) if error is None else error)
        best = torch.where(better, scale, best[0]), torch.where(better, zero, best[1])
        error = found if error is None else torch.minimum(error, found)
    return best


def grid_of(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Scale, fp16, and zero point that span [low, high] ∋ 0."""
    smallest = torch.finfo(torch.float16).smallest_normal
    scale = ((high - low) / LEVELS).clamp_(smallest, torch.finfo(torch.float16).max).half()
    return scale, (-low / scale.float()).round_().clamp_(0, LEVELS)


def pack_rows(codes: Tensor) -> Tensor:
    """(n, k) integers of 4 bits -> (n / 8, k) int32, the earliest row in the lowest bits."""
    words = codes.long().view(-1, PER_WORD, codes.shape[1])
    shifts = 4 * torch.arange(PER_WORD, device=codes.device)
    packed = (words << shifts[:, None]).sum(1)
    return torch.where(packed >= 1 << 31, packed - (1 << 32), packed).to(torch.int32)


def unpack_rows(words: Tensor) -> Tensor:
    """(n / 8, k) int32 -> (n, k) int32."""
    shifts = 4 * torch.arange(PER_WORD, device=words.device, dtype=torch.int32)
    return ((words[:, None] >> shifts[:, None]) & LEVELS).reshape(-1, words.shape[1])
