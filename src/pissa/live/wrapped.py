"""A base in an adapted model is not saved by itself: its tensors have PEFT's names, and no model could load them."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..errors import PissaError

SAVING = "save_pretrained"


class NotByItself:
    """What is called in place of a wrapped base's own `save_pretrained`."""

    def __call__(self, *_: Any, **__: Any) -> None:
        raise PissaError(
            "the model inside is wrapped in adapters, so that its files would fit no model: call save_pretrained on "
            "the adapted model itself, pissa.save_residual(model, …), or pissa.export_merged(model, …)"
        )


def refuse_to_be_saved(base: nn.Module) -> None:
    """Refuse `base.save_pretrained`, until `let_be_saved`."""
    if hasattr(base, SAVING):
        base.__dict__[SAVING] = NotByItself()


def let_be_saved(base: nn.Module) -> None:
    """Give a base that is wrapped no longer its own method back."""
    if isinstance(vars(base).get(SAVING), NotByItself):
        del base.__dict__[SAVING]
