"""What was done to a live model, kept on it as `model.pissa`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from peft import PeftModel

from ..config import PissaConfig, Quantization
from ..decompose.certificate import Certificate


@dataclass(frozen=True)
class Undo:
    """What `restore` needs to give the base back as it was."""

    untied: Mapping[str, str] = field(default_factory=dict)
    """Target whose weight was shared -> the module that keeps the shared weight."""
    ties: Mapping[str, str] = field(default_factory=dict)
    """The ties among weights that transformers knew of, and that were undone for that."""
    tie_word_embeddings: bool | None = None
    """The base configuration's value, where untying changed it."""
    trainable: frozenset[str] = frozenset()
    """The base's parameters that required a gradient."""


@dataclass
class Record:
    """What `adapt` did to a model, or what its directory says of a loaded one; kept on it as `model.pissa`."""

    config: PissaConfig | None = None
    """What was asked for; None for a model that was loaded."""
    certificates: dict[str, Certificate] = field(default_factory=dict)
    """Module name -> certificate of its split."""
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
    polish: dict[str, Any] | None = None
    """What a polish of the quantised start did (`training/polish.py`); None where there was none."""
    undo: Undo = field(default_factory=Undo)
    """Filled in when the record is put on a model."""


def record_of(model: object) -> Record | None:
    """What is known of an adapted model; None for any other, such as one from plain PEFT."""
    found = getattr(model, "pissa", None)
    return found if isinstance(found, Record) else None


def keep_record(model: PeftModel, record: Record) -> None:
    """Put a record on a model as `model.pissa`: on its tuner, where PeftModel finds what it does not have itself."""
    tuner: Any = model.base_model
    tuner.pissa = record
