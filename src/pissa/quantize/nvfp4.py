"""NVFP4: 4-bit floats (E2M1) with an E4M3 scale for each block of 16 inputs and one fp32 scale for the whole matrix.

    dequantised = value[code] · scale[block] / global            value: ±{0, ½, 1, 1½, 2, 3, 4, 6}

It is stored as compressed-tensors stores it ("nvfp4-pack-quantized"), which is what vLLM loads. The table is symmetric,
so a scale's sign gains nothing; searched scales are those of least error among both directions of clipping, as in NF4,
and codes are chosen for the scales that E4M3 can hold.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from ..config import ScaleSearch
from ..errors import WeightError
from .nf4 import absmax_scales, chunk_scratch, each_chunk
from .scales import SMALLEST, Table, reciprocal, search_scales

MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
LARGEST, LARGEST_SCALE = 6.0, 448.0
USUAL, LEAST = 256.0, 1.0
"""The global scale that nearly every weight has: magnitudes up to 10.5 fit. Where the largest scale times it is below
LEAST, the others would be too near the smallest number of E4M3."""
BLOCK = 16
SIGN = 8
"""Added to the code of a magnitude for its negative."""


@cache
def e2m1_table(device: torch.device) -> Table:
    """The fifteen values over the largest of them, ascending."""
    positive = [value / LARGEST for value in MAGNITUDES]
    return Table(torch.tensor([-value for value in positive[:0:-1]] + positive, device=device))


@dataclass(frozen=True)
class PackedNVFP4:
    """A matrix in NVFP4."""

    weight_packed: Tensor
    """(out, in / 2) uint8: two codes a byte, the earlier one in the low four bits; a code is sign and magnitude."""
    weight_scale: Tensor
    """(out, in / 16) float8_e4m3fn."""
    weight_global_scale: Tensor
    """(1,) fp32, by which scales are divided."""
    dtype: torch.dtype
    """Of the dequantised matrix."""

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.weight_packed.shape[0], 2 * self.weight_packed.shape[1]

    @property
    def scales(self) -> Tensor:
        """(out · in / 16,) fp32, of values up to 6."""
        return (self.weight_scale.float() / self.weight_global_scale).view(-1)

    def dequantize(self) -> Tensor:
        """(out, in) in `dtype`."""
        codes = torch.stack([self.weight_packed & 15, self.weight_packed >> 4], -1).view(-1, BLOCK)
        every = torch.tensor([*MAGNITUDES, *(-value for value in MAGNITUDES)], device=codes.device)
        values = every.index_select(0, codes.view(-1).int()).view_as(codes)
        return (values * self.scales[:, None]).view(self.shape).to(self.dtype)


def quantize_nvfp4(
    W: Tensor,
    *,
    scale_search: ScaleSearch = "absmax",
    weights: Tensor | None = None,
    dtype: torch.dtype | None = None,
    near: Tensor | None = None,
) -> PackedNVFP4:
    """A matrix in NVFP4.

    Args:
        W: (out, in), finite; `in` a multiple of 16.
        scale_search: "absmax" maps a block's largest magnitude to 6; the others search the scale of least error.
        weights: (in,) positive weights of the columns' squared errors in the search; None for all alike.
        dtype: of the dequantised matrix; None for W's own.
        near: (blocks,) scales of a matrix near W, as `PackedNVFP4.scales`, close to which W's are searched.

    Raises:
        WeightError: rows that are not whole blocks.
    """
    out, n = W.shape
    check_blocks(out, n)
    flat = W.detach().reshape(-1)
    table = e2m1_table(W.device)
    parts, done = [], 0
    for blocks, importance, short in each_chunk(flat, BLOCK, weights):
        if scale_search == "absmax":
            parts.append(absmax_scales(blocks, short))
        else:
            here = None if near is None else near[done : done + len(blocks)] * LARGEST
            parts.append(search_scales(blocks, table, signed=False, weights=importance, near=here))
        done += len(blocks)
    stored, whole = round_scales(torch.cat(parts) / LARGEST)
    codes, done = torch.empty(flat.numel(), dtype=torch.uint8, device=W.device), 0
    scratch, steps = chunk_scratch(flat, BLOCK), LARGEST * stored.float() / whole
    for blocks, _, _ in each_chunk(flat, BLOCK, None):
        v = blocks * reciprocal(steps[done : done + len(blocks)])[:, None]
        found = table.codes(v.view(-1), scratch).int() - (len(MAGNITUDES) - 1)
        codes[done * BLOCK : (done + len(blocks)) * BLOCK] = torch.where(found < 0, SIGN - found, found).to(torch.uint8)
        done += len(blocks)
    pairs = codes.view(out, n // 2, 2)
    return PackedNVFP4(pairs[..., 0] | pairs[..., 1] << 4, stored.view(out, -1), whole, dtype or W.dtype)


def check_blocks(out: int, n: int) -> None:
    """Refuse a matrix (out, n) whose rows are not whole blocks."""
    if n % BLOCK:
        raise WeightError(
            f"NVFP4 has a scale for each 16 inputs and {(out, n)} has {n} of them; exclude the layer or take format "
            '"gptq"'
        )


def round_scales(scales: Tensor) -> tuple[Tensor, Tensor]:
    """(blocks,) positive scales in E4M3, and the fp32 (1,) by which they are to be divided.

    That is USUAL where it brings the largest scale into E4M3's range with room to spare below it, and else the power of
    two that brings it near the range's end. Of layers that a server joins it has to be the same.
    """
    largest = float(scales.amax())
    whole = USUAL
    if not LEAST <= largest * whole <= LARGEST_SCALE:
        whole = 2.0 ** min(126, math.floor(math.log2(LARGEST_SCALE / max(largest, SMALLEST))))
    stored = (scales * whole).clamp(max=LARGEST_SCALE).to(torch.float8_e4m3fn)
    return stored, torch.full((1,), whole, device=scales.device)
