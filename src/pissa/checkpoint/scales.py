"""The factor before `B·A` that PEFT gives a module, as its configuration says."""

from __future__ import annotations

from peft import LoraConfig
from peft.utils.other import get_pattern_key


def rank_of(config: LoraConfig, name: str) -> int:
    """A module's rank."""
    ranks = config.rank_pattern or {}
    return ranks.get(get_pattern_key(list(ranks), name), config.r)


def scale_of(config: LoraConfig, name: str) -> float:
    """`alpha / rank`, or `alpha / sqrt(rank)` with rsLoRA."""
    rank, alphas = rank_of(config, name), config.alpha_pattern or {}
    alpha = alphas.get(get_pattern_key(list(alphas), name), config.lora_alpha)
    return alpha / (rank**0.5 if config.use_rslora else rank)
