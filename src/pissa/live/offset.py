"""Placement "offset": the base stays as it is, and the adapter carries its own starting point along.

    W + s·(B·A − B0·A0) = W + s·[B | −B0]·[A ; A0]

is ONE plain LoRA of rank 2r on the untouched base, quantised or not. Its first half is trained; the second, the
initial factors, is frozen. So `disable_adapter()` is the base, bit for bit, and whatever PEFT, TRL or an inference
server saves, copies or merges is the trained function, with no further code.

Two guards keep the second half. Its gradient is set to zero as soon as it is accumulated, so that clipping, gradient
norms and the optimizer's moments never see it. That does not stop decoupled weight decay, which shrinks a parameter
whatever its gradient is; so after each step of any torch optimizer the half is put back, and where the optimizer has
copies of its own, as with DeepSpeed's ZeRO-2, before each forward.

What replaces or cuts up parameters is told apart at the first step, which is refused before it changes anything:
FSDP2's `fully_shard` puts new parameters in the place of the old ones, so `freeze_second_halves(model)` has to be
called after it; and in DeepSpeed's ZeRO-3 nothing can be put back, so its weight decay has to be 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from weakref import WeakSet

import torch
from peft import LoraConfig, PeftModel
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.optim.optimizer import (
    Optimizer,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from ..errors import PissaError
from .factors import AdapterFactors
from .marks import config_with_ranks, set_marks
from .state import TRAINABLE, adapter_layers, parameters_of, place_at

FROZEN = "_pissa_frozen_half"
"""A parameter's attribute: (dimension that is cut in halves, stacks along it, the second halves as they must stay)."""
GUARDED = "_pissa_guarded"
"""A layer's attribute: (its identity, the adapters whose second halves are frozen)."""
PUT_BACK = "_pissa_put_back"
"""A parameter's attribute: some torch optimizer has it, after whose steps its second half is put back."""
SHARDED = "ds_id"
"""The attribute by which DeepSpeed's ZeRO-3 knows the parameters that it cut up."""
_layers: WeakSet[Any] = WeakSet()
"""All layers with frozen halves."""
_watching: list[Any] = []


def offset_config(lora_config: LoraConfig) -> LoraConfig:
    """The configuration of rank 2r and the same scales, marked as of this placement."""
    doubled = config_with_ranks(lora_config, 2.0)
    set_marks(doubled, placement="offset")
    return doubled


def concatenated(
    trained: Mapping[str, tuple[Tensor, ...]], initial: Mapping[str, tuple[Tensor, ...]]
) -> dict[str, tuple[Tensor, ...]]:
    """Name -> ([A ; A0] (…, 2r, in), [B | −B0] (…, out, 2r)), from A (…, r, in) and B (…, out, r)."""
    changes = {name: AdapterFactors(A, B, 1.0, *initial[name]).change() for name, (A, B) in trained.items()}
    return {name: (change.A, change.B) for name, change in changes.items()}


def freeze_second_halves(model: PeftModel, adapter: str = TRAINABLE) -> None:
    """Keep the second half of every factor of an adapter as it is, whatever is trained.

    `adapt` does it; it has to be done again after whatever replaces parameters, such as FSDP2's `fully_shard`.

    Args:
        model: a model that was adapted with placement "offset".
        adapter: the adapter's name.

    Raises:
        PissaError: an adapter of an odd rank, which has no halves.

    Example:
        >>> from transformers import AutoModelForCausalLM
        >>> from pissa import PissaConfig, adapt, freeze_second_halves
        >>> base = AutoModelForCausalLM.from_pretrained("base")
        >>> model = adapt(base, PissaConfig(rank=8, placement="offset"))
        >>> freeze_second_halves(model)
    """
    for name, layer in adapter_layers(model).items():
        if layer.r[adapter] % 2:
            raise PissaError(f"{name}: an offset adapter has an even rank, this one {layer.r[adapter]}")
        _freeze_layer(layer, adapter)
        runtime: Any = layer
        if not hasattr(layer, GUARDED):
            runtime.register_forward_pre_hook(_keep)
        setattr(layer, GUARDED, (id(layer), {*getattr(layer, GUARDED, (0, ()))[1], adapter}))


def put_back_second_halves(model: PeftModel) -> None:
    """Put every frozen half back that an optimizer with copies of its own has moved at its last step."""
    for layer in adapter_layers(model).values():
        if hasattr(layer, GUARDED):
            _keep(layer)


