"""Weights that several modules share: a residual gets one of its own, the others keep the shared one."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from torch import nn


def shared_weights(model: nn.Module, names: list[str]) -> dict[str, str]:
    """Targets whose weight another module uses as well -> that module. Their residual becomes a weight of its own."""
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        if weight is not None:
            owners.setdefault(id(weight), []).append(name)
    shared = {}
    for group in owners.values():
        kept = next((name for name in group if name not in names), group[0])
        shared |= {name: kept for name in group if name in names and name != kept}
    return shared


def declare_untied(model: nn.Module, shared: Mapping[str, str]) -> tuple[dict[str, str], bool | None]:
    """Tell transformers that the weights are no longer tied, so that saving keeps both; returns the old ties and
    setting."""
    warnings.warn(
        "untied "
        + ", ".join(f"{name} from {kept}" for name, kept in shared.items())
        + ": the residual gets a weight of its own and the shared one stays as it was (restore ties them again)",
        stacklevel=5,
    )
    known: dict[str, str] = getattr(model, "all_tied_weights_keys", {})
    undone = dict(known)  # one setting ties all there is, and it has to go
    known.clear()
    model_config: Any = getattr(model, "config", None)
    if not hasattr(model_config, "tie_word_embeddings"):
        return undone, None
    before = model_config.tie_word_embeddings
    model_config.tie_word_embeddings = False
    return undone, before
