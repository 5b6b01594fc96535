"""Tokens whose embeddings are trained in full beside the adapters (`trainable_token_indices`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.trainable_tokens import TrainableTokensLayer
from torch import nn

from ..errors import ConfigError, listed


def check_tokens(model: nn.Module, tokens: Sequence[int] | Mapping[str, Sequence[int]], adapted: Sequence[str]) -> None:
    """Refuse tokens that a model does not have.

    Args:
        model: the base.
        tokens: ids of its input embedding, or the name ending of a module -> ids.
        adapted: names of the modules that get an adapter.

    Raises:
        ConfigError: no module of that name has rows for tokens, one is adapted as well, or it has fewer rows.
    """
    modules: dict[str, Any] = dict(model.named_modules())
    if isinstance(tokens, Mapping):
        for where, ids in tokens.items():
            _check_rows(modules, where, [name for name in modules if f".{name}".endswith(f".{where}")], ids, adapted)
    elif tokens:
        runtime: Any = model
        embedding = runtime.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
        inputs = [name for name, module in modules.items() if module is embedding]
        _check_rows(modules, "the input embedding", inputs, tokens, adapted)


def _check_rows(
    modules: Mapping[str, Any], where: str, names: Sequence[str], ids: Sequence[int], adapted: Sequence[str]
) -> None:
    if not names or not all(isinstance(modules[name], nn.Embedding | nn.Linear) for name in names):
        raise ConfigError(f"trainable_token_indices: {where} is no embedding of the model")
    if both := [name for name in names if name in adapted]:
        raise ConfigError(
            f"trainable_token_indices: {', '.join(both)} gets an adapter as well; leave it out by exclude_modules"
        )
    rows = min(len(modules[name].weight) for name in names)
    if beyond := [i for i in ids if i >= rows]:
        raise ConfigError(
            f"trainable_token_indices: {where} has {rows} rows and no {listed(beyond)}; give ids from "
            "0, after resize_token_embeddings where tokens were added"
        )


@torch.no_grad()
def fill_tokens(model: PeftModel) -> None:
    """Give the trained rows the embedding's values, in fp32: PEFT gives none where adapters are made without memory."""
    for layer in model.modules():
        if not isinstance(layer, TrainableTokensLayer) or layer.tied_adapter is not None:
            continue
        embedding: Any = layer.get_base_layer().weight
        for adapter, rows in layer.token_indices.items():
            values = embedding[rows]
            flag = layer.trainable_tokens_delta[adapter].requires_grad
            layer.trainable_tokens_delta[adapter] = nn.Parameter(values.float(), requires_grad=flag)
            layer.trainable_tokens_original[adapter] = values.clone()
