"""The largest memory that a stretch of work needed: of the GPU where there is one, else of this process."""

from __future__ import annotations

import gc
from pathlib import Path

import torch

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
RESET_PEAK = "5"
"""What Linux takes to let the peak start again from what is resident now (proc(5))."""


def start_peak() -> bool:
    """Forget the peak so far; what nobody refers to any more is freed first.

    Returns:
        Whether it is forgotten; where it is not, `peak_gib` is that of the whole process.
    """
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return True
    try:
        CLEAR.write_text(RESET_PEAK)
    except OSError:
        return False
    return True


def peak_gib() -> float | None:
    """The peak since `start_peak`, in GiB; None where the system does not say."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    try:
        lines = STATUS.read_text().splitlines()
    except OSError:
        return None
    found = [line.split()[1] for line in lines if line.startswith("VmHWM:")]
    return int(found[0]) / 2**20 if found else None
