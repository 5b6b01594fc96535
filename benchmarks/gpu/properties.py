"""Stage: the properties of tests/devices, which pytest checks on a CPU, on the device; pytest is not needed."""

from __future__ import annotations

import sys
import time
import traceback
from pathlib import Path

from .context import Context, first_line

TESTS = Path(__file__).resolve().parents[2] / "tests"


def run(context: Context) -> None:
    """Check one property after the other, and record which hold.

    Raises:
        AssertionError: some do not.
    """
    sys.path[:0] = [str(TESTS / "devices"), str(TESTS)]
    from properties import PROPERTIES, Unavailable  # pyright: ignore[reportMissingImports]

    held, failed, skipped, seconds = [], {}, {}, {}
    for name, check in PROPERTIES.items():
        start = time.perf_counter()
        try:
            check(context.device)
        except Unavailable as reason:
            skipped[name] = str(reason)
        except Exception as error:
            failed[name] = first_line(error)
            traceback.print_exc()
        else:
            held.append(name)
        seconds[name] = round(time.perf_counter() - start, 2)
        context.record(held=len(held), of=len(PROPERTIES), failed=failed, skipped=skipped, seconds=seconds)
    assert not failed, f"{len(failed)} of {len(PROPERTIES)} properties do not hold: {', '.join(failed)}"
