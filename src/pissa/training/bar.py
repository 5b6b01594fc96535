"""What a long job shows on stderr: a bar in a terminal, lines in a file.

A line comes where something begins, and then every few seconds with how far it is. While there is nothing new to say,
the command line says what is being done (`stages.py`).
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    Task,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Column
from rich.text import Text

from ..outside.text import for_terminal
from ..stages import stage

LINE_SECONDS = 4.0
"""Between two lines about the same."""


class PlainConsole(Console):
    """A console on which text is text: no name in it steers the terminal."""

    def print(self, *objects: Any, **options: Any) -> None:
        """As rich's, with what a stranger may have written spelled out."""
        super().print(*(for_terminal(each) if isinstance(each, str) else each for each in objects), **options)


class _NoteColumn(TextColumn):
    """What is cut, and not wrapped, where a terminal is narrow."""

    def render(self, task: Task) -> Text:
        """As rich's."""
        text = super().render(task)
        text.no_wrap, text.overflow = True, "ellipsis"
        return text


class _Bar(Progress):
    """Ends without an empty line where there was nothing to show."""

    def stop(self) -> None:
        super().stop() if self.tasks else self.live.stop()


class Lines(Progress):
    """The same as lines, for what is no terminal."""

    def __init__(self, *columns: Any, **options: Any) -> None:
        super().__init__(*columns, **options)
        self._said: dict[TaskID, tuple[float, Any]] = {}

    def start(self) -> None:
        """Nothing is drawn."""

    def refresh(self) -> None:
        """Nothing is drawn."""

    def stop(self) -> None:
        """Write what is not yet said."""
        for task in self.tasks:
            if self._said[task.id][1] != _state(task):
                self._say(task)

    def add_task(self, description: str, *arguments: Any, **options: Any) -> TaskID:
        """As rich's; the line with which something begins."""
        task = super().add_task(description, *arguments, **options)
        self._say(self._tasks[task])
        return task

    def update(self, task_id: TaskID, **changes: Any) -> None:
        """As rich's; a line, where the last one is some seconds ago."""
        super().update(task_id, **changes)
        self._say_now_and_then(task_id)

    def advance(self, task_id: TaskID, advance: float = 1) -> None:
        """As rich's; a line, where the last one is some seconds ago."""
        super().advance(task_id, advance)
        self._say_now_and_then(task_id)

    def _say_now_and_then(self, task_id: TaskID) -> None:
        if time.monotonic() - self._said[task_id][0] >= LINE_SECONDS:
            self._say(self._tasks[task_id])

    def _say(self, task: Task) -> None:
        self._said[task.id] = time.monotonic(), _state(task)
        far = f"{task.completed:,.0f} of {task.total:,.0f}" if task.total is not None else ""
        left = TimeRemainingColumn().render(task).plain if task.total and not task.finished else ""
        left = f"{left} left" if left.strip("-:") else ""
        parts = (task.description, far, str(task.fields.get("note", "")), left)
        self.console.print("  ".join(filter(None, parts)), markup=False, highlight=False, soft_wrap=True)


def _state(task: Task) -> tuple[Any, ...]:
    """What a line says of a task."""
    return task.completed, task.total, task.fields.get("note")


def make_progress(console: Console | None = None) -> Progress:
    """What every long job shows, on stderr."""
    console = console or PlainConsole(stderr=True)
    kind = _Bar if console.is_terminal else Lines
    return kind(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=12),
        MofNCompleteColumn(table_column=Column(no_wrap=True)),
        _NoteColumn("{task.fields[note]}", table_column=Column()),
        TimeRemainingColumn(table_column=Column(no_wrap=True)),
        console=console,
    )


@contextmanager
def shown(progress: Progress | None, label: str) -> Iterator[None]:
    """A line on the bar, without an end, while this goes on."""
    task = progress.add_task(label, total=None, note="") if progress is not None else None
    try:
        with stage(label):
            yield
    finally:
        if progress is not None and task is not None:
            progress.remove_task(task)
