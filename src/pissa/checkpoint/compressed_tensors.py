"""NVFP4 weights as the package compressed-tensors stores them ("nvfp4-pack-quantized"), for vLLM and transformers.

vLLM joins q, k and v, and gate and up, into one matrix and takes one global scale for all of it. So the global scale is
a power of two that nearly every weight has in common (`quantize/nvfp4.py`), and not each matrix's own.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..errors import CheckpointError, listed
from ..quantize.nvfp4 import BLOCK, PackedNVFP4, check_blocks
from .source.reader import Source

PARTS = ("weight_packed", "weight_scale", "weight_global_scale")
"""A layer's tensors in such a checkpoint, beside its bias."""


def nvfp4_parts(name: str, packed: PackedNVFP4) -> dict[str, Tensor]:
    """A layer's tensors by their names."""
    return {f"{name}.{part}": getattr(packed, part) for part in PARTS}


def empty_nvfp4(out: int, n: int, dtype: torch.dtype) -> PackedNVFP4:
    """A matrix (out, n) in NVFP4 with no values: memory that is never touched."""
    check_blocks(out, n)
    scales = torch.empty(out, n // BLOCK, dtype=torch.float8_e4m3fn)
    return PackedNVFP4(torch.empty(out, n // 2, dtype=torch.uint8), scales, torch.empty(1), dtype)


def read_nvfp4(source: Source, name: str, dtype: torch.dtype) -> PackedNVFP4:
    """A layer's weight out of its parts.

    Args:
        source: where they lie.
        name: the layer's.
        dtype: that it dequantises to.

    Raises:
        CheckpointError: a part is missing.
    """
    missing = [f"{name}.{part}" for part in PARTS if f"{name}.{part}" not in source.entries]
    if missing:
        raise CheckpointError(f"{source.path} has no {listed(missing)}")
    return PackedNVFP4(**{part: source.read(f"{name}.{part}") for part in PARTS}, dtype=dtype)


def nvfp4_description(model: nn.Module, chosen: Iterable[str]) -> dict[str, Any]:
    """config.json's `quantization_config` for a model in which just these layers are in NVFP4, and inputs in 16 bits.

    Args:
        model: with all its layers.
        chosen: names of those in NVFP4.
    """
    chosen = set(chosen)
    linear = [name for name, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D))]
    weights = {
        "num_bits": 4,
        "type": "float",
        "strategy": "tensor_group",
        "group_size": BLOCK,
        "symmetric": True,
        "dynamic": False,
    }
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": "nvfp4-pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": [name for name in linear if name not in chosen],
        "kv_cache_scheme": None,
    }
