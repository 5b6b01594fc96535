"""A directory that only the same run continues, one process at a time; decisions are taken again under the lock."""

from __future__ import annotations

import json
import multiprocessing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pissa.checkpoint.disk.resumable import Resumable, as_recorded, differences, only_writer
from pissa.checkpoint.disk.write import TEMPORARY_PREFIX, write_json
from pissa.errors import OutputError


@dataclass(frozen=True)
class Record:
    settings: dict[str, Any]


def directory(path: Path) -> Resumable:
    return Resumable(path, path / "work" / "run.json", "run", "working", Record, path / "work")


def begin(path: Path, settings: dict[str, Any]) -> None:
    (path / "work").mkdir(parents=True)
    write_json(path / "work" / "run.json", {"settings": settings})


def test_the_record_is_what_was_written_and_a_new_directory_has_none(tmp_path: Path) -> None:
    assert directory(tmp_path / "new").read() is None
    begin(tmp_path / "run", {"a": 1})
    assert directory(tmp_path / "run").read() == {"settings": {"a": 1}}


@pytest.mark.parametrize("name", ["mine.txt", "work/mine.txt"])
def test_what_is_somebody_elses_is_refused_by_name(tmp_path: Path, name: str) -> None:
    (tmp_path / "work").mkdir()
    (tmp_path / name).write_text("mine")
    with pytest.raises(OutputError, match=r"already holds something else \(mine\.txt\), and not a run"):
        directory(tmp_path).read()


def test_what_a_killed_process_left_is_taken_away_and_refused_to_nobody(tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    for place in (tmp_path, tmp_path / "work"):
        (place / f"{TEMPORARY_PREFIX}x").write_text("half")
    assert directory(tmp_path).read() is None
    with directory(tmp_path).held():
        assert not directory(tmp_path).leftovers()


@pytest.mark.parametrize(
    "text",
    ["", "[]", "null", "{}", '{"settings": 3}', '{"settings": []}', '{"a":' * 50_000, b"\xff", '{"x": 1, "x": 2}'],
)
def test_a_damaged_record_is_one_line(tmp_path: Path, text: str | bytes) -> None:
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "run.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(OutputError, match="cannot be continued") as caught:
        directory(tmp_path).read()
    assert "\n" not in str(caught.value)


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)
settings = st.dictionaries(st.text(min_size=1, max_size=4), plain, max_size=4)


@given(settings, settings)
def test_settings_differ_exactly_where_something_is_said_to(before: dict[str, Any], now: dict[str, Any]) -> None:
    said = list(differences(before, now))
    missing_as_none = {key: None for key in {**before, **now}}
    assert bool(said) == _differ({**missing_as_none, **before}, {**missing_as_none, **now})
    assert not list(differences(as_recorded(before), as_recorded(before)))


def _differ(a: Any, b: Any) -> bool:
    """Whether two values are not the same, where a name that is missing is as good as null."""
    if isinstance(a, dict) and isinstance(b, dict):
        return any(_differ(a.get(key), b.get(key)) for key in {**a, **b})
    return a != b


def test_the_difference_is_named(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"is another run \(a\.b: 1 then, 2 now\); give the same settings"):
        directory(tmp_path).check_same({"a": {"b": 1}}, {"a": {"b": 2}})


def _hold(path: str, begun: Any, end: Any) -> None:
    with directory(Path(path)).held():
        begun.set()
        end.wait(30)


def test_another_process_is_refused_for_as_long_as_the_first_lives(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    begun, end = context.Event(), context.Event()
    process = context.Process(target=_hold, args=(str(tmp_path), begun, end))
    process.start()
    assert begun.wait(60)
    with pytest.raises(OutputError, match=f"another process is working into {tmp_path}"), directory(tmp_path).held():
        pass
    assert (tmp_path / "work").is_dir()  # the loser takes nothing away
    process.kill()
    process.join()
    with directory(tmp_path).held():
        pass


def test_what_was_decided_before_the_lock_is_decided_again_under_it(tmp_path: Path) -> None:
    """Both looked at the empty directory; the slower one finds the quicker one's record."""
    slow, quick = directory(tmp_path / "run"), directory(tmp_path / "run")
    assert slow.read() is None and quick.read() is None
    with quick.held(quick.read):
        write_json(quick.record, {"settings": {"seed": 2}})

    def check() -> None:
        record = slow.read()
        if record is not None:
            slow.check_same(record["settings"], {"seed": 1})

    with pytest.raises(OutputError, match=r"seed: 2 then, 1 now"), slow.held(check):
        pytest.fail("entered")
    assert json.loads(slow.record.read_text()) == {"settings": {"seed": 2}}


def test_a_directory_that_was_exchanged_is_not_taken_for_the_locked_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "place"

    def exchanged(_: int) -> bool:
        place.rmdir()
        place.mkdir()
        return True

    monkeypatch.setattr("pissa.checkpoint.disk.resumable.locked", exchanged)
    with pytest.raises(OutputError, match=r"took .* away just now"), only_writer(place, "busy"):
        pytest.fail("entered")


def test_nothing_stays_of_a_directory_in_which_nothing_was_done(tmp_path: Path) -> None:
    with directory(tmp_path / "run").held():
        pass
    assert not (tmp_path / "run" / "work").exists()
