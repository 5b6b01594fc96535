"""Which of a model's trained parameters are the factors of one product, and how PEFT holds them.

An optimizer keeps a group's settings in its state dict, so a pair is described in JSON's own kinds, and found by its
place: whatever replaces parameters one by one, as FSDP2 does, changes nothing here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from peft import PeftModel
from torch import Tensor, nn

from ..errors import ConfigError, listed
from ..live.adalora import is_adalora, layer_scale
from ..live.layers import KINDS
from ..live.state import active_adapter_name, adapter_layers, is_offset, parameters_of, place_at


@dataclass(frozen=True)
class Pair:
    """How two parameters are the factors of s·B·A."""

    name: str
    """Of what they adapt."""
    scale: float
    """s, alpha over rank."""
    kind: int
    """Place in `KINDS`: how PEFT lays the factors out."""
    rank: int
    """Of the adapter as PEFT holds it."""
    halved: bool
    """Whether only the first half of the rank is trained, as with placement "offset"."""

    def matrices(self, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        """The trained factors (n, r, in) and (n, out, r), n > 1 for a stack of experts, out of PEFT's two tensors, or
        of any of their shapes: views, where those are contiguous."""
        A, B = KINDS[self.kind].unpack(A, B, self.rank)
        if self.halved:
            A, B = A[..., : self.rank // 2, :], B[..., : self.rank // 2]
        return (A, B) if A.ndim == 3 else (A[None], B[None])

    def stored(self, A: Tensor, B: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
        """Matrices (n, r, in) and (n, out, r) in the shapes of PEFT's two tensors, 0 in halves that are not trained."""
        whole = [matrices.new_zeros(each.shape) for matrices, each in zip((A, B), like, strict=True)]
        for view, matrices in zip(self.matrices(*whole), (A, B), strict=True):
            view.copy_(matrices)
        return whole


@dataclass(frozen=True)
class Trained:
    """What is trained of a model."""

    pairs: list[Pair]
    factors: list[nn.Parameter]
    """A and B of each pair, in turn."""
    others: dict[str, nn.Parameter]
    """What belongs to no product, by name: DoRA's magnitudes, modules in full, embeddings."""


def trained_pairs(model: Any) -> Trained:
    """A model's trained parameters.

    Args:
        model: a PEFT model, as it is or within DistributedDataParallel.

    Raises:
        ConfigError: no adapter of two factors is trained, or the parts of one are not alike.
    """
    model = getattr(model, "module", model)
    if not isinstance(model, PeftModel):
        raise ConfigError(
            f"this optimizer moves the products of LoRA's factors, and {type(model).__name__} is no PEFT model: adapt "
            "it first, or take AdamW"
        )
    adapter, pairs, factors, wrong = active_adapter_name(model), [], [], []
    layers: dict[str, Any] = {**adapter_layers(model)}
    for name, layer in layers.items():
        if adapter not in layer.r:
            continue
        A, B = parameters_of(layer, adapter)
        if not (A.requires_grad or B.requires_grad) or any(A is factor for factor in factors):
            continue
        if is_adalora(layer):
            wrong.append(f"{name} has AdaLoRA's third factor")
        elif not (A.requires_grad and B.requires_grad):
            wrong.append(f"of {name} only lora_{'A' if A.requires_grad else 'B'} is trained")
        kind = KINDS.index(place_at(layer).kind)
        pairs.append(Pair(name, layer_scale(layer, adapter), kind, layer.r[adapter], is_offset(model, adapter)))
        factors += [A, B]
    if wrong:
        raise ConfigError(f"this optimizer moves both factors of B·A: {listed(wrong)}; take AdamW")
    if not pairs:
        raise ConfigError(f"no factors of adapter {adapter!r} are trained; adapt the model, or take AdamW")
    held = {id(factor) for factor in factors}
    named = ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)
    return Trained(pairs, factors, {name: parameter for name, parameter in named if id(parameter) not in held})
