"""Models on disk in GPTQ's format, loaded with layers that train (`live/gptq.py`).

Every module that has a `qweight` in the checkpoint becomes such a layer, and takes its tensors as they are stored.
"""

from __future__ import annotations

import os
from typing import Any

import torch

from ...errors import CheckpointError, listed
from ...live.gptq import PARTS, GPTQLinear
from ...live.quantized import declare_quantized
from ...quantize.gptq import WORD, PackedGPTQ
from .reader import Source, open_source
from .skeleton import build

BITS = (2, 3, 4)


def is_gptq(config: dict[str, Any]) -> bool:
    """Whether a config.json describes a model in GPTQ's format."""
    described = config.get("quantization_config")
    return isinstance(described, dict) and described.get("quant_method") == "gptq"


def load_gptq(source: str | os.PathLike[str], dtype: torch.dtype | str, device: Any = None) -> Any:
    """A model in evaluation mode.

    Args:
        source: a local directory.
        dtype: that layers compute in, and of everything that is not in few bits; "auto" for what config.json says.
        device: where it goes; None for the CPU.

    Raises:
        CheckpointError: it is in another variant of the format, or tensors are missing or of another shape.
    """
    with open_source(source) as opened:
        described = opened.config["quantization_config"]
        bits, form = described.get("bits"), described.get("checkpoint_format", "gptq")
        if bits not in BITS or form != "gptq":
            raise CheckpointError(
                f"{source} is in GPTQ's format {form!r} with {bits!r} bits; 'gptq' with 4, 3 or 2 bits can be read"
            )
        model: Any = build(opened, buffers=True)
        chosen: Any = getattr(torch, str(opened.config.get("dtype"))) if dtype == "auto" else dtype
        for name in gptq_layers(opened):
            _put_layer(model, name, opened, bits, chosen)
        _fill(model, opened, chosen)
    model.config.dtype, model.config._name_or_path = chosen, os.fspath(source)
    model.name_or_path = os.fspath(source)
    declare_quantized(model, 4, described)
    return model if device is None else model.to(device)


def gptq_layers(source: Source) -> list[str]:
    """The names of a checkpoint's layers in GPTQ's format."""
    return [name.removesuffix(".qweight") for name in source.entries if name.endswith(".qweight")]


def read_gptq(source: Source, name: str, dtype: torch.dtype) -> PackedGPTQ:
    """A layer's weight out of its parts.

    Args:
        source: where they lie.
        name: the layer's.
        dtype: that it dequantises to.

    Raises:
        CheckpointError: a part is missing, or they do not fit each other.
    """
    missing = [f"{name}.{part}" for part in PARTS if f"{name}.{part}" not in source.entries]
    if missing:
        raise CheckpointError(f"{source.path} has no {listed(missing)}")
    words, groups = source.entries[f"{name}.qweight"].shape, source.entries[f"{name}.g_idx"].shape
    bits = words[0] * WORD // max(1, groups[0]) if len(words) == 2 and len(groups) == 1 else 0
    if bits not in BITS or words[0] * WORD != bits * groups[0]:
        raise CheckpointError(
            f"{source.path}: {name}.qweight {words} and g_idx {groups} do not fit each other; download it again"
        )
    return PackedGPTQ(**{part: source.read(f"{name}.{part}") for part in PARTS}, dtype=dtype, bits=bits)


def _put_layer(model: Any, name: str, source: Source, bits: int, dtype: torch.dtype) -> None:
    """A layer of GPTQ's in the place of the one of this name."""
    old = model.get_submodule(name)
    packed = read_gptq(source, name, dtype)
    if packed.bits != bits:
        raise CheckpointError(f"{source.path}: {name} has {packed.bits} bits, and config.json says {bits}")
    layer = GPTQLinear(packed, old.bias)
    wanted = (old.out_features, old.in_features) if isinstance(old, torch.nn.Linear) else tuple(old.weight.mT.shape)
    if (layer.out_features, layer.in_features) != wanted:
        raise CheckpointError(f"{source.path}: {name} is {(layer.out_features, layer.in_features)} and not {wanted}")
    layer.source_cls = type(old)
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, layer.eval())


def _fill(model: Any, source: Source, dtype: torch.dtype) -> None:
    """Give everything that is not in few bits its values."""
    parts = tuple(f".{part}" for part in PARTS)
    state = {}
    for name in source.entries:
        if not name.endswith(parts):
            tensor = source.read(name)
            state[name] = tensor.to(dtype) if tensor.is_floating_point() else tensor
    try:
        found = model.load_state_dict(state, strict=False, assign=True)
    except RuntimeError as error:
        raise CheckpointError(f"{source.path}: {' '.join(str(error).split())[:300]}") from error
    model.tie_weights()
    empty = [name for name, tensor in model.state_dict().items() if tensor.is_meta]
    wrong = [f"{name} is missing" for name in empty] + [f"{name} is unknown" for name in found.unexpected_keys]
    if wrong:
        raise CheckpointError(f"{source.path} does not hold the weights that its config.json asks for: {listed(wrong)}")
