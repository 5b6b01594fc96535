"""Stages one after the other, each in a process of its own with a time limit, and one JSON that is whole at any time.

A stage ends in one of these ways, which its `status` and `message` say: "done"; "skipped", it cannot run here;
"failed", it raised; "out of memory", on the device; "killed", by a signal, as where the machine is out of memory;
"timed out"; "not reached", the pass had no time left for it. Its figures up to that point are kept whatever happened.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from .context import write_json
from .stages import BUDGET, Stage

ROOT = Path(__file__).resolve().parents[2]
SHORTEST = 5.0
"""With fewer seconds left in the pass, no stage is begun."""
LAST_LINES = 30
"""Lines of a failed stage's output that are kept."""


def run_pass(
    stages: Sequence[Stage],
    out: Path,
    document: dict[str, Any],
    *,
    sizes: str,
    device: str,
    budget: float = BUDGET,
    progress: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Run the stages and write the results after each.

    Args:
        stages: in the order in which they run.
        out: the JSON file that is written.
        document: what the results begin with: versions, hardware and the like.
        sizes: "full" or "tiny".
        device: torch's name of the device.
        budget: seconds for all stages together.
        progress: called with a line before and after each stage.

    Returns:
        The document with every stage's status, message, seconds and figures in `stages`.
    """
    start = time.monotonic()
    outcomes: dict[str, Any] = {stage.name: ended(stage, "not reached", "the pass was cut short") for stage in stages}
    document = {**document, "budget_seconds": budget, "seconds": 0.0, "stages": outcomes}
    write_json(out, document)
    for stage in stages:
        left = budget - (time.monotonic() - start)
        if left < min(SHORTEST, stage.limit):
            outcomes[stage.name]["message"] = f"{left:.0f} of the pass's {budget:.0f} s were left"
        else:
            progress(f"{stage.name}: at most {min(stage.limit, left):.0f} s")
            outcomes[stage.name] = run_stage(stage, min(stage.limit, left), sizes, device)
        outcome = outcomes[stage.name]
        progress(f"{stage.name}: {outcome['status']} after {outcome['seconds']:.1f} s {outcome['message'] or ''}")
        document["seconds"] = round(time.monotonic() - start, 2)
        write_json(out, document)
    return document


def run_stage(stage: Stage, limit: float, sizes: str, device: str) -> dict[str, Any]:
    """One stage in its own process: how it ended, how long it took, and its figures."""
    with tempfile.TemporaryDirectory() as folder:
        results, log = Path(folder) / "figures.json", Path(folder) / "log"
        command = [sys.executable, "-m", "benchmarks.gpu.child", stage.module, sizes, device, str(results)]
        start = time.monotonic()
        with log.open("wb") as output:
            process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output, start_new_session=True)
            try:
                code = process.wait(limit)
            except subprocess.TimeoutExpired:
                code = None
            finally:
                end_group(process)
        seconds = time.monotonic() - start
        status, message = how_it_ended(code, limit, results.with_suffix(".end"))
        outcome = ended(stage, status, message, seconds, read(results) or {})
        if status not in ("done", "skipped"):
            outcome["output"] = log.read_text(encoding="utf-8", errors="replace").splitlines()[-LAST_LINES:]
        return outcome


def end_group(process: subprocess.Popen[bytes]) -> None:
    """End a process and what it started, and wait for it: a GPU's memory is free only then."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def how_it_ended(code: int | None, limit: float, note: Path) -> tuple[str, str | None]:
    """Status and message, from the exit code (None: it ran past its limit) and what the stage noted at its end."""
    said = read(note)
    if said is not None:
        return said["status"], said["message"]
    if code is None:
        return "timed out", f"ended after its {limit:.0f} s"
    if code < 0:
        name = signal.Signals(-code).name if -code in signal.valid_signals() else f"signal {-code}"
        return "killed", f"by {name}"
    return "failed", f"exit code {code}"


def ended(
    stage: Stage, status: str, message: str | None, seconds: float = 0.0, figures: dict[str, Any] | None = None
) -> dict[str, Any]:
    """A stage's entry in the results."""
    return {
        "title": stage.title,
        "status": status,
        "message": message,
        "seconds": round(seconds, 2),
        "limit_seconds": stage.limit,
        "figures": figures or {},
    }


def read(path: Path) -> Any:
    """A JSON file's document; None where there is none that is whole."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
