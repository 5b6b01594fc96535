"""An adapted model's adapter as plain tensors.

What training changed is, per module,

    ΔW = s · (B·A − B0·A0)

with the trained factors A, B and the initial ones A0, B0. Whatever loads, saves or exports an adapter moves this
record; the model it came from is not needed.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from ..errors import PissaError
from .layers import is_linear

TRAINABLE = "default"
INITIAL = "pissa_init"
MARKS = "pissa"
PRESERVING_INITIALISATIONS = (True, False, "gaussian", "orthogonal", "eva")
"""What PEFT may have done at initialisation without changing the base's weights."""


@dataclass(frozen=True)
class AdapterFactors:
    """One module's adapter. For a LoRA baseline, whose initial product is zero, A0 and B0 are None."""

    A: Tensor
    """(r, in)."""
    B: Tensor
    """(out, r)."""
    scale: float
    A0: Tensor | None = None
    """(r, in): A at step 0."""
    B0: Tensor | None = None
    """(out, r): B at step 0."""


def adapter_layers(model: PeftModel) -> dict[str, LoraLayer]:
    """The adapted layers by their module's name in the base model."""
    base = model.get_base_model()
    return {name: module for name, module in base.named_modules() if isinstance(module, LoraLayer)}


def has_initial_adapter(model: nn.Module) -> bool:
    """Whether the model's weights are residuals, that is, whether it carries `pissa_init`."""
    return INITIAL in getattr(model, "peft_config", {})


def is_offset(model: nn.Module, adapter: str) -> bool:
    """Whether an adapter is one of placement "offset": `[A ; A0]` and `[B | −B0]` in one LoRA of rank 2r."""
    return is_marked_offset(getattr(model, "peft_config", {}).get(adapter))


def is_marked_offset(config: Any) -> bool:
    """Whether an adapter's configuration says placement "offset"."""
    return marks(config).get("placement") == "offset"


def marks(config: Any) -> dict[str, str]:
    """What pissa notes in an adapter's own configuration, so that it is not lost when PEFT or Trainer saves it.

    "placement": "offset", where the adapter's second half is frozen; "residual": the format, where the adapter fits
    only a quantised residual. `auto_mapping` is the one field of a PeftConfig that holds any dict.
    """
    mapping = getattr(config, "auto_mapping", None) or {}
    return mapping.get(MARKS, {}) if isinstance(mapping, dict) else {}


def set_marks(config: Any, **values: str) -> None:
    """Note something in an adapter's configuration, see `marks`."""
    config.auto_mapping = {**(config.auto_mapping or {}), MARKS: {**marks(config), **values}}


def without_marks(config: LoraConfig) -> LoraConfig:
    """A copy of the configuration as plain PEFT would have it."""
    result = deepcopy(config)
    rest = {key: value for key, value in (config.auto_mapping or {}).items() if key != MARKS}
    result.auto_mapping = rest or None
    return result


def not_plain_lora(config: Any, *, initial_known: bool) -> str | None:
    """Why an adapter is something else than `s·B·A` added to the base's own weights; None where it is just that.

    Args:
        config: PEFT's configuration of the adapter.
        initial_known: whether the initial factors are at hand, so that it does not matter what the base's weights
            were replaced by.
    """
    if str(getattr(config.peft_type, "value", config.peft_type)) != "LORA":
        return f"is of type {getattr(config.peft_type, 'value', config.peft_type)}; pissa handles LORA"
    if config.use_dora:
        return "is a DoRA adapter, which a plain LoRA cannot express"
    if config.lora_bias:
        return "trains biases inside the adapter (lora_bias), which a plain LoRA cannot express"
    how = config.init_lora_weights
    if how not in PRESERVING_INITIALISATIONS and not initial_known:
        return (
            f"was initialised by PEFT as {how!r}, which changed the base's weights and kept no record of it; "
            "convert it with PEFT (path_initial_model_for_weight_conversion), or adapt with pissa.adapt"
        )
    return None


