"""What a run is about to do, on one screen, before the weights are loaded: its rows, an example, and what it takes."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from rich.progress import Progress

from ..checkpoint.source.load import check_model_directory
from ..data.encode import IGNORED, Encoded
from ..data.prompts import resolve_template
from .bar import shown
from .engine import micro_batch, process_count
from .memory import Memory, estimated
from .ready import ready_split, recipe_of_split
from .recipe import Recipe
from .rows import Rows, tokenised

OPEN, CLOSE = "⟦", "⟧"
"""Around what is learned."""
LONGEST = 900
"""Letters of the example that are shown; more are left out of its middle."""


@dataclass(frozen=True)
class Preview:
    """What is known of a run before its first step."""

    rows: int
    tokens: int
    learned: int
    """Tokens that the loss runs over."""
    truncated: int
    """Rows cut at max_length."""
    dropped: int
    """Rows left out, since nothing of their response was left."""
    max_length: int
    notes: tuple[str, ...]
    validation_rows: int
    template: str
    example: tuple[tuple[str, bool], ...]
    """The first row in pieces: text, and whether it is learned."""
    steps: int | None
    """Optimizer steps; None where packing decides."""
    batch_size: int
    micro_batch_size: int
    parameters: int
    trainable_parameters: int
    memory: Memory

    def as_dict(self) -> dict[str, Any]:
        """As plain values, for JSON."""
        return {
            **asdict(self),
            "learned_share": self.learned / self.tokens,
            "example": "".join(_marked(text, learned) for text, learned in self.example),
            "memory": self.memory.as_dict(),
        }

    @property
    def text(self) -> str:
        """The screen."""
        lost = [f"{self.truncated} cut at {self.max_length} tokens"] if self.truncated else []
        lost += [f"{self.dropped} dropped"] if self.dropped else []
        steps = f"{self.steps:,} steps" if self.steps is not None else "as many steps as packing makes"
        pieces = f"{self.batch_size} rows each" if self.batch_size != 1 else "one row each"
        lines = [
            ("rows", ", ".join([f"{self.rows:,}", *lost, *self.notes])),
            ("tokens", f"{self.tokens:,}, of which {self.learned:,} are learned ({self.learned / self.tokens:.0%})"),
            ("validation", f"{self.validation_rows:,} rows" if self.validation_rows else ""),
            ("steps", f"{steps} of {pieces}, {self.micro_batch_size} at a time"),
            ("trained", f"{self.trainable_parameters:,} values beside {self.parameters:,} of the model"),
            ("memory", self.memory.text),
            ("", self.memory.remedy),
            (self.template, _shortened("".join(_marked(text, learned) for text, learned in self.example))),
        ]
        body = "\n".join(f"{name:<12}{text}" for name, text in lines if text)
        return f"{body}\n{'':<12}({OPEN}…{CLOSE} is learned)"


def preview(model: str, data: str | Rows, recipe: Recipe, progress: Progress | None = None) -> Preview:
    """What a run would do and take; nothing is written, and no weights are loaded.

    Args:
        model: the base's directory or hub id.
        data: a file or hub id; or the rows themselves.
        recipe: all settings.
        progress: a bar to use, or None.

    Raises:
        PissaError: the input or the settings are wrong.
    """
    if (ready := ready_split(model)) is not None:
        recipe = recipe_of_split(ready, recipe)
    check_model_directory(model)
    with shown(progress, "reading the rows"):
        tokenizer, encoded, validation = tokenised(model, data, recipe)
    with shown(progress, "estimating memory"):
        return preview_of(model, recipe, encoded, validation, tokenizer)


def preview_of(model: str, recipe: Recipe, encoded: Encoded, validation: Encoded | None, tokenizer: Any) -> Preview:
    """What is known of a run once its rows are read.

    Args:
        model: the base's directory or hub id.
        recipe: of the run.
        encoded: its rows.
        validation: the rows to measure on, if any.
        tokenizer: the model's.
    """
    parameters, memory = estimated(model, recipe, encoded)
    return Preview(
        rows=len(encoded),
        tokens=sum(encoded.lengths),
        learned=encoded.learned,
        truncated=encoded.truncated,
        dropped=encoded.dropped,
        max_length=encoded.max_length,
        notes=encoded.notes,
        validation_rows=len(validation) if validation is not None else 0,
        template=resolve_template(recipe.template, tokenizer),
        example=decoded(encoded[0], tokenizer),
        steps=planned_steps(recipe, len(encoded)),
        batch_size=recipe.batch_size,
        micro_batch_size=micro_batch(recipe) * process_count(),
        parameters=parameters[0],
        trainable_parameters=parameters[1],
        memory=memory,
    )


def decoded(row: dict[str, list[int]], tokenizer: Any) -> tuple[tuple[str, bool], ...]:
    """A row's text in pieces, each with whether it is learned."""
    pieces: list[tuple[list[int], bool]] = []
    for token, label in zip(row["input_ids"], row["labels"], strict=True):
        learned = label != IGNORED
        if not pieces or pieces[-1][1] != learned:
            pieces.append(([], learned))
        pieces[-1][0].append(token)
    return tuple((tokenizer.decode(ids), learned) for ids, learned in pieces)


def planned_steps(recipe: Recipe, rows: int) -> int | None:
    """How many optimizer steps a run has; None where that depends on how its rows are packed."""
    if recipe.max_steps is not None:
        return recipe.max_steps
    return None if recipe.packing else math.ceil(recipe.epochs * math.ceil(rows / recipe.batch_size))


def _marked(text: str, learned: bool) -> str:
    return f"{OPEN}{text}{CLOSE}" if learned else text


def _shortened(text: str) -> str:
    """A text's beginning and end on lines of their own."""
    half = LONGEST // 2
    text = text if len(text) <= LONGEST else f"{text[:half]} … {text[-half:]}"
    return text.replace("\n", "\n" + " " * 12)
