"""Groups of parameters for AdamW: LoRA+ (arXiv 2402.12354) and what weight decay leaves alone.

    lr(A) = η        lr(B) = λ·η                                           λ ≥ 1

In a wide network a useful step of B is larger than one of A, since B's gradient passes through fewer sums; LoRA+ gives
B a larger rate. The argument is about LoRA, whose B starts at zero; under PiSSA both factors start alike, and λ is one
more thing to try. Everything else that is trained (A, DoRA's magnitudes, AdaLoRA's values, modules in full) has rate η.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from peft import PeftModel
from torch import nn

from ..live.state import active_adapter_name, adapter_layers, parameters_of


def parameter_groups(
    model: PeftModel, decayed: Iterable[str], *, learning_rate: float, ratio: float, weight_decay: float
) -> list[dict[str, Any]]:
    """What is trained, as an optimizer takes it; the first group has the learning rate that logs show.

    Args:
        model: an adapted model.
        decayed: names of the parameters that weight decay may shrink.
        learning_rate: η.
        ratio: λ.
        weight_decay: of those parameters.
    """
    adapter, decayed = active_adapter_name(model), set(decayed)
    left = {parameters_of(layer, adapter)[1] for layer in adapter_layers(model).values()}
    groups: dict[tuple[float, float], list[nn.Parameter]] = {
        (rate, decay): [] for rate in (learning_rate, ratio * learning_rate) for decay in (weight_decay, 0.0)
    }
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            rate = ratio * learning_rate if parameter in left else learning_rate
            groups[rate, weight_decay if name in decayed else 0.0].append(parameter)
    return [{"params": held, "lr": rate, "weight_decay": decay} for (rate, decay), held in groups.items() if held]


def trained_groups(model: Any, learning_rate: float, ratio: float | None) -> list[dict[str, Any]]:
    """What is trained, with its learning rates: `parameter_groups` under LoRA+, else one group."""
    if ratio is not None:
        return parameter_groups(model, (), learning_rate=learning_rate, ratio=ratio, weight_decay=0.0)
    return [{"params": [p for p in model.parameters() if p.requires_grad], "lr": learning_rate}]
