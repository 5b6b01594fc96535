"""What a stage is given, and what it writes: a JSON file that is whole after each figure.

Nothing here imports torch before a stage does.
"""

from __future__ import annotations

import json
import math
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .sizes import Sizes

if TYPE_CHECKING:
    import torch


class Skipped(Exception):
    """A stage, or a part of one, cannot run here; the message says why."""


@dataclass
class Context:
    """One stage's run: what it works with, and its figures so far."""

    sizes: Sizes
    device_name: str
    """torch's name of the device."""
    results: Path
    """The file that holds the figures; see `record`."""
    figures: dict[str, Any] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        import torch

        return torch.device(self.device_name)

    def record(self, **figures: Any) -> None:
        """Keep figures, and write all of them: should the stage be ended, these are known."""
        self.figures.update(figures)
        write_json(self.results, self.figures)

    def attempt(self, name: str, part: Any, *arguments: Any) -> Any:
        """Run one part of a stage and record what it returns; what cannot run here, or runs out of memory, is recorded
        with its message and stops no other part.

        Args:
            name: key of the figure.
            part: called with the arguments; returns a figure.

        Returns:
            The figure, None where there is none.
        """
        try:
            figure = part(*arguments)
        except Skipped as reason:
            self.record(**{name: {"skipped": str(reason)}})
        except out_of_memory() as error:
            self.record(**{name: {"out_of_memory": first_line(error)}})
        else:
            self.record(**{name: figure})
            return figure
        return None


def out_of_memory() -> tuple[type[Exception], ...]:
    """What torch raises where a device's memory does not suffice; nothing as long as torch is not imported."""
    torch = sys.modules.get("torch")
    return () if torch is None else (torch.OutOfMemoryError,)


def write_json(path: Path, document: Any) -> None:
    """Write a document such that the file is whole at any time."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(json.dumps(plain(document), indent=1, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(partial, path)


def plain(document: Any) -> Any:
    """The document with NaN and infinities, which JSON has no numbers for, as text."""
    if isinstance(document, dict):
        return {str(key): plain(value) for key, value in document.items()}
    if isinstance(document, list | tuple):
        return [plain(value) for value in document]
    return repr(document) if isinstance(document, float) and not math.isfinite(document) else document


def first_line(error: BaseException) -> str:
    """An error's kind and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
