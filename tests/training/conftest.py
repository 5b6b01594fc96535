"""A tiny model on disk, shared by the tests of training."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pissa.training import outcome
from tiny import tiny_llama, tiny_tokenizer


@pytest.fixture(scope="session")
def base_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory that holds a tiny Llama (fp32) and its tokenizer; nobody writes into it."""
    directory = tmp_path_factory.mktemp("base")
    tiny_llama().save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory


@pytest.fixture(scope="session", autouse=True)
def _one_picture_for_all_runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Let the curves of the first run stand in every run's directory: a picture takes a fifth of a tiny run's time.

    `test_curves.py` looks at pictures.
    """
    draw, drawn = outcome.draw_curves, tmp_path_factory.mktemp("picture") / "curves.png"

    def draw_once(log: Any, validation: Any, out: Path) -> bool:
        if not drawn.is_file() and not draw(log, validation, drawn):
            return False
        shutil.copy(drawn, out)
        return True

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(outcome, "draw_curves", draw_once)
        yield
