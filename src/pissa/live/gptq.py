"""A linear layer that holds GPTQ's codes: its weight is made from them at each call, forwards and backwards.

    y = x Ŵᵀ + b         Ŵ = (code − zero) · scale, never kept: a training step holds one layer's weight at a time

Its buffers go by the names that GPTQ checkpoints have for them, so that a model of such layers is saved in that format
by saving its state.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..quantize.gptq import PackedGPTQ

PARTS = ("qweight", "qzeros", "scales", "g_idx")
"""A layer's tensors in a GPTQ checkpoint, beside its bias."""


class GPTQLinear(nn.Linear):
    """An `nn.Linear` whose weight lies in GPTQ's format.

    Args:
        packed: the weight (out, in).
        bias: (out,), or None.
    """

    def __init__(self, packed: PackedGPTQ, bias: nn.Parameter | None = None) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = packed.shape
        for part in PARTS:
            self.register_buffer(part, getattr(packed, part))
        self.bits, self.source_dtype = packed.bits, packed.dtype
        self.source_cls: type[nn.Module] = nn.Linear
        self.register_parameter("bias", bias)

    @property
    def packed(self) -> PackedGPTQ:
        """The codes and scales, as they lie in the layer."""
        buffers: dict[str, Any] = {part: self._buffers[part] for part in PARTS}
        return PackedGPTQ(**buffers, dtype=self.source_dtype, bits=self.bits)

    @property
    def weight(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        """(out, in), made anew: what is written to it is lost."""
        return self.packed.dequantize()

    def forward(self, input: Tensor) -> Tensor:
        """`x Ŵᵀ + b`, in the input's dtype."""
        y = _Product.apply(input, self)
        return y if self.bias is None else y + self.bias.to(y.dtype)


class _Product(torch.autograd.Function):
    """`x Ŵᵀ`, which keeps neither x nor Ŵ for the backward pass: the gradient by x is `g Ŵ`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: GPTQLinear) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.layer = layer
        return x @ layer.weight.to(x.dtype).mT

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return gradient @ ctx.layer.weight.to(gradient.dtype), None


def gptq_description(model: nn.Module, chosen: Iterable[str], packed: PackedGPTQ, symmetric: bool) -> dict[str, Any]:
    """config.json's `quantization_config` for a model in which just these layers are in GPTQ's format.

    Args:
        model: with all its layers, none of them replaced yet.
        chosen: names of those in GPTQ's format.
        packed: one of their weights.
        symmetric: whether the zero points of all are the middle code.
    """
    group = int(torch.bincount(packed.g_idx.long()).max())
    ordered = bool((packed.g_idx.long() == torch.arange(len(packed.g_idx), device=packed.g_idx.device) // group).all())
    described = {
        "quant_method": "gptq",
        "bits": packed.bits,
        "group_size": group,
        "desc_act": not ordered,
        "sym": symmetric,
        "lm_head": False,
        "checkpoint_format": "gptq",
        "pack_dtype": "int32",
    }
    inside = sorted({_in_block(name) for name in chosen})
    linear = {_in_block(name) for name, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D))}
    if inside != sorted(name for name in linear if name):
        described["modules_in_block_to_quantize"] = [inside]
    return described


def _in_block(name: str) -> str:
    """The part of a layer's name after its block's number; nothing for a layer outside the blocks."""
    return re.sub(r"^.*?\.\d+\.", "", name) if re.search(r"\.\d+\.", name) else ""
