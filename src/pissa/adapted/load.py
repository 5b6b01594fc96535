"""`load`: an adapted model as it was saved, at any step."""

from __future__ import annotations

import os

from peft import PeftModel
from torch import nn

from ..checkpoint.attached import attach_saved
from .guards import guard


def load(
    path: str | os.PathLike[str],
    base: str | os.PathLike[str] | nn.Module | None = None,
    *,
    is_trainable: bool = False,
) -> PeftModel:
    """Load an adapted model as it was saved, at any step; nothing is decomposed.

    Args:
        path: a run's directory, a checkpoint inside it, an export, or what `model.save_pretrained` wrote; a hub id.
        base: the base model (it is changed, as by `adapt`), its directory or hub id; None for the one recorded.
        is_trainable: whether adapter "default" is to be trained further.

    Returns:
        The adapted model: adapter "default" as trained, and `pissa_init` where the method has one.

    Raises:
        CheckpointError: the adapter or the base is missing, incomplete, or they do not fit each other.

    Example:
        >>> from transformers import AutoModelForCausalLM
        >>> from pissa import PissaConfig, adapt, load
        >>> model = adapt(AutoModelForCausalLM.from_pretrained("base"), PissaConfig(rank=8))
        >>> model.save_pretrained("saved")  # an ordinary LoRA for the base, and what continues it
        >>> model = load("saved", "base", is_trainable=True)
    """
    adapted = attach_saved(path, base, is_trainable=is_trainable)
    guard(adapted)
    return adapted
