"""PEFT's own methods on an adapted model, made to keep their promise: adapters are relative to the base.

Other libraries know nothing of residuals. They take `disable_adapter()` for the base, as TRL does for its reference,
copy an adapter, name "__base__" in a batch, unload, pickle. So `adapt` and `load` give the model, PEFT's tuner in it
and its layers classes of ours, derived from PEFT's: what they compute with any mixture of adapters is in `layer.py`,
what they save in `save.py`, and what else must be right or refused is here. A copied or unpickled model has the same
classes, and cannot be unpickled without them.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from functools import cache
from typing import Any

import peft
import torch
from peft import LoraConfig, PeftModel
from peft.tuners.tuners_utils import BaseTuner
from torch import nn

from ..errors import PissaError
from ..live.marks import PRESERVING_INITIALISATIONS, set_marks
from ..live.offset import concatenated, freeze_ahead
from ..live.reference import reference, restore
from ..live.state import (
    INITIAL,
    TRAINABLE,
    adapter_factors,
    adapter_layers,
    has_initial_adapter,
    is_offset,
    set_factors,
)
from ..live.wrapped import let_be_saved
from .layer import AdaptedLayer, adapt_layer, refuse_initial
from .save import AdaptedSaving

TRL_REFERENCE = "ref"
WAY_OUT = 'add it as model.add_adapter(name, model.peft_config["default"]), which starts at the base'
OFFSET = 'adapt with placement="offset", which leaves the base as it is'
_SHAPE = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "fan_in_fan_out")
OURS = ("pissa", "accelerate")
"""Packages that move an adapter's tensors between models of one residual, and know what they do."""
TENSORS = {
    function.__code__: f"{function.__name__} {instead}"
    for function, instead in (
        (
            peft.get_peft_model_state_dict,
            "gives what fits this residual alone; call pissa.export_lora(model)",
        ),
        (peft.set_peft_model_state_dict, "takes an adapter for the base; call pissa.load(path, base)"),
        (peft.get_base_model_state_dict, "gives the residual; call pissa.restore(model), or pissa.save_residual"),
        (peft.set_base_model_state_dict, "replaces the residual; call pissa.restore(model), and adapt the other base"),
    )
}
"""PEFT's functions that take tensors out of a model whose weights are residuals, or put them in."""


class AdaptedModel(AdaptedSaving):
    """Mixed into the class of a PeftModel, before it."""

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Inside the block the model computes what the base computes."""
        model: Any = self
        with reference(model):
            yield

    def add_adapter(
        self,
        adapter_name: str,
        peft_config: Any,
        low_cpu_mem_usage: bool = False,
        autocast_adapter_dtype: bool = True,
    ) -> None:
        """PEFT's `add_adapter`, for an adapter that starts at the base.

        Args:
            adapter_name: of the new adapter, which is neither active nor trainable until `set_adapter`.
            peft_config: that of "default" for another PiSSA adapter of the same ranks and scales; anything else only in
                placement "offset", whose weights are the base's.
            low_cpu_mem_usage, autocast_adapter_dtype: as PEFT has them.

        Raises:
            PissaError: the adapter would start at the residual, or change the weights under the one that is there.
        """
        model: Any = self
        how = getattr(peft_config, "init_lora_weights", True)
        if how not in PRESERVING_INITIALISATIONS:
            raise PissaError(
                f"adapter {adapter_name!r} asks for init_lora_weights={how!r}, which would change the weights under "
                f"the adapters that are there; {WAY_OUT}"
            )
        own = model.peft_config.get(TRAINABLE) or model.peft_config.get(INITIAL)
        same = own is not None and _same_place(peft_config, own)
        if has_initial_adapter(model) and not same:
            raise PissaError(
                f"adapter {adapter_name!r} would be added to residuals, so that with it the model is not the base's; "
                f"{WAY_OUT}, or {OFFSET}"
            )
        if adapter_name == TRL_REFERENCE and list(model.active_adapters) != [TRAINABLE]:
            raise PissaError(
                f'a trainer copies adapter "default" as its reference, but {list(model.active_adapters)} would be '
                'trained; activate the other with set_adapter("default"), or delete it'
            )
        config = deepcopy(peft_config)
        if adapter_name == TRL_REFERENCE:
            config.lora_dropout = 0.0
        if not same:
            set_marks(config, placement=None)
        theirs: Any = super()
        theirs.add_adapter(adapter_name, config, low_cpu_mem_usage and not same, autocast_adapter_dtype)
        if same:
            _start_at_base(model, adapter_name)
        guard_layers(model)

    def set_adapter(self, adapter_name: str, inference_mode: bool = False) -> None:
        """PEFT's `set_adapter`; the initial adapter is not to be trained."""
        if not inference_mode:
            refuse_initial(adapter_name)
        theirs: Any = super()
        theirs.set_adapter(adapter_name, inference_mode=inference_mode)

    @property
    def peft_config(self) -> Any:
        """The adapters' configurations."""
        _refuse_tensors(self)
        return PeftModel.peft_config.fget(self)  # pyright: ignore

    @peft_config.setter
    def peft_config(self, value: Any) -> None:
        PeftModel.peft_config.fset(self, value)  # pyright: ignore

    @property
    def _is_prompt_learning(self) -> bool:
        _refuse_tensors(self)
        return False

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _made_again, (_peft_class(type(self)),), vars(self).copy()


