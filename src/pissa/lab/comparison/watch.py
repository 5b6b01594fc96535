"""What is seen while a run trains: the seconds of each step, and now and then the loss on test problems
and, where that is asked for, how many of them are solved.

One JSON line a step in state/watch.jsonl, beside the run's own log; a resumed run takes out the lines of steps that it
does again. Measuring draws no random numbers and leaves the model's mode as it was, so that training is the same
with it and without.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ...training.progress import keep_up_to, read_log


@dataclass(frozen=True)
class WatchRecord:
    """One line of watch.jsonl."""

    step: int
    seconds: float
    loss: Annotated[Any, lambda loss: loss is None or type(loss) in (int, float), "a number"] = None
    """What was measured; NaN and infinity are kept."""
    accuracy: float | None = None


class Watch(TrainerCallback):
    """Writes the lines; at the given steps also what `measure` makes of the model, "loss" among it."""

    def __init__(
        self, path: Path, steps: tuple[int, ...], measure: Callable[[Any], dict[str, float | None]] | None
    ) -> None:
        self.path, self.steps, self.measure = path, steps, measure
        self.started = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **context: Any
    ) -> None:
        """Take out the lines of steps that are about to be done again."""
        keep_up_to(self.path, state.global_step, WatchRecord)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **context: Any
    ) -> None:
        """Start the clock."""
        self.started = time.perf_counter()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **context: Any
    ) -> None:
        """Write the step's line."""
        record: dict[str, Any] = {"step": state.global_step, "seconds": time.perf_counter() - self.started}
        if self.measure is not None and state.global_step in self.steps:
            record |= self.measure(context["model"])
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")


def curve_steps(steps: int, points: int) -> tuple[int, ...]:
    """At which steps the loss is measured: evenly spread, the last one among them."""
    return tuple(sorted({round(steps * (i + 1) / points) for i in range(points)} - {0})) if points else ()


def finite(value: float) -> float | None:
    """The number as JSON may hold it: None where there is none."""
    return value if math.isfinite(value) else None


def seconds_of(path: Path) -> float:
    """How long all steps took together."""
    return sum(record["seconds"] for record in read_log(path, WatchRecord))


def curve_of(path: Path) -> list[dict[str, Any]]:
    """What was measured, step by step; losses that are not finite are None, and accuracies that were not asked for."""
    return [
        {"step": record["step"], "loss": finite(record["loss"]), "accuracy": record.get("accuracy")}
        for record in read_log(path, WatchRecord)
        if "loss" in record
    ]
