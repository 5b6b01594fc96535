"""Work that takes too long or too much is stopped, in every thread, and what was set before is set again."""

from __future__ import annotations

import re
import resource
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from pissa.outside.limits import LimitError, bounded


def loop() -> None:
    """Work without end, in Python."""
    with bounded(0.2, 1 << 30):
        while True:
            pass


def test_a_loop_is_stopped_in_the_main_thread_and_in_another() -> None:
    with pytest.raises(LimitError, match=r"more than 0\.2 s"):
        loop()
    with ThreadPoolExecutor(1) as threads, pytest.raises(LimitError, match=r"more than 0\.2 s"):
        threads.submit(loop).result(60)


TRACED = """
import sys, threading
from pissa.outside.limits import LimitError, bounded

def work(seconds):
    try:
        with bounded(seconds, 1 << 30):
            while seconds < 1: pass
    except LimitError:
        pass

for seconds in (0.1, 60):
    thread = threading.Thread(target=work, args=(seconds,)); thread.start(); thread.join()
sys.settrace(lambda *_: None)
sum(map(abs, range(9)))
(lambda: print("done"))()
"""


def test_a_debugger_goes_on_after_work_in_another_thread() -> None:
    found = subprocess.run([sys.executable, "-c", TRACED], capture_output=True, text=True, timeout=60, check=True)
    assert found.stdout == "done\n"


def test_a_regular_expression_is_stopped_in_the_main_thread() -> None:
    with pytest.raises(LimitError), bounded(0.2, 1 << 30):
        re.fullmatch("(a+)+b", "a" * 60)


def test_memory_is_bounded_and_free_again_afterwards() -> None:
    before = resource.getrlimit(resource.RLIMIT_AS)
    with pytest.raises(LimitError, match="more than 64 MiB"), bounded(60, 64 << 20):
        bytearray(1 << 30)
    assert resource.getrlimit(resource.RLIMIT_AS) == before
    assert len(bytearray(128 << 20)) == 128 << 20


def test_work_within_the_limits_is_left_alone_and_errors_pass() -> None:
    with bounded(60, 1 << 30):
        found = sum(range(1000))
    assert found == 499500
    with pytest.raises(KeyError), bounded(60, 1 << 30):
        raise KeyError("mine")


def test_an_alarm_that_was_set_before_still_comes() -> None:
    rung: list[int] = []
    kept = signal.signal(signal.SIGALRM, lambda number, _: rung.append(number))
    earlier = signal.setitimer(signal.ITIMER_REAL, 0.5)
    try:
        with bounded(30, 1 << 30):
            time.sleep(0.1)
        deadline = time.monotonic() + 30
        while not rung and time.monotonic() < deadline:
            time.sleep(0.01)
        assert rung == [signal.SIGALRM]
    finally:
        signal.signal(signal.SIGALRM, kept)
        signal.setitimer(signal.ITIMER_REAL, *earlier)


def test_a_limit_inside_another_leaves_the_outer_one(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(LimitError, match=r"more than 1 s"), bounded(1, 1 << 30):
        with pytest.raises(LimitError, match=r"more than 0\.1 s"), bounded(0.1, 1 << 30):
            while True:
                pass
        while True:
            pass