class AdaptedTuner:
    """Mixed into the class of PEFT's tuner, which `model.base_model` is, before it."""

    def unload(self) -> nn.Module:
        """The base, as `pissa.restore` gives it."""
        tuner: Any = self
        return restore(tuner)

    def merge_and_unload(
        self, progressbar: bool = False, safe_merge: bool = False, adapter_names: list[str] | None = None
    ) -> nn.Module:
        """PEFT's `merge_and_unload`, of one adapter at its own scale."""
        theirs: Any = super()
        plain = theirs.merge_and_unload(progressbar=progressbar, safe_merge=safe_merge, adapter_names=adapter_names)
        let_be_saved(plain)
        return plain

    def add_weighted_adapter(self, adapters: list[str], *arguments: Any, **options: Any) -> None:
        """PEFT's `add_weighted_adapter`, of adapters for the base."""
        tuner: Any = self
        if has_initial_adapter(tuner):
            raise PissaError(
                f"{adapters} fit the residual alone and cannot be mixed there: export each with pissa.export_lora, "
                f"load the exports on the base and mix them there, or {OFFSET}"
            )
        theirs: Any = super()
        theirs.add_weighted_adapter(adapters, *arguments, **options)
        guard_layers(tuner)

    def delete_adapter(self, adapter_name: str) -> None:
        """PEFT's `delete_adapter`; the initial adapter stays."""
        refuse_initial(adapter_name)
        tuner: Any = self
        theirs: Any = super()
        theirs.delete_adapter(adapter_name)
        left = [name for name in tuner.peft_config if name != INITIAL]
        if INITIAL in tuner.active_adapters and left:  # PEFT takes the first by the alphabet
            tuner.set_adapter(left[0])

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """PEFT's `set_adapter`; the initial adapter is not to be trained."""
        tuner: Any = self
        if not inference_mode and adapter_name != tuner.active_adapters:  # PEFT sets these again for each new adapter
            refuse_initial(adapter_name)
        theirs: Any = super()
        theirs.set_adapter(adapter_name, inference_mode=inference_mode)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """PEFT's `set_requires_grad`; the initial adapter is not to be trained."""
        if requires_grad:
            refuse_initial(adapter_names)
        theirs: Any = super()
        theirs.set_requires_grad(adapter_names, requires_grad)

    def get_base_model(self) -> nn.Module:
        """The model whose layers are wrapped."""
        tuner: Any = self
        return tuner.model

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _made_again, (_peft_class(type(self)),), vars(self).copy()


