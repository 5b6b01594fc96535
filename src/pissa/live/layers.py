"""How each kind of layer shows its weight as an (out, in) matrix, and how it takes one back."""

from __future__ import annotations

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


def is_linear(module: nn.Module) -> bool:
    """Whether the module multiplies by one weight matrix: nn.Linear, or GPT-2's Conv1D, which stores it transposed."""
    return isinstance(module, (nn.Linear, Conv1D))


def as_matrix(module: nn.Module, weight: Tensor) -> Tensor:
    """The module's weight, or a tensor of the weight's shape, as a view of shape (out, in)."""
    return weight.T if isinstance(module, Conv1D) else weight


def as_stored(module: nn.Module, matrix: Tensor) -> Tensor:
    """An (out, in) matrix in the shape and layout in which the module stores its weight; contiguous."""
    return (matrix.T if isinstance(module, Conv1D) else matrix).contiguous()


def weight_matrix(module: nn.Module) -> Tensor:
    """The module's weight as a detached (out, in) view."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return as_matrix(module, weight.detach())


def set_weight_matrix(module: nn.Module, matrix: Tensor) -> None:
    """Give the module a new frozen parameter; the old one, and whoever else holds it, stays as it was."""
    module.weight = nn.Parameter(as_stored(module, matrix), requires_grad=False)
