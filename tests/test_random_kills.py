"""Commands that die at random moments leave what a run nobody disturbed leaves, once they are given again."""

from __future__ import annotations

from pathlib import Path

import pytest

from random_kills import differences, kill_often


def test_what_differs_is_found() -> None:
    left = {"a": b"1", "b.json": [{".x": 1, ".y": 2}], "c": b""}
    assert differences(left, left) == set()
    assert differences(left, {"a": b"2", "b.json": [{".x": 1, ".y": 3}], "d": b""}) == {"a", "b.json: .y", "c", "d"}


@pytest.mark.slow
def test_random_kills_change_nothing(tmp_path: Path) -> None:
    tallies = kill_often(tmp_path, kills=60, seconds=240, seed=1)
    assert {name: tally.wrong for name, tally in tallies.items() if tally.wrong} == {}
    assert all(tally.kills and tally.same for tally in tallies.values())
