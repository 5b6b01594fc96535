"""An adapted model's adapter as plain tensors.

What training changed is, per module,

    ΔW = s · (B·A − B0·A0)

with the trained factors A, B and the initial ones A0, B0. Whatever loads, saves or exports an adapter moves this
record; the model it came from is not needed.
"""

from __future__ import annotations

import re
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import torch
from peft import AdaLoraConfig, LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn

from ..errors import PissaError
from .adalora import layer_scale, set_rank, set_singular_values, singular_values
from .layers import ATTENTION, CONVOLUTION, EMBEDDING, LINEAR, TRANSPOSED, Kind, Place, kind_of, kind_of_parameter
from .runtime import OUT_PROJ, foreign, holes, mend, with_holes

TRAINABLE = "default"
INITIAL = "pissa_init"
MARKS = "pissa"
MAGNITUDE = "lora_magnitude_vector"
WRAPPED = ".base_layer"
"""The ending of a path inside one of PEFT's wrappers."""
PRESERVING_INITIALISATIONS = (True, False, "gaussian", "orthogonal", "eva")
"""What PEFT may have done at initialisation without changing the base's weights."""


@dataclass(frozen=True)
class AdapterFactors:
    """One weight's adapter, or that of a stack of experts, which is the leading dimension then. For a LoRA baseline,
    whose initial product is zero, A0 and B0 are None."""

    A: Tensor
    """(…, r, in)."""
    B: Tensor
    """(…, out, r)."""
    scale: float
    A0: Tensor | None = None
    """(…, r, in): A at step 0."""
    B0: Tensor | None = None
    """(…, out, r): B at step 0."""
    magnitude: Tensor | None = None
    """(out,): of DoRA, the norms of the adapted weight's rows; else None."""
    E: Tensor | None = None
    """(r,): of AdaLoRA, the values between B and A; else None."""
    E0: Tensor | None = None
    """(r,): E at step 0."""

    def folded(self) -> AdapterFactors:
        """The same adapter without a vector of its own between the factors: B·diag(E) for B."""
        if self.E is None:
            return self
        B0 = self.B0 * self.E0 if self.B0 is not None and self.E0 is not None else None
        return replace(self, B=self.B * self.E, B0=B0, E=None, E0=None)


@dataclass(frozen=True)
class Layout:
    """How PEFT stores one weight's adapter."""

    path: str
    """Of PEFT's layer in the wrapped model: the module's name, below it `base_layer` for one wrapped again."""
    kind: Kind
    shape: tuple[int, ...]
    """Of the weight as it is stored."""
    dilation: tuple[int, ...] = ()
    """Of a convolution: what the kernels in PEFT's files have holes for, see `runtime.py`."""

    @property
    def magnitude_key(self) -> str:
        """The name of DoRA's magnitudes in PEFT's files."""
        return f"{self.path}.{MAGNITUDE}"

    def keys(self, adapter: str | None = None) -> tuple[str, str]:
        """The names of A and B in PEFT's files, without their common beginning; with an adapter's name, in a model."""
        ending = "" if self.kind is EMBEDDING else ".weight"  # PEFT holds these two as bare parameters
        inserted = f".{adapter}" if adapter else ""
        A, B = (f"{self.path}.{side}{inserted}{ending}" for side in self.kind.sides)
        return A, B

    def tensors(self, A: Tensor, B: Tensor, E: Tensor | None = None) -> dict[str, Tensor]:
        """Factors A (…, r, in) and B (…, out, r), for AdaLoRA with E (r,), as PEFT's files hold them."""
        if E is not None:
            return {f"{self.path}.lora_A": A, f"{self.path}.lora_B": B, f"{self.path}.lora_E": E.reshape(-1, 1)}
        A_stored, B_stored = self.kind.pack(A, B, self.shape)
        if self.dilation:
            A_stored = with_holes(A_stored, self.dilation)
        entries = dict(zip(self.keys(), (A_stored, B_stored), strict=True))
        if self.kind is ATTENTION:
            rank, width = A.shape
            below = f"{self.path}{OUT_PROJ}.lora"
            entries |= {f"{below}_A.weight": A.new_zeros(rank, width), f"{below}_B.weight": A.new_zeros(width, rank)}
        return entries


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


def is_marked_offset(config: Any) -> bool:
    """Whether an adapter's configuration says placement "offset"."""
    return marks(config).get("placement") == "offset"


