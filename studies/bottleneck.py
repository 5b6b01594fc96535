"""Bottleneck adapters, the baselines of the paper's table 3, in a few lines of our own.

    h + W_up · relu(W_down · h)          W_up = 0 at the start, so that the model starts as the base

Houlsby (arXiv 1902.00751) puts one after each block's attention and one after its feed-forward layer, Pfeiffer (arXiv
2005.00247) one after the feed-forward layer alone. At r for LoRA on query, key and value a block of width d has 6·r·d
parameters; two bottlenecks of width 3r/2, or one of 3r, have as many.
"""

from __future__ import annotations

import re
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pissa.errors import TargetError

Kind = Literal["houlsby", "pfeiffer"]
AFTER_ATTENTION = re.compile(r".*attention\.output\.dense")
AFTER_FEED_FORWARD = re.compile(r".*layer\.\d+\.output\.dense")


class Bottleneck(nn.Module):
    """h (…, width) -> h + W_up·relu(W_down·h), the same shape."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(width, inner), nn.Linear(inner, width)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, h: Tensor) -> Tensor:
        return h + self.up(torch.relu(self.down(h)))


def add_bottlenecks(model: nn.Module, kind: Kind, rank: int, seed: int) -> nn.Module:
    """Freeze an encoder of BERT's shape and give its blocks adapters, which alone are trained.

    Args:
        model: changed; its linear layers named `attention.output.dense` and `layer.N.output.dense` are followed by
            adapters.
        kind: where they go.
        rank: of the LoRA on query, key and value that has as many parameters.
        seed: of the random W_down.

    Raises:
        TargetError: the model has no such layers.
    """
    places = [AFTER_ATTENTION, AFTER_FEED_FORWARD] if kind == "houlsby" else [AFTER_FEED_FORWARD]
    names = [name for name, _ in model.named_modules() if any(place.fullmatch(name) for place in places)]
    if not names:
        raise TargetError(f"{type(model).__name__} has no layers named output.dense; {kind} adapters are for encoders")
    model.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for name in names:
            parent, _, child = name.rpartition(".")
            dense: Any = model.get_submodule(name)
            after = Bottleneck(dense.out_features, 3 * rank // len(places))
            setattr(model.get_submodule(parent), child, nn.Sequential(dense, after.to(dense.weight)))
    return model
