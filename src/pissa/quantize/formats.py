"""One call for every format: a matrix in, packed codes and scales out."""

from __future__ import annotations

import torch
from torch import Tensor

from ..config import Quantization
from ..config.quantization import QuantizationFormat
from ..errors import ConfigError
from .feedback import round_nf4_with_feedback
from .gptq import PackedGPTQ, quantize_gptq
from .int8 import PackedInt8, quantize_int8
from .metric import Metric
from .nf4 import PackedNF4, quantize_nf4, rounded_nf4
from .nvfp4 import PackedNVFP4, quantize_nvfp4

Packed = PackedNF4 | PackedInt8 | PackedGPTQ | PackedNVFP4
FORMS: dict[type, QuantizationFormat] = {
    PackedNF4: "nf4",
    PackedInt8: "int8",
    PackedGPTQ: "gptq",
    PackedNVFP4: "nvfp4",
}


def form_of(packed: Packed) -> QuantizationFormat:
    """The name of a packed matrix's format."""
    return FORMS[type(packed)]


def quantize_matrix(
    R: Tensor,
    config: Quantization,
    dtype: torch.dtype,
    metric: Metric | None = None,
    near: Packed | None = None,
    rough: bool = False,
) -> Packed:
    """A matrix (out, in) fp32 in the format, with the scale search and rounding that the configuration asks for.

    Args:
        R: the matrix, usually `W − s·B·A`.
        config: format, scale search, rounding, double quantisation and block size; the rest is not looked at.
        dtype: that the packed matrix dequantises to.
        metric: which errors matter; needed for rounding "gptq".
        near: a matrix near R in the same format, which shortens the search for scales of NF4 and NVFP4.
        rough: whether another matrix near this one is quantised next, so that NF4's first search may be short.
    """
    weights = None if metric is None else metric.weights
    if config.format == "int8":
        return quantize_int8(R, scale_search=config.scale_search, weights=weights, dtype=dtype)
    if config.format == "gptq":
        moment = metric.moment if metric is not None and config.rounding == "gptq" else None
        return quantize_gptq(
            R,
            moment,
            group_size=config.block_size,
            scale_search=config.scale_search,
            weights=weights,
            dtype=dtype,
            bits=config.bits,
            symmetric=config.is_symmetric,
        )
    scales = near.scales if isinstance(near, PackedNF4 | PackedNVFP4) else None
    if config.format == "nvfp4":
        return quantize_nvfp4(R, scale_search=config.scale_search, weights=weights, dtype=dtype, near=scales)
    packed = quantize_nf4(
        R,
        block_size=config.block_size,
        double_quant=config.double_quant,
        scale_search=config.scale_search,
        weights=weights,
        dtype=dtype,
        near=scales,
        rough=rough,
    )
    if config.rounding == "gptq":
        if metric is None:
            raise ConfigError('rounding "gptq" needs the second moment of the inputs; give calibration text')
        return round_nf4_with_feedback(R, packed, metric)
    return packed


def rounded_matrix(R: Tensor, config: Quantization, dtype: torch.dtype, metric: Metric | None = None) -> Tensor:
    """What `quantize_matrix` gives, dequantised to fp32, for a step of an iteration: cheaper where that is possible."""
    if config.format != "nf4" or config.rounding != "nearest":
        return quantize_matrix(R, config, dtype, metric).dequantize().float()
    return rounded_nf4(
        R,
        block_size=config.block_size,
        double_quant=config.double_quant,
        scale_search=config.scale_search,
        weights=None if metric is None else metric.weights,
    )
