"""A live model's adapters: where PEFT keeps them, and their tensors out of it and into it (`factors.py`)."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn

from ..errors import PissaError
from .adalora import layer_scale, set_singular_values, singular_values
from .factors import MAGNITUDE, WRAPPED, AdapterFactors, Layout, halves
from .layers import CONVOLUTION, LINEAR, TRANSPOSED, Place, kind_of, kind_of_parameter
from .marks import is_marked_offset
from .runtime import OUT_PROJ, foreign, holes, mend

TRAINABLE = "default"
"""The adapter that is trained."""
INITIAL = "pissa_init"
"""The adapter as it was at step 0, frozen and inactive, where the weights are residuals."""


def adapter_layers(model: PeftModel) -> dict[str, LoraLayer]:
    """The adapted layers by the name of what each adapts: a module of the base model, or a bare parameter."""
    return {name_at(path, layer): layer for path, layer in layers_by_path(model)}


def adapter_layouts(model: PeftModel) -> dict[str, Layout]:
    """How PEFT stores each adapter, by the same names."""
    layouts = {}
    for path, layer in layers_by_path(model):
        place = place_at(layer)
        dilation = holes(place.module) if place.kind is CONVOLUTION else ()
        layouts[name_at(path, layer)] = Layout(path, place.kind, place.shape, dilation)
    return layouts


def name_at(path: str, layer: LoraLayer) -> str:
    """The name of what PEFT's layer at this path adapts."""
    if not isinstance(layer, ParamWrapper):
        return path
    module = module_path(path)
    return module if layer.parameter_name == "weight" else f"{module}.{layer.parameter_name}"


def module_path(path: str) -> str:
    """The name of the module that a wrapper at this path wraps, itself wrapped or not."""
    while path.endswith(WRAPPED):
        path = path.removesuffix(WRAPPED)
    return path


def without_wrappers(key: str) -> str:
    """A name in a wrapped model as the base has it."""
    return re.sub(r"(\.base_layer)+(?=\.|$)", "", key)


def place_at(layer: LoraLayer) -> Place:
    """Where the weight lies that PEFT's layer adapts."""
    module = base_layer(layer)
    parameter = layer.parameter_name if isinstance(layer, ParamWrapper) else None
    kind = kind_of(module) if parameter is None else kind_of_parameter(module, getattr(module, parameter).shape)
    if kind is None:
        raise PissaError(f"pissa does not handle adapters of {type(module).__name__}")
    return Place(module, kind, parameter or kind.parameter)


def layers_by_path(model: PeftModel) -> list[tuple[str, LoraLayer]]:
    """PEFT's layers in the order of the model, of several around one module the innermost first."""
    found = {path: layer for path, layer in model.get_base_model().named_modules() if isinstance(layer, LoraLayer)}
    groups: dict[str, list[str]] = {}
    for path in found:
        if path.removesuffix(OUT_PROJ) == path or path.removesuffix(OUT_PROJ) not in found:
            groups.setdefault(module_path(path), []).append(path)
    return [(path, found[path]) for group in groups.values() for path in reversed(group)]


def holders(layer: LoraLayer) -> tuple[Any, Any]:
    """PEFT's two dictionaries, adapter name -> module or parameter, that hold A and B."""
    A, B = (getattr(layer, side) for side in place_at(layer).kind.sides)
    return A, B


def parameters_of(layer: LoraLayer, adapter: str) -> tuple[nn.Parameter, nn.Parameter]:
    """An adapter's two parameters as PEFT holds them."""
    A, B = (held[adapter] if isinstance(held, nn.ParameterDict) else held[adapter].weight for held in holders(layer))
    return A, B


def has_initial_adapter(model: nn.Module) -> bool:
    """Whether the model's weights are residuals, that is, whether it carries `pissa_init`."""
    return INITIAL in getattr(model, "peft_config", {})


def is_offset(model: nn.Module, adapter: str) -> bool:
    """Whether an adapter is one of placement "offset": `[A ; A0]` and `[B | −B0]` in one LoRA of rank 2r."""
    return is_marked_offset(getattr(model, "peft_config", {}).get(adapter))


