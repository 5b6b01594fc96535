"""How each kind of layer shows its weight as an (out, in) matrix, and how it takes one back."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .quantized import bits_of, dequantized


def is_linear(module: nn.Module) -> bool:
    """Whether the module multiplies by one weight matrix: nn.Linear, or GPT-2's Conv1D, which stores it transposed."""
    return isinstance(module, (nn.Linear, Conv1D))


def as_matrix(module: nn.Module, weight: Tensor) -> Tensor:
    """The module's weight, or a tensor of the weight's shape, as a view of shape (out, in)."""
    return weight.T if isinstance(module, Conv1D) else weight


def as_stored(module: nn.Module | type[nn.Module], matrix: Tensor) -> Tensor:
    """An (out, in) matrix in the shape and layout in which the module, or its class, stores its weight; contiguous."""
    kind = module if isinstance(module, type) else type(module)
    return (matrix.T if issubclass(kind, Conv1D) else matrix).contiguous()


def matrix_shape(module: nn.Module) -> tuple[int, int]:
    """(out, in) of the module's weight, however it is stored."""
    layer: Any = module
    if bits_of(module) is not None:
        return layer.out_features, layer.in_features
    out, columns = as_matrix(module, layer.weight).shape
    return out, columns


def weight_matrix(module: nn.Module) -> Tensor:
    """The module's weight as a detached (out, in) view; of a quantised layer, what its weight dequantises to."""
    if bits_of(module) is not None:
        return dequantized(module)
    weight = module.weight
    assert isinstance(weight, Tensor)
    return as_matrix(module, weight.detach())


def set_weight_matrix(module: nn.Module, matrix: Tensor) -> None:
    """Give the module a new frozen parameter; the old one, and whoever else holds it, stays as it was."""
    module.weight = nn.Parameter(as_stored(module, matrix), requires_grad=False)
