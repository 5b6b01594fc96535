"""A run continues from a whole checkpoint to the same losses, or says which part of it is missing or damaged."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from pissa.errors import OutputError
from pissa.training.checkpoints import LIST, problems
from pissa.training.directory import RunDirectory
from training.small_runs import log_of, recipe, run


@pytest.fixture(scope="module")
def finished(base_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with the checkpoints of steps 4 and 6."""
    out = tmp_path_factory.mktemp("finished") / "run"
    run(base_directory, out, recipe())
    return out


@pytest.fixture
def stopped(finished: Path, tmp_path: Path) -> Path:
    """The same run as if it had been stopped after step 4."""
    out = Path(shutil.copytree(finished, tmp_path / "run"))
    for child in out.iterdir():
        if child.is_file():
            child.unlink()
    shutil.rmtree(out / "state" / "checkpoint-6")
    return out


def test_a_whole_checkpoint_continues_to_the_same_losses(base_directory: Path, finished: Path, stopped: Path) -> None:
    run(base_directory, stopped, recipe())
    assert log_of(stopped) == log_of(finished)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-2])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def no_text(path: Path) -> None:
    path.write_bytes(b"\xff" * 10)


def as_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGE: dict[str, Callable[[Path], None]] = {
    "removed": Path.unlink,
    "emptied": empty,
    "cut": cut,
    "flipped": flip,
    "not text": no_text,
    "a directory": as_directory,
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_every_part_counts_and_is_named(stopped: Path, damage: str) -> None:
    """Each file of the checkpoint in turn, whatever happens to it."""
    directory, checkpoint = RunDirectory(stopped), stopped / "state" / "checkpoint-4"
    assert not problems(directory, checkpoint)
    names = sorted(path.name for path in checkpoint.iterdir())
    assert {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", LIST} <= set(names)
    for name in names:
        kept = (checkpoint / name).read_bytes()
        DAMAGE[damage](checkpoint / name)
        (problem,) = problems(directory, checkpoint)
        # a digit of the list that was flipped may be one of a file's digest: then that file is named
        named = names if (name, damage) == (LIST, "flipped") else [name]
        assert any(part in problem for part in named) and "\n" not in problem
        if (checkpoint / name).is_dir():
            (checkpoint / name).rmdir()
        (checkpoint / name).write_bytes(kept)
    assert not problems(directory, checkpoint)


@pytest.mark.parametrize("line", range(4))
@pytest.mark.parametrize("damage", ["lost", "cut", "not JSON", "no step", "nested", "twice"])
def test_every_line_of_the_log_counts(stopped: Path, line: int, damage: str) -> None:
    log = stopped / "state" / "log.jsonl"
    lines = log.read_text().splitlines(keepends=True)
    changed = {
        "lost": "",
        "cut": lines[line][:-5] + "\n",
        "not JSON": "null\n",
        "no step": '{"loss": 1.0}\n',
        "nested": "[" * 100_000 + "\n",
        "twice": lines[(line + 1) % 4],
    }
    log.write_text("".join([*lines[:line], changed[damage], *lines[line + 1 :]]))
    (problem,) = problems(RunDirectory(stopped), stopped / "state" / "checkpoint-4")
    assert problem == f"{log} has no whole line of step {line + 1}"


def test_the_last_whole_checkpoint_is_offered_and_continues(
    base_directory: Path, finished: Path, tmp_path: Path
) -> None:
    out = Path(shutil.copytree(finished, tmp_path / "run"))
    for name in ("results.json", "adapter_config.json"):
        (out / name).unlink()
    (out / "state" / "checkpoint-6" / "optimizer.pt").unlink()
    with pytest.raises(OutputError, match=r"optimizer\.pt is missing; remove it, .* continues from .*checkpoint-4"):
        run(base_directory, out, recipe())
    shutil.rmtree(out / "state" / "checkpoint-6")
    run(base_directory, out, recipe())
    assert log_of(out) == log_of(finished)


def test_without_a_whole_checkpoint_the_run_starts_elsewhere(base_directory: Path, stopped: Path) -> None:
    (stopped / "state" / "checkpoint-4" / "scheduler.pt").unlink()
    with pytest.raises(OutputError, match=r"scheduler\.pt is missing; there is no whole checkpoint before it"):
        run(base_directory, stopped, recipe())


@pytest.mark.parametrize(
    "files", [None, [], {}, {"../x": {"size": 1, "sha256": "0" * 64}}, {"a": {"size": -1}}, {"a": 3}]
)
def test_a_list_of_another_kind_is_no_list(stopped: Path, files: object) -> None:
    (stopped / "state" / "checkpoint-4" / LIST).write_text(json.dumps({"files": files}))
    (problem,) = problems(RunDirectory(stopped), stopped / "state" / "checkpoint-4")
    assert LIST in problem


def test_the_optimizer_of_products_continues_to_the_same_losses(base_directory: Path, tmp_path: Path) -> None:
    settings = recipe(optimizer="spectral", learning_rate=None, method="pissa+dora", max_steps=4)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    result = run(base_directory, whole, settings)
    assert result.results["learning_rate"] == 0.05
    assert len(result.results["losses"]) == 4 and result.results["losses"][-1] != result.results["losses"][0]
    shutil.copytree(whole, parts)
    for child in [child for child in parts.iterdir() if child.is_file()]:
        child.unlink()
    shutil.rmtree(parts / "state" / "checkpoint-4")
    run(base_directory, parts, settings)
    assert log_of(parts) == log_of(whole)
