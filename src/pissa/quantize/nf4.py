"""4-bit NormalFloat with codes and scales of our own choice, in bitsandbytes' storage.

    dequantised = (table[code] · scale) rounded to the dtype            one scale per block of 64 consecutive values

The table has the quantiles of a normal distribution (QLoRA, arXiv 2305.14314, section 3 and appendix E).
bitsandbytes reads codes and scales as they are stored and never asks where they came from: any scale, also a
negative one, is honoured exactly. So the format leaves room that absmax scaling does not use; `scales.py` has the
search.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from ..config import ScaleSearch
from .nested import NestedScales, quantize_scales
from .scales import CHUNK, GPU_CHUNK, SMALLEST, Scratch, Table, reciprocal, search_scales

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
    """The sixteen NF4 values on a device."""
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
        step = chunk_blocks(self.block_size, out.device) * self.block_size
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
    near: Tensor | None = None,
    rough: bool = False,
) -> PackedNF4:
    """A matrix in NF4. With `scale_search="absmax"` codes and scales are those of bitsandbytes' `quantize_4bit`.

    Args:
        W: (out, in), finite.
        block_size: values that share a scale, consecutive in row-major order; the last block may be shorter.
        double_quant: scales in 8 bits. Searched scales then get codes chosen for the scales that are stored.
        scale_search: see `Quantization.scale_search`.
        weights: (in,) positive weights of the columns' squared errors in the search; None for all alike.
        dtype: of the dequantised matrix; None for W's own.
        near: (blocks,) searched scales of a matrix near W, close to which W's are searched; None to search all over.
        rough: search scales from few starts, see `search_scales`.
    """
    flat = W.detach().reshape(-1)
    absmax, scales = choose_scales(flat, block_size, double_quant, scale_search, weights, near, rough)
    codes, done = torch.empty(flat.numel() + flat.numel() % 2, dtype=torch.uint8, device=W.device), 0
    codes[flat.numel() :] = ZERO_CODE
    scratch = chunk_scratch(flat, block_size)
    for blocks, _, short in each_chunk(flat, block_size, None):
        first = done // block_size
        found = nearest_codes(blocks, scales[first : first + len(blocks)], short, scratch)[: flat.numel() - done]
        codes[done : done + len(found)] = found
        done += len(found)
    return PackedNF4(pack(codes), absmax, (W.shape[0], W.shape[1]), dtype or W.dtype, block_size)


def rounded_nf4(
    W: Tensor,
    *,
    block_size: int = 64,
    double_quant: bool = False,
    scale_search: ScaleSearch = "absmax",
    weights: Tensor | None = None,
) -> Tensor:
    """What `quantize_nf4` would dequantise to, (out, in) fp32, without codes and in half the time.

    A value within a lookup cell of the middle between two table values may go to the one slightly farther away:
    right for the steps of an iteration, not for its result.
    """
    flat = W.detach().reshape(-1)
    absmax, scales = choose_scales(flat, block_size, double_quant, scale_search, weights)
    stored = absmax.dequantize() if isinstance(absmax, NestedScales) else absmax
    out, done = torch.empty(flat.shape, device=W.device), 0
    scratch = chunk_scratch(flat, block_size)
    table = nf4_table(W.device)
    for blocks, _, _ in each_chunk(flat, block_size, None):
        here = slice(done // block_size, done // block_size + len(blocks))
        v = torch.mul(blocks, reciprocal(scales[here])[:, None], out=scratch.values[: blocks.numel()].view_as(blocks))
        t = table.nearest(v.view(-1), scratch).view_as(blocks)
        found = t.mul_(stored[here, None]).view(-1)[: flat.numel() - done]
        out[done : done + len(found)] = found
        done += len(found)
    return out.view(W.shape)


def rounding_error(W: Tensor, left: Tensor, right: Tensor, block_size: int, out: Tensor) -> Tensor:
    """`W − nf4(W − left·right)`, with absmax scales, for a step of an iteration: every chunk stays in the cache.

    Args:
        W: (out, in) fp32, contiguous, `in` a multiple of the block size.
        left: (out, r) fp32; right: (r, in) fp32.
        block_size: values that share a scale.
        out: (out, in) fp32 that the result is written to.

    Returns:
        `out`; of the nearest values the same is true as in `rounded_nf4`.
    """
    m, n = W.shape
    table, step = nf4_table(W.device), max(1, chunk_values(W.device) // n)
    scratch, rest = Scratch(W[:step]), torch.empty_like(W[:step])
    for top in range(0, m, step):
        rows = slice(top, top + step)
        R = torch.addmm(W[rows], left[rows], right, alpha=-1, out=rest[: min(step, m - top)]).view(-1, block_size)
        scales = torch.abs(R, out=scratch.values[: R.numel()].view_as(R)).amax(1)
        found = table.nearest_within(R, reciprocal(scales), scratch).mul_(scales[:, None])
        torch.sub(W[rows], found.view(-1, n), out=out[rows])
    return out


def choose_scales(
    flat: Tensor,
    block_size: int,
    double_quant: bool,
    scale_search: ScaleSearch,
    weights: Tensor | None,
    near: Tensor | None = None,
    rough: bool = False,
) -> tuple[Tensor | NestedScales, Tensor]:
    """The scales to store, and those (blocks,) that codes are chosen for."""
    parts, done = [], 0
    for blocks, importance, short in each_chunk(flat, block_size, weights):
        if scale_search == "absmax":
            parts.append(absmax_scales(blocks, short))
        else:
            here = None if near is None else near[done : done + len(blocks)]
            table, signed = nf4_table(flat.device), scale_search == "signed"
            parts.append(search_scales(blocks, table, signed=signed, weights=importance, near=here, rough=rough))
        done += len(blocks)
    scales = torch.cat(parts)
    if not double_quant:
        return scales, scales
    nested = quantize_scales(scales)
    # For its absmax, bitsandbytes chooses codes for the scales as they were before their own quantisation.
    return nested, scales if scale_search == "absmax" else nested.dequantize()


def chunk_scratch(flat: Tensor, block_size: int) -> Scratch:
    """Buffers for the largest chunk."""
    blocks = min(chunk_blocks(block_size, flat.device), -(-flat.numel() // block_size))
    return Scratch(flat.new_empty(blocks * block_size))


def pack(codes: Tensor) -> Tensor:
    """(n,) uint8 codes, n even, two a byte: (n / 2, 1)."""
    pairs = codes.view(torch.int16) if sys.byteorder == "little" else (codes[1::2].short() << 8) | codes[::2]
    return ((pairs << 4) | (pairs >> 8)).to(torch.uint8)[:, None]


def each_chunk(flat: Tensor, block_size: int, weights: Tensor | None) -> Iterator[tuple[Tensor, Tensor | None, bool]]:
    """(blocks (n, block_size) fp32, their weights or None, whether the last one is short) chunk by chunk.

    A short last block is filled up with zeros.
    """
    step = chunk_blocks(block_size, flat.device) * block_size
    for start in range(0, flat.numel(), step):
        part = flat[start : start + step].float()
        missing = -len(part) % block_size
        if missing:
            part = torch.nn.functional.pad(part, (0, missing))
        blocks = part.view(-1, block_size)
        importance = None
        if weights is not None and len(weights) % block_size == 0:
            # rows are whole blocks, and a block's weights lie together
            by_block = weights.view(-1, block_size)
            numbers = torch.arange(start // block_size, start // block_size + len(blocks), device=flat.device)
            importance = by_block.index_select(0, numbers % len(by_block))
        elif weights is not None:
            columns = torch.arange(start, start + len(part), device=flat.device) % len(weights)
            importance = weights.index_select(0, columns).view_as(blocks)
        yield blocks, importance, missing > 0


def chunk_blocks(block_size: int, device: torch.device) -> int:
    """How many blocks are worked on at once, so that memory stays bounded."""
    return max(1, chunk_values(device) // block_size)


def chunk_values(device: torch.device) -> int:
    """How many values are worked on at once."""
    return CHUNK if device.type == "cpu" else GPU_CHUNK


def absmax_scales(blocks: Tensor, short: bool) -> Tensor:
    """Largest magnitude of each block, as bitsandbytes stores it."""
    absmax = blocks.abs().amax(1)
    if short:
        absmax[-1].clamp_(min=SMALLEST)
    return absmax


def nearest_codes(blocks: Tensor, scales: Tensor, short: bool, scratch: Scratch) -> Tensor:
    """(blocks · size,) uint8: codes of the values nearest to `block / scale`, ties as bitsandbytes breaks them."""
    v = torch.mul(blocks, reciprocal(scales)[:, None], out=scratch.values[: blocks.numel()].view_as(blocks))
    if short:
        # bitsandbytes divides here, where it multiplies by the reciprocal elsewhere.
        v[-1] = blocks[-1] / torch.where(scales[-1] == 0, SMALLEST, scales[-1])
    return nf4_table(blocks.device).codes(v.view(-1), scratch)
