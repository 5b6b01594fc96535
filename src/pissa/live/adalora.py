"""AdaLoRA on PEFT's modules: where its three factors lie, its scale, and its penalty.

PEFT scales the product by `lora_alpha / (r + 1e-5)`. So `lora_alpha` is set to `s·(r + 1e-5)`, and the scale is s. Its
schedule is set such that `update_and_allocate`, which no trainer needs to call, never prunes a rank.
"""

from __future__ import annotations

from typing import Any

import torch
from peft import AdaLoraConfig, LoraConfig, PeftModel
from peft.tuners.adalora import AdaLoraLayer
from torch import Tensor, nn

from ..decompose.adalora import orthogonality

EPSILON = 1e-5
"""What PEFT adds to the rank before it divides by it."""
NEVER = 1 << 40
"""A step that no run reaches."""


def adalora_config(lora: LoraConfig, weight: float) -> AdaLoraConfig:
    """The AdaLoRA configuration of the same targets, rank and scale.

    Args:
        lora: of one rank and alpha for all targets.
        weight: of the orthogonality penalty.
    """
    return AdaLoraConfig(
        init_r=lora.r,
        target_r=lora.r,
        lora_alpha=lora.lora_alpha / lora.r * (lora.r + EPSILON),  # pyright: ignore[reportArgumentType]
        tinit=NEVER,
        total_step=NEVER + 2,
        orth_reg_weight=weight,
        target_modules=lora.target_modules,
        modules_to_save=lora.modules_to_save,
        lora_dropout=lora.lora_dropout,
        fan_in_fan_out=lora.fan_in_fan_out,
        task_type=lora.task_type,
    )


def lora_config(source: AdaLoraConfig) -> LoraConfig:
    """The LoRA configuration of the same targets, rank and scale."""
    rank = source.init_r
    return LoraConfig(
        r=rank,
        lora_alpha=rank * scale_of(source),  # pyright: ignore[reportArgumentType]
        target_modules=source.target_modules,
        modules_to_save=source.modules_to_save,
        lora_dropout=source.lora_dropout,
        fan_in_fan_out=source.fan_in_fan_out,
        task_type=source.task_type,
        base_model_name_or_path=source.base_model_name_or_path,
        auto_mapping=source.auto_mapping,
    )


def scale_of(config: AdaLoraConfig) -> float:
    """The factor before the product, s."""
    return _rounded(config.lora_alpha / (config.init_r + EPSILON))


def set_rank(config: AdaLoraConfig, rank: int) -> None:
    """Change the rank and leave the scale."""
    scale = scale_of(config)
    config.init_r = config.target_r = rank
    config.lora_alpha = scale * (rank + EPSILON)  # pyright: ignore[reportAttributeAccessIssue]


def _rounded(scale: float) -> float:
    """The scale without what multiplying by `r + 1e-5` and dividing again left in the last bits."""
    return float(f"{scale:.14g}")


def is_adalora(layer: nn.Module) -> bool:
    """Whether PEFT's layer holds AdaLoRA's three factors."""
    return isinstance(layer, AdaLoraLayer)


def layer_scale(layer: Any, adapter: str) -> float:
    """The factor before an adapter's product, of a layer of LoRA or AdaLoRA."""
    scaling = float(layer.scaling[adapter])
    return _rounded(scaling / (layer.r[adapter] + EPSILON)) if is_adalora(layer) else scaling


def singular_values(layer: Any, adapter: str) -> Tensor | None:
    """E (r,) of an AdaLoRA adapter, detached; None for LoRA."""
    return layer.lora_E[adapter].detach().flatten() if is_adalora(layer) else None


def set_singular_values(layer: Any, adapter: str, E: Tensor, *, trainable: bool) -> None:
    """Put E (r,), copied, in fp32, into an AdaLoRA layer's adapter."""
    device = layer.get_base_layer().weight.device
    value = E.detach().to(device=device, dtype=torch.float32, copy=True).reshape(-1, 1)
    layer.lora_E[adapter] = nn.Parameter(value, requires_grad=trainable)


def penalty(model: PeftModel, adapter: str) -> Tensor | None:
    """The orthogonality penalty, a mean over the layers, with its weight; None for an adapter that has none.

    A model that is given labels adds PEFT's own, which is the root of this, to the loss that it returns.
    """
    config = model.peft_config[adapter]
    layers: list[Any] = [layer for layer in model.modules() if is_adalora(layer)]
    found = [orthogonality(layer.lora_A[adapter], layer.lora_B[adapter]) for layer in layers if adapter in layer.lora_A]
    if not found or not isinstance(config, AdaLoraConfig):
        return None
    return config.orth_reg_weight * torch.stack(found).mean()
