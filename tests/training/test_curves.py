"""A run's picture is drawn of whatever its log holds."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from pissa.training.curves import draw_curves


def log(steps: int, **changes: Any) -> list[dict[str, Any]]:
    """Falling losses."""
    usual = {"grad_norm": 1.0, "learning_rate": 1e-4}
    return [{"step": step, "loss": 1 / step, **usual, **changes} for step in range(1, steps + 1)]


@pytest.mark.parametrize("steps", [0, 1, 2, 100])
@pytest.mark.parametrize("changes", [{}, {"grad_norm": None}, {"learning_rate": 0.0}], ids=str)
def test_there_is_a_picture(steps: int, changes: dict[str, Any], tmp_path: Path) -> None:
    assert draw_curves(log(steps, **changes), [{"step": 1, "loss": 0.5}], tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_there_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("matplotlib.figure", "matplotlib.backends.backend_agg"):
        monkeypatch.setitem(sys.modules, name, None)
    assert not draw_curves(log(3), [], tmp_path / "curves.png")
    assert not list(tmp_path.iterdir())
