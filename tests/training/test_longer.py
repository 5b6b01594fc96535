"""A run goes on beyond its length, or from a checkpoint that is not its last."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
from killed import signal_at_step
from small_runs import listing, log_of, recipe, result_tensors, run, write_rows

from pissa.errors import ConfigError, OutputError
from pissa.training.recipe import Recipe
from pissa.training.run import Interrupted, train
from tiny import same_tensors


def steady(**settings: Any) -> Recipe:
    """A recipe whose steps do not depend on how many there are."""
    return recipe(**{"schedule": "constant", "warmup_ratio": 0, **settings})


def test_a_finished_run_trained_longer_is_the_longer_run(
    base_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, data = tmp_path / "run", str(write_rows(tmp_path / "rows.jsonl"))
    run(base_directory, tmp_path / "long", steady(max_steps=9), data)
    run(base_directory, out, steady(max_steps=5), data)
    with pytest.raises(Interrupted, match="checkpoint-8 is saved"):
        signal_at_step(7, lambda: run(base_directory, out, steady(max_steps=9), data), number=signal.SIGTERM)
    # the results of the shorter run are no results of this one
    train(str(base_directory), data, out, steady(max_steps=9))
    assert "continuing from" in capsys.readouterr().err
    assert log_of(out) == log_of(tmp_path / "long")
    assert same_tensors(result_tensors(out), result_tensors(tmp_path / "long"))
    results = json.loads((out / "results.json").read_text())
    assert results["continued"] == [{"step": 5, "max_steps": 5}] and results["settings"]["max_steps"] == 9
    assert run(base_directory, out, steady(max_steps=9), data).model is None
    with pytest.raises(OutputError, match="max_steps: 9 then, 5 now"):
        run(base_directory, out, steady(max_steps=5), data)


def test_epochs_are_a_length_too(base_directory: Path, tmp_path: Path) -> None:
    run(base_directory, tmp_path / "long", steady(max_steps=None, epochs=2))
    for epochs in (1, 2):
        run(base_directory, tmp_path / "run", steady(max_steps=None, epochs=epochs))
    assert log_of(tmp_path / "run") == log_of(tmp_path / "long")


def test_a_schedule_that_falls_is_said_to_be_another_one(
    base_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = str(write_rows(tmp_path / "rows.jsonl"))
    run(base_directory, tmp_path / "run", recipe(max_steps=3), data)
    train(str(base_directory), data, tmp_path / "run", recipe(max_steps=6))
    said = " ".join(capsys.readouterr().err.split())
    assert "its cosine schedule becomes that of the longer run" in said
    rates = [record["learning_rate"] for record in log_of(tmp_path / "run")]
    assert rates[3] > rates[2]


@pytest.mark.parametrize("named", ["checkpoint", "relative"])
def test_a_run_goes_back_to_a_checkpoint_of_its_own_once(
    base_directory: Path, tmp_path: Path, named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "run"
    run(base_directory, out, recipe())
    expected = result_tensors(out)
    place = out / "state" / "checkpoint-4"
    again = recipe(resume_from=str(place if named == "checkpoint" else place.relative_to(tmp_path)))
    (out / "state" / "checkpoint-6" / "optimizer.pt").unlink()  # the last one is of no use any more
    assert run(base_directory, out, again).model is not None
    assert same_tensors(result_tensors(out), expected)
    assert run(base_directory, out, again).model is None and run(base_directory, out, recipe()).model is None


def test_a_run_goes_on_from_another_one_s_checkpoint(base_directory: Path, tmp_path: Path) -> None:
    first, out = tmp_path / "first", tmp_path / "second"
    run(base_directory, first, steady(max_steps=4, eval_fraction=0.2, eval_every=1, keep_best=True))
    before = {path: path.read_bytes() for path in first.rglob("*") if path.is_file()}
    longer = {"max_steps": 6, "eval_fraction": 0.2, "eval_every": 1, "keep_best": True}
    run(base_directory, tmp_path / "long", steady(**longer))
    run(base_directory, out, steady(**longer, resume_from=str(first)))
    assert log_of(out) == log_of(tmp_path / "long")
    assert same_tensors(result_tensors(out), result_tensors(tmp_path / "long"))
    assert {path: path.read_bytes() for path in first.rglob("*") if path.is_file()} == before
    assert json.loads((out / "results.json").read_text())["resumed_from"] == f"{first}, step 4"


def test_what_cannot_be_gone_on_from_is_named(base_directory: Path, tmp_path: Path) -> None:
    first = tmp_path / "first"
    run(base_directory, first, recipe(max_steps=2))
    for wrong in (tmp_path, first / "state", tmp_path / "missing"):
        with pytest.raises(ConfigError, match="neither a run with a checkpoint nor a checkpoint of a run"):
            run(base_directory, tmp_path / "out", recipe(resume_from=str(wrong)))
    with pytest.raises(OutputError, match="rank: 4 then, 2 now"):
        run(base_directory, tmp_path / "out", recipe(rank=2, max_steps=2, resume_from=str(first)))
    assert not (tmp_path / "out").exists()
    run(base_directory, tmp_path / "out", recipe(max_steps=1))
    with pytest.raises(OutputError, match="has checkpoints of its own"):
        run(base_directory, tmp_path / "out", recipe(max_steps=3, resume_from=str(first)))
    assert "checkpoint-1" in listing(tmp_path / "out" / "state")
