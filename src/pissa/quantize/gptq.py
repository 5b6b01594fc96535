"""Integers of 4, 3 or 2 bits with a scale and a zero point per group of inputs, stored as GPTQ checkpoints store them.

    dequantised = (code − zero) · scale                  one (scale, zero) per output and group of consecutive inputs

The solver is GPTQ's (arXiv 2210.17323): columns are rounded in order and each error is carried on to the columns
still to come, `feedback.py`. Inputs may be taken in order of falling energy ("act order"), so that those that matter
most are rounded while there is most left to compensate with; `g_idx` then says which group an input belongs to. A
group's grid is laid when its first column is reached, over the values as the errors before have left them.
Without a second moment every code is the nearest one.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..config import ScaleSearch
from ..errors import WeightError
from .feedback import round_with_feedback

SHRINKS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)
"""Multiples of a group's range among which a searched scale is found."""
FURTHER = (0.65, 0.6, 0.55, 0.5, 0.45)
"""More of them for codes of fewer than 4 bits, where the steps are so wide that clipping pays."""
WORD = 32
"""Bits of an int32, which codes fill without a gap: the first code in the lowest bits, and of 3 bits the eleventh and
the twenty-second lie in two words."""


@dataclass(frozen=True)
class PackedGPTQ:
    """A matrix in GPTQ's format (version 1: zero points are stored less one)."""

    qweight: Tensor
    """(in · bits / 32, out) int32: the codes of each output, the earliest input in the lowest bits."""
    qzeros: Tensor
    """(groups, out · bits / 32) int32; the zero point less one."""
    scales: Tensor
    """(groups, out) fp16."""
    g_idx: Tensor
    """(in,) int32: the group of each input."""
    dtype: torch.dtype
    """Of the dequantised matrix."""
    bits: int = 4
    """Of a code."""

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.qweight.shape[1], self.qweight.shape[0] * WORD // self.bits

    @property
    def is_symmetric(self) -> bool:
        """Whether every zero point is the middle code."""
        return bool((unpack_rows(self.qzeros.mT, self.bits) == levels(self.bits) // 2).all())

    def dequantize(self) -> Tensor:
        """(out, in) in `dtype`."""
        codes = unpack_rows(self.qweight, self.bits)
        zeros = (unpack_rows(self.qzeros.mT, self.bits).mT + 1) & levels(self.bits)
        group = self.g_idx.long()
        return ((codes - zeros[group]).float() * self.scales.float()[group]).mT.contiguous().to(self.dtype)


def levels(bits: int) -> int:
    """The largest code."""
    return (1 << bits) - 1


def quantize_gptq(
    W: Tensor,
    moment: Tensor | None = None,
    *,
    group_size: int = 128,
    act_order: bool = False,
    scale_search: ScaleSearch = "absmax",
    weights: Tensor | None = None,
    dtype: torch.dtype | None = None,
    bits: int = 4,
    symmetric: bool = False,
) -> PackedGPTQ:
    """A matrix in GPTQ's format.

    Args:
        W: (out, in), finite; both sides fill whole words.
        moment: (in, in) positive definite (damped) second moment of the inputs; None rounds to nearest.
        group_size: inputs that share scale and zero point; the last group may be smaller.
        act_order: take inputs in order of falling second moment.
        scale_search: "absmax" spans each group's range; the others search the shrunk range of least error, "signed"
            among negative scales too where the grid is symmetric.
        weights: (in,) positive weights of the columns' squared errors in the search; None for all alike.
        dtype: of the dequantised matrix; None for W's own.
        bits: 4, 3 or 2, of a code.
        symmetric: the zero point is the middle code everywhere, which is what fast kernels take.

    Raises:
        WeightError: a side that does not fill whole words: no multiple of 8, 32 or 16 for 4, 3 or 2 bits.
    """
    out, n = W.shape
    check_words(out, n, bits)
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
        scale[g], zero[g] = group_grid(columns, scale_search, here, bits, symmetric)

    def round_column(j: int, column: Tensor) -> Tensor:
        s, z = scale[groups[j]].float(), zero[groups[j]]
        code = ((column / s).round_() + z).clamp_(0, levels(bits))
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
    stored = (zero.to(torch.int32) - 1) & levels(bits)
    qweight, qzeros = pack_rows(codes, bits), pack_rows(stored.mT, bits).mT.contiguous()
    return PackedGPTQ(qweight, qzeros, scale, g_idx, dtype or W.dtype, bits)


def check_words(out: int, n: int, bits: int) -> None:
    """Refuse a matrix (out, n) whose codes do not fill whole words."""
    whole = WORD // math.gcd(WORD, bits)
    if out % whole or n % whole:
        raise WeightError(
            f"GPTQ packs codes of {bits} bits into words of 32 and {(out, n)} has a side that is no multiple of "
            f'{whole}; exclude the layer or take format "nf4"'
        )


def empty_gptq(out: int, n: int, group_size: int, bits: int, dtype: torch.dtype) -> PackedGPTQ:
    """A matrix (out, n) in GPTQ's format with groups but no values: memory that is never touched."""
    check_words(out, n, bits)
    groups = -(-n // group_size)
    return PackedGPTQ(
        torch.empty(n * bits // WORD, out, dtype=torch.int32),
        torch.empty(groups, out * bits // WORD, dtype=torch.int32),
        torch.empty(groups, out, dtype=torch.float16),
        torch.arange(n, dtype=torch.int32) // group_size,
        dtype,
        bits,
    )


def group_grid(
    w: Tensor, scale_search: ScaleSearch, weights: Tensor | None, bits: int = 4, symmetric: bool = False
) -> tuple[Tensor, Tensor]:
    """Scale (out,) fp16 and zero point (out,) fp32, a code, for one group (out, k) of inputs."""
    low, high, most = w.amin(1).clamp_(max=0), w.amax(1).clamp_(min=0), levels(bits)
    if symmetric:
        high = torch.maximum(-low, high)
        low = -high
    best, error = grid_of(low, high, most, symmetric), None
    if scale_search == "absmax":
        return best
    shrinks = SHRINKS if bits >= 4 else SHRINKS + FURTHER
    signs = (1.0, -1.0) if symmetric and scale_search == "signed" else (1.0,)
    for shrink, sign in itertools.product(shrinks, signs):
        scale, zero = grid_of(low * shrink, high * shrink, most, symmetric)
        scale *= sign
        s, z = scale.float()[:, None], zero[:, None]
        found = ((((w / s).round_() + z).clamp_(0, most) - z) * s - w).square_()
        found = found.sum(1) if weights is None else found @ weights
        better = found < (torch.full_like(found, torch.inf) if error is None else error)
        best = torch.where(better, scale, best[0]), torch.where(better, zero, best[1])
        error = found if error is None else torch.minimum(error, found)
    return best


def grid_of(low: Tensor, high: Tensor, most: int, symmetric: bool = False) -> tuple[Tensor, Tensor]:
    """Scale, fp16, and zero point with which the codes 0 … most span [low, high] ∋ 0; where that is symmetric, the zero
    point is the middle code, and the largest value lies half a step outside."""
    smallest = torch.finfo(torch.float16).smallest_normal
    scale = ((high - low) / most).clamp_(smallest, torch.finfo(torch.float16).max).half()
    if symmetric:
        return scale, torch.full_like(high, (most + 1) // 2)
    return scale, (-low / scale.float()).round_().clamp_(0, most)


def pack_rows(codes: Tensor, bits: int = 4) -> Tensor:
    """(n, k) codes -> (n · bits / 32, k) int32, the earliest row in the lowest bits."""
    codes = codes.to(torch.int32)
    first = torch.arange(0, len(codes) * bits, WORD, device=codes.device)
    words = torch.zeros(len(first), codes.shape[1], dtype=torch.int32, device=codes.device)
    for bit in range(WORD):
        place = first + bit
        words |= ((codes[place // bits] >> (place % bits)[:, None].int()) & 1) << bit
    return words


def unpack_rows(words: Tensor, bits: int = 4) -> Tensor:
    """(n · bits / 32, k) int32 -> (n, k) int32."""
    if WORD % bits == 0:
        shifts = torch.arange(0, WORD, bits, device=words.device, dtype=torch.int32)
        return ((words[:, None] >> shifts[:, None]) & levels(bits)).reshape(-1, words.shape[1])
    first = torch.arange(0, len(words) * WORD, bits, device=words.device)
    codes = torch.zeros(len(first), words.shape[1], dtype=torch.int32, device=words.device)
    for bit in range(bits):
        place = first + bit
        codes |= ((words[place // WORD] >> (place % WORD)[:, None].int()) & 1) << bit
    return codes