def active_adapter_name(model: PeftModel) -> str:
    """The one adapter that is being trained or used."""
    names = [name for name in model.peft_config if name != INITIAL]
    active = [name for name in model.active_adapters if name != INITIAL]
    chosen = active if len(active) == 1 else names
    if len(chosen) != 1:
        raise PissaError(f"the model has the adapters {names}; activate the one that is meant with set_adapter")
    return chosen[0]


def adapter_factors(model: PeftModel, adapter: str | None = None, *, split: bool = True) -> dict[str, AdapterFactors]:
    """Detached views of a live model's adapter, by module name.

    Args:
        model: an adapted model.
        adapter: the adapter's name; None for the active one.
        split: whether the two halves of an offset adapter are told apart, which in a sharded model every process has
            to do together.

    Raises:
        PissaError: it adapts something else than linear layers.
    """
    adapter = adapter or active_adapter_name(model)
    factors, others = {}, []
    for name, layer in adapter_layers(model).items():
        if adapter in layer.lora_embedding_A or (adapter in layer.lora_A and not is_linear(base_layer(layer))):
            others.append(f"{name} ({type(base_layer(layer)).__name__})")
            continue
        if adapter not in layer.lora_A:
            continue
        A, B = _pair(layer, adapter)
        if split and is_offset(model, adapter):
            factors[name] = halves(AdapterFactors(A, B, float(layer.scaling[adapter])))
            continue
        A0, B0 = _pair(layer, INITIAL) if INITIAL in layer.lora_A else (None, None)
        factors[name] = AdapterFactors(A, B, float(layer.scaling[adapter]), A0, B0)
    if others:
        raise PissaError(f"adapter {adapter!r} adapts {', '.join(others)}; pissa handles linear layers only")
    return factors


def halves(factors: AdapterFactors) -> AdapterFactors:
    """Trained and initial factors out of `[A ; A0]` and `[B | −B0]`."""
    r = factors.A.shape[0] // 2
    return AdapterFactors(
        factors.A[:r].contiguous(),
        factors.B[:, :r].contiguous(),
        factors.scale,
        factors.A[r:].contiguous(),
        -factors.B[:, r:].contiguous(),
    )


def config_with_ranks(source: LoraConfig, factor: float) -> LoraConfig:
    """A copy of the configuration with every rank multiplied by `factor` and every alpha such that the scales stay."""
    result = deepcopy(source)
    alpha_factor = factor**0.5 if source.use_rslora else factor
    result.r = round(source.r * factor)
    result.lora_alpha = _whole(source.lora_alpha * alpha_factor)
    result.rank_pattern = {key: round(rank * factor) for key, rank in (source.rank_pattern or {}).items()}
    result.alpha_pattern = {key: _whole(a * alpha_factor) for key, a in (source.alpha_pattern or {}).items()}
    return result


def set_factors(layer: LoraLayer, adapter: str, A: Tensor, B: Tensor, *, trainable: bool) -> None:
    """Put factors (copied, contiguous, fp32, on the layer's device) into a layer's adapter."""
    device = base_layer(layer).weight.device
    for holder, tensor in ((layer.lora_A[adapter], A), (layer.lora_B[adapter], B)):
        value = tensor.detach().to(device=device, dtype=torch.float32, copy=True).contiguous()
        holder.weight = nn.Parameter(value, requires_grad=trainable)


def base_layer(layer: LoraLayer) -> Any:
    """The layer that PEFT wrapped, whose weight is the base's or the residual."""
    wrapped: Any = layer
    return wrapped.get_base_layer()


def _pair(layer: LoraLayer, adapter: str) -> tuple[Tensor, Tensor]:
    holders: Any = layer.lora_A[adapter], layer.lora_B[adapter]
    A, B = (holder.weight.detach() for holder in holders)
    return A, B


def _whole(alpha: float) -> Any:
    return int(alpha) if float(alpha).is_integer() else alpha
