"""Hostile programs: each is contained, by each of the layers that is said to contain it, or the gap is stated."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from pissa.evaluation.sandbox import JAIL, Limits, gaps, missing, run_program

QUICK = Limits(seconds=2, memory_mib=512, scratch_mib=8)
LAYERS = run_program("pass").layers
# All together, and each of the two that keep files and network apart by itself.
ALONE = {"all": (), "namespaces alone": ("landlock", "seccomp"), "landlock and seccomp": ("namespaces",)}

pytestmark = pytest.mark.skipif(
    not (LAYERS.get("namespaces") and LAYERS.get("landlock") and LAYERS.get("seccomp")),
    reason=f"this machine confines with {LAYERS} alone; what that leaves open is told by gaps()",
)
under_each = pytest.mark.parametrize("skip", ALONE.values(), ids=ALONE)


def test_a_machine_with_every_layer_has_no_gap() -> None:
    assert gaps() == ()


def test_programs_end_as_they_do() -> None:
    assert run_program("assert 1 + 1 == 2").passed
    for program, result in {
        "assert 1 + 1 == 3": "failed: AssertionError: ",
        "raise ValueError('x' * 10000)": "failed: ValueError: " + "x" * 288,
        "def f(:": "failed: SyntaxError: invalid syntax (<string>, line 1)",
        "import sys; sys.exit(0)": "failed: SystemExit: 0",
        "import os; os._exit(0)": "ended without a verdict",
        "import ctypes; ctypes.string_at(0)": "ended without a verdict",
        "input()": "failed: EOFError: EOF when reading a line",
        "class E(Exception):\n    def __str__(self): raise E\nraise E": "failed: E",
    }.items():
        verdict = run_program(program, QUICK)
        assert not verdict.passed
        assert verdict.result == result, program


def test_an_infinite_loop_ends_with_its_time() -> None:
    start = time.monotonic()
    assert run_program("while True: pass", QUICK).result == "timed out"
    assert run_program(
        "import signal, time\nsignal.pthread_sigmask(0, range(1, 65))\ntime.sleep(60)", QUICK
    ).result == ("timed out")
    assert time.monotonic() - start < 15


@under_each
def test_a_memory_hog_is_refused_memory(skip: tuple[str, ...]) -> None:
    assert run_program("x = bytearray(1 << 30)", QUICK, skip=skip).result == "failed: MemoryError: "


def test_a_fork_bomb_makes_no_process() -> None:
    bomb = "import os\nwhile True:\n    try: os.fork()\n    except PermissionError: raise SystemExit('none')"
    assert run_program(bomb, QUICK).result == "failed: SystemExit: none"
    for call in ("os.posix_spawn('/bin/true', ['true'], {})", "os.system('true') and 1/0", "os.forkpty()"):
        assert not run_program(f"import os\n{call}", QUICK).passed
    assert run_program("import subprocess\nsubprocess.run(['/bin/true'])", QUICK).result.startswith(
        "failed: Permission"
    )
    threads = "import threading\nt = threading.Thread(target=print)\nt.start()\nt.join()"
    assert run_program(threads, QUICK).passed


def test_processes_that_were_made_end_with_the_program() -> None:
    """Without seccomp, but in a namespace: a fork bomb's processes are gone when the verdict is there.

    A jailer that is root and cannot become another user makes them; any other is kept from it by a limit.
    """
    program = "import os, time\nfor _ in range(5):\n    if os.fork() == 0: time.sleep(60)"
    verdict = run_program(program, QUICK, skip=("seccomp", "landlock"))
    unprivileged = verdict.layers["unprivileged"]
    assert not verdict.passed and "BlockingIOError" in verdict.result if unprivileged else verdict.passed
    left = [p for p in Path("/proc").glob("[0-9]*/cwd") if _is_scratch(p)]
    assert left == []


def _is_scratch(link: Path) -> bool:
    try:
        return "pissa-program-" in os.readlink(link)
    except OSError:
        return False


@under_each
def test_nothing_outside_the_working_directory_is_written(skip: tuple[str, ...], tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.write_text("kept")
    os.chmod(tmp_path, 0o777)
    os.chmod(target, 0o666)
    new = tmp_path / "new"
    for program in (
        f"open({str(new)!r}, 'w')",
        f"open({str(target)!r}, 'w')",
        f"import os; os.remove({str(target)!r})",
        f"import os; os.truncate({str(target)!r}, 0)",
        f"import os; os.rename({str(target)!r}, {str(new)!r})",
        f"import os; os.link({str(target)!r}, {str(new)!r})",
        f"import os; os.mkdir({str(new)!r})",
        f"import shutil; shutil.rmtree({str(tmp_path)!r})",
        f"import os; os.symlink('/', 'root'); open('root{new}', 'w')",
        "open('/dev/shm/pissa', 'w')",
        "open('/tmp/pissa', 'w')",
        "open('/var/tmp/pissa', 'w')",
        "open('/proc/sys/vm/swappiness', 'w').write('1')",
        f"open({str(JAIL)!r}, 'a')",
    ):
        verdict = run_program(program, QUICK, skip=skip)
        assert verdict.result.startswith("failed: "), program
        assert "SyntaxError" not in verdict.result
    assert [path.name for path in tmp_path.iterdir()] == ["target"] and target.read_text() == "kept"


@under_each
def test_permissions_outside_are_left_alone(skip: tuple[str, ...], tmp_path: Path) -> None:
    """Landlock does not know of chmod: that rests on the mounts, or on the process being nobody."""
    target = tmp_path / "target"
    target.write_text("kept")
    os.chmod(target, 0o644)
    verdict = run_program(f"import os; os.chmod({str(target)!r}, 0o777)", QUICK, skip=skip)
    if "namespaces" not in skip or (verdict.layers["unprivileged"] and os.geteuid() == 0):
        assert not verdict.passed and target.stat().st_mode & 0o777 == 0o644
    else:
        assert any("permissions" in gap for gap in missing(verdict.layers))


def test_the_working_directory_is_writable_small_and_gone_afterwards() -> None:
    before = set(Path(tempfile.gettempdir()).glob("pissa-program-*"))
    assert run_program("open('a', 'w').write('x'); assert open('a').read() == 'x'", QUICK).passed
    full = "import os\nfor i in range(100):\n    open(f'{i}', 'wb').write(bytes(1 << 20))"
    assert run_program(full, QUICK).result == "failed: OSError: [Errno 28] No space left on device"
    hidden = "import os\nos.makedirs('a/c')\nopen('a/c/b', 'w')\nos.chmod('a/c', 0)\nos.chmod('a', 0)"
    assert run_program(hidden, QUICK, skip=("namespaces",)).passed
    assert set(Path(tempfile.gettempdir()).glob("pissa-program-*")) == before


def test_no_memory_is_kept_in_files_without_a_name() -> None:
    result = run_program("import os\nos.memfd_create('x')", QUICK).result
    assert result == "failed: PermissionError: [Errno 1] Operation not permitted"


@under_each
def test_no_socket_reaches_anything(skip: tuple[str, ...]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        port = server.getsockname()[1]
        connect = f"import socket\nsocket.create_connection(('127.0.0.1', {port}), timeout=1)"
        assert run_program(connect, QUICK, skip=skip).result.startswith("failed: ")
        with pytest.raises(TimeoutError):
            server.accept()
    udp = "import socket\ns = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\ns.sendto(b'x', ('10.0.0.1', 53))"
    assert run_program(udp, QUICK, skip=skip).result.startswith("failed: ")


def test_the_environment_is_emptied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret-of-the-user")
    names = "import os\nassert set(os.environ) == {'HOME', 'LANG', 'OPENBLAS_NUM_THREADS'}, dict(os.environ)"
    assert run_program(names, QUICK).result == "passed"
    search = (
        "import glob\n"
        "for path in glob.glob('/proc/*/environ') + glob.glob('/proc/*/cmdline'):\n"
        "    try: assert b'secret-of' + b'-the-user' not in open(path, 'rb').read()\n"
        "    except OSError: pass"
    )
    for skip in ALONE.values():
        assert run_program(search, QUICK, skip=skip).result == "passed"


def test_files_of_the_user_are_not_read(tmp_path: Path) -> None:
    secret = tmp_path / "token"
    secret.write_text("secret")
    os.chmod(secret, 0o644)
    for path in (secret, Path.home() / ".bash_history", Path("/etc/passwd"), Path(__file__)):
        result = run_program(f"open({str(path)!r}).read()", QUICK).result
        assert result.startswith("failed: PermissionError") or not path.exists(), path


@under_each
def test_no_process_outside_gets_a_signal(skip: tuple[str, ...]) -> None:
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as victim:
        try:
            for target in (victim.pid, os.getpid(), -os.getpgrp()):
                run_program(f"import os\nos.kill({target}, 9)", QUICK, skip=skip)
            run_program("import os\nos.kill(-1, 9)", QUICK, skip=skip)
            run_program("import os\nos.kill(os.getppid(), 9)", QUICK, skip=skip)
            assert victim.poll() is None
        finally:
            victim.kill()


def test_a_program_that_kills_its_keeper_has_no_verdict() -> None:
    verdict = run_program("import os, time\nos.kill(os.getppid(), 9)\ntime.sleep(1)", QUICK)
    assert verdict.result != "ended without a verdict" or not verdict.passed
    assert run_program("assert True").passed


def test_gigabytes_of_output_are_thrown_away() -> None:
    program = "import os\nfor _ in range(2000):\n    os.write(1, bytes(1 << 20))\n    print('x' * (1 << 10))"
    assert run_program(program, Limits(seconds=20)).passed


def test_a_flood_on_the_report_is_cut_and_no_pass() -> None:
    program = "import os\nwhile True: os.write(3, b'x' * 4096)"
    assert not run_program(program, QUICK).passed


def test_whatever_a_program_reports_is_no_pass_and_no_failure_of_the_jail() -> None:
    for line in ("b'5'", "b'[1]'", "b'null'", "b'[' * 60000", "b'{\"result\": {}}'", "b'\\xff'"):
        program = f"import os\nos.write(3, {line} + b'\\n')"
        assert run_program(program, QUICK).result == "ended without a verdict", line


def test_system_calls_alone_keep_a_program_from_other_processes_and_from_lasting_memory() -> None:
    for program, result in {
        "import resource, os; resource.prlimit(os.getpid(), resource.RLIMIT_NOFILE, (32, 32))": "failed: Permission",
        "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (32, 32))": "passed",
        "import os; os.setpriority(os.PRIO_PROCESS, 0, 19)": "failed: Permission",
        "import ctypes; assert ctypes.CDLL(None).shmget(0, 4096, 0o1600) == -1": "passed",
    }.items():
        assert run_program(program, QUICK, skip=("namespaces", "landlock")).result.startswith(result), program


@under_each
def test_no_way_up_is_open(skip: tuple[str, ...]) -> None:
    for call in (
        "libc.mount(b'none', b'/', None, 1 << 5, None)",
        "libc.umount2(b'/proc', 2)",
        "libc.unshare(0x10000000)",
        "libc.ptrace(16, os.getppid(), 0, 0)",
        "libc.chroot(b'.')",
        "libc.setresuid(0, 0, 0) + (os.getuid() == 0)",
    ):
        if "seccomp" in skip and "unshare" in call:
            continue  # a user namespace of one's own gives nothing outside it
        program = f"import ctypes, os\nlibc = ctypes.CDLL(None)\nassert {call} != 0"
        verdict = run_program(program, QUICK, skip=skip)
        if "setresuid" in call and not verdict.layers["unprivileged"]:
            continue
        assert verdict.passed, (call, verdict)


@pytest.mark.parametrize(
    ("layers", "stated"),
    [
        ({"namespaces": True, "landlock": 7, "seccomp": True, "unprivileged": True}, 0),
        ({"namespaces": True, "landlock": 0, "seccomp": True, "unprivileged": True}, 1),
        ({"namespaces": False, "landlock": 7, "seccomp": True, "unprivileged": True}, 3),
        ({"namespaces": False, "landlock": 2, "seccomp": True, "unprivileged": True}, 5),
        ({"namespaces": True, "landlock": 7, "seccomp": False, "unprivileged": True}, 2),
        ({}, 11),
    ],
)
def test_every_layer_that_is_missing_opens_gaps(layers: dict[str, object], stated: int) -> None:
    assert len(missing(layers)) == stated


def test_a_user_without_rights_is_confined_too() -> None:
    """The jail under an ordinary user, whose namespaces are a user namespace's."""
    python = Path("/usr/bin/python3")
    if os.geteuid() != 0 or not python.exists():
        pytest.skip("needs root, to become somebody else, and a Python that everybody may run")
    with tempfile.TemporaryDirectory() as place:
        os.chmod(place, 0o755)
        script, scratch = Path(place) / "jail.py", Path(place) / "scratch"
        shutil.copy(JAIL, script)
        scratch.mkdir()
        os.chown(scratch, 65534, 65534)

        def run(program: str) -> dict[str, object]:
            request = {"program": program, "scratch": str(scratch), "seconds": 3, "memory_mib": 512, "scratch_mib": 8}
            done = subprocess.run(
                [python, "-I", "-B", script],
                input=json.dumps(request),
                capture_output=True,
                text=True,
                user=65534,
                group=65534,
                extra_groups=[],
                cwd=scratch,
                env={},
                check=True,
            )
            return json.loads(done.stdout)

        report = run("open('a', 'w').write('x')")
        assert report["result"] == "passed" and missing(dict(report["layers"])) == ()  # type: ignore[call-overload]
        assert list(scratch.iterdir()) == []
        for program in (
            "open('/tmp/pissa', 'w')",
            "import os; os.fork()",
            "import ctypes; assert ctypes.CDLL(None).mount(b'none', b'/', None, 1 << 5, None) == 0",
            "import socket; socket.socket()",
        ):
            assert str(run(program)["result"]).startswith("failed: "), program
