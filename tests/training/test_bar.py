"""Whoever follows a file knows what goes on, and a terminal has a bar."""

from __future__ import annotations

import io
import re
import time

import pytest
from rich.console import Console

from pissa.stages import current
from pissa.training import bar as bar_module
from pissa.training.bar import Lines, make_progress, shown


def test_what_is_no_terminal_gets_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bar_module, "LINE_SECONDS", 0.05)
    screen = io.StringIO()
    progress = make_progress(Console(file=screen, width=300))
    assert isinstance(progress, Lines)
    with progress:
        with shown(progress, "loading the base"):
            assert current() == "loading the base"
        task = progress.add_task("train", total=4, note="")
        progress.update(task, completed=1, note="loss 0.6")
        time.sleep(0.1)
        progress.update(task, completed=3, note="loss 0.5")
        progress.update(task, completed=4, note="loss 0.4")
    assert current() is None
    lines = [" ".join(line.split()) for line in screen.getvalue().splitlines()]
    assert lines[:2] == ["loading the base", "train 0 of 4"]
    assert lines[2].startswith("train 3 of 4 loss 0.5")
    # what came last is said, however soon the end follows
    assert lines[3:] == ["train 4 of 4 loss 0.4"]


def test_a_terminal_gets_a_bar() -> None:
    screen = io.StringIO()
    progress = make_progress(Console(file=screen, width=120, force_terminal=True))
    assert not isinstance(progress, Lines)
    with progress, shown(progress, "loading"):
        pass


def test_a_narrow_terminal_cuts_the_note_and_no_count() -> None:
    screen = io.StringIO()
    progress = make_progress(Console(file=screen, width=80, force_terminal=True))
    with progress:
        task = progress.add_task("PiSSA lr 0.0002, test", total=48, note="")
        progress.update(task, completed=32, note="loss 0.169  grad 1.99  rate 5.1e-07  64 tok/s")
        progress.refresh()
    last = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.getvalue()).replace("\r", "\n").splitlines()[-1]
    assert len(last) <= 80 and "test" in last and "32/48 loss 0.169" in last and "…" in last
