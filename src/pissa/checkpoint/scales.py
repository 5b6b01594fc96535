"""A module's rank, and the factor before its `B·A`, as PEFT's configuration says."""

from __future__ import annotations

from peft import AdaLoraConfig, LoraConfig
from peft.utils.other import get_pattern_key

from ..live import adalora


def rank_of(config: LoraConfig, name: str) -> int:
    """A module's rank.

    Args:
        config: the adapter's.
        name: what PEFT matches its patterns with.
    """
    if isinstance(config, AdaLoraConfig):
        return config.init_r
    ranks = config.rank_pattern or {}
    return ranks.get(get_pattern_key(list(ranks), name), config.r)


def scale_of(config: LoraConfig, name: str) -> float:
    """`alpha / rank`, or `alpha / sqrt(rank)` with rsLoRA; of AdaLoRA what `live.adalora` says."""
    if isinstance(config, AdaLoraConfig):
        return adalora.scale_of(config)
    rank, alphas = rank_of(config, name), config.alpha_pattern or {}
    alpha = alphas.get(get_pattern_key(list(alphas), name), config.lora_alpha)
    return alpha / (rank**0.5 if config.use_rslora else rank)
