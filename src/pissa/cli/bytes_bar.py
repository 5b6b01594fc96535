"""The bar of commands that go through many bytes: how many, how long yet, and at what they are."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

from ..outside.text import on_one_line
from ..stages import stage

LINE_SECONDS = 4.0
"""Between two lines, where there is no terminal."""


class BytesBar:
    """A bar on stderr."""

    def __init__(self, progress: Progress, label: str) -> None:
        self._progress, self._label = progress, label
        self._task = None
        self._said = 0.0

    def show(self, note: str, done: int, total: int) -> None:
        """Move the bar to so many bytes; where it is no terminal, say so in a line now and then."""
        if not self._progress.console.is_terminal:
            if time.monotonic() - self._said > LINE_SECONDS or done == total:
                self._said = time.monotonic()
                print(f"{self._label} {done:,} of {total:,} bytes  {on_one_line(note)}", file=sys.stderr)
            return
        if self._task is None:
            self._task = self._progress.add_task(self._label, total=total, note=note)
        self._progress.update(self._task, completed=done, total=total, note=note)


@contextmanager
def bytes_bar(label: str) -> Iterator[BytesBar]:
    """A bar that is there while the block runs, once there is something to show."""
    progress = Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=12),
        DownloadColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", markup=False),
        console=Console(stderr=True),
    )
    bar = BytesBar(progress, label)
    with stage(label):
        try:
            progress.start()
            yield bar
        finally:
            progress.stop() if progress.tasks else progress.live.stop()
