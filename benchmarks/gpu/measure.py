"""Clocks that wait for the device, memory beyond what was there, and the device's own rate."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pissa.lab.memory import peak_gib, start_peak


def synchronize(device: torch.device) -> None:
    """Wait until all work given to the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(device: torch.device, work: Callable[[], Any]) -> tuple[float, Any]:
    """How long some work takes until the device is done with it, and what it returns."""
    synchronize(device)
    start = time.perf_counter()
    result = work()
    synchronize(device)
    return time.perf_counter() - start, result


def median_seconds(device: torch.device, work: Callable[[], Any], repeats: int, most: float) -> tuple[float, Any]:
    """The median of several times, the first one left out, and the last result; fewer repetitions where `most` seconds
    are over."""
    times, result, start = [], None, time.perf_counter()
    for _ in range(repeats + 1):
        spent, result = seconds_of(device, work)
        times.append(spent)
        if time.perf_counter() - start > most:
            break
    return statistics.median(times[1:] or times), result


@dataclass
class Extra:
    """Memory that a stretch of work needed at its peak, beyond what lay there before."""

    gib: float | None = None


@contextmanager
def extra_memory(device: torch.device) -> Iterator[Extra]:
    """Fills in the result at the end of the block: of the device where that is a GPU, else of this process."""
    release()
    forgotten = start_peak()
    before, found = _resident_gib(device), Extra()
    yield found
    synchronize(device)
    peak = peak_gib()
    if forgotten and peak is not None and before is not None:
        found.gib = max(0.0, peak - before)


def release() -> None:
    """Give back memory that nothing refers to any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def product_rate(device: torch.device, side: int) -> float:
    """FLOP/s of a square bf16 matrix product on random numbers, the median of ten."""
    generator = torch.Generator(device).manual_seed(0)
    A, B = (torch.randn(side, side, generator=generator, device=device).bfloat16() for _ in range(2))
    times = [seconds_of(device, lambda: A @ B)[0] for _ in range(13)]
    return 2 * side**3 / statistics.median(times[3:])


def _resident_gib(device: torch.device) -> float | None:
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device) / 2**30
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    found = [line.split()[1] for line in lines if line.startswith("VmRSS:")]
    return int(found[0]) / 2**20 if found else None
