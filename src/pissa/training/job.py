"""What every part of a run is handed: the run as it is asked for, and what it learns from."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.progress import Progress

from ..data.encode import Encoded
from .bar import shown
from .directory import RunDirectory
from .recipe import Recipe
from .rows import Rows, fingerprint_of_rows

if TYPE_CHECKING:
    from trl.trainer.sft_config import SFTConfig


@dataclass(frozen=True)
class Job:
    """One run as it is asked for."""

    model: str
    """The base's directory or hub id."""
    data: str | Rows
    """A file or hub id; or the rows themselves."""
    directory: RunDirectory
    """Where it leaves what it makes."""
    recipe: Recipe
    """All settings."""
    arguments: SFTConfig
    """The same as TRL takes them."""
    settings: dict[str, Any]
    """What the run's record says of them."""
    progress: Progress | None
    """The bar; None where nothing is shown."""
    label: str | None
    """The run's name where it is one of several; what would be said of each is then not said."""

    @property
    def name(self) -> str:
        """The run's name on the bar."""
        return self.label or self.recipe.method

    def shown(self, what: str) -> AbstractContextManager[None]:
        """A line on the bar while this goes on."""
        return shown(self.progress, f"{self.name}, {what}")

    def say(self, text: str) -> None:
        """Print a line, or several, above the bar."""
        if self.progress is not None:
            self.progress.console.print(text, markup=False, highlight=False, soft_wrap=True)


@dataclass(frozen=True)
class Learned:
    """What a run learns from."""

    tokenizer: Any
    """The model's."""
    rows: Encoded
    """The rows to learn."""
    validation: Encoded | None
    """Those to measure the validation loss on."""

    @property
    def fingerprints(self) -> dict[str, str]:
        """Of the rows."""
        found = {"data": fingerprint_of_rows(self.rows)}
        return found if self.validation is None else {**found, "eval_data": fingerprint_of_rows(self.validation)}
