"""The log has each step once, and a request to stop is heard once."""

from __future__ import annotations

import io
import json
import signal
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console
from transformers import TrainerControl, TrainerState

from pissa.errors import OutputError
from pissa.training import progress as progress_module
from pissa.training.bar import make_progress
from pissa.training.progress import StepLog, StopAtStepEnd, read_log

ARGUMENTS: Any = SimpleNamespace(world_size=1)


def state_at(step: int) -> TrainerState:
    return TrainerState(global_step=step, max_steps=10, is_world_process_zero=True, is_local_process_zero=True)


def step_log(path: Path, **options: Any) -> StepLog:
    log = StepLog(path, **{"progress": None, "label": "run", **options})
    log.trainer = SimpleNamespace(take_tokens_per_second=lambda: 100.0)
    return log


def write(log: StepLog, step: int) -> None:
    logs = {"loss": 1 / step, "grad_norm": 2.0, "learning_rate": 0.1, "tokens_per_second": 100.0}
    log.on_log(ARGUMENTS, state_at(step), TrainerControl(), logs)


def test_a_step_is_one_line_of_json(tmp_path: Path) -> None:
    log = step_log(tmp_path / "log.jsonl")
    log.on_train_begin(ARGUMENTS, state_at(0), TrainerControl())
    for step in (1, 2):
        write(log, step)
    log.on_log(ARGUMENTS, state_at(2), TrainerControl(), {"train_loss": 3.0})
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == read_log(tmp_path / "log.jsonl")
    assert json.loads(lines[1]) == {
        "step": 2,
        "loss": 0.5,
        "grad_norm": 2.0,
        "learning_rate": 0.1,
        "tokens_per_second": 100.0,
    }


def test_a_continued_log_drops_what_is_done_again_and_half_a_line(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    log = step_log(path)
    for step in (1, 2, 3):
        write(log, step)
    with path.open("a") as file:
        file.write('{"step": 4, "lo')
    assert [record["step"] for record in read_log(path)] == [1, 2, 3]
    again = step_log(path)
    again.on_train_begin(ARGUMENTS, state_at(2), TrainerControl())
    write(again, 3)
    assert [record["step"] for record in read_log(path)] == [1, 2, 3]
    assert path.read_text().count("\n") == 3
    assert [file.name for file in tmp_path.iterdir()] == ["log.jsonl"]


def test_a_log_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    log = step_log(tmp_path / "missing" / "log.jsonl")
    with pytest.raises(OutputError, match=r"log\.jsonl cannot be written"):
        write(log, 1)
    assert read_log(tmp_path / "missing" / "log.jsonl") == []


def test_only_the_main_process_writes(tmp_path: Path) -> None:
    log = step_log(tmp_path / "log.jsonl")
    other = TrainerState(global_step=1, max_steps=2, is_world_process_zero=False)
    log.on_train_begin(ARGUMENTS, other, TrainerControl())
    log.on_log(ARGUMENTS, other, TrainerControl(), {"loss": 1.0})
    assert not list(tmp_path.iterdir())


def test_the_bar_shows_loss_gradient_norm_and_speed(tmp_path: Path) -> None:
    screen = io.StringIO()
    bar = make_progress(Console(file=screen, width=120, force_terminal=True))
    with bar:
        log = step_log(tmp_path / "log.jsonl", progress=bar, label="pissa")
        log.on_train_begin(ARGUMENTS, state_at(4), TrainerControl())
        write(log, 5)
    [task] = bar.tasks
    assert (task.completed, task.total, task.description) == (5, 10, "pissa")
    assert task.fields["note"] == "loss 0.200  grad 2.00  rate 1.0e-01  100 tok/s"
    log.on_log(ARGUMENTS, state_at(5), TrainerControl(), {"eval_loss": 3.0})
    write(log, 6)
    assert task.fields["note"] == "loss 0.167  validation 3.000  grad 2.00  rate 1.0e-01  100 tok/s"


class Clock:
    """A clock that tests set."""

    now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress_module, "time", clock)
    return clock


def test_the_first_signal_stops_after_the_step_and_a_later_one_at_once(clock: Clock) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    stop, control = StopAtStepEnd(), TrainerControl()
    stop.on_train_begin()
    try:
        stop.on_step_end(ARGUMENTS, state_at(1), control)
        assert not control.should_save and not control.should_training_stop
        signal.raise_signal(signal.SIGINT)
        clock.now += 0.5  # a launcher passes the terminal's signal on
        signal.raise_signal(signal.SIGTERM)
        stop.on_step_end(ARGUMENTS, state_at(2), control)
        assert control.should_save and control.should_training_stop
        clock.now += 1
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    finally:
        stop.release()
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_run_in_a_thread_leaves_signals_alone() -> None:
    before = signal.getsignal(signal.SIGINT)
    seen = []

    def work() -> None:
        stop = StopAtStepEnd()
        stop.on_train_begin()
        seen.append(signal.getsignal(signal.SIGINT))
        stop.release()

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before] == [signal.getsignal(signal.SIGINT)]