def active_adapter_name(model: PeftModel) -> str:
    """The one adapter that is being trained or used."""
    names = [name for name in model.peft_config if name != INITIAL]
    active = [name for name in model.active_adapters if name != INITIAL]
    chosen = active if len(active) == 1 else names
    if len(chosen) != 1:
        raise PissaError(f"the model has the adapters {names}; activate the one that is meant with set_adapter")
    return chosen[0]


def adapter_factors(model: PeftModel, adapter: str | None = None) -> dict[str, AdapterFactors]:
    """Detached views of a live model's adapter, by the name of what each adapts.

    Args:
        model: an adapted model.
        adapter: the adapter's name; None for the active one.

    Raises:
        PissaError: PEFT's layer computes something else from these factors than their product.
    """
    adapter = adapter or active_adapter_name(model)
    factors, others = {}, []
    for name, layer in adapter_layers(model).items():
        held = holders(layer)[0]
        if adapter not in held:
            continue
        if reason := foreign(layer, adapter):
            others.append(f"{name} {reason}")
            continue
        A, B = _pair(layer, adapter)
        found = AdapterFactors(
            A, B, layer_scale(layer, adapter), magnitude=_magnitude(layer, adapter), E=singular_values(layer, adapter)
        )
        if is_offset(model, adapter):
            found = halves(found)
        elif INITIAL in held:
            A0, B0 = _pair(layer, INITIAL)
            found = replace(found, A0=A0, B0=B0, E0=singular_values(layer, INITIAL))
        factors[name] = found
    if others:
        raise PissaError(f"adapter {adapter!r}: {'; '.join(others)}")
    return factors


def _magnitude(layer: Any, adapter: str) -> Tensor | None:
    """DoRA's magnitudes (out,), detached; None where the adapter has none."""
    if adapter not in getattr(layer, MAGNITUDE):
        return None
    if place_at(layer).kind not in (LINEAR, TRANSPOSED):
        raise PissaError(f"pissa does not handle DoRA adapters of a {place_at(layer).kind.title}")
    return getattr(layer, MAGNITUDE)[adapter].weight.detach()


def set_magnitude(layer: Any, adapter: str, magnitude: Tensor, *, trainable: bool) -> None:
    """Put magnitudes (out,), copied, in fp32, into a layer's DoRA adapter."""
    value = magnitude.detach().to(device=place_at(layer).weight.device, dtype=torch.float32, copy=True)
    getattr(layer, MAGNITUDE)[adapter].weight = nn.Parameter(value, requires_grad=trainable)


def set_factors(
    layer: LoraLayer, adapter: str, A: Tensor, B: Tensor, E: Tensor | None = None, *, trainable: bool
) -> None:
    """Put factors (…, r, in) and (…, out, r), copied, in fp32, on the layer's device, into a layer's adapter; for
    AdaLoRA with the values (r,) between them."""
    if E is not None:
        set_singular_values(layer, adapter, E, trainable=trainable)
    place = place_at(layer)
    for held, tensor in zip(holders(layer), place.kind.pack(A, B, place.shape), strict=True):
        value = tensor.detach().to(device=place.weight.device, dtype=torch.float32, copy=True).contiguous()
        parameter = nn.Parameter(value, requires_grad=trainable)
        if isinstance(held, nn.ParameterDict):
            held[adapter] = parameter
        else:
            held[adapter].weight = parameter
    mend(layer, adapter)


def base_layer(layer: LoraLayer) -> Any:
    """The layer that PEFT wrapped, whose weight is the base's or the residual."""
    wrapped: Any = layer
    return wrapped.get_base_layer()


def _pair(layer: LoraLayer, adapter: str) -> tuple[Tensor, Tensor]:
    A, B = (parameter.detach() for parameter in parameters_of(layer, adapter))
    return place_at(layer).kind.unpack(A, B, layer.r[adapter])
