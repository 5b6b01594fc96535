"""Rounding column by column, each error carried on to the columns that are not yet rounded (GPTQ, arXiv 2210.17323).

    min over codes of tr((W − Q) M (W − Q)ᵀ)          M (in, in): second moment of the layer's input

With U upper triangular and `M⁻¹ = UᵀU`, rounding column j to q_j costs `((w_j − q_j) / U_jj)²`, and subtracting
`(w_j − q_j) / U_jj · U_j,k` from every later column k is the best compensation that they can give. Rows do not
interact. The updates of far columns are gathered and done a block at a time, as one matrix product.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from ..decompose.lapack import damped_cholesky
from .metric import Metric
from .nf4 import PackedNF4, nf4_table, pack
from .scales import reciprocal

COLUMNS = 128
"""Columns rounded between two updates of the rest."""


def round_with_feedback(
    W: Tensor,
    moment: Tensor,
    round_column: Callable[[int, Tensor], Tensor],
    *,
    width: int = COLUMNS,
    begin_block: Callable[[int, Tensor], None] | None = None,
) -> None:
    """Round W's columns in order.

    Args:
        W: (out, in) fp32.
        moment: (in, in) positive definite.
        round_column: (j, column (out,)) -> the rounded column; it keeps the codes for itself.
        width: columns rounded between two updates of the rest.
        begin_block: called with (j, columns (out, width)) before column j and the width − 1 after it are rounded: the
            values as the errors so far have left them.
    """
    inverse = torch.cholesky_inverse(damped_cholesky(moment.double()))
    U = damped_cholesky(inverse).mT.float()
    # Columns are read and written whole: as rows of the transpose they lie together.
    rest, n = W.mT.contiguous(), W.shape[1]
    for left in range(0, n, width):
        right = min(left + width, n)
        if begin_block is not None:
            begin_block(left, rest[left:right].mT)
        errors = torch.empty(right - left, len(W), device=W.device)
        for j in range(left, right):
            error = errors[j - left]
            torch.sub(rest[j], round_column(j, rest[j]), out=error)
            error /= U[j, j]
            rest[j + 1 : right].addr_(U[j, j + 1 : right], error, alpha=-1)
        rest[right:].addmm_(U[left:right, right:].mT, errors, alpha=-1)


def round_nf4_with_feedback(W: Tensor, packed: PackedNF4, metric: Metric) -> PackedNF4:
    """The same scales, with codes chosen for least expected output error.

    Args:
        W: (out, in) fp32, the matrix that was packed.
        packed: its scales are kept.
        metric: of the layer's input.
    """
    out, n = W.shape
    table, scales = nf4_table(W.device), packed.scales
    codes = torch.empty(n, out, dtype=torch.uint8, device=W.device)
    first = torch.arange(out, device=W.device) * n

    def round_column(j: int, column: Tensor) -> Tensor:
        scale = scales[(first + j) // packed.block_size]
        codes[j] = table.codes(column * reciprocal(scale))
        return table.values.index_select(0, codes[j].int()) * scale

    round_with_feedback(W, metric.moment, round_column)
    flat = torch.nn.functional.pad(codes.mT.reshape(-1), (0, out * n % 2), value=7)
    return replace(packed, codes=pack(flat))
