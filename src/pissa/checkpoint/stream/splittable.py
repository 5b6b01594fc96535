"""What `pissa init` cannot split, refused before a weight is read: settings that need a live model, and bases that were
split or quantised before.
"""

from __future__ import annotations

from ...config import PissaConfig
from ...errors import CheckpointError, ConfigError
from ...live.quantized import require_bitsandbytes
from ..manifest import read_manifest
from ..residual import RESIDUAL
from ..source.reader import Source


def check_config(config: PissaConfig) -> None:
    """Refuse what leaves nothing to write, or needs the model itself.

    Raises:
        ConfigError: with what to use instead.
    """
    if config.placement == "offset":
        raise ConfigError(
            'placement "offset" leaves the base as it is, so there is nothing to prepare: give --placement offset to '
            "pissa train"
        )
    if config.starts_at_zero and config.quantization is None:
        raise ConfigError(
            f"method {config.method!r} leaves the base as it is, so there is nothing to prepare: give it to pissa train"
        )
    if config.needs_gradient or config.use_dora or config.use_adalora:
        what = 'component "scored"' if config.needs_gradient else "DoRA" if config.use_dora else "AdaLoRA"
        raise ConfigError(f"{what} needs the model itself: give it to pissa train, which adapts in memory")
    if config.trainable_token_indices:
        raise ConfigError(
            "trainable_token_indices trains rows of an embedding, which is left as it is here: give it to pissa train"
        )
    if config.rank_budget is not None:
        raise ConfigError(
            "rank_budget looks at every weight before the first is split, which streaming does not: take the ranks of "
            "pissa inspect --rank-budget as rank_pattern"
        )
    if config.quantization is None:
        return
    if config.quantization.format in ("nf4", "int8"):
        require_bitsandbytes()


def check_base(source: Source) -> None:
    """Refuse a base that was split or quantised before.

    Raises:
        CheckpointError: it is quantised, or a residual already.
    """
    if (manifest := read_manifest(source.path)) is not None and manifest.get("layout") == RESIDUAL:
        raise CheckpointError(
            f"{source.path} is a residual already, of {manifest.get('base')}: pissa train takes it, or split that base"
        )
    if source.config.get("quantization_config"):
        method = source.config["quantization_config"]
        method = method.get("quant_method", "some method") if isinstance(method, dict) else method
        raise CheckpointError(
            f"{source.path} is quantised already ({str(method)[:50]}): give the base in 16 or 32 bits, or train an "
            "adapter beside it with pissa train --placement offset"
        )
