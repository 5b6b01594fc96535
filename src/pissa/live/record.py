"""What was done to a live model, kept on it as `model.pissa`."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..config import PissaConfig, Quantization
from ..decompose.certificate import Certificate


@dataclass
class AdaptationRecord:
    """What `adapt` did to a model; kept on it as `model.pissa`."""

    config: PissaConfig | None
    """What was asked for; None for a model that was loaded."""
    certificates: dict[str, Certificate]
    """Module name -> certificate of its split."""
    untied: dict[str, str] = field(default_factory=dict)
    """Target whose weight was shared -> the module that keeps the shared weight."""
    ties: dict[str, str] = field(default_factory=dict)
    """The ties among weights that transformers knew of, and that were undone for that."""
    tie_word_embeddings: bool | None = None
    """The base configuration's value, where untying changed it."""
    trainable: frozenset[str] = frozenset()
    """The base's parameters that required a gradient."""
    method: str | None = None
    """Name of the method, where it is known."""
    quantization: Quantization | None = None
    """How the residual was quantised; None where it is not, or where pissa did not do it."""
    quantized: bool = False
    """Whether the residual is in few bits, so that the trained function is `Q + s·B·A`."""
    base: str | None = None
    """Directory or hub id of the base."""
    residual: str | None = None
    """The directory to which the residual was saved, or from which it was loaded."""
