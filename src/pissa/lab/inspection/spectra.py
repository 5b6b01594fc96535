"""Singular values of a weight, of its residual, and of what quantising either loses (paper, figures 3, 9 and 10)."""

from __future__ import annotations

import torch
from torch import Tensor

from ...config import PissaConfig
from ...live.targets import Target
from ...quantize.error import split_error
from ...quantize.formats import quantize_matrix
from ...split import split_weight
from .layers import matrices_of
from .variants import Variant


def spectra(target: Target, variant: Variant, rank: int) -> dict[str, Tensor]:
    """Name -> singular values, descending; of a stack of experts, the first one's."""
    name, W = matrices_of(target)[0]
    W = W.float()
    residual = split_weight(W, PissaConfig(rank=rank), name=name).residual
    config = variant.plain
    kind = config.format.upper()
    matrices = {
        "W": W,
        "W_res": residual,
        f"W − {kind}(W)": W - quantize_matrix(W, config, W.dtype).dequantize(),
        f"W_res − {kind}(W_res)": residual - quantize_matrix(residual, config, W.dtype).dequantize(),
    }
    if not variant.aware:
        matrices[f"error of {variant.name}"] = split_error(W, split_weight(W, variant.config(rank, 0), name=name))
    return {label: positive(torch.linalg.svdvals(matrix)) for label, matrix in matrices.items()}


def positive(values: Tensor) -> Tensor:
    """What a logarithmic axis can show: not the zeros at the end of a low-rank or split matrix."""
    return values[values > 1e-6 * values[0]] if values[0] > 0 else values[:0]
