"""The layers that an inspection looks at: which, what they are called, and their weights as matrices."""

from __future__ import annotations

import re

from torch import Tensor, nn

from ...config import PissaConfig
from ...errors import ConfigError
from ...live.targets import Target, resolve_targets


def select_targets(model: nn.Module, config: PissaConfig, max_layers: int | None) -> list[Target]:
    """The targets, of some blocks only where `max_layers` says so."""
    targets = resolve_targets(model, config)
    if max_layers is None:
        return targets
    blocks = list(dict.fromkeys(block for target in targets if (block := block_of(target.name))))
    if max_layers < 1 or not blocks:
        raise ConfigError(f"max_layers is {max_layers}; the model's blocks with targets are {len(blocks)}")
    count = min(max_layers, len(blocks))
    kept = {blocks[i * len(blocks) // count] for i in range(count)}
    return [target for target in targets if block_of(target.name) in kept]


def matrices_of(target: Target) -> list[tuple[str, Tensor]]:
    """A target's matrix (out, in) under its name, or those of its experts, numbered."""
    matrices = target.place.matrices()
    if matrices.ndim == 2:
        return [(target.name, matrices)]
    return [(f"{target.name}[{i}]", matrix) for i, matrix in enumerate(matrices)]


def block_of(name: str) -> str | None:
    """`model.layers.3.mlp.up_proj` -> `model.layers.3`; None outside of numbered blocks."""
    found = re.match(r"(?:.*?\.)?\d+(?=\.)", name)
    return found.group() if found else None


def kind_of(name: str) -> str:
    """What a layer is called within its block: `q_proj`, or more of its name where that alone would not tell
    (`attention.output.dense`)."""
    parts = re.split(r"(?:^|\.)\d+\.", name.partition("[")[0])[-1].split(".")
    return parts[-1] if parts[-1] not in ("dense", "linear", "weight", "c_proj") else ".".join(parts)
