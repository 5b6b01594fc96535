"""A saved adapter back on its base, exactly as it was; nothing is decomposed."""

from __future__ import annotations

import os
from typing import Any

from peft import PeftModel
from torch import Tensor, nn

from ..errors import CheckpointError
from ..live.attach import attach, attach_offset
from ..live.identity import is_other_base
from ..live.marks import is_marked_offset
from ..live.offset import concatenated, freeze_second_halves
from ..live.quantized import keep_unpacked, quantized_layers
from ..live.record import Record, record_of
from ..live.state import TRAINABLE, adapter_layers, is_offset, place_at, set_factors, set_magnitude
from .read import SavedAdapter, base_place, fitted, read_adapter
from .saved_residual import SavedResidual
from .source.architecture import class_for
from .source.load import check_model_directory, load_base, load_config
from .vocabulary import fit_vocabulary


def attach_saved(
    path: str | os.PathLike[str],
    base: str | os.PathLike[str] | nn.Module | None = None,
    *,
    is_trainable: bool = False,
) -> PeftModel:
    """What `pissa.load` gives, before PEFT's own methods are guarded; its arguments and errors are explained there."""
    given = base if base is None or isinstance(base, str | os.PathLike) else getattr(base, "name_or_path", None) or ""
    saved = read_adapter(path, given)
    model, residual = _base_or_residual(path, saved, base, given)
    fit_vocabulary(path, saved, model, given or saved.base)
    adapters = fitted(path, saved, model)
    if residual is None and is_other_base(saved.sample, model, adapters):
        raise CheckpointError(
            f"{path} was trained on another base than the one given: shapes agree, values do not; load it on "
            f"{saved.base or 'the model that it was adapted from'}"
        )
    has_initial = any(factors.A0 is not None for factors in adapters.values())
    in_few_bits = any(name in adapters for name in quantized_layers(model))
    offset = has_initial and residual is None and (is_marked_offset(saved.config) or in_few_bits)
    trained = {name: _tensors(f.A, f.B, f.E) for name, f in adapters.items()}
    initial = {
        name: _tensors(f.A0, f.B0, f.E0) if f.A0 is not None and f.B0 is not None else trained[name]
        for name, f in adapters.items()
    }
    magnitudes = {name: f.magnitude for name, f in adapters.items() if f.magnitude is not None}
    attach_placed = attach_offset if offset else attach
    record = Record(method=saved.method)
    if residual is not None:
        record = Record(
            certificates=residual.certificates,
            method=saved.method,
            quantized=in_few_bits,
            base=residual.base,
            residual=str(residual.path),
        )
    adapted = attach_placed(
        model,
        saved.config,
        initial,
        record,
        subtract=has_initial,
        trained=trained,
        magnitudes=magnitudes or None,
        ready=residual is not None,
    )
    if saved.others:
        _load_others(adapted, saved.others)
    if not is_trainable:
        adapted.requires_grad_(False)
    return adapted


def put_back(adapted: PeftModel, path: str | os.PathLike[str]) -> None:
    """Give an adapted model the values that its own adapter had when it was saved; the initial adapter stays.

    Args:
        adapted: the model.
        path: where its adapter was saved, at any step.

    Raises:
        CheckpointError: the adapter is missing, incomplete, or another one.
    """
    record = record_of(adapted)
    saved = read_adapter(path, record.residual if record is not None else None)
    layers = adapter_layers(adapted)
    places = {name: place_at(layer) for name, layer in layers.items()}
    factors = fitted(path, saved, adapted.get_base_model(), places)
    if factors.keys() != layers.keys():
        raise CheckpointError(f"{path} holds another adapter than the model's own")
    trained = {name: _tensors(f.A, f.B, f.E) for name, f in factors.items()}
    offset = is_offset(adapted, TRAINABLE)
    if offset:
        trained = concatenated(trained, {name: _tensors(f.A0, f.B0, f.E0) for name, f in factors.items()})
    for name, layer in layers.items():
        set_factors(layer, TRAINABLE, *trained[name], trainable=True)
        if (magnitude := factors[name].magnitude) is not None:
            set_magnitude(layer, TRAINABLE, magnitude, trainable=True)
    if offset:
        freeze_second_halves(adapted)
    if saved.others:
        _load_others(adapted, saved.others)


def _tensors(*factors: Tensor | None) -> tuple[Tensor, ...]:
    return tuple(factor for factor in factors if factor is not None)


def _base_or_residual(
    path: str | os.PathLike[str],
    saved: SavedAdapter,
    base: str | os.PathLike[str] | nn.Module | None,
    given: str | os.PathLike[str] | None,
) -> tuple[Any, SavedResidual | None]:
    """The model to attach an adapter to, and where it is the residual already, what its directory says."""
    place, residual = base_place(path, saved, given)
    model: Any = base
    if base is None or isinstance(base, str | os.PathLike):
        model = load_base(place, kind=_class_of(path, saved, place))
    keep_unpacked(model)
    return model, residual


def _class_of(path: str | os.PathLike[str], saved: SavedAdapter, place: str | os.PathLike[str]) -> str:
    """The name of the class of transformers that the base is loaded by: what its config.json names."""
    check_model_directory(place)
    task: Any = saved.config.task_type
    mapping = saved.config.auto_mapping or {}
    architectures = getattr(load_config(place), "architectures", None)
    return class_for(architectures, getattr(task, "value", task), mapping.get("base_model_class"), f"{path}")


def _load_others(model: PeftModel, tensors: dict[str, Tensor]) -> None:
    from peft import set_peft_model_state_dict

    set_peft_model_state_dict(model, tensors, adapter_name=TRAINABLE)
