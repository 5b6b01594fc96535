"""PEFT's own methods on an adapted model, made to keep their promise: adapters are relative to the base.

Other libraries know nothing of residuals. They take `disable_adapter()` for the base, as TRL does for its reference,
and they add a second adapter (TRL's copy of the policy, named "ref") as if the weights were the base's. In a model
whose weights are residuals both would silently compute something else, so `adapt` and `load` put these methods on it:

    disable_adapter()         the base, in either placement (`reference`)
    add_adapter(name, config) with the configuration of an adapter that the model has: another one that starts at the
                              base, from the same initial factors, so that nothing is decomposed again; with any
                              other: as PEFT does it on an untouched base, refused where it could not be right
    save_pretrained, push_to_hub, load_adapter
                              files hold adapters for the base, see `save.py`
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from types import MethodType
from typing import Any

import torch
from peft import LoraConfig, PeftModel

from ..errors import PissaError
from ..live.marks import PRESERVING_INITIALISATIONS
from ..live.offset import concatenated, freeze_ahead
from ..live.reference import reference
from ..live.state import (
    INITIAL,
    TRAINABLE,
    adapter_factors,
    adapter_layers,
    has_initial_adapter,
    is_offset,
    set_factors,
)
from .save import METHODS

TRL_REFERENCE = "ref"
WAY_OUT = 'add it as model.add_adapter(name, model.peft_config["default"]), which starts at the base'
_SHAPE = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "fan_in_fan_out")


def guard(model: PeftModel) -> None:
    """Put the methods below on an adapted model whose adapter starts elsewhere than at zero."""
    runtime: Any = model
    for method in (add_adapter, *METHODS):
        setattr(runtime, method.__name__, MethodType(method, model))
    if has_initial_adapter(model):
        runtime.disable_adapter = MethodType(disable_adapter, model)


# The functions have the names of PEFT's methods, so that a copied or unpickled model finds them, or PEFT's.


@contextmanager
def disable_adapter(self: PeftModel) -> Iterator[None]:
    """Inside the block the model computes what the base computes."""
    with reference(self):
        yield


def add_adapter(
    self: PeftModel,
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
    how = getattr(peft_config, "init_lora_weights", True)
    if how not in PRESERVING_INITIALISATIONS:
        raise PissaError(
            f"adapter {adapter_name!r} asks for init_lora_weights={how!r}, which would change the weights under the "
            f"adapters that are there; {WAY_OUT}"
        )
    same = _same_place(peft_config, self.peft_config[TRAINABLE])
    if has_initial_adapter(self) and not same:
        raise PissaError(
            f"adapter {adapter_name!r} would be added to residuals, so that with it the model is not the base's; "
            f'{WAY_OUT}, or adapt with placement="offset", which leaves the base as it is'
        )
    if adapter_name == TRL_REFERENCE and list(self.active_adapters) != [TRAINABLE]:
        raise PissaError(
            f'a trainer copies adapter "default" as its reference, but {list(self.active_adapters)} would be trained; '
            'activate the other with set_adapter("default"), or delete it'
        )
    config = deepcopy(peft_config)
    if adapter_name == TRL_REFERENCE:
        config.lora_dropout = 0.0
    theirs: Any = type(self).add_adapter
    theirs(self, adapter_name, config, low_cpu_mem_usage and not same, autocast_adapter_dtype)
    if same:
        _start_at_base(self, adapter_name)


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
    if is_offset(model, TRAINABLE):
        factors = adapter_factors(model, TRAINABLE)
        initial = {name: (f.A0, f.B0) for name, f in factors.items() if f.A0 is not None and f.B0 is not None}
        layers = adapter_layers(model)
        for name, (A, B) in concatenated(initial, initial).items():
            set_factors(layers[name], adapter, A, B, trainable=False)
        freeze_ahead(model, adapter)
    for name, parameter in model.named_parameters():
        if f".{INITIAL}." in name:
            model.get_parameter(name.replace(f".{INITIAL}.", f".{adapter}.")).copy_(parameter)
    if adapter == TRL_REFERENCE and _is_quantized(model):
        # TRL rounds the policy of a quantised model to bf16 after it copied it; the reference is rounded alike
        for name, parameter in model.named_parameters():
            if f".{adapter}." in name:
                parameter.data = parameter.data.to(torch.bfloat16)


def _is_quantized(model: PeftModel) -> bool:
    base = model.get_base_model()
    return bool(getattr(base, "is_loaded_in_4bit", False) or getattr(base, "is_loaded_in_8bit", False))
