"""How much of a format's error a split takes away.

    reduction = (1 − ‖W − (Q + s·B·A)‖ / ‖W − format(W)‖) · 100 %                        (paper, section 4)

The paper measures in the nuclear norm, the sum of singular values. `format(W)` is the plain format, with double
quantisation where the split has it, so QLoRA's reduction is 0 by definition; so is that of W = 0.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor

from ..config import Quantization
from ..decompose.lapack import singular_values
from ..errors import ConfigError
from .formats import Packed, quantize_matrix
from .gptq import PackedGPTQ
from .int8 import PackedInt8
from .nested import NestedScales
from .nvfp4 import PackedNVFP4

if TYPE_CHECKING:
    from typing import Protocol

    class QuantizedSplit(Protocol):
        @property
        def A(self) -> Tensor: ...
        @property
        def B(self) -> Tensor: ...
        @property
        def scale(self) -> float: ...
        @property
        def packed(self) -> Packed | None: ...


Norm = Literal["nuclear", "frobenius"]


def reduction_ratio(W: Tensor, split: QuantizedSplit, *, norm: Norm = "nuclear") -> float:
    """By how many percent a quantised split's error is below that of the plain format.

    Args:
        W: (out, in), the weight that was split.
        split: what `split_weight` made of it with a quantisation.
        norm: "nuclear", the paper's, needs all singular values; "frobenius" is quick.

    Returns:
        Percent: 0 for the plain format's own error, 100 for none at all.

    Raises:
        ConfigError: the split is not quantised, or no such norm.

    Example:
        >>> import torch
        >>> from pissa import PissaConfig, Quantization, reduction_ratio, split_weight
        >>> W = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
        >>> split = split_weight(W, PissaConfig(rank=16, quantization=Quantization("nf4")))
        >>> reduction_ratio(W, split) > 10
        True
    """
    if split.packed is None:
        raise ConfigError("the split is not quantised; split with PissaConfig(quantization=Quantization(...))")
    baseline = matrix_norm(plain_error(W, split.packed), norm)
    if baseline == 0:
        return 0.0
    return 100 * (1 - matrix_norm(split_error(W, split), norm) / baseline)


def split_error(W: Tensor, split: QuantizedSplit) -> Tensor:
    """`W − (Q + s·B·A)`, (out, in) fp32."""
    assert split.packed is not None
    E = W.detach().float() - split.packed.dequantize()
    return torch.addmm(E, split.B.float(), split.A.float(), alpha=-split.scale)


def plain_error(W: Tensor, packed: Packed) -> Tensor:
    """`W − format(W)`, (out, in) fp32, in the format, dtype and block size of a packed matrix."""
    if isinstance(packed, PackedInt8):
        config = Quantization("int8", scale_search="absmax")
    elif isinstance(packed, PackedNVFP4):
        config = Quantization("nvfp4", scale_search="absmax")
    elif isinstance(packed, PackedGPTQ):
        return W.detach().float() - plain_gptq(W, packed)
    else:
        config = Quantization(
            scale_search="absmax",
            double_quant=isinstance(packed.absmax, NestedScales),
            block_size=packed.block_size,  # type: ignore[arg-type]
        )
    return W.detach().float() - quantize_matrix(W.detach().float(), config, packed.dtype).dequantize()


def plain_gptq(W: Tensor, packed: PackedGPTQ) -> Tensor:
    """`W` rounded to nearest in GPTQ's format with as many inputs to a group and the same kind of zero points."""
    from .gptq import quantize_gptq

    size = int(torch.bincount(packed.g_idx.long()).max())
    same: dict[str, Any] = {"dtype": packed.dtype, "bits": packed.bits, "symmetric": packed.is_symmetric}
    return quantize_gptq(W.detach().float(), group_size=size, **same).dequantize()


def matrix_norm(E: Tensor, norm: Norm) -> float:
    """The nuclear or Frobenius norm, in fp64 where it is cheap."""
    if norm == "frobenius":
        return float(torch.linalg.vector_norm(E, dtype=torch.float64))
    if norm == "nuclear":
        return float(singular_values(E.float()).double().sum())
    raise ConfigError(f"norm is {norm!r}; allowed: {', '.join(get_args(Norm))}")


def output_error(E: Tensor, moment: Tensor) -> float:
    """`sqrt(tr(E M Eᵀ))`: root of the expected squared output error.

    Args:
        E: (out, in) error of a weight.
        moment: M (in, in), the second moment of the layer's input, best from text that no fit has seen.
    """
    E = E.double()
    return float(((E @ moment.double()) * E).sum().clamp_min(0).sqrt())
