"""4-bit NormalFloat with codes and scales of our own choice, in bitsandbytes' storage.

    dequantised = (table[code] · scale) rounded to the dtype            one scale per block of 64 consecutive values

The table has the quantiles of a normal distribution (QLoRA, arXiv 2305.14314, section 3 and appendix E). bitsandbytes reads
codes and scales as they are stored and never asks where they came from: any scale, also a negative one, is honoured
exactly. So the format leaves room that absmax scaling does not use; `scales.py` has the search.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from ..config import ScaleSearch
from .nested import NestedScales, quantize_scales
from .scales import CHUNK, SMALLEST, Table, reciprocal, search_scales

# fmt: off
NF4_VALUES = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)
# fmt: on
ZERO_CODE = NF4_VALUES.index(0.0)


@cache
def nf4_table(device: torch.device) -> Table:
    return Table(torch.tensor(NF4_VALUES, dtype=torch.float32, device=device))


@dataclass(frozen=True)
class PackedNF4:
    """A matrix in NF4, with everything that bitsandbytes needs to read it."""

    codes: Tensor
    """(ceil(out·in / 2), 1) uint8: two codes a byte, the earlier one in the high four bits."""
    absmax: Tensor | NestedScales
    """The blocks' scales of either sign: (blocks,) fp32, or in 8 bits."""
    shape: tuple[int, int]
    """(out, in)."""
    dtype: torch.dtype
    """Of the dequantised matrix."""
    block_size: int = 64

    @property
    def table(self) -> Tensor:
        """(16,) fp32: bitsandbytes' `quant_map`."""
        return nf4_table(self.codes.device).values

    @property
    def scales(self) -> Tensor:
        """(blocks,) fp32, as they enter the dequantisation."""
        return self.absmax.dequantize() if isinstance(self.absmax, NestedScales) else self.absmax

    def dequantize(self) -> Tensor:
        """(out, in) in `dtype`, the same bits as bitsandbytes."""
        out = torch.empty(self.shape, dtype=self.dtype, device=self.codes.device)
        flat, scales, packed = out.view(-1), self.scales, self.codes.view(-1)
        pairs = torch.cartesian_prod(self.table, self.table)
        step = chunk_blocks(self.block_size) * self.block_size
        for start in range(0, flat.numel(), step):
            stop = min(start + step, flat.numel())
            codes = packed[start // 2 : (stop + 1) // 2].int()
            values = pairs.index_select(0, codes).view(-1)[: stop - start]
            blocks = scales[start // self.block_size : -(-stop // self.block_size)]
            if len(values) == len(blocks) * self.block_size:
                flat[start:stop] = (values.view(-1, self.block_size) * blocks[:, None]).view(-1)
            else:
                flat[start:stop] = values * blocks.repeat_interleave(self.block_size)[: len(values)]
        return out


def quantize_nf4(
    W: Tensor,
    *,
    block_size: int = 64,
    double_quant: bool = False,
    scale_search: ScaleSearch = "absmax",
    weights: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> PackedNF4:
    """A matrix in NF4. With `scale_search="absmax"` codes and scales are those of bitsandbytes' `quantize_4bit`.

    Args:
        W: (out, in), finite.
        block_size: values that share a scale, consecutive in row-major order; the last block may be shorter.
        double_quant: scales in 8 bits. Searched scales then get codes chosen for the scales that are stored.
        scale_search: see `Quantization.scale_search`.
        weights: (in,) positive weights of the columns' squared errors in the search; None for all alike.
        dtype: of the dequantised matrix; None for W's own.
    """
    flat = W.detach().reshape(-1)
    scales = torch.cat(
        [
            absmax_scales(blocks, short)
            if scale_search == "absmax"
            else search_scales(blocks, nf4_table(W.device), signed=scale_search == "signed", weights=importance)
            for blocks, importance, short in each_chunk(flat, block_size, weights)
        ]
    )
    absmax = quantize_scales(scales) if double_quant else scales
    # bitsandbytes chooses codes for the scales as they were before their own quantisation; we do so only for its absmax.
    stored = absmax.dequantize() if isinstance(absmax, NestedScales) and scale_search != "absmax" else scales
    codes, done = torch.empty(flat.numel() + flat.numel() % 2, dtype=torch.uint8, device=W.device), 0
    codes[flat.numel() :] = ZERO_CODE
    for blocks, _, short in each_chunk(flat, block_size, None):
        first = done // block_size
        found = nearest_codes(blocks, stored[first : first + len(blocks)], short).view(-1)[: flat.numel() - done]
        codes[done : done + len(found)] = found
        done += len(found)
    return PackedNF4(pack(codes), absmax, (W.shape[0], W.shape[1]), dtype or W.dtype, block_size)


def pack(codes: Tensor) -> Tensor:
    """(n,) uint8 codes, n even, two a byte: (n / 2, 1)."""
    return (codes[::2] << 4).bitwise_or_(codes[1::2])[:, None]


def each_chunk(flat: Tensor, block_size: int, weights: Tensor | None):
    """(blocks (n, block_size) fp32, their weights or None, whether the last one is short) chunk by chunk.

    A short last block is filled up with zeros.
    """
    step = chunk_blocks(block_size) * block_size
    for start in range(0, flat.numel(), step):
        part = flat[start : start + step].float()
        missing = -len(part) % block_size
        if missing:
            part = torch.nn.functional.pad(part, (0, missing))
        blocks = part.view(-1, block_size)
        importance = None
        if weights is not None:
            columns = torch.arange(start, start + len(part), device=flat.device) % len(weights)
            importance = weights.index_select(0, columns).view_as(blocks)
        yield blocks, importance, missing > 0


def chunk_blocks(block_size: int) -> int:
    return max(1, CHUNK // block_size)


def absmax_scales(blocks: Tensor, short: bool) -> Tensor:
    """Largest magnitude of each block, as bitsandbytes stores it."""
    absmax = blocks.abs().amax(1)
    if short:
        absmax[-1].clamp_(min=SMALLEST)
    return absmax


def nearest_codes(blocks: Tensor, scales: Tensor, short: bool) -> Tensor:
    """uint8 code of the table value nearest to `block / scale`, with bitsandbytes' rounding at ties."""
    v = blocks * reciprocal(scales)[:, None]
    if short:
        # bitsandbytes divides here, where it multiplies by the reciprocal elsewhere.
        v[-1] = blocks[-1] / torch.where(scales[-1] == 0, SMALLEST, scales[-1])
    return nf4_table(blocks.device).codes(v)
