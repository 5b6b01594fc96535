"""Double quantisation: NF4's block scales in 8 bits, as bitsandbytes stores them (QLoRA, arXiv 2305.14314, section 3).

    scale = offset + absmax₂[block of 256] · map[code]

`map` is the signed dynamic map of arXiv 1511.04561: seven decades from 1e-7 to 1, each with twice as many evenly
spaced values as the decade below, of either sign, and 0 and 1. bitsandbytes takes the mean of the scales as offset.
Scales of either sign fit as well: the largest decade has 64 values of each sign, so a scale is off by at most 0.7 %
of the largest of its 256. What remains of that is mended by choosing codes, and adapter, for the scale that is
stored.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

NESTED_BLOCK = 256


@cache
def dynamic_map() -> Tensor:
    """(256,) fp32, ascending; never modified."""
    values = [0.0, 1.0]
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2**decade + 1, dtype=torch.float32)
        middles = (edges[:-1] + edges[1:]) / 2.0
        positive = (10 ** (decade - 6) * middles).tolist()
        values += [*positive, *(-value for value in positive)]
    return torch.tensor(sorted(values), dtype=torch.float32)


@dataclass(frozen=True)
class NestedScales:
    """Block scales in 8 bits."""

    codes: Tensor
    """(blocks,) uint8, indices into the map."""
    absmax: Tensor
    """(ceil(blocks / 256),) fp32."""
    offset: Tensor
    """() fp32."""

    @property
    def table(self) -> Tensor:
        """(256,) fp32: bitsandbytes' `nested_quant_map`."""
        return dynamic_map().to(self.codes.device)

    def dequantize(self) -> Tensor:
        """(blocks,) fp32, the same bits as bitsandbytes."""
        values = self.table[self.codes.long()]
        return values * self.absmax.repeat_interleave(NESTED_BLOCK)[: len(values)] + self.offset


def quantize_scales(scales: Tensor) -> NestedScales:
    """Round (blocks,) fp32 scales to 8 bits: each to the nearest value of the map.

    Scales of one sign are taken relative to their mean, as bitsandbytes does. Those of both signs lie in two heaps, and
    the offset 0 between them keeps both equally fine.
    """
    mixed = bool((scales < 0).any()) and bool((scales > 0).any())
    offset = scales.new_zeros(()) if mixed else scales.mean()
    deviations = scales - offset
    absmax = absmax_of(deviations)
    relative = deviations * (1 / absmax.clamp(min=1e-38)).repeat_interleave(NESTED_BLOCK)[: len(scales)]
    return NestedScales(nearest(relative), absmax, offset)


def absmax_of(deviations: Tensor) -> Tensor:
    """Largest magnitude of each nested block."""
    missing = -len(deviations) % NESTED_BLOCK
    return torch.nn.functional.pad(deviations, (0, missing)).view(-1, NESTED_BLOCK).abs().amax(1)


def nearest(relative: Tensor) -> Tensor:
    """uint8 code of the nearest map value."""
    table = dynamic_map().to(relative.device)
    return torch.bucketize(relative.clamp(-1, 1), (table[:-1] + table[1:]) / 2, out_int32=True).to(torch.uint8)
