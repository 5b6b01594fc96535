"""What a run shows and writes while it goes: a line of numbers per step, and the numbers of its bar."""

from __future__ import annotations

import json
import math
import os
import signal
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from rich.progress import Progress
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..checkpoint.disk.write import TEMPORARY_PREFIX, explained
from ..errors import OutputError
from ..outside.documents import Unreadable, parse_object
from ..outside.schema import wrong_fields

SAME_REQUEST_SECONDS = 1.0
STEP_KEYS = ("loss", "grad_norm", "learning_rate", "tokens_per_second")


@dataclass(frozen=True)
class StepRecord:
    """One line of `log.jsonl`."""

    step: int
    loss: float
    grad_norm: float | None = None
    learning_rate: float = 0.0
    tokens_per_second: float = 0.0


class StepLog(TrainerCallback):
    """Appends one JSON line a step to `log.jsonl` and moves the bar; a resumed run first takes later lines out."""

    def __init__(self, path: Path, *, progress: Progress | None, label: str) -> None:
        self.path, self.progress, self.label = path, progress, label
        self.trainer: Any = None
        self.task: Any = None
        self.measuring: Any = None
        self.validation: float | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **context: Any
    ) -> None:
        """Drop the lines of steps that are about to be done again, and start the bar."""
        self.trainer.take_tokens_per_second()
        if not state.is_world_process_zero:
            return
        keep_up_to(self.path, state.global_step)
        if self.progress is not None:
            self.task = self.progress.add_task(
                self.label, total=state.max_steps, completed=state.global_step, note="", start=True
            )

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **context: Any,
    ) -> None:
        """Write the step's record."""
        if logs is not None and "eval_loss" in logs:
            self.validation = float(logs["eval_loss"])
        if logs is None or "loss" not in logs:
            return
        record = {"step": state.global_step, **{key: float(logs[key]) for key in STEP_KEYS if key in logs}}
        if not state.is_world_process_zero:
            return
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record, allow_nan=False) + "\n")
                if control.should_save:
                    # no checkpoint without the lines of its steps
                    file.flush()
                    os.fsync(file.fileno())
        except OSError as error:
            raise OutputError(f"{self.path} cannot be written: {error.strerror}; make room and run again") from error
        if self.progress is not None:
            self.progress.update(self.task, completed=state.global_step, note=_note(record, self.validation))

    def on_prediction_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        eval_dataloader: Any = None,
        **context: Any,
    ) -> None:
        """Show how far a measurement of the validation loss is."""
        if self.progress is None or not state.is_world_process_zero:
            return
        if self.measuring is None:
            name = f"{self.label}, validation"
            self.measuring = self.progress.add_task(name, total=len(eval_dataloader), note="")
        self.progress.advance(self.measuring)

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **context: Any
    ) -> None:
        """Take that away again."""
        if self.progress is not None and self.measuring is not None:
            self.progress.remove_task(self.measuring)
            self.measuring = None


class StopAtStepEnd(TrainerCallback):
    """On the first Ctrl-C or SIGTERM finishes the step, saves a checkpoint and stops; on the second stops at once.

    Launchers pass a signal on that the terminal has sent already: what follows within a moment is still the first.
    """

    def __init__(self) -> None:
        self.requested = False
        self._requested_at = 0.0
        self._previous: dict[int, Any] = {}

    def on_train_begin(self, *_: Any, **context: Any) -> None:
        """Listen for the signals."""
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **context: Any
    ) -> None:
        """Save and stop where that was asked for, in all processes after the same step."""
        if args.world_size > 1:
            asked = torch.tensor(int(self.requested), device=args.device)
            torch.distributed.all_reduce(asked, op=torch.distributed.ReduceOp.MAX)
            self.requested = bool(asked)
        if self.requested:
            control.should_save = True
            control.should_training_stop = True

    def release(self) -> None:
        """Give the signals back to whoever had them."""
        for number, handler in self._previous.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        self._previous = {}

    def _ask(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self.requested:
            self.requested, self._requested_at = True, now
            os.write(2, b"\nstopping after this step; once more to stop at once\n")
        elif now - self._requested_at > SAME_REQUEST_SECONDS:
            raise KeyboardInterrupt


def read_log(path: Path, kind: type = StepRecord) -> list[dict[str, Any]]:
    """The records of a log up to the first that is damaged, such as a line that a crash cut off.

    Args:
        path: the log, one JSON object a line.
        kind: the dataclass that a line is held against.
    """
    if not path.is_file():
        return []
    records = []
    for line in path.read_bytes().splitlines():
        try:
            record = parse_object(line)
        except Unreadable:
            break
        if next(wrong_fields(record, kind), None) is not None:
            break
        records.append(record)
    return records


def keep_up_to(path: Path, step: int, kind: type = StepRecord) -> None:
    """Leave a log's lines of the steps up to this one, in one stroke."""
    kept = [record for record in read_log(path, kind) if record["step"] <= step]
    partial = path.with_name(f"{TEMPORARY_PREFIX}{path.name}")
    with explained(path):
        partial.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
        partial.replace(path)


def _note(record: dict[str, float], validation: float | None) -> str:
    measured = f"  validation {validation:.3f}" if validation is not None else ""
    return (
        f"loss {record['loss']:.3f}{measured}  grad {record.get('grad_norm', math.nan):.2f}  "
        f"rate {record.get('learning_rate', math.nan):.1e}  {record['tokens_per_second']:,.0f} tok/s"
    )
