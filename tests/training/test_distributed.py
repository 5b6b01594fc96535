"""Two processes with the same batch are the same run as one."""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import sys
from pathlib import Path
from typing import Any

import pytest
from accelerate.state import AcceleratorState
from small_runs import (
    arguments,
    command,
    finish,
    listing,
    log_of,
    plain_logits,
    recipe,
    result_tensors,
    run,
    write_rows,
)

from pissa import load
from pissa.cli.main import run as run_command_line
from pissa.training.progress import read_log
from pissa.training.recipe import Recipe
from tiny import largest_difference, logits_of

CLOSE = 1e-4


def settings(**changes: Any) -> Recipe:
    """Eight steps of six rows, four of which are an epoch of 20 rows: its last batch has two."""
    return recipe(**{"batch_size": 6, "micro_batch_size": 3, "max_steps": 8, "save_every": 3, **changes})


def launched(arguments: list[str]) -> list[str]:
    """The command as two processes over gloo."""
    pissa = arguments[arguments.index("-m") :]
    return [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", *pissa]


def in_two_forks(given: list[str], place: Path) -> list[tuple[int | None, str]]:
    """What two copies of this process say and exit with that are `pissa` with these arguments, as torchrun starts it.

    They have imported everything, which takes most of the time of a run that is started anew.
    """
    port, context = str(free_port()), multiprocessing.get_context("fork")
    files = [place / f"said-{rank}" for rank in range(2)]
    processes = [context.Process(target=_rank, args=(rank, port, given, file)) for rank, file in enumerate(files)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(180)
        process.kill()
    return [(process.exitcode, file.read_text()) for process, file in zip(processes, files, strict=True)]


def _rank(rank: int, port: str, given: list[str], file: Path) -> None:
    sizes = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    os.environ |= {name: str(value) for name, value in sizes.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), 2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    sys.stdout, sys.stderr = (open(number, "w", closefd=False) for number in (1, 2))  # noqa: SIM115
    AcceleratorState._reset_state(reset_partial_state=True)  # that of the process that forked
    run_command_line(given)


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.fixture(scope="module")
def alone(base_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(data, directory of the run of one process)."""
    place = tmp_path_factory.mktemp("alone")
    data = write_rows(place / "data.jsonl")
    # no multiple of what two processes measure at a time
    write_rows(place / "measured.jsonl", 7)
    run(base_directory, place / "run", settings(**measured_on(data)), str(data))
    return data, place / "run"


def measured_on(data: Path) -> dict[str, Any]:
    """Settings of a validation loss on rows beside the data."""
    return {"eval_data": str(data.with_name("measured.jsonl")), "eval_every": 3}


def assert_close(out: Path, expected: Path) -> None:
    """Losses and gradient norms of each step within 1e-4, and each step once."""
    ours, theirs = log_of(out), log_of(expected)
    assert [record["step"] for record in ours] == [record["step"] for record in theirs]
    for one, other in zip(ours, theirs, strict=True):
        assert one == pytest.approx(other, abs=CLOSE)
    for one, other in zip(*(read_log(place / "state" / "validation.jsonl") for place in (out, expected)), strict=True):
        assert one == pytest.approx(other, abs=CLOSE)


def assert_one_result(base: Path, out: Path, expected: Path) -> None:
    """The files of one process, with the same function in them."""
    assert listing(out) == listing(expected)
    checkpoint = out / "state" / "checkpoint-8"
    generators = {"rng_state_0.pth", "rng_state_1.pth"}
    assert listing(checkpoint) == listing(expected / "state" / "checkpoint-8") - {"rng_state.pth"} | generators
    assert result_tensors(out).keys() == result_tensors(expected).keys()
    assert largest_difference(plain_logits(base, out), plain_logits(base, expected)) < 1e-3
    assert largest_difference(plain_logits(base, out), logits_of(load(out, str(base)).eval())) < 1e-5
    assert json.loads((out / "results.json").read_text())["processes"] == 2


def test_two_processes_train_as_one_does(base_directory: Path, tmp_path: Path, alone: tuple[Path, Path]) -> None:
    data, expected = alone
    out = tmp_path / "run"
    given = arguments(base_directory, data, out, settings(micro_batch_size=1, **measured_on(data)))
    for code, said in in_two_forks(given, tmp_path):
        assert code == 0, said
    assert_close(out, expected)
    assert_one_result(base_directory, out, expected)


@pytest.mark.slow
def test_two_processes_continue_what_was_stopped(
    base_directory: Path, tmp_path: Path, alone: tuple[Path, Path]
) -> None:
    data, expected = alone
    out = tmp_path / "run"
    started = launched(command(base_directory, data, out, settings(**measured_on(data))))
    stopper = tmp_path / "sitecustomize.py"
    stopper.write_text(STOP_RANK_1_AT_STEP_5)
    stopped = finish(started, PYTHONPATH=str(tmp_path))
    assert stopped.returncode != 0 and "checkpoint-5 is saved" in stopped.stderr
    assert (out / "state" / "checkpoint-5").is_dir() and len(log_of(out)) == 5
    done = finish(started)
    assert done.returncode == 0, done.stderr
    assert_close(out, expected)
    assert_one_result(base_directory, out, expected)


STOP_RANK_1_AT_STEP_5 = """
import os
if os.environ.get("RANK") == "1":
    import signal
    from pissa.training.trainer import RunTrainer

    original = RunTrainer.training_step

    def training_step(self, *arguments):
        if self.state.global_step == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, *arguments)

    RunTrainer.training_step = training_step
"""


@pytest.mark.slow
def test_wrong_input_ends_all_processes_with_nothing_written(base_directory: Path, tmp_path: Path) -> None:
    data, out = write_rows(tmp_path / "data.jsonl"), tmp_path / "run"
    done = finish(launched(command(base_directory, data, out, settings(rank=20))))
    assert done.returncode != 0 and not out.exists()
    assert "rank exceeds the smaller side" in done.stderr
