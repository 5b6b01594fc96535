"""Several processes write what one does, and none of them dies unnoticed."""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from streaming import CONFIG, contents, llama_on_disk
from torch import distributed

from pissa import init_checkpoint
from pissa.checkpoint.disk import outputs
from pissa.checkpoint.disk.distribute import JOINED, Alone, Processes, assemble
from pissa.checkpoint.disk.journal import Journal
from pissa.checkpoint.stream.unfinished import WORK
from pissa.cli.main import run
from pissa.errors import Interrupted, PissaError


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def torchrun(base: Path, out: Path, processes: int = 2) -> subprocess.CompletedProcess[str]:
    """The command in several processes over gloo."""
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--master-port", str(free_port())]
    command = [*launcher, "-m", "pissa", "init", str(base), str(out), "--rank", "4"]
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=300)


class Forked:
    """The command in forked processes, which start at once; what each writes to stderr lies in a file."""

    def __init__(self, base: Path, out: Path, place: Path, act: Callable[[int], None] | None = None) -> None:
        """Start two.

        Args:
            act: called in each process with its rank before its third piece of a tensor, when everybody has come so
                far. None: nothing special, and nobody waits.
        """
        self.files = [place / f"stderr-{rank}-{time.monotonic_ns()}" for rank in range(2)]
        port, context = str(free_port()), multiprocessing.get_context("fork")
        self.processes = [
            context.Process(target=_process, args=(rank, port, base, out, file, act))
            for rank, file in enumerate(self.files)
        ]
        for process in self.processes:
            process.start()

    def wait(self) -> tuple[list[int | None], list[str]]:
        """Exit codes, and the last line that each process said."""
        for process in self.processes:
            process.join(120)
            process.kill()
        lines = [[line for line in file.read_text().splitlines() if "pissa: " in line] for file in self.files]
        return [process.exitcode for process in self.processes], [(said or [""])[-1] for said in lines]


