"""A command that has nothing to say for some seconds says what it is doing."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import sys, time
from pissa.cli import heartbeat
from pissa.stages import stage
heartbeat.SILENCE = 0.05
with heartbeat.heartbeat():
    with stage("loading a model\\x1b[2J"):
        time.sleep(1)
    print("done")
    print("warned", file=sys.stderr)
print("after", file=sys.stderr)
"""


def test_a_silence_is_broken_by_what_is_being_done() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=60, check=True)
    lines = done.stderr.splitlines()
    spoken = [line for line in lines if line.startswith("pissa: loading a model\\x1b[2J, ")]
    assert spoken and all(line.endswith(" s so far") for line in spoken)
    assert done.stdout == "done\n" and lines[-1] == "after" and "warned" in lines


def test_in_a_terminal_one_line_is_written_over_and_then_taken_away() -> None:
    pty = pytest.importorskip("pty")
    import os

    ours, theirs = pty.openpty()
    done = subprocess.run([sys.executable, "-c", PROGRAM], stdout=theirs, stderr=theirs, timeout=60, check=True)
    os.close(theirs)
    seen = b""
    while b"after" not in seen:
        seen += os.read(ours, 4096)
    os.close(ours)
    assert done.returncode == 0
    said = seen.decode().split("\r\x1b[2K")
    assert sum("loading a model" in part for part in said) > 1
    assert not any("loading a model" in part and "\n" in part for part in said)


def test_nothing_is_said_while_somebody_is_waited_for() -> None:
    waiting = PROGRAM.replace('stage("loading a model\\x1b[2J")', "stage(SILENT)")
    program = (
        waiting.replace("import stage", "import SILENT, stage").replace("0.05", "1.0").replace("sleep(1)", "sleep(3)")
    )
    assert program.count("SILENT") == 2
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stderr.splitlines() == ["warned", "after"]


def test_nothing_is_said_to_who_calls_from_python() -> None:
    program = "from pissa.cli import heartbeat, main; heartbeat.SILENCE = 0.0; main.run(['--version'])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stderr == "" and done.stdout.startswith("pissa ")