def guard(model: PeftModel) -> None:
    """Give an adapted model the classes that are described above."""
    runtime: Any = model
    runtime.__class__ = _guarded(type(model))
    runtime.base_model.__class__ = _guarded(type(runtime.base_model))
    guard_layers(model)


def guard_layers(model: Any) -> None:
    """The same for the layers that have no such class yet."""
    for name, layer in adapter_layers(model).items():
        if not isinstance(layer, AdaptedLayer):
            adapt_layer(layer, name)


@cache
def _guarded(cls: type) -> type:
    if issubclass(cls, AdaptedModel | AdaptedTuner):
        return cls
    mixin = AdaptedTuner if issubclass(cls, BaseTuner) else AdaptedModel
    return type(cls.__name__, (mixin, cls), {"__doc__": cls.__doc__, "__module__": cls.__module__})


def _peft_class(cls: type) -> type:
    ours = AdaptedModel | AdaptedTuner
    return next(c for c in cls.__mro__[1:] if issubclass(c, nn.Module) and not issubclass(c, ours))


def _made_again(cls: type) -> Any:
    """An empty model or tuner, as unpickling and copying want it."""
    guarded: Any = _guarded(cls)
    return guarded.__new__(guarded)


def _refuse_tensors(model: Any) -> None:
    """Refuse one of PEFT's functions that is looking at a model whose weights are residuals.

    PEFT's functions are not the model's methods, so they are known by who asks for what they need.
    """
    asking = sys._getframe(2)
    refusal = TENSORS.get(asking.f_code)
    if refusal is None or INITIAL not in PeftModel.peft_config.fget(model):  # pyright: ignore
        return
    caller = asking.f_back
    if caller is None or caller.f_globals.get("__name__", "").partition(".")[0] not in OURS:
        raise PissaError(f"the model's weights are residuals: {refusal}, or {OFFSET}")


def _same_place(config: Any, own: Any) -> bool:
    """Whether an adapter's factors have the shapes, scales and places of another's."""
    if not isinstance(config, LoraConfig) or any(getattr(config, k) != getattr(own, k) for k in _SHAPE):
        return False
    lists = ("target_modules", "target_parameters")
    return all(_as_set(getattr(config, k)) == _as_set(getattr(own, k)) for k in lists)


def _as_set(names: Any) -> Any:
    return names if isinstance(names, str) else set(names or ())


@torch.no_grad()
def _start_at_base(model: PeftModel, adapter: str) -> None:
    """Give an adapter what "default" started with."""
    layers = adapter_layers(model)
    if is_offset(model, TRAINABLE):
        factors = adapter_factors(model, TRAINABLE)
        initial = {name: (f.A0, f.B0) for name, f in factors.items() if f.A0 is not None and f.B0 is not None}
        for name, (A, B) in concatenated(initial, initial).items():
            set_factors(layers[name], adapter, A, B, trainable=False)
        freeze_ahead(model, adapter)
    for name, parameter in model.named_parameters():
        if f".{INITIAL}." in name:
            model.get_parameter(name.replace(f".{INITIAL}.", f".{adapter}.")).copy_(parameter)
    for layer in layers.values():
        if isinstance(layer, AdaptedLayer) and layer.start_scale is not None:
            layer.started.add(adapter)
    if adapter == TRL_REFERENCE and _is_quantized(model):
        # TRL rounds the policy of a quantised model to bf16 after it copied it; the reference is rounded alike
        for name, parameter in model.named_parameters():
            if f".{adapter}." in name:
                parameter.data = parameter.data.to(torch.bfloat16)


def _is_quantized(model: PeftModel) -> bool:
    base = model.get_base_model()
    return bool(getattr(base, "is_loaded_in_4bit", False) or getattr(base, "is_loaded_in_8bit", False))
