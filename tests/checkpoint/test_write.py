"""Files appear whole or not at all, and what was there before survives a failure."""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pissa.checkpoint.disk import write
from pissa.checkpoint.disk.write import check_free, output_directory, output_file, output_files, write_json
from pissa.errors import OutputError, PissaError


def tree(directory: Path) -> dict[str, bytes | None]:
    """Everything under a directory: relative name -> content, None for a directory."""
    return {
        str(path.relative_to(directory)): path.read_bytes() if path.is_file() else None
        for path in sorted(directory.rglob("*"))
    }


def test_a_directory_appears_when_its_block_ends_well(tmp_path: Path) -> None:
    out = tmp_path / "new" / "out"
    with output_directory(out) as partial:
        (partial / "sub").mkdir()
        (partial / "sub" / "file").write_text("content")
        assert not out.exists() and partial.parent == out.parent
    assert tree(tmp_path) == {"new": None, "new/out": None, "new/out/sub": None, "new/out/sub/file": b"content"}


def test_an_empty_directory_is_taken_and_so_is_a_link_to_one(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    with output_directory(tmp_path / "link") as partial:
        (partial / "file").touch()
    assert (tmp_path / "link").is_symlink() and (tmp_path / "empty" / "file").is_file()
    assert len(list(tmp_path.iterdir())) == 2


def test_directories_and_files_get_the_user_s_usual_permissions(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        with output_directory(tmp_path / "out") as partial:
            write_json(partial / "a.json", {})
        with output_files(tmp_path / "out", last="b") as partial:
            (partial / "b").touch(mode=0o600)
        assert os.umask(0o027) == 0o027
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o750
    assert {stat.S_IMODE(file.stat().st_mode) for file in (tmp_path / "out").iterdir()} == {0o640}


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(1), ValueError("other"), MemoryError()])
def test_a_block_that_fails_leaves_nothing_and_its_error_passes(tmp_path: Path, error: BaseException) -> None:
    with pytest.raises(type(error)), output_directory(tmp_path / "out") as partial:
        (partial / "file").write_text("half")
        raise error
    assert tree(tmp_path) == {}


@pytest.mark.parametrize("content", ["file", "directory with content", "hidden"])
def test_an_output_that_holds_something_is_refused_untouched(tmp_path: Path, content: str) -> None:
    out = tmp_path / "out"
    if content == "file":
        out.write_text("mine")
    else:
        out.mkdir()
        (out / (".hidden" if content == "hidden" else "file")).write_text("mine")
    before = tree(tmp_path)
    with pytest.raises(OutputError, match="already holds something"), output_directory(out):
        pytest.fail("the block must not run")
    with pytest.raises(OutputError, match="already holds something"):
        check_free(out)
    assert tree(tmp_path) == before


def system_error(number: int) -> Callable[..., Any]:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError(number, os.strerror(number))

    return fail


@pytest.mark.parametrize(
    ("function", "number", "said"),
    [
        ("fsync", errno.ENOSPC, "is full; make room"),
        ("fsync", errno.EDQUOT, "is full; make room"),
        ("chmod", errno.EROFS, "cannot be written"),
        ("chmod", errno.EACCES, "cannot be written"),
    ],
)
def test_a_disk_that_refuses_is_one_clear_line_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str, number: int, said: str
) -> None:
    monkeypatch.setattr(os, function, system_error(number))
    with pytest.raises(OutputError, match=said) as caught, output_directory(tmp_path / "out") as partial:
        (partial / "file").write_text("x")
    assert isinstance(caught.value, PissaError) and isinstance(caught.value, OSError)
    assert str(tmp_path / "out") in str(caught.value) and "\n" not in str(caught.value)
    assert tree(tmp_path) == {}


@pytest.mark.parametrize("name", ["file/out", "file/deep/out", "n" * 300])
def test_a_place_where_no_directory_can_be_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OutputError), output_directory(tmp_path / name):
        pytest.fail("the block must not run")
    assert tree(tmp_path) == {"file": b"mine"}


def test_another_error_of_the_system_is_not_disguised(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), output_directory(tmp_path / "out"):
        (tmp_path / "missing").read_bytes()
    assert tree(tmp_path) == {}


# write_json


def test_json_is_replaced_whole(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"first": [1, 2], "é": None})
    write_json(tmp_path / "a.json", {"second": 1.5})
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == {"second": 1.5}
    assert list(tree(tmp_path)) == ["a.json"]


@pytest.mark.parametrize("failing", ["replace", "fsync"])
def test_json_that_cannot_be_written_leaves_the_old(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    write_json(tmp_path / "a.json", {"old": 1})
    before = tree(tmp_path)
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"new": object()})
    monkeypatch.setattr(os, failing, system_error(errno.ENOSPC))
    with pytest.raises(OutputError, match="is full"):
        write_json(tmp_path / "a.json", {"new": 2})
    assert tree(tmp_path) == before


# output_files


def test_files_replace_their_namesakes_and_leave_the_rest(tmp_path: Path) -> None:
    (tmp_path / "kept").write_text("kept")
    (tmp_path / "weights").write_text("old")
    with output_files(tmp_path, last="config") as partial:
        (partial / "weights").write_text("new")
        (partial / "config").write_text("new")
    assert tree(tmp_path) == {"config": b"new", "kept": b"kept", "weights": b"new"}


def test_a_failing_block_leaves_the_old_files(tmp_path: Path) -> None:
    for name in ("weights", "config"):
        (tmp_path / name).write_text("old")
    with pytest.raises(KeyboardInterrupt), output_files(tmp_path, last="config") as partial:
        (partial / "weights").write_text("new")
        raise KeyboardInterrupt
    assert tree(tmp_path) == {"config": b"old", "weights": b"old"}


@pytest.mark.parametrize("moves", range(3))
def test_old_and_new_files_are_never_readable_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moves: int
) -> None:
    """Killed after any number of moves: either all is old, or the file without which nobody reads is missing."""
    names = ("a", "config", "z")
    for name in names:
        (tmp_path / name).write_text("old")
    real, done = Path.replace, []

    def replace(self: Path, target: Any) -> Path:
        if len(done) == moves:
            raise KeyboardInterrupt
        done.append(target)
        return real(self, target)

    monkeypatch.setattr(Path, "replace", replace)
    with pytest.raises(KeyboardInterrupt), output_files(tmp_path, last="config") as partial:
        for name in names:
            (partial / name).write_text("new")
    assert "config" not in tree(tmp_path)
    assert not [name for name in tree(tmp_path) if name.startswith(write.TEMPORARY_PREFIX)]


@pytest.mark.parametrize("empty", [False, True])
def test_of_two_directories_at_once_the_first_wins_whole(tmp_path: Path, empty: bool) -> None:
    out = tmp_path / "out"
    if empty:
        out.mkdir()
    with pytest.raises(OutputError, match=r"another process wrote .* meanwhile"), output_directory(out) as slow:
        (slow / "a").write_text("slow")
        with output_directory(out) as quick:
            (quick / "b").write_text("quick")
    assert {path.name: path.read_text() for path in out.iterdir()} == {"b": "quick"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("links", [True, False])
def test_of_two_files_at_once_the_first_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool) -> None:
    if not links:
        monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(PermissionError(1, "no links here")))
    out = tmp_path / "out"
    with pytest.raises(OutputError, match=r"another process wrote .* meanwhile"), output_file(out) as slow:
        slow.write_text("slow")
        with output_file(out) as quick:
            quick.write_text("quick")
    assert out.read_text() == "quick"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
