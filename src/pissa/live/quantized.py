"""Layers in 4 or 8 bits, bitsandbytes' and GPTQ's (`gptq.py`), holding codes and scales of our own.

A packed residual is put into the layer as it is: nothing is quantised again, so what the layer computes with is
`split.residual`, bit for bit. bitsandbytes is imported only where a layer is made; layers are recognised by their
weight.

On CPUs with AVX512-bf16 an evaluation-mode forward of `Linear4bit` repacks the weights in place, after which they can
neither be trained on nor saved. `keep_unpacked` turns that off, for layers of ours and for those that others loaded.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..config import Quantization
from ..errors import TargetError, extra, listed
from ..quantize.formats import Packed
from ..quantize.gptq import PackedGPTQ
from ..quantize.int8 import INVERSE, PackedInt8
from ..quantize.nested import NESTED_BLOCK, NestedScales
from ..quantize.nf4 import PackedNF4
from .gptq import GPTQLinear, gptq_description

Bits = Literal[4, 8]
WEIGHT_CLASSES: dict[str, Bits] = {"Params4bit": 4, "Int8Params": 8}
OUTLIER_THRESHOLD = 6.0
"""LLM.int8(): input columns with larger values are multiplied in 16 bits (arXiv 2208.07339)."""
FLAGS = ("is_loaded_in_4bit", "is_loaded_in_8bit", "is_quantized", "quantization_method", "hf_quantizer")


def require_bitsandbytes() -> Any:
    """The package.

    Raises:
        MissingExtraError: it is not installed.
    """
    with extra("quant", "4- and 8-bit layers need bitsandbytes"):
        import bitsandbytes
    return bitsandbytes


def bits_of(module: nn.Module) -> Bits | None:
    """4 or 8 for a layer that is quantised (GPTQ's of fewer bits count as 4), None for any other module."""
    if isinstance(module, GPTQLinear):
        return 4
    return WEIGHT_CLASSES.get(type(module._parameters.get("weight")).__name__)


def quantized_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The model's 4- and 8-bit layers by name."""
    return {name: module for name, module in model.named_modules() if bits_of(module) is not None}


def dequantized(module: nn.Module) -> Tensor:
    """What a quantised layer's weight stands for, (out, in): 4-bit in the dtype it was quantised from, 8-bit in the
    model's where that is known, else in fp32."""
    layer: Any = module
    if isinstance(module, GPTQLinear):
        return module.weight
    if bits_of(module) == 8:
        scales = layer.state.SCB if layer.weight.SCB is None else layer.weight.SCB
        dtype = getattr(module, "source_dtype", torch.float32)
        return (layer.weight.data * scales[:, None] * INVERSE).to(dtype)
    unpack(module)
    return require_bitsandbytes().functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)


def quantized_layer(module: nn.Module, packed: Packed) -> nn.Module:
    """A layer with these codes and scales, in place of an nn.Linear or a Conv1D.

    Args:
        module: the layer to replace; its bias is shared, its device kept.
        packed: the weight (out, in).
    """
    bias: Any = module.bias
    if isinstance(packed, PackedGPTQ):
        held = GPTQLinear(packed, bias)
        held.source_cls = type(module)
        return held.train(module.training)
    bnb = require_bitsandbytes()
    out, columns = packed.shape
    if isinstance(packed, PackedNF4):
        nested = isinstance(packed.absmax, NestedScales)
        layer = bnb.nn.Linear4bit(
            columns, out, bias is not None, packed.dtype, compress_statistics=nested, quant_type="nf4", device="meta"
        )
        layer.quant_state = _quant_state(bnb, packed)
        layer.weight = bnb.nn.Params4bit(
            packed.codes,
            requires_grad=False,
            quant_state=layer.quant_state,
            blocksize=packed.block_size,
            compress_statistics=nested,
            quant_type="nf4",
            bnb_quantized=True,
            module=layer,
        )
    elif isinstance(packed, PackedInt8):
        layer = bnb.nn.Linear8bitLt(
            columns, out, bias is not None, has_fp16_weights=False, threshold=OUTLIER_THRESHOLD, device="meta"
        )
        codes, scales = packed.codes.contiguous(), packed.absmax
        layer.weight = bnb.nn.Int8Params(codes, requires_grad=False, has_fp16_weights=False, CB=codes, SCB=scales)
    else:
        raise TargetError("no live layer holds NVFP4; use format nf4, int8 or gptq")
    layer.bias = bias
    # transformers' quantiser keeps the replaced class under the same name
    layer.source_cls, layer.source_dtype = type(module), packed.dtype
    layer.train(module.training)
    keep_unpacked(layer)
    return layer


