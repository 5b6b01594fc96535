"""The properties of this folder on the CPU, on a stand-in for a GPU, and on what PISSA_TEST_DEVICE names."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.utils.backend_registration as backend
from properties import PROPERTIES, Unavailable

HERE = Path(__file__).resolve().parent
GIVEN = os.environ.get("PISSA_TEST_DEVICE")


@pytest.fixture(params=["cpu", *([GIVEN] if GIVEN else [])])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Where a property is checked."""
    return torch.device(request.param)


@pytest.mark.parametrize("name", PROPERTIES)
def test_property_holds(name: str, device: torch.device) -> None:
    try:
        PROPERTIES[name](device)
    except Unavailable as reason:
        pytest.skip(str(reason))


@pytest.mark.timeout(1200)
def test_properties_hold_on_a_stand_in_for_a_gpu() -> None:
    if not hasattr(backend, "_setup_privateuseone_for_python_backend"):
        pytest.skip(f"torch {torch.__version__} takes no backend written in Python")
    paths = os.pathsep.join([str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, str(HERE / "stand_in.py")],
        capture_output=True,
        text=True,
        timeout=1100,
        check=False,
        env={**os.environ, "PYTHONPATH": paths},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    skipped = [line for line in done.stdout.splitlines() if line.startswith("skipped: ")]
    assert done.stdout.count("holds: ") + len(skipped) == len(PROPERTIES)
    assert all(line.endswith(("needs a real device", "is not installed")) for line in skipped)
