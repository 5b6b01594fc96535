"""The validation loss: on which rows, how it is kept, and what was measured.

It is the mean over all learned tokens of rows that are not learned, whatever the batches; measuring it draws no random
number, so that a run with it learns what one without it does.

RUN/state/validation.jsonl has one line a measurement.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..data.encode import Encoded
from ..errors import ConfigError, OutputError
from .progress import keep_up_to


@dataclass(frozen=True)
class ValidationRecord:
    """One line of `validation.jsonl`."""

    step: int
    loss: float
    """Nats per learned token."""


class ValidationLog(TrainerCallback):
    """Appends one JSON line a measurement; a resumed run first takes later lines out."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **context: Any
    ) -> None:
        """Drop the lines of steps that are about to be done again."""
        if state.is_world_process_zero:
            keep_up_to(self.path, state.global_step, ValidationRecord)

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float],
        **context: Any,
    ) -> None:
        """Write the measurement's line, so that no checkpoint is without it."""
        if not state.is_world_process_zero:
            return
        record = {"step": state.global_step, "loss": metrics["eval_loss"]}
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record, allow_nan=False) + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise OutputError(f"{self.path} cannot be written: {error.strerror}; make room and run again") from error


def split_off(encoded: Encoded, fraction: float, seed: int) -> tuple[Encoded, Encoded]:
    """Rows to learn and rows to measure on, each in the data's order.

    Args:
        encoded: all rows.
        fraction: of them that are kept apart, at least one.
        seed: decides which.

    Raises:
        ConfigError: there is but one row.
    """
    count = len(encoded)
    if count < 2:
        raise ConfigError("eval_fraction needs at least 2 rows; give rows to measure on with eval_data")
    apart = min(max(round(fraction * count), 1), count - 1)
    drawn = torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:apart].tolist()
    chosen = set(drawn)
    measured = replace(_part(encoded, sorted(chosen)), dropped=0, notes=())
    return _part(encoded, [i for i in range(count) if i not in chosen]), measured


def _part(encoded: Encoded, indices: list[int]) -> Encoded:
    """Some of the rows."""
    return replace(
        encoded,
        input_ids=[encoded.input_ids[index] for index in indices],
        labels=[encoded.labels[index] for index in indices],
        cut=[encoded.cut[index] for index in indices],
    )
