"""Where PEFT's layers compute something else than `W + s·B·A`, and what puts that right or refuses it.

As read in, and run against, PEFT 0.21.2:

- The A of a convolution is made without the layer's dilation. It is set here, on every adapter. Plain PEFT would
  compute something else from such an adapter, without a word where padding is "same"; so its kernel is written with the
  holes that dilation puts between its taps, a shape that plain PEFT refuses to load.
- The A of a convolution in groups sees all channels, so what is trained is no such convolution any more: refused.
- nn.MultiheadAttention: the product for `out_proj` is added twice (PEFT's pull request 3774 mends it), so that a file
  means one function before the repair and another after it. It is kept at zero, where both mean the same. And the
  base's weights are added to and subtracted from at each forward, and drift by rounding: they are put back.
- nn.TransformerEncoderLayer in evaluation skips its children's forward, and with it every adapter, unless one of them
  has a hook.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import MultiheadAttention, ParamWrapper
from torch import Tensor, nn

from ..errors import listed
from .layers import ATTENTION, CONVOLUTION, EMBEDDING, MODULES, Kind, kind_of

OUT_PROJ = ".base_layer.out_proj"
"""Where PEFT puts the adapter of an attention's out_proj, below that of the attention."""
TWICE = (
    "adapts out_proj, which PEFT adds twice or once depending on its version; merge it with the PEFT that trained it"
)
UNDILATED = "adapts a convolution without its dilation, as PEFT does; only PEFT can run it"


def why_not(module: nn.Module) -> str | None:
    """Why PEFT's layers cannot carry an adapter of this module, of a kind that has one; None where they can."""
    layer: Any = module
    kind = kind_of(module)
    if kind is EMBEDDING:
        if type(module).forward is not nn.Embedding.forward and not hasattr(module, "embed_scale"):
            return "its forward is its own, which PEFT's layer does not call for the adapter"
        if layer.max_norm is not None or layer.sparse:
            return "max_norm and sparse gradients act on the factors in PEFT's layer"
    elif kind is CONVOLUTION:
        cls = next(cls for cls, of in MODULES.items() if of is CONVOLUTION and isinstance(module, cls))
        if any(getattr(type(module), name) is not getattr(cls, name) for name in ("forward", "_conv_forward")):
            return "its forward is its own, which PEFT's layer would apply to the factors"
        if layer.groups > 1:
            return f"groups={layer.groups}: PEFT's A sees all channels, so what is trained cannot be merged"
        if layer.padding_mode != "zeros" and any(layer._reversed_padding_repeated_twice):
            return f"padding_mode={layer.padding_mode!r}: PEFT's A pads with zeros"
    elif isinstance(module, nn.MultiheadAttention) and not layer._qkv_same_embed_dim:
        return "kdim or vdim differs from embed_dim, so it has three weights where PEFT's layer expects one"
    return None


def foreign(layer: LoraLayer, adapter: str) -> str | None:
    """Why an adapter that PEFT alone made is something else than its factors say; None where it is what they say."""
    runtime: Any = layer
    module = runtime.get_base_layer()
    if isinstance(layer, ParamWrapper):
        return None
    if isinstance(layer, MultiheadAttention):
        out_proj: Any = module.out_proj
        pair = [holder[adapter].weight for holder in (out_proj.lora_A, out_proj.lora_B) if adapter in holder]
        if all(bool(factor.any()) for factor in pair) and pair:
            return TWICE
    elif kind_of(module) is CONVOLUTION and runtime.lora_A[adapter].dilation != module.dilation and is_dilated(module):
        return UNDILATED
    return why_not(module)


def holes(module: nn.Module) -> tuple[int, ...]:
    """The dilation of a convolution along each dimension in which its kernel has more than one tap, else 1."""
    layer: Any = module
    return tuple(d if k > 1 else 1 for d, k in zip(layer.dilation, layer.kernel_size, strict=True))


def with_holes(kernel: Tensor, dilation: tuple[int, ...]) -> Tensor:
    """A kernel (…, k, …) as the equal one without dilation, (…, (k − 1)·dilation + 1, …)."""
    sizes = [(k - 1) * d + 1 for k, d in zip(kernel.shape[2:], dilation, strict=True)]
    result = kernel.new_zeros(*kernel.shape[:2], *sizes)
    result[taps(dilation)] = kernel
    return result


def taps(dilation: tuple[int, ...]) -> tuple[Any, ...]:
    """The index of a kernel's taps among its holes."""
    return (slice(None), slice(None), *[slice(None, None, d) for d in dilation])