def _keep(layer: Any, *_: Any) -> None:
    """Freeze in a copy of a layer, whose parameters are its own, what is frozen in the original; and put back what
    an optimizer's own copy has brought."""
    original, adapters = getattr(layer, GUARDED)
    adapters = adapters & {*layer.r}
    if original != id(layer):
        setattr(layer, GUARDED, (id(layer), adapters))
        for adapter in adapters:
            _freeze_layer(layer, adapter)
    for parameter in (parameter for adapter in adapters for parameter in parameters_of(layer, adapter)):
        if hasattr(parameter, FROZEN) and not hasattr(parameter, PUT_BACK) and not _is_cut(parameter):
            dimension, stacks, values = getattr(parameter, FROZEN)
            second_half(parameter.data, dimension, stacks).copy_(values)


def _is_cut(parameter: nn.Parameter) -> bool:
    """Whether this process holds a part of a parameter, or none of it."""
    return isinstance(parameter, DTensor) or hasattr(parameter, SHARDED)


def _freeze_layer(layer: Any, adapter: str) -> None:
    _layers.add(layer)
    A, B = parameters_of(layer, adapter)
    _freeze(A, 0, place_at(layer).kind.stacks(A, layer.r[adapter]))
    _freeze(B, 1)


def _freeze(parameter: nn.Parameter, dimension: int, stacks: int = 1) -> None:
    """Freeze one factor's second half along a dimension (0 for A, 1 for B), that of each stack on its own."""

    def drop_gradient(accumulated: Tensor) -> None:
        if accumulated.grad is not None:
            second_half(accumulated.grad, dimension, stacks).zero_()

    if not hasattr(parameter, FROZEN):
        trained = parameter.requires_grad
        parameter.requires_grad_(True).register_post_accumulate_grad_hook(drop_gradient)  # torch hooks no others
        parameter.requires_grad_(trained)
    setattr(parameter, FROZEN, (dimension, stacks, second_half(parameter.detach(), dimension, stacks).clone()))
    if not _watching:
        _watching.append(register_optimizer_step_pre_hook(_check))
        _watching.append(register_optimizer_step_post_hook(_put_back))


def second_half(factor: Tensor, dimension: int, stacks: int = 1) -> Tensor:
    """A view of the second half along a dimension, of that of each stack where several follow each other along it; of a
    sharded factor, of what this process holds of that half."""
    if isinstance(factor, DTensor):
        if stacks > 1:
            raise PissaError("experts with an offset adapter cannot be sharded; leave their modules whole")
        half = factor.shape[dimension] // 2
        _, offsets = compute_local_shape_and_global_offset(factor.shape, factor.device_mesh, factor.placements)
        factor = factor.to_local()
        before = min(max(half - offsets[dimension], 0), factor.shape[dimension])
        return factor.narrow(dimension, before, factor.shape[dimension] - before)
    split = factor.unflatten(dimension, (stacks, -1))
    half = split.shape[dimension + 1] // 2
    return split.narrow(dimension + 1, half, half)


def trained_values(parameter: nn.Parameter) -> int:
    """How many of a parameter's values are trained."""
    # under ZeRO-3 a parameter that is not in use has no values here
    values = getattr(parameter, "ds_numel", parameter.numel())
    return values // (2 if hasattr(parameter, FROZEN) else 1)


def _check(optimizer: Optimizer, *_: Any) -> None:
    """Refuse a step that would move a frozen half for good.

    Raises:
        PissaError: with the line that is missing.
    """
    stepped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for layer in _layers:
        for adapter in getattr(layer, GUARDED)[1] & {*layer.r}:
            for parameter in parameters_of(layer, adapter):
                if id(parameter) in stepped and not hasattr(parameter, FROZEN):
                    raise PissaError(
                        "an offset adapter's parameters were replaced, as fully_shard does, so that its second half "
                        "is no longer frozen: call pissa.freeze_second_halves(model) after that"
                    )
                if hasattr(parameter, SHARDED) and any(group.get("weight_decay") for group in optimizer.param_groups):
                    raise PissaError(
                        'weight decay moves the frozen half of a placement "offset" that ZeRO-3 has cut up: set '
                        'weight_decay to 0, use ZeRO-2, or placement "residual"'
                    )


@torch.no_grad()
def _put_back(optimizer: Optimizer, *_: Any) -> None:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if hasattr(parameter, FROZEN):
                setattr(parameter, PUT_BACK, True)
                dimension, stacks, values = getattr(parameter, FROZEN)
                second_half(parameter, dimension, stacks).copy_(values)


def freeze_ahead(model: PeftModel, adapter: str) -> None:
    """Keep an offset adapter's second half as it is from the moment the adapter is trained."""
    held = [(p, p.requires_grad) for name, p in model.named_parameters() if f".{adapter}." in name]
    for parameter, _ in held:
        parameter.requires_grad_(True)  # torch hooks no others
    freeze_second_halves(model, adapter)
    for parameter, flag in held:
        parameter.requires_grad_(flag)
