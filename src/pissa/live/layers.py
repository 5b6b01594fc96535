"""Kinds of layers: how each shows its weight as matrices, and how PEFT stores the two factors.

| kind            | weight as stored       | matrices        | PEFT's A            | PEFT's B            |
|-----------------|------------------------|-----------------|---------------------|---------------------|
| `LINEAR`        | (out, in)              | (out, in)       | (r, in)             | (out, r)            |
| `TRANSPOSED`    | (in, out)              | (out, in)       | (r, in)             | (out, r)            |
| `EMBEDDING`     | (in, out)              | (out, in)       | (r, in)             | (out, r)            |
| `CONVOLUTION`   | (out, channels, k, …)  | (out, in)       | (r, channels, k, …) | (out, r, 1, …)      |
| `ATTENTION`     | (out, in)              | (out, in)       | (r, in)             | (out, r)            |
| `PARAMETER`     | (out, in)              | (out, in)       | (r, in)             | (out, r)            |
| `EXPERTS`       | (experts, out, in)     | as stored       | (experts·r, in)     | (out, r·experts)    |
| `EXPERTS_INPUT` | (experts, in, out)     | (…, out, in)    | (experts·r, in)     | (out, r·experts)    |

Everywhere else a weight is one matrix (out, in) or a stack of them, its factors A (…, r, in) and B (…, out, r); what
this table says is written nowhere else. The kinds compute with tensors alone, so that models in memory and checkpoints
on disk go through the same functions; a `Place` applies them to a live module.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..split import combine
from .quantized import bits_of, dequantized


@dataclass(frozen=True)
class Kind:
    """A kind of layer whose weight is stored as (out, in), and the default for all others."""

    title: str
    """What messages call it."""
    parameter: str = "weight"
    """The parameter that is adapted; a bare parameter goes by its own name."""
    sides: tuple[str, str] = ("lora_A", "lora_B")
    """PEFT's attributes that hold the factors."""
    bare: bool = False
    """Whether PEFT finds it by `target_parameters`, not by `target_modules`."""

    def matrices(self, weight: Tensor) -> Tensor:
        """The stored weight, or any tensor of its shape, as matrices (…, out, in): a view."""
        return weight

    def stored(self, matrices: Tensor, shape: Sequence[int]) -> Tensor:
        """Matrices (…, out, in) as a weight of this shape; contiguous."""
        return matrices.contiguous()

    def pack(self, A: Tensor, B: Tensor, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Factors A (…, r, in) and B (…, out, r) of a weight of this shape as PEFT holds them."""
        return A, B

    def unpack(self, A: Tensor, B: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        """PEFT's two tensors as factors A (…, r, in) and B (…, out, r): views."""
        return A, B

    def shape_of(self, A: Tensor, B: Tensor, rank: int) -> tuple[int, ...]:
        """The stored weight's shape, from PEFT's two tensors."""
        out, columns = B.shape[0], A.shape[1]
        return out, columns

    def stacks(self, A: Tensor, rank: int) -> int:
        """How many matrices' rows follow each other along PEFT's A; along B the rank always comes first."""
        return 1


class _Transposed(Kind):
    def matrices(self, weight: Tensor) -> Tensor:
        return weight.mT

    def stored(self, matrices: Tensor, shape: Sequence[int]) -> Tensor:
        return matrices.mT.contiguous()

    def shape_of(self, A: Tensor, B: Tensor, rank: int) -> tuple[int, ...]:
        return A.shape[1], B.shape[0]


class _Convolution(Kind):
    """A is a convolution with the layer's own kernel and r outputs, B one with a kernel of size 1."""

    def matrices(self, weight: Tensor) -> Tensor:
        return weight.flatten(1)

    def stored(self, matrices: Tensor, shape: Sequence[int]) -> Tensor:
        return matrices.reshape(tuple(shape)).contiguous()

    def pack(self, A: Tensor, B: Tensor, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
        return A.reshape(-1, *shape[1:]), B.reshape(*B.shape, *[1] * (len(shape) - 2))

    def unpack(self, A: Tensor, B: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        return A.flatten(1), B.flatten(1)

    def shape_of(self, A: Tensor, B: Tensor, rank: int) -> tuple[int, ...]:
        return B.shape[0], *A.shape[1:]


class _Experts(Kind):
    """PEFT lays the experts' A one below the other, and interleaves the columns of their B."""

    def pack(self, A: Tensor, B: Tensor, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
        return A.reshape(-1, A.shape[-1]), B.permute(1, 2, 0).reshape(B.shape[1], -1)

    def unpack(self, A: Tensor, B: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        experts = self.stacks(A, rank)
        return A.reshape(experts, -1, A.shape[-1]), B.reshape(B.shape[0], -1, experts).permute(2, 0, 1)

    def shape_of(self, A: Tensor, B: Tensor, rank: int) -> tuple[int, ...]:
        return self.stacks(A, rank), B.shape[0], A.shape[1]

    def stacks(self, A: Tensor, rank: int) -> int:
        return A.shape[0] // rank


class _ExpertsInput(_Experts):
    def matrices(self, weight: Tensor) -> Tensor:
        return weight.mT

    def stored(self, matrices: Tensor, shape: Sequence[int]) -> Tensor:
        return matrices.mT.contiguous()

    def shape_of(self, A: Tensor, B: Tensor, rank: int) -> tuple[int, ...]:
        return self.stacks(A, rank), A.shape[1], B.shape[0]


LINEAR = Kind("linear layer")
TRANSPOSED = _Transposed("Conv1D")
EMBEDDING = _Transposed("embedding", sides=("lora_embedding_A", "lora_embedding_B"))
CONVOLUTION = _Convolution("convolution")
ATTENTION = Kind("in_proj of nn.MultiheadAttention", parameter="in_proj_weight")
PARAMETER = Kind("parameter", bare=True)
EXPERTS = _Experts("experts", bare=True)
EXPERTS_INPUT = _ExpertsInput("experts stored as (experts, in, out)", bare=True)

KINDS = (LINEAR, TRANSPOSED, EMBEDDING, CONVOLUTION, ATTENTION, PARAMETER, EXPERTS, EXPERTS_INPUT)

MODULES: dict[type[nn.Module], Kind] = {
    nn.Linear: LINEAR,
    Conv1D: TRANSPOSED,
    nn.Embedding: EMBEDDING,
    nn.Conv1d: CONVOLUTION,
    nn.Conv2d: CONVOLUTION,
    nn.Conv3d: CONVOLUTION,
    nn.MultiheadAttention: ATTENTION,
}


def kind_of(module: nn.Module) -> Kind | None:
    """The kind of a module that PEFT adapts as a module; None for any other."""
    return next((kind for cls, kind in MODULES.items() if isinstance(module, cls)), None)


def kind_of_parameter(module: nn.Module, shape: Sequence[int]) -> Kind | None:
    """The kind of a bare parameter of this shape; None where PEFT cannot adapt it."""
    if len(shape) == 3:
        return EXPERTS_INPUT if getattr(module, "is_transposed", False) else EXPERTS
    return PARAMETER if len(shape) == 2 else None


def is_linear(module: nn.Module) -> bool:
    """Whether the module multiplies by one weight matrix: nn.Linear, or GPT-2's Conv1D, which stores it transposed."""
    return kind_of(module) in (LINEAR, TRANSPOSED)


@dataclass(frozen=True)
class Place:
    """Where one weight of a live model lies."""

    module: nn.Module
    kind: Kind
    parameter: str

    @property
    def weight(self) -> Tensor:
        """The parameter as it is stored, detached."""
        weight = getattr(self.module, self.parameter)
        assert isinstance(weight, Tensor)
        return weight.detach()

    def key(self, name: str) -> str:
        """The weight's name in the model's state dict, where the place goes by `name`, see `place_named`."""
        return name if self.kind.bare and self.parameter != "weight" else f"{name}.{self.parameter}"

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight, as it would be stored unquantised."""
        if bits_of(self.module) is not None:
            layer: Any = self.module
            return layer.out_features, layer.in_features
        return tuple(self.weight.shape)

    @property
    def matrix_shape(self) -> tuple[int, ...]:
        """(…, out, in), however the weight is stored."""
        return tuple(self.kind.matrices(torch.empty(self.shape, device="meta")).shape)

    def matrices(self) -> Tensor:
        """The weight as a view (…, out, in); of a quantised layer, what it dequantises to."""
        if bits_of(self.module) is not None:
            return dequantized(self.module)
        return self.kind.matrices(self.weight)

    def put(self, matrices: Tensor) -> None:
        """Give the module a new frozen parameter; the old one, and whoever else holds it, stays as it was."""
        weight = nn.Parameter(self.kind.stored(matrices, self.shape), requires_grad=False)
        setattr(self.module, self.parameter, weight)


def place_of(module: nn.Module) -> Place:
    """The weight of a module that has a kind of its own."""
    kind = kind_of(module)
    assert kind is not None
    return Place(module, kind, kind.parameter)


def place_named(model: nn.Module, name: str) -> Place | None:
    """The weight that goes by this name in a model without adapters: a module's own, or a bare parameter."""
    module, parameter = _submodule(model, name), "weight"
    if module is not None and kind_of(module) is not None:
        return place_of(module)
    if module is None:
        owner, _, parameter = name.rpartition(".")
        module = _submodule(model, owner)
    weight = module._parameters.get(parameter) if module is not None else None
    kind = kind_of_parameter(module, weight.shape) if module is not None and weight is not None else None
    return Place(module, kind, parameter) if module is not None and kind is not None else None


def _submodule(model: nn.Module, name: str) -> nn.Module | None:
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None


def combine_each(matrices: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """`W + scale·B·A` of one matrix (out, in) or of each of a stack: same bits either way, see `split.combine`."""
    if matrices.ndim == 2:
        return combine(matrices, A, B, scale)
    return torch.stack([combine(*each, scale) for each in zip(matrices, A, B, strict=True)])
