"""The GPU benchmark runs on a CPU at tiny shapes, by the same code."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "svd_cuda.py"


def test_the_tiny_model_is_decomposed_within_the_tolerance():
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--tiny", "--device", "cpu"], capture_output=True, text=True, check=True
    )
    report = json.loads(done.stdout)
    assert report["linears"] == 224
    assert report["largest_certified_loss"] <= 1e-3
    assert len(report["seconds"]) == 3
