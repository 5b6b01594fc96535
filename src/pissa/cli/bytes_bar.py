"""The bar of commands that go through many bytes: how many, how long yet, and at what they are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn


class BytesBar:
    """A bar on stderr."""

    def __init__(self, progress: Progress, label: str) -> None:
        self._progress, self._label = progress, label
        self._task = None

    def show(self, note: str, done: int, total: int) -> None:
        """Move the bar to so many bytes."""
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
    try:
        progress.start()
        yield bar
    finally:
        progress.stop() if progress.tasks else progress.live.stop()
