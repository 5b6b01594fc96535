"""Tokens whose embeddings are trained in full beside the adapters (`trainable_token_indices`)."""

from __future__ import annotations

import torch
from peft import PeftModel
from peft.tuners.trainable_tokens import TrainableTokensLayer
from torch import nn


@torch.no_grad()
def fill_tokens(model: PeftModel) -> None:
    """Give the trained rows the embedding's values, in fp32: PEFT gives none where adapters are made without memory."""
    for layer in model.modules():
        if not isinstance(layer, TrainableTokensLayer) or layer.tied_adapter is not None:
            continue
        embedding = layer.get_base_layer().weight
        for adapter, rows in layer.token_indices.items():
            values = embedding[rows]
            flag = layer.trainable_tokens_delta[adapter].requires_grad
            layer.trainable_tokens_delta[adapter] = nn.Parameter(values.float(), requires_grad=flag)
            layer.trainable_tokens_original[adapter] = values.clone()
