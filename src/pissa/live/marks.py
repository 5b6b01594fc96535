"""What an adapter's configuration says of it: our notes in PEFT's own configuration, ranks, and whether it is plain."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

from peft import AdaLoraConfig, LoraConfig

from ..errors import PissaError
from .adalora import set_rank

MARKS = "pissa"
ROWS = "rows"
"""A mark, and the attribute of a model: how many rows the embedding was enlarged to, see `checkpoint/vocabulary.py`."""
PRESERVING_INITIALISATIONS = (True, False, "gaussian", "orthogonal", "eva")
"""What PEFT may have done at initialisation without changing the base's weights."""


def is_marked_offset(config: Any) -> bool:
    """Whether an adapter's configuration says placement "offset"."""
    return marks(config).get("placement") == "offset"


def marks(config: Any) -> dict[str, Any]:
    """What pissa notes in an adapter's own configuration, so that it is not lost when PEFT or Trainer saves it.

    "placement": "offset", where the adapter's second half is frozen; "residual": the format, where the adapter fits
    only a quantised residual; "parameters": see `conversion.py`; "base": see `identity.py`. `auto_mapping` is the one
    field of a PeftConfig that holds any dict.
    """
    mapping = getattr(config, "auto_mapping", None) or {}
    return mapping.get(MARKS, {}) if isinstance(mapping, dict) else {}


def set_marks(config: Any, **values: Any) -> None:
    """Note something in an adapter's configuration, see `marks`; None takes a note away."""
    noted = {key: value for key, value in {**marks(config), **values}.items() if value is not None}
    rest = {key: value for key, value in (config.auto_mapping or {}).items() if key != MARKS}
    config.auto_mapping = {**rest, MARKS: noted} if noted else rest or None


def without_marks(config: LoraConfig) -> LoraConfig:
    """A copy of the configuration as plain PEFT would have it."""
    result = deepcopy(config)
    rest = {key: value for key, value in (config.auto_mapping or {}).items() if key != MARKS}
    result.auto_mapping = rest or None
    return result


def not_plain_lora(config: Any, *, initial_known: bool) -> str | None:
    """Why an adapter is something else than `s·B·A` added to the base's own weights, with or without DoRA's magnitudes
    or AdaLoRA's values; None where it is just that.

    Args:
        config: PEFT's configuration of the adapter.
        initial_known: whether the initial factors are at hand, so that it does not matter what the base's weights
            were replaced by.
    """
    if str(getattr(config.peft_type, "value", config.peft_type)) not in ("LORA", "ADALORA"):
        return f"is of type {getattr(config.peft_type, 'value', config.peft_type)}; pissa handles LORA and ADALORA"
    if config.lora_bias:
        return "trains biases inside the adapter (lora_bias), which a plain LoRA cannot express"
    how = config.init_lora_weights
    if how not in PRESERVING_INITIALISATIONS and not initial_known:
        return (
            f"was initialised by PEFT as {how!r}, which changed the base's weights and kept no record of it; "
            "convert it with PEFT (path_initial_model_for_weight_conversion), or adapt with pissa.adapt"
        )
    return None


def check_always_on(config: Any, what: str) -> None:
    """Refuse an adapter that acts on some tokens alone where it would act on all.

    Args:
        config: PEFT's configuration of the adapter.
        what: what would, for the message.

    Raises:
        PissaError: it is an activated LoRA (aLoRA).
    """
    if getattr(config, "alora_invocation_tokens", None):
        raise PissaError(
            f"the adapter acts only after its invocation tokens (alora_invocation_tokens), and {what} would apply it "
            "to every token; load it with PEFT, as it is or exported without --merged and --to"
        )


def config_with_ranks(source: LoraConfig, factor: float) -> LoraConfig:
    """A copy of the configuration with every rank multiplied by `factor` and every alpha such that the scales stay."""
    result = deepcopy(source)
    if isinstance(result, AdaLoraConfig):
        set_rank(result, round(result.init_r * factor))
        return result
    alpha_factor = factor**0.5 if source.use_rslora else factor
    result.r = round(source.r * factor)
    result.lora_alpha = _whole(source.lora_alpha * alpha_factor)
    result.rank_pattern = {key: round(rank * factor) for key, rank in (source.rank_pattern or {}).items()}
    result.alpha_pattern = {key: _whole(a * alpha_factor) for key, a in (source.alpha_pattern or {}).items()}
    return result


def _whole(alpha: float) -> Any:
    return int(alpha) if float(alpha).is_integer() else alpha
