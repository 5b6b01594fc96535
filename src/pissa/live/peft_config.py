"""PEFT's configuration of an adapter, from ours and the targets."""

from __future__ import annotations

from collections.abc import Mapping

from peft import LoraConfig
from torch import nn

from ..config import PissaConfig
from .adalora import adalora_config
from .conversion import NESTING
from .layers import LINEAR, TRANSPOSED
from .marks import set_marks
from .selection import task_type
from .targets import Target, pattern_keys, peft_targets


def peft_config(model: nn.Module, targets: list[Target], config: PissaConfig) -> LoraConfig:
    """PEFT's configuration for these targets. It says `init_lora_weights=True`, so that no library that copies or
    reloads the adapter decomposes the residual."""
    default_alpha = _lora_alpha(config, config.rank, config.alpha)
    alphas = {target.peft_name: _lora_alpha(config, target.rank, target.alpha) for target in targets}
    keys = pattern_keys([*alphas])
    linear = [t.kind for t in targets if t.kind in (LINEAR, TRANSPOSED)]
    parameters = [t.weight_key for t in targets if t.kind.bare]
    result = LoraConfig(
        r=config.rank,
        lora_alpha=default_alpha,  # pyright: ignore[reportArgumentType] -- PEFT computes with floats as well
        target_modules=peft_targets(model, [t.name for t in targets if not t.kind.bare]),
        target_parameters=parameters or None,
        rank_pattern={keys[t.peft_name]: t.rank for t in targets if t.rank != config.rank},
        alpha_pattern={keys[name]: alpha for name, alpha in alphas.items() if alpha != default_alpha},
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
        lora_dropout=config.dropout,
        fan_in_fan_out=config.quantization is None and set(linear) == {TRANSPOSED},
        modules_to_save=list(config.modules_to_save) or None,
        trainable_token_indices=_token_indices(config),
        init_lora_weights=True,
        task_type=task_type(model),
    )
    if parameters:
        set_marks(result, **{NESTING: parameters})
    return adalora_config(result, config.orthogonality) if config.use_adalora else result


def _token_indices(config: PissaConfig) -> list[int] | dict[str, list[int]] | None:
    tokens = config.trainable_token_indices
    if isinstance(tokens, Mapping):
        return {module: list(ids) for module, ids in tokens.items()} or None
    return list(tokens) or None


def _lora_alpha(config: PissaConfig, rank: int, alpha: float | None) -> float:
    if alpha is not None:
        return alpha
    return rank**0.5 if config.use_rslora else rank
