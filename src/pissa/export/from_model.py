"""A live model's adapter as if it had been read from a directory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from torch import Tensor

from ..checkpoint.factors import PREFIX, REMEDY
from ..checkpoint.read import SavedAdapter
from ..errors import PissaError, listed
from ..live.adalora import layer_scale
from ..live.factors import MAGNITUDE, AdapterFactors, Layout, halves
from ..live.marks import config_with_ranks, is_marked_offset, marks, not_plain_lora
from ..live.offset import put_back_second_halves
from ..live.record import record_of
from ..live.state import (
    INITIAL,
    active_adapter_name,
    adapter_factors,
    adapter_layers,
    adapter_layouts,
    has_initial_adapter,
    is_offset,
)

FSDP_WRAPPER = "_fsdp_wrapped_module."


def from_live(model: PeftModel, whole: Mapping[str, Tensor] | None = None, adapter: str | None = None) -> SavedAdapter:
    """The adapter of a name, the active one by default; its tensors out of a whole state dict where one is given."""
    adapter = exportable(model, adapter)
    config = model.peft_config[adapter]
    assert isinstance(config, LoraConfig)
    layouts = adapter_layouts(model)
    if whole is None:
        put_back_second_halves(model)
        factors = adapter_factors(model, adapter)
    else:
        layouts = {name.replace(FSDP_WRAPPER, ""): _unwrapped(layout) for name, layout in layouts.items()}
        factors = _whole_factors(model, layouts, adapter, whole)
        if is_marked_offset(config):
            factors = {name: halves(f) for name, f in factors.items()}
    check_finite(
        {f"{name}, {side}": t for name, f in factors.items() for side, t in (("A", f.A), ("B", f.B))}, "the adapter"
    )
    given = dict(whole) if whole is not None else None
    state = get_peft_model_state_dict(model, given, adapter_name=adapter, save_embedding_layers=False)
    others = {key: value.detach().clone() for key, value in state.items() if ".lora_" not in key}
    if is_marked_offset(config):
        config = config_with_ranks(config, 0.5)
    record = record_of(model)
    base = record.base if record is not None and record.residual else config.base_model_name_or_path
    gaps = {n: c.rounding for n, c in record.certificates.items()} if record is not None and record.quantized else {}
    method = record.method if record is not None else None
    sample = marks(config).get("base")
    return SavedAdapter(factors, layouts, config, base, others, gaps=gaps, sample=sample, method=method)


def exportable(model: PeftModel, adapter: str | None = None) -> str:
    """The name of the adapter that an export takes, the active one by default.

    Raises:
        PissaError: it is no plain LoRA, or merged into the weights.
    """
    adapter = adapter or active_adapter_name(model)
    reason = not_plain_lora(model.peft_config[adapter], initial_known=has_initial_adapter(model))
    if reason:
        raise PissaError(f"adapter {adapter!r} {reason}")
    if any(layer.merged for layer in adapter_layers(model).values()):
        raise PissaError("the adapters are merged into the weights: call unmerge_adapter() first")
    return adapter


def check_finite(tensors: Mapping[str, Tensor], what: str) -> None:
    """Refuse tensors with which nothing can be computed.

    Args:
        tensors: by the names that the message gives.
        what: they are, for the message: "the adapter".

    Raises:
        PissaError: some hold NaN or Inf.
    """
    wrong = [name for name, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())]
    if wrong:
        raise PissaError(f"{what} holds NaN or Inf in {listed(wrong)}: {REMEDY}")


def _unwrapped(layout: Layout) -> Layout:
    return replace(layout, path=layout.path.replace(FSDP_WRAPPER, ""))


def _whole_factors(
    model: PeftModel, layouts: Mapping[str, Layout], adapter: str, state: Mapping[str, Tensor]
) -> dict[str, AdapterFactors]:
    """The factors out of a gathered state dict; of the model, whose parameters are shards, no tensor is looked at.

    Raises:
        PissaError: the state dict lacks some of them.
    """
    missing: list[str] = []

    def tensor(key: str) -> Tensor:
        found = state.get(f"{PREFIX}{key}")
        missing.extend([key] if found is None else [])
        return torch.zeros(0, 0) if found is None else found.detach().cpu().float()

    def pair(layout: Layout, of: str, rank: int) -> tuple[Tensor, Tensor]:
        A, B = (tensor(key) for key in layout.keys(of))
        return (A, B) if missing else layout.kind.unpack(A, B, rank)

    factors = {}
    for wrapped, layer in adapter_layers(model).items():
        name = wrapped.replace(FSDP_WRAPPER, "")
        layout, runtime = layouts[name], cast("Any", layer)
        if adapter not in runtime.r:
            continue
        initial = (None, None)
        if has_initial_adapter(model) and not is_offset(model, adapter):
            initial = pair(layout, INITIAL, runtime.r[INITIAL])
        magnitude = None
        if adapter in getattr(layer, MAGNITUDE):
            magnitude = tensor(f"{layout.magnitude_key}.{adapter}.weight")
        scale = layer_scale(layer, adapter)
        factors[name] = AdapterFactors(*pair(layout, adapter, runtime.r[adapter]), scale, *initial, magnitude)
    if missing:
        raise PissaError(
            f"the state dict lacks {listed(missing)}: gather the "
            'whole model, frozen parameters included (with ZeRO-3 Trainer leaves them out: use placement "offset")'
        )
    return factors