def dense_layer(module: nn.Module, weight: nn.Parameter) -> nn.Module:
    """The unquantised layer again, with this parameter in the layout of the class that was replaced."""
    layer: Any = module
    if getattr(module, "source_cls", nn.Linear) is Conv1D:
        plain: Any = Conv1D(0, 0)
        plain.nf, plain.nx = layer.out_features, layer.in_features
        plain.bias = layer.bias
    else:
        plain = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        plain.bias = layer.bias
    plain.weight = weight
    return plain.train(module.training)


def keep_unpacked(model: nn.Module) -> None:
    """Turn the repacking of 4-bit weights off in a model or layer, and undo it where it has happened."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # pyright: ignore[reportArgumentType]
            unpack(module)


def unpack(module: nn.Module) -> None:
    """Give a 4-bit layer whose weight was repacked for inference its ordinary codes and scales back."""
    weight: Any = module.weight
    state = getattr(weight, "quant_state", None)
    if state is not None and getattr(state, "packing_format_for_cpu", False):
        from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

        weight.data, weight.quant_state = _convert_weight_packed_for_cpu_inverse(weight.data, state)
        module.quant_state = weight.quant_state  # pyright: ignore[reportArgumentType]


def remember_dtype(model: nn.Module, dtype: torch.dtype) -> None:
    """Note in 8-bit layers, which do not store it, what dtype the model computes in."""
    for module in quantized_layers(model).values():
        if not hasattr(module, "source_dtype"):
            module.source_dtype = dtype  # pyright: ignore[reportArgumentType]


def check_quantizable(model: nn.Module, modules: Mapping[str, nn.Module], form: Quantization) -> None:
    """Refuse, by name and before anything is changed, what a layer in few bits cannot hold.

    Raises:
        TargetError: naming every such module.
    """
    kinds = [
        f"{n} ({type(m).__name__})" for n, m in modules.items() if type(m) is not nn.Linear and type(m) is not Conv1D
    ]
    if kinds:
        raise TargetError(
            f"cannot quantise {listed(kinds)}: layers in few bits replace nn.Linear and Conv1D itself, not classes "
            "made from them; name them in exclude_modules"
        )
    kept: Iterable[str] = getattr(model, "_keep_in_fp32_modules", None) or ()
    full = [name for name in modules if any(f".{key}." in f".{name}." for key in kept)]
    if full:
        raise TargetError(
            f"cannot quantise {listed(full)}: transformers keeps them in full precision when it loads the model; "
            "name them in exclude_modules"
        )
    inputs = {name: _inputs(module) for name, module in modules.items()}
    block_size = form.block_size
    uneven = [f"{name} ({count} inputs)" for name, count in inputs.items() if count % block_size]
    if form.format == "nf4" and uneven:
        raise TargetError(
            f"cannot quantise {listed(uneven)}: bitsandbytes reads NF4 wrongly on CPUs where the block size, "
            f"{block_size}, does not divide the number of inputs; choose a smaller block_size, or name them in "
            "exclude_modules"
        )


def declare_quantized(model: nn.Module, bits: Bits, config: Any = None) -> None:
    """Tell PEFT, Trainer and `save_pretrained` that a model's layers are quantised.

    Args:
        config: transformers' BitsAndBytesConfig, for a transformers model.
    """
    runtime: Any = model
    runtime.is_loaded_in_4bit, runtime.is_loaded_in_8bit = bits == 4, bits == 8
    if isinstance(model, PreTrainedModel) and isinstance(config, dict):
        # transformers' own quantiser of this method would ask for packages that these layers do without
        runtime.config.quantization_config = config
    elif isinstance(model, PreTrainedModel) and config is not None:
        from transformers.quantizers.auto import AutoHfQuantizer

        runtime.config.quantization_config = config
        runtime.hf_quantizer = AutoHfQuantizer.from_config(config, pre_quantized=True)
        runtime.is_quantized, runtime.quantization_method = True, config.quant_method


def undeclare_quantized(model: nn.Module) -> None:
    """Take back what `declare_quantized` said."""
    for flag in FLAGS:
        model.__dict__.pop(flag, None)
    config: Any = getattr(model, "config", None)
    if hasattr(config, "quantization_config"):
        del config.quantization_config


def quantization_description(model: nn.Module, packed: Mapping[str, Packed]) -> Any:
    """What config.json says of a model in which just these layers are quantised, as `declare_quantized` takes it."""
    first = next(iter(packed.values()))
    symmetric = all(isinstance(weight, PackedGPTQ) and weight.is_symmetric for weight in packed.values())
    return description_of(model, packed, first, first.dtype, symmetric)


def description_of(model: nn.Module, chosen: Iterable[str], packed: Packed, dtype: torch.dtype, symmetric: bool) -> Any:
    """The same, of the names of the layers and one of their weights.

    Args:
        dtype: that the layers compute in.
        symmetric: whether all zero points of GPTQ's format are the middle code.
    """
    if isinstance(packed, PackedGPTQ):
        return gptq_description(model, chosen, packed, symmetric)
    return bitsandbytes_config(model, chosen, packed, dtype)


def bitsandbytes_config(model: nn.Module, chosen: Iterable[str], packed: Packed, dtype: torch.dtype) -> Any:
    """transformers' description of a model in which just these layers are quantised.

    Args:
        chosen: names of the quantised layers.
        packed: one of their weights.
        dtype: that the layers compute in.
    """
    from transformers import BitsAndBytesConfig

    skipped = skip_patterns(model, set(chosen))
    if isinstance(packed, PackedInt8):
        return BitsAndBytesConfig(
            load_in_8bit=True, llm_int8_threshold=OUTLIER_THRESHOLD, llm_int8_skip_modules=skipped
        )
    assert isinstance(packed, PackedNF4)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=isinstance(packed.absmax, NestedScales),
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=skipped,
    )


def skip_patterns(model: nn.Module, chosen: set[str]) -> list[str]:
    """Names by which transformers leaves alone every linear layer but the chosen ones.

    It takes a name for a beginning and for an ending of others; where that would hit a chosen layer, an anchored
    regular expression is given instead.
    """
    others = [n for n, m in model.named_modules() if isinstance(m, (nn.Linear, Conv1D)) and n and n not in chosen]
    return [
        f"{re.escape(name)}$" if any(c.startswith(name) or c.endswith(name) for c in chosen) else name
        for name in others
    ]


def _inputs(module: nn.Module) -> int:
    weight: Any = module.weight
    return weight.shape[0] if isinstance(module, Conv1D) else weight.shape[1]


def _quant_state(bnb: Any, packed: PackedNF4) -> Any:
    nested = packed.absmax if isinstance(packed.absmax, NestedScales) else None
    inner = None
    if nested is not None:
        inner = bnb.functional.QuantState(
            absmax=nested.absmax, code=nested.table.clone(), blocksize=NESTED_BLOCK, dtype=torch.float32
        )
    return bnb.functional.QuantState(
        absmax=packed.absmax if nested is None else nested.codes,
        shape=torch.Size(packed.shape),
        code=packed.table.clone(),  # safetensors would save a shared one only once
        blocksize=packed.block_size,
        quant_type="nf4",
        dtype=packed.dtype,
        offset=None if nested is None else nested.offset,
        state2=inner,
    )
