"""The base's function back, at any time.

In a model whose weights are residuals, `disable_adapter()` is not the base: it is the residual alone. The base is
residual + `pissa_init`, which `reference` switches to for the length of a block and `restore` adds back for good.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.other import ModulesToSaveWrapper
from torch import nn

from ..errors import PissaError, listed
from .layers import combine_each, place_named, place_of
from .marks import PRESERVING_INITIALISATIONS
from .quantized import bits_of, dense_layer, undeclare_quantized
from .record import Record, record_of
from .state import INITIAL, adapter_factors, adapter_layers, base_layer, has_initial_adapter, place_at
from .wrapped import let_be_saved


@contextmanager
def reference(model: PeftModel) -> Iterator[PeftModel]:
    """Inside the block the model computes what the base computes; afterwards everything is as it was.

    Exact up to the residual's rounding or quantisation error (`model.pissa.certificates`) for PiSSA, bit for bit in
    placement "offset" and for the LoRA baselines.

    Args:
        model: an adapted model, trained or not, in training or evaluation mode.

    Yields:
        The same model.

    Raises:
        PissaError: the model has no adapter, its adapters are merged, or its weights were changed by an initialisation
            that pissa did not make, so that the base cannot be known.

    Example:
        >>> import torch
        >>> from transformers import AutoModelForCausalLM
        >>> from pissa import PissaConfig, adapt, reference
        >>> model = adapt(AutoModelForCausalLM.from_pretrained("base"), PissaConfig(rank=8))
        >>> with torch.no_grad(), reference(model):  # what the base says, for a KL penalty or DPO
        ...     logits = model(input_ids=torch.tensor([[1, 2, 3]])).logits
    """
    _check(model)
    trainable = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        with _initial_adapter_active(model) if has_initial_adapter(model) else PeftModel.disable_adapter(model):
            yield model
    finally:
        for parameter, flag in trainable.items():
            parameter.requires_grad_(flag)


def restore(model: Any, base: nn.Module | None = None) -> nn.Module:
    """Take the adapters off and give the base model back.

    Args:
        model: an adapted model, or PEFT's tuner in it; it must not be used afterwards.
        base: the base model as it was before `adapt`, where it is at hand: its weights are copied, bit for bit.
            Without it the weights are `residual + s·B0·A0`, which is the base up to the residual's rounding or
            quantisation error (bit for bit in placement "offset" and for the LoRA baselines, which never change it).

    Returns:
        The model that `adapt` was given, without adapters, tied and trainable where it was.

    Raises:
        PissaError: as for `reference`, or `base` has other modules or shapes.

    Example:
        >>> from transformers import AutoModelForCausalLM
        >>> from pissa import PissaConfig, adapt, restore
        >>> model = adapt(AutoModelForCausalLM.from_pretrained("base"), PissaConfig(rank=8))
        >>> base = restore(model, AutoModelForCausalLM.from_pretrained("base"))  # the very weights, bit for bit
    """
    _check(model)
    layers = adapter_layers(model)
    originals = _original_weights(base, layers) if base is not None else {}
    record = record_of(model) or Record()
    undo = record.undo
    if has_initial_adapter(model) or record.quantized:
        for name, weight in _base_weights(model, layers, originals):
            if bits_of(base_layer(layers[name])) is not None:
                _make_dense(layers[name], weight)
            elif name not in undo.untied:
                place_at(layers[name]).put(weight)
        if record.quantized:
            undeclare_quantized(model.get_base_model())
    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper):
            module.set_adapter([])  # else unloading keeps the trained copy
    tuner: Any = model.base_model if isinstance(model, PeftModel) else model
    plain: Any = BaseTuner.unload(tuner)
    let_be_saved(plain)
    for name, kept in undo.untied.items():
        plain.get_submodule(name).weight = plain.get_submodule(kept).weight
    if undo.ties:
        plain.all_tied_weights_keys.update(undo.ties)
    if undo.tie_word_embeddings is not None:
        plain.config.tie_word_embeddings = undo.tie_word_embeddings
    if record_of(model) is not None:
        for name, parameter in plain.named_parameters():
            parameter.requires_grad_(name in undo.trainable)
    return plain


def _base_weights(
    model: PeftModel, layers: dict[str, LoraLayer], originals: dict[str, torch.Tensor]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and the base's weight (…, out, in): the original where it is at hand, else residual + `pissa_init`."""
    initial = adapter_factors(model, INITIAL) if has_initial_adapter(model) else {}
    for name, layer in layers.items():
        weight = place_at(layer).matrices()
        if name in originals:
            weight = originals[name].to(weight, copy=True)
        elif name in initial:
            start = initial[name].folded()
            weight = combine_each(weight, start.A, start.B, start.scale)
        yield name, weight


def _make_dense(layer: Any, weight: torch.Tensor) -> None:
    """Put an unquantised layer with this weight under an adapter."""
    plain = dense_layer(base_layer(layer), nn.Parameter(weight, requires_grad=False))
    place_of(plain).put(weight)
    layer.base_layer = plain


@contextmanager
def _initial_adapter_active(model: PeftModel) -> Iterator[None]:
    runtime: Any = model.base_model
    active = list(model.active_adapters)
    disabled = any(layer.disable_adapters for layer in adapter_layers(model).values())
    if disabled:
        runtime.enable_adapter_layers()
    runtime.set_adapter(INITIAL, inference_mode=True)
    try:
        yield
    finally:
        runtime.set_adapter(active)
        if disabled:
            runtime.disable_adapter_layers()


def _check(model: Any) -> None:
    if not any(isinstance(model, cls) for cls in (PeftModel, BaseTuner)):
        raise PissaError(f"a model from pissa.adapt or pissa.load is needed, got {type(model).__name__}")
    if has_initial_adapter(model):
        merged = [name for name, layer in adapter_layers(model).items() if layer.merged]
        if merged:
            raise PissaError(f"adapters are merged into {len(merged)} modules: call unmerge_adapter() first")
    initialisations = {name: getattr(config, "init_lora_weights", True) for name, config in model.peft_config.items()}
    foreign = {name: how for name, how in initialisations.items() if how not in PRESERVING_INITIALISATIONS}
    if foreign:
        raise PissaError(f"the base cannot be known: {foreign} changed its weights for good; adapt with pissa.adapt")


def _original_weights(base: nn.Module, layers: dict[str, LoraLayer]) -> dict[str, torch.Tensor]:
    places = {name: place_named(base, name) for name in layers}
    found = {
        name: place.matrices()
        for name, place in places.items()
        if place is not None and place.matrix_shape == place_at(layers[name]).matrix_shape
    }
    wrong = [name for name in layers if name not in found]
    if wrong:
        raise PissaError(f"base is another model: {listed(wrong)} missing or of another shape")
    return found