def _process(rank: int, port: str, base: Path, out: Path, file: Path, act: Callable[[int], None] | None) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), 2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
    original, count = outputs.Outputs.put, 0
    begun = [Path(f"{file}-of-{other}").with_stem(f"begun-{port}-{other}") for other in range(2)]

    def put(self: outputs.Outputs, *arguments: Any) -> None:
        nonlocal count
        count += 1
        mine = count
        if mine == 3:
            begun[rank].touch()
        while mine >= 3 and not all(path.exists() for path in begun):
            time.sleep(0.01)
        if mine == 3:
            assert act is not None
            act(rank)
        original(self, *arguments)

    if act is not None:
        outputs.Outputs.put = put  # type: ignore[method-assign]
    outputs.COMMIT_BYTES = 1
    run(["init", str(base), str(out), "--rank", "4"])


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base for all."""
    return llama_on_disk(tmp_path_factory.mktemp("base") / "base", hidden=64)


def alone(base: Path, out: Path) -> dict[str, bytes]:
    """What one process writes into a directory, which is then free again."""
    init_checkpoint(base, out, CONFIG)
    found = contents(out)
    out.rename(out.with_name("alone"))
    return found


def test_two_processes_write_what_one_does(base: Path, tmp_path: Path) -> None:
    expected = alone(base, tmp_path / "out")
    codes, said = Forked(base, tmp_path / "out", tmp_path, lambda rank: None).wait()
    assert codes == [0, 0] and said == ["", ""]
    assert contents(tmp_path / "out") == expected


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_ends_the_run_and_one_process_continues_it(base: Path, tmp_path: Path, victim: int) -> None:
    expected = alone(base, tmp_path / "out")

    def act(rank: int) -> None:
        if rank == victim:
            os.kill(os.getpid(), signal.SIGKILL)

    codes, said = Forked(base, tmp_path / "out", tmp_path, act).wait()
    assert codes[victim] == -signal.SIGKILL and codes[1 - victim] == 130
    assert re.search(
        r"ended; \d+ of 21 tensors are saved in .*: the same command continues from there", said[1 - victim]
    )
    assert [child.name for child in (tmp_path / "out").iterdir()] == [WORK]
    result = init_checkpoint(base, tmp_path / "out", CONFIG)
    assert result.continued > 0 and contents(tmp_path / "out") == expected


def test_a_process_that_fails_says_so_for_all_and_two_continue(base: Path, tmp_path: Path) -> None:
    expected = alone(base, tmp_path / "out")

    def act(rank: int) -> None:
        if rank == 1:
            raise OSError(28, "No space left on device")

    codes, said = Forked(base, tmp_path / "out", tmp_path, act).wait()
    full = f"the disk that holds {tmp_path / 'out'} is full; make room and run the same command again"
    assert codes == [2, 2] and said == [f"pissa: process 1 of 2 failed: {full}", f"pissa: {full}"]
    codes, _ = Forked(base, tmp_path / "out", tmp_path).wait()
    assert codes == [0, 0] and contents(tmp_path / "out") == expected


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_one_stops_both_in_good_order(base: Path, tmp_path: Path, number: int) -> None:
    expected = alone(base, tmp_path / "out")

    def act(rank: int) -> None:
        if rank == 1:
            os.kill(os.getpid(), number)

    codes, said = Forked(base, tmp_path / "out", tmp_path, act).wait()
    assert codes == [130, 130]
    assert all("of 21 tensors are saved" in line for line in said)
    result = init_checkpoint(base, tmp_path / "out", CONFIG)
    assert result.continued > 0 and contents(tmp_path / "out") == expected


@pytest.mark.slow
def test_torchrun_starts_them(base: Path, tmp_path: Path) -> None:
    expected = alone(base, tmp_path / "out")
    for finished in (False, True):
        done = torchrun(base, tmp_path / "out", 2 + finished)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("finished already" if finished else "holds 14 modules") == 1
        assert contents(tmp_path / "out") == expected
    failed = torchrun(base, tmp_path / "alone" / "config.json")
    assert failed.returncode != 0 and "is a file; name a directory" in failed.stderr


def teams(work: Path, size: int = 2) -> list[Processes]:
    store = distributed.HashStore()  # pyright: ignore[reportPrivateImportUsage]
    return [Processes(store, rank, size, work) for rank in range(size)]


def test_every_job_is_claimed_once(tmp_path: Path) -> None:
    first, second = teams(tmp_path)
    assert [first.claim(), second.claim(), second.claim(), first.claim()] == [0, 1, 2, 3]
    single = Alone()
    assert [single.claim() for _ in range(3)] == [0, 1, 2]


def test_whoever_lets_go_of_its_journal_is_missed(tmp_path: Path) -> None:
    first, second = teams(tmp_path)
    first.check()
    journal = Journal(tmp_path, 1)
    second.announce(JOINED)
    first.check()
    second.check()
    journal.close()
    with pytest.raises(Interrupted, match="process 1 of 2 ended"):
        first.check()
    journal.path.unlink()  # as rank 0 does when all is published
    first.check()


def test_a_failure_is_told_to_the_others(tmp_path: Path) -> None:
    first, second = teams(tmp_path)
    second.fail("the disk is full")
    with pytest.raises(PissaError, match="process 1 of 2 failed: the disk is full"):
        first.check()


def test_what_is_announced_is_reached(tmp_path: Path) -> None:
    first, second = teams(tmp_path)
    second.announce("worked")
    assert not first.reached("worked") and not first.reached("worked", everyone=True)
    first.announce("worked")
    assert second.reached("worked") and second.reached("worked", everyone=True)


@pytest.mark.parametrize("value", [None, "1"])
def test_without_a_launcher_there_is_one_process(tmp_path: Path, value: str | None) -> None:
    lookup: Callable[[str], str | None] = {"WORLD_SIZE": value}.get
    assert isinstance(assemble(tmp_path, lookup), Alone)
