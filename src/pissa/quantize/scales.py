"""The scale of least error for each block of a table-based format.

    min over s ∈ ℝ and codes c of  Σ_i w_i (x_i − s·t[c_i])²                  x: one block, t: the table, w: weights

For fixed codes the best scale is least squares, `s = ⟨x, t[c]⟩_w / ⟨t[c], t[c]⟩_w`, and it lowers the error to
`⟨x, x⟩ − ⟨x, t⟩² / ⟨t, t⟩`; for a fixed scale the best codes are the nearest ones. Alternating the two from several
multiples of ±absmax and keeping the best finds what exhaustive search finds, or close to it. A negative scale is
worth having because NF4's table is not symmetric: it has 7 negative and 8 positive values, and the sign decides
which side of a block gets the finer ones. Dequantisation multiplies table and scale, so the format has it for free.
"""

from __future__ import annotations

import torch
from torch import Tensor

CELLS = 4096
"""Cells of the lookup that finds nearest codes; no cell holds two boundaries of the NF4 table."""
CHUNK = 1 << 17
"""Values worked on at a time: few enough for the cache, many enough to hide the calls."""
GPU_CHUNK = 1 << 24
"""The same on a GPU, where each of the many calls starts a kernel: enough to fill it, few enough for its memory."""
SMALLEST = 1e-38
"""Divisors are kept away from zero by this, as in bitsandbytes."""
LARGEST = 1e34
"""Factors are kept below this, so that products with the number of cells do not overflow."""
STARTS = (1.06, 1.0, 0.93, 0.86, 0.79, 0.72)
"""Multiples of ±absmax to start from."""
REFINEMENTS = (1.0, 0.97, 1.03)
"""Multiples of the best scale so far to go on from."""

NEAR_REFINEMENTS = (0.97, 1.03)
"""The same where the search began close by."""
ROUGH_STARTS, ROUGH_REFINEMENTS = (1.0, 0.86), (1.0,)
"""The same for scales that will be searched again."""


class Table:
    """A sorted table of values with a lookup for the nearest one.

    `cell(v)` grows with v, so comparing v with the one boundary that shares its cell gives the nearest code exactly,
    in a third of a binary search's time and without its branches.
    """

    def __init__(self, values: Tensor) -> None:
        self.values = values
        self.boundaries = (values[:-1] + values[1:]) / 2
        cells = self.cell(self.boundaries).long()
        assert cells.unique().numel() == cells.numel()
        every = torch.arange(CELLS, device=values.device)
        self.first_code = (cells[None, :] < every[:, None]).sum(1).to(torch.uint8)
        self.boundary = torch.full((CELLS,), torch.inf, device=values.device)
        self.boundary[cells] = self.boundaries
        # The nearest value to the middle of each cell: wrong only where the two choices are almost equally good.
        middle = (every.float() + 0.5) * (2 / CELLS) - 1
        near = values[torch.bucketize(middle, self.boundaries)]
        self.near = torch.cat([near, near[-1:]])

    def cell(self, v: Tensor, scratch: Scratch | None = None) -> Tensor:
        """int32 cell of each value (n,); values outside [−1, 1] go to the outermost cells."""
        scratch = scratch or Scratch(v)
        position = torch.mul(v, CELLS / 2, out=scratch.floats[: len(v)])
        return scratch.cells[: len(v)].copy_(position.add_(CELLS / 2).clamp_(0, CELLS - 1))

    def codes(self, v: Tensor, scratch: Scratch | None = None) -> Tensor:
        """uint8 code of the table value nearest to each of v (n,); a value on a boundary gets the lower code."""
        scratch = scratch or Scratch(v)
        cell = self.cell(v, scratch)
        boundary = torch.index_select(self.boundary, 0, cell, out=scratch.floats[: len(v)])
        above = torch.gt(v, boundary, out=scratch.flags[: len(v)])
        return self.first_code.index_select(0, cell).add_(above)

    def nearest(self, v: Tensor, scratch: Scratch | None = None) -> Tensor:
        """The table value nearest to each of v (n,), up to half a cell's tolerance at the boundaries.

        With a scratch the result lies in it, to be used before the next call.
        """
        scratch = scratch or Scratch(v)
        return torch.index_select(self.near, 0, self.cell(v, scratch), out=scratch.floats[: len(v)])

    def nearest_within(self, blocks: Tensor, factors: Tensor, scratch: Scratch) -> Tensor:
        """`nearest` of `blocks·factors` for products that lie in [−1, 1] up to rounding, and so in the lookup's cells.

        Args:
            blocks: (k, size).
            factors: (k,).

        Returns:
            (k, size), in the scratch, to be used before the next call.
        """
        position = scratch.values[: blocks.numel()].view_as(blocks)
        torch.mul(blocks, (factors.clamp(-LARGEST, LARGEST) * (CELLS / 2))[:, None], out=position)
        cells = scratch.cells[: blocks.numel()].copy_(position.add_(CELLS / 2).view(-1))
        return torch.index_select(self.near, 0, cells, out=scratch.floats[: blocks.numel()]).view_as(blocks)


