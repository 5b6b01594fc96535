"""Running generated code: a confined process per program, and what this machine can and cannot confine.

What it does NOT cover, on any machine:

    a forged verdict    it is reached inside the program's own process; a program that sets out to forge "passed" can
    the kernel          a fault in it is the way out of every layer; for code of somebody who wants to do harm, and not
                        of a model that makes mistakes, take a virtual machine
    side channels       time, caches, and how busy the machine is
    threads             any number, until the program's time is over; their stacks count as its memory, the kernel's
                        own part of them (some 16 KiB each) does not

Memory, time, files, processes, network and signals are covered where the layers of `jail.py` hold, and `gaps` says what
is open where one does not.
"""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from ..errors import ConfigError

JAIL = Path(__file__).with_name("jail.py")
GRACE = 20.0
"""Seconds that the jailer itself may take beside the program's own time."""


@dataclass(frozen=True)
class Limits:
    """What one program may use."""

    seconds: float = 10.0
    """On the clock, from the start of its process."""
    memory_mib: int = 1024
    """Of address space."""
    scratch_mib: int = 32
    """In its working directory, and per file."""


@dataclass(frozen=True)
class Verdict:
    """How a program ended."""

    passed: bool
    """Whether it ran to its end."""
    result: str
    """"passed", "failed: …", "timed out" or "ended without a verdict" (it was killed, or left by force)."""
    layers: dict[str, Any]
    """What confined it: see `gaps`."""


LIMITS = Limits()


def run_program(program: str, limits: Limits = LIMITS, *, skip: Sequence[str] = ()) -> Verdict:
    """Run an untrusted Python program in a confined process of its own.

    Its environment is empty but for fixed values, its working directory new, and removed afterwards.

    Args:
        program: its source, tests included.
        limits: what it may use.
        skip: layers of confinement to leave out; for tests of the others.

    Raises:
        ConfigError: this system has no way to confine a process.
    """
    if os.name != "posix":
        raise ConfigError("generated code is run on Linux and macOS alone; leave this task out, or run it there")
    scratch = tempfile.mkdtemp(prefix="pissa-program-")
    environment = {"HOME": scratch, "LANG": "C.UTF-8", "OPENBLAS_NUM_THREADS": "1"}
    request = json.dumps(
        {"program": program, "scratch": os.path.realpath(scratch), "skip": list(skip), **asdict(limits)}
    )
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-B", str(JAIL)],
            input=request.encode(),
            capture_output=True,
            cwd=scratch,
            env=environment,
            start_new_session=True,
            timeout=limits.seconds + GRACE,
            check=False,
        )
        if done.returncode == 0:
            report = json.loads(done.stdout)
            return Verdict(report["result"] == "passed", report["result"], report["layers"])
        if done.returncode > 0:
            raise RuntimeError(f"the jailer failed: {done.stderr.decode(errors='replace')[-2000:]}")
        return Verdict(False, "ended without a verdict", {})
    except subprocess.TimeoutExpired:
        return Verdict(False, "timed out", {})
    finally:
        _remove(scratch)


@cache
def gaps() -> tuple[str, ...]:
    """What this machine cannot keep a program from, in words; empty where every layer holds."""
    layers = run_program("pass").layers
    return missing(layers)


def missing(layers: dict[str, Any]) -> tuple[str, ...]:
    """What a program is not kept from under these layers of confinement.

    Args:
        layers: "namespaces" (mounts, network, processes), "landlock" (its version, 0 for none), "seccomp",
            "unprivileged" (it is not root).
    """
    namespaces, landlock = bool(layers.get("namespaces")), int(layers.get("landlock") or 0)
    seccomp, unprivileged = bool(layers.get("seccomp")), bool(layers.get("unprivileged"))
    found = []
    if not namespaces and not landlock:
        found.append("writing and deleting files that its user may write")
    if not landlock:
        found.append("reading files that its user may read")
    if not namespaces and not seccomp:
        found.append("using the network")
    if not seccomp:
        found.append("talking to services of this machine through their sockets")
    if not namespaces and landlock < 6:
        found.append("sending signals to processes of its user")
    if not namespaces and not seccomp:
        found.append("changing limits and priorities of processes of its user, and leaving shared memory behind")
    if not namespaces and 0 < landlock < 3:
        found.append("emptying files that its user may write")
    if not namespaces:
        found.append("reading the command lines of processes of its user")
    if not seccomp:
        found.append("keeping more in memory than it is granted, in files that have no name")
    if not seccomp and not unprivileged:
        found.append("starting any number of processes until its time is over")
    if not namespaces:
        found.append("changing permissions and times of files of its user")
        found.append("filling the disk with many files until its time is over")
    if sys.platform == "darwin":
        found.append("using more memory than it is granted")
    return tuple(found)


def _remove(directory: str) -> None:
    """Remove a directory, whatever permissions its content was given."""

    def retry(function: Callable[..., Any], path: str, _: Any) -> None:
        for place in (os.path.dirname(path), path):
            if not os.path.islink(place):
                os.chmod(place, stat.S_IRWXU)
        if function in (os.unlink, os.rmdir):
            function(path)
        else:  # a directory that could not be opened, or looked into
            shutil.rmtree(path, onerror=retry)

    try:
        shutil.rmtree(directory, onerror=retry)
    except OSError:
        shutil.rmtree(directory, ignore_errors=True)