def mend(layer: LoraLayer, adapter: str) -> None:
    """Make an adapter of PEFT's layer compute what its factors say."""
    runtime: Any = layer
    module = runtime.get_base_layer()
    if kind_of(module) is CONVOLUTION and is_dilated(module):
        _dilate(runtime.lora_A[adapter], module)
    if isinstance(layer, MultiheadAttention):
        _silence(layer, adapter)
        if not getattr(layer, "_pissa_keeps_weights", False):
            runtime._pissa_keeps_weights = True
            layer.register_forward_pre_hook(_hold_weights)
            layer.register_forward_hook(_put_weights_back, always_call=True)


def keep_slow_path(model: nn.Module) -> None:
    """Let nn.TransformerEncoderLayer call its adapted children in evaluation as well."""
    for encoder in model.modules():
        if isinstance(encoder, nn.TransformerEncoderLayer):
            adapted = [m for m in encoder.modules() if isinstance(m, LoraLayer)]
            if adapted and not any(m._forward_hooks or m._forward_pre_hooks for m in encoder.modules()):
                adapted[0].register_forward_hook(_look_on)


def warn_of_peft(model: nn.Module, kinds: Mapping[str, Kind], dropout: float) -> None:
    """Say what PEFT's layers leave out, and what it would take to use an export with PEFT alone."""
    undropped = [name for name, kind in kinds.items() if dropout > 0 and kind in (EMBEDDING, ATTENTION)]
    if undropped:
        warnings.warn(
            f"{listed(undropped)}: PEFT applies no dropout in layers of this kind, so dropout {dropout:g} has no "
            "effect there",
            stacklevel=3,
        )
    attentions = [f"{name}.out_proj" for name, kind in kinds.items() if kind is ATTENTION]
    if attentions:
        warnings.warn(
            f"{listed(attentions)}: left as it is, for PEFT adds the adapter of an attention's out_proj twice; only "
            "in_proj is adapted",
            stacklevel=3,
        )
    encoders = [name for name, module in model.named_modules() if isinstance(module, nn.TransformerEncoderLayer)]
    reached = [
        name for name in encoders if any(f"{target}.".startswith(f"{name}." if name else "") for target in kinds)
    ]
    if reached:
        warnings.warn(
            f"{listed(reached)}: torch's fast path of nn.TransformerEncoderLayer leaves adapters out in evaluation. "
            "Models from pissa take care of that; to use an export with PEFT alone, call "
            "torch.backends.mha.set_fastpath_enabled(False), or merge it",
            stacklevel=3,
        )
    dilated = [name for name, kind in kinds.items() if kind is CONVOLUTION and is_dilated(model.get_submodule(name))]
    if dilated:
        warnings.warn(
            f"{listed(dilated)}: PEFT alone drops the dilation of an adapter and refuses to load this one; load it "
            "with pissa.load, or use export_merged",
            stacklevel=3,
        )


def is_dilated(module: nn.Module) -> bool:
    """Whether there are holes between the taps of a convolution's kernel."""
    return any(step > 1 for step in holes(module))


def _dilate(convolution: Any, module: Any) -> None:
    if convolution.dilation == module.dilation:
        return
    convolution.dilation = module.dilation
    if isinstance(convolution.padding, str):
        twin = type(convolution)(1, 1, module.kernel_size, padding="same", dilation=module.dilation)
        convolution._reversed_padding_repeated_twice = twin._reversed_padding_repeated_twice
    convolution.register_state_dict_post_hook(_save_with_holes)
    convolution.register_load_state_dict_pre_hook(_load_without_holes)


def _save_with_holes(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    key = f"{prefix}weight"
    state[key] = with_holes(state[key], holes(module))


def _load_without_holes(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    key, dilation = f"{prefix}weight", holes(module)
    weight: Any = module.weight
    if key in state and state[key].shape == with_holes(weight.detach(), dilation).shape:
        state[key] = state[key][taps(dilation)].contiguous()


def _silence(layer: MultiheadAttention, adapter: str) -> None:
    """Both factors zero: then neither has a gradient, whatever is made trainable."""
    out_proj: Any = layer.get_base_layer().out_proj
    device = out_proj.get_base_layer().weight.device
    for holder in (out_proj.lora_A[adapter], out_proj.lora_B[adapter]):
        zeros = torch.zeros(holder.weight.shape, dtype=torch.float32, device=device)
        holder.weight = nn.Parameter(zeros, requires_grad=False)


def _hold_weights(layer: Any, _: Any) -> None:
    if not layer.merged:
        attention = layer.get_base_layer()
        layer._pissa_held = attention.in_proj_weight, attention.out_proj.get_base_layer().weight


def _put_weights_back(layer: Any, *_: Any) -> None:
    held = layer.__dict__.pop("_pissa_held", None)
    if held is not None:
        attention = layer.get_base_layer()
        attention.in_proj_weight, attention.out_proj.get_base_layer().weight = held


def _look_on(*_: Any) -> None:
    """Nothing: that there is a hook is enough."""
