"""A base model is wrapped by PEFT and given ready factors: the step that `adapt` and `load` share."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from peft import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn

from ..decompose.dora import magnitudes as row_norms
from ..errors import PissaError
from ..quantize.formats import Packed, form_of
from .adalora import layer_scale
from .conversion import settle_names
from .identity import base_sample
from .layers import combine_each
from .marks import ROWS, set_marks
from .offset import concatenated, freeze_second_halves, offset_config
from .quantized import declare_quantized, quantization_description, quantized_layer
from .record import Record, Undo, keep_record
from .runtime import keep_slow_path
from .state import INITIAL, TRAINABLE, adapter_layers, base_layer, place_at, set_factors, set_magnitude
from .ties import declare_untied, shared_weights
from .tokens import fill_tokens
from .trial import REFUSALS, refusal
from .undo import undone_on_failure
from .wrapped import refuse_to_be_saved


def attach(
    model: nn.Module,
    lora_config: LoraConfig,
    initial: Mapping[str, tuple[Tensor, ...]],
    record: Record,
    *,
    subtract: bool,
    trained: Mapping[str, tuple[Tensor, ...]] | None = None,
    magnitudes: Mapping[str, Tensor] | None = None,
    packed: Mapping[str, Packed] | None = None,
    ready: bool = False,
) -> PeftModel:
    """Wrap a base model by PEFT and give it ready factors: the step that `adapt` and `load` share.

    Args:
        model: the base; its targets' weights are replaced by residuals where `subtract` is set.
        lora_config: the configuration of adapter "default".
        initial: name of what is adapted -> (A0 (…, r, in), B0 (…, out, r)), for AdaLoRA with E0 (r,) as the third.
        record: what is known of the model, put on it as `model.pissa` with what `restore` needs beside it.
        subtract: whether `s·B0·A0` is taken out of the weights and kept as `pissa_init`; else the base stays as it is.
        trained: the factors that "default" gets; None for the initial ones.
        magnitudes: those that it gets where it is a DoRA adapter; None for the norms of the weights' rows.
        packed: quantised residuals that take the weights' place, one for each target or none at all.
        ready: whether the weights are residuals already, as loaded.

    Whatever fails, the model is given back as it was.
    """
    with undone_on_failure(model):
        return _attach(model, lora_config, initial, record, subtract, trained, magnitudes, packed, ready)


def attach_offset(
    model: nn.Module,
    lora_config: LoraConfig,
    initial: Mapping[str, tuple[Tensor, ...]],
    record: Record,
    *,
    trained: Mapping[str, tuple[Tensor, ...]] | None = None,
    magnitudes: Mapping[str, Tensor] | None = None,
    **_: Any,
) -> PeftModel:
    """`attach` for placement "offset": the base is left alone and the initial factors are the adapter's second half.

    Args:
        lora_config: of rank r; the adapter gets twice the rank at the same scale.
    """
    factors = concatenated(trained or initial, initial)
    adapted = attach(model, offset_config(lora_config), factors, record, subtract=False, magnitudes=magnitudes)
    freeze_second_halves(adapted)
    return adapted


def _attach(
    model: nn.Module,
    lora_config: LoraConfig,
    initial: Mapping[str, tuple[Tensor, ...]],
    record: Record,
    subtract: bool,
    trained: Mapping[str, tuple[Tensor, ...]] | None,
    magnitudes: Mapping[str, Tensor] | None,
    packed: Mapping[str, Packed] | None,
    ready: bool,
) -> PeftModel:
    shared = shared_weights(model, list(initial)) if (subtract or packed) and not ready else {}
    ties, tied_before = declare_untied(model, shared) if shared else ({}, None)
    trainable = frozenset(name for name, parameter in model.named_parameters() if parameter.requires_grad)
    base = record.base if record.residual is not None else getattr(model, "name_or_path", None) or None
    if not ready and (sample := base_sample(model, initial)) is not None:
        set_marks(lora_config, base=sample)
    if (rows := vars(model).get(ROWS)) is not None:
        set_marks(lora_config, **{ROWS: rows})
    if packed:
        _quantize_layers(model, packed)
        set_marks(lora_config, residual=form_of(next(iter(packed.values()))))
    adapted = _wrap(model, lora_config, twice=subtract)
    layers = adapter_layers(adapted)
    if set(layers) != set(initial):
        raise PissaError(f"PEFT adapted other modules than asked for: {sorted(set(layers) ^ set(initial))}")
    _follow_modes(adapted, model)
    for name, factors in initial.items():
        layer: Any = layers[name]
        layer.train(base_layer(layer).training)
        place = place_at(layer)
        set_factors(layer, TRAINABLE, *(trained or initial)[name], trainable=True)
        if lora_config.use_dora:
            m = magnitudes[name] if magnitudes is not None else row_norms(place.matrices())
            set_magnitude(layer, TRAINABLE, m, trainable=True)
        if subtract:
            set_factors(layer, INITIAL, *factors, trainable=False)
        if subtract and not packed and not ready:
            A0, B0, *E0 = factors
            B0 = B0 * E0[0] if E0 else B0
            place.put(combine_each(place.matrices(), A0, B0, -layer_scale(layer, TRAINABLE)))
    keep_slow_path(adapted)
    refuse_to_be_saved(adapted.get_base_model())
    quantized = record.quantized or bool(packed)
    undo = Undo(shared, ties, tied_before, trainable)
    keep_record(adapted, replace(record, base=base, quantized=quantized, undo=undo))
    return adapted


def _wrap(model: nn.Module, lora_config: LoraConfig, *, twice: bool) -> PeftModel:
    """Let PEFT wrap the layers, with adapters whose values are still to be set.

    Args:
        twice: with the initial adapter beside the trainable one.
    """
    with warnings.catch_warnings():
        # PEFT looks for the keys among modules alone, though it finds those of bare parameters as well
        warnings.filterwarnings("ignore", "The following (rank|alpha)_pattern keys did not match", RuntimeWarning)
        try:
            adapted = get_peft_model(model, lora_config, adapter_name=TRAINABLE, low_cpu_mem_usage=True)
            if twice:
                adapted.add_adapter(INITIAL, _initial_config(lora_config), low_cpu_mem_usage=True)
        except REFUSALS as error:
            raise refusal(error) from error
    settle_names(adapted)
    fill_tokens(adapted)
    return adapted


def _follow_modes(adapted: PeftModel, model: nn.Module) -> None:
    """Let what PEFT put around modules be in training or evaluation as they are."""
    for wrapper in (adapted, adapted.base_model):
        wrapper.training = model.training
    for module in adapted.modules():
        if isinstance(module, ModulesToSaveWrapper):
            module.train(module.original_module.training)


def _initial_config(lora_config: LoraConfig) -> LoraConfig:
    """The configuration of `pissa_init`: without dropout, and without DoRA, for it is the base's weight as it is."""
    changes: dict[str, Any] = {"lora_dropout": 0.0, "use_dora": False}
    if isinstance(lora_config, AdaLoraConfig):
        changes["inference_mode"] = True  # PEFT allows one trainable AdaLoRA adapter
    return replace(lora_config, **changes)


def _quantize_layers(model: nn.Module, packed: Mapping[str, Packed]) -> None:
    """Put layers in few bits with these weights in the place of the model's own."""
    description = quantization_description(model, packed)
    for name, weight in packed.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, quantized_layer(model.get_submodule(name), weight))
    declare_quantized(model, 8 if form_of(next(iter(packed.values()))) == "int8" else 4, description)