class Scratch:
    """Buffers for one chunk after the other: fresh ones for each would cost more in page faults than the arithmetic."""

    def __init__(self, like: Tensor) -> None:
        n, device = like.numel(), like.device
        self.values = torch.empty(n, device=device)
        self.floats = torch.empty(n, device=device)
        self.cells = torch.empty(n, dtype=torch.int32, device=device)
        self.flags = torch.empty(n, dtype=torch.bool, device=device)


def reciprocal(scales: Tensor) -> Tensor:
    """`1 / s` with a sign, finite for s = 0."""
    magnitude = scales.abs().clamp_(min=SMALLEST)
    return torch.where(scales < 0, -1.0, 1.0).div_(magnitude)


def search_scales(
    blocks: Tensor,
    table: Table,
    *,
    signed: bool,
    weights: Tensor | None = None,
    near: Tensor | None = None,
    rough: bool = False,
) -> Tensor:
    """The scale of least (weighted) squared error for each block.

    Args:
        blocks: (n, block) fp32.
        table: of the format.
        signed: try negative scales too.
        weights: (n, block), positive; None for all alike.
        near: (n,) scales of nearly the same blocks, where they are known: the search then begins and ends close to
            them.
        rough: begin from few starts, for scales that are searched again near these.

    Returns:
        (n,) fp32; 0 for an all-zero block.
    """
    absmax = blocks.abs().amax(1)
    x = blocks * reciprocal(absmax)[:, None]
    xw = x if weights is None else x * weights
    scratch = Scratch(x)
    trial_values = scratch.values.view_as(x)
    best, gain = torch.ones_like(absmax), torch.full_like(absmax, -1.0)

    def improve(trial: Tensor) -> None:
        torch.mul(x, (1 / trial)[:, None], out=trial_values)
        t = table.nearest(trial_values.view(-1), scratch).view_as(x)
        xt = torch.linalg.vecdot(xw, t)
        tt = torch.linalg.vecdot(t if weights is None else t * weights, t).clamp_(min=SMALLEST)
        # The least-squares scale must keep the trial's sign: with the other one these codes are not the nearest.
        found = torch.where(xt * trial > 0, xt.square() / tt, -1.0)
        better = found > gain
        best.copy_(torch.where(better, xt / tt, best))
        gain.copy_(torch.where(better, found, gain))

    if near is not None:
        improve(torch.where(near == 0, 1.0, near * reciprocal(absmax)))
    for start in () if near is not None else ROUGH_STARTS if rough else STARTS:
        for sign in (1.0, -1.0) if signed else (1.0,):
            improve(torch.full_like(absmax, sign * start))
    for factor in NEAR_REFINEMENTS if near is not None else ROUGH_REFINEMENTS if rough else REFINEMENTS:
        improve(best * factor)
    return best * absmax
