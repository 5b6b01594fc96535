"""Telling a base from another one of the same shapes, by a few values of the weights that are adapted.

The values are compared, not hashed: a base in another dtype, or one that `restore` gave back, is still that base.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from .layers import place_named
from .quantized import bits_of

SAMPLES = 32
CLOSE = 0.02
"""Relative distance up to which two samples are of one base; rounding to bf16 makes 0.002."""


def base_sample(model: nn.Module, names: Iterable[str]) -> str | None:
    """A few values of these weights as text, for an adapter's configuration; None where they cannot be looked at."""
    values = _sample(model, names)
    return None if values is None else base64.b64encode(values.numpy().tobytes()).decode()


def is_other_base(sample: str | None, model: nn.Module, names: Iterable[str]) -> bool:
    """Whether a model is not the one that a sample was taken from."""
    values = _sample(model, names)
    if sample is None or values is None:
        return False
    known = torch.frombuffer(bytearray(base64.b64decode(sample)), dtype=torch.float32)
    size = max(float(known.norm()), float(values.norm()))
    return len(known) == len(values) and float((known - values).norm()) > CLOSE * size


def _sample(model: nn.Module, names: Iterable[str]) -> Tensor | None:
    places = [place_named(model, name) for name in sorted(names)]
    weights = [place.weight for place in places if place is not None and bits_of(place.module) is None]
    if len(weights) != len(places) or any(weight.is_meta or weight.numel() == 0 for weight in weights):
        return None
    found = []
    for i in range(SAMPLES):
        weight = weights[i % len(weights)]
        position = (weight.numel() * (2 * i + 1)) // (2 * SAMPLES)
        found.append(weight[tuple(int(index) for index in torch.unravel_index(torch.tensor(position), weight.shape))])
    return torch.stack([value.float().cpu() for value in found])