def marks(config: Any) -> dict[str, Any]:
    """What pissa notes in an adapter's own configuration, so that it is not lost when PEFT or Trainer saves it.

    "placement": "offset", where the adapter's second half is frozen; "residual": the format, where the adapter fits
    only a quantised residual; "parameters": see `conversion.py`; "base": see `identity.py`. `auto_mapping` is the one
    field of a PeftConfig that holds any dict.
    """
    mapping = getattr(config, "auto_mapping", None) or {}
    return mapping.get(MARKS, {}) if isinstance(mapping, dict) else {}


def set_marks(config: Any, **values: Any) -> None:
    """Note something in an adapter's configuration, see `marks`; None takes a note away."""
    noted = {key: value for key, value in {**marks(config), **values}.items() if value is not None}
    rest = {key: value for key, value in (config.auto_mapping or {}).items() if key != MARKS}
    config.auto_mapping = {**rest, MARKS: noted} if noted else rest or None


def without_marks(config: LoraConfig) -> LoraConfig:
    """A copy of the configuration as plain PEFT would have it."""
    result = deepcopy(config)
    rest = {key: value for key, value in (config.auto_mapping or {}).items() if key != MARKS}
    result.auto_mapping = rest or None
    return result


def not_plain_lora(config: Any, *, initial_known: bool) -> str | None:
    """Why an adapter is something else than `s·B·A` added to the base's own weights, with or without DoRA's magnitudes
    or AdaLoRA's values; None where it is just that.

    Args:
        config: PEFT's configuration of the adapter.
        initial_known: whether the initial factors are at hand, so that it does not matter what the base's weights
            were replaced by.
    """
    if str(getattr(config.peft_type, "value", config.peft_type)) not in ("LORA", "ADALORA"):
        return f"is of type {getattr(config.peft_type, 'value', config.peft_type)}; pissa handles LORA and ADALORA"
    if config.lora_bias:
        return "trains biases inside the adapter (lora_bias), which a plain LoRA cannot express"
    how = config.init_lora_weights
    if how not in PRESERVING_INITIALISATIONS and not initial_known:
        return (
            f"was initialised by PEFT as {how!r}, which changed the base's weights and kept no record of it; "
            "convert it with PEFT (path_initial_model_for_weight_conversion), or adapt with pissa.adapt"
        )
    return None


def check_always_on(config: Any, what: str) -> None:
    """Refuse an adapter that acts on some tokens alone where it would act on all.

    Args:
        config: PEFT's configuration of the adapter.
        what: what would, for the message.

    Raises:
        PissaError: it is an activated LoRA (aLoRA).
    """
    if getattr(config, "alora_invocation_tokens", None):
        raise PissaError(
            f"the adapter acts only after its invocation tokens (alora_invocation_tokens), and {what} would apply it "
            "to every token; load it with PEFT, as it is or exported without --merged and --to"
        )


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


def halves(factors: AdapterFactors) -> AdapterFactors:
    """Trained and initial factors out of `[A ; A0]` and `[B | −B0]`."""
    r = factors.A.shape[-2] // 2
    return AdapterFactors(
        factors.A[..., :r, :].contiguous(),
        factors.B[..., :r].contiguous(),
        factors.scale,
        factors.A[..., r:, :].contiguous(),
        -factors.B[..., r:].contiguous(),
        factors.magnitude,
        factors.E[:r] if factors.E is not None else None,
        factors.E[r:] if factors.E is not None else None,
    )


def config_with_ranks(source: LoraConfig, factor: float) -> LoraConfig:
    """A copy of the configuration with every rank multiplied by `factor` and every alpha such that the scales stay."""
    result = deepcopy(source)
    if isinstance(result, AdaLoraConfig):
        set_rank(result, round(result.init_r * factor))
        return result
    alpha_factor = factor**0.5 if source.use_rslora else factor
    result.r = round(source.r * factor)
    result.lora_alpha = _whole(source.lora_alpha * alpha_factor)
    result.rank_pattern = {key: round(rank * factor) for key, rank in (source.rank_pattern or {}).items()}
    result.alpha_pattern = {key: _whole(a * alpha_factor) for key, a in (source.alpha_pattern or {}).items()}
    return result


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


def _whole(alpha: float) -> Any:
    return int(alpha) if float(alpha).is_integer() else alpha
