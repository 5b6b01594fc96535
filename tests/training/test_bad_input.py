"""What cannot be trained is one line that says how to mend it, and nothing is written."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import (
    arguments,
    in_process,
    listing,
    log_of,
    plain_logits,
    recipe,
    result_tensors,
    rows,
    run,
    write_rows,
)

from pissa.checkpoint.disk.write import TEMPORARY_PREFIX
from pissa.errors import CheckpointError, ConfigError, OutputError, PissaError
from pissa.training import outcome
from pissa.training import saved as saved_module
from pissa.training.recipe import Recipe
from tiny import largest_difference, same_tensors, tiny_llama, tiny_tokenizer


def missing(base: Path) -> None:
    shutil.rmtree(base)


def empty(base: Path) -> None:
    for file in base.iterdir():
        file.unlink()


def without_weights(base: Path) -> None:
    (base / "model.safetensors").unlink()


def without_a_shard(base: Path) -> None:
    empty(base)
    tiny_llama().save_pretrained(base, max_shard_size="60KB")
    tiny_tokenizer().save_pretrained(base)
    next(iter(sorted(base.glob("model-00002*")))).unlink()


def cut_short(base: Path) -> None:
    file = base / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def without_tokenizer(base: Path) -> None:
    for file in base.glob("tokenizer*"):
        file.unlink()


def without_end(base: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    tokenizer.save_pretrained(base)


def with_nan(base: Path) -> None:
    model: Any = tiny_llama()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = float("nan")
    model.save_pretrained(base)


MODELS: dict[str, tuple[Callable[[Path], None], str]] = {
    "missing": (missing, "BASE does not exist; give a model's directory or a hub id"),
    "empty": (empty, "BASE is empty; a model directory holds config.json"),
    "without weights": (without_weights, "BASE has no weights: no model.safetensors"),
    "without a shard": (without_a_shard, "BASE lacks 1 shard(s) that model.safetensors.index.json names: model-00002-"),
    "cut short": (cut_short, "BASE/model.safetensors is not whole: its header describes"),
    "without tokenizer": (without_tokenizer, "cannot load a tokenizer from BASE"),
    "without end of sequence": (without_end, "the tokenizer of BASE has no end-of-sequence token"),
    "NaN": (with_nan, "NaN or Inf in the weight of model.layers.1.mlp.up_proj"),
}


@pytest.fixture
def base(base_directory: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model that may be damaged."""
    return Path(shutil.copytree(base_directory, tmp_path / "base"))


def snapshot_of(place: Path) -> dict[Path, bytes | None]:
    return {p: p.read_bytes() if p.is_file() else None for p in [place, *place.rglob("*")] if p.exists()}


def refused(base: Path, out: Path, settings: Recipe, data: Any = None) -> str:
    """The one line with which a run is refused; nothing is written."""
    before = snapshot_of(out.parent)
    with pytest.raises(PissaError) as caught:
        run(base, out, settings, data)
    assert snapshot_of(out.parent) == before and not out.exists()
    message = str(caught.value)
    assert "\n" not in message.strip()
    return message


@pytest.mark.parametrize("damage", MODELS)
def test_a_model_that_cannot_be_trained_is_refused(base: Path, tmp_path: Path, damage: str) -> None:
    harm, said = MODELS[damage]
    harm(base)
    assert said.replace("BASE", str(base)) in refused(base, tmp_path / "out", recipe())


def test_a_rank_above_the_smaller_side_names_some_modules_and_counts_the_rest(base: Path, tmp_path: Path) -> None:
    names = ("k_proj", "v_proj", "up_proj")
    message = refused(base, tmp_path / "out", recipe(rank=20, target_modules=names))
    for layer in (0, 1):
        for name in ("k_proj", "v_proj"):
            assert f"model.layers.{layer}.self_attn.{name} (16, 32): 20 > 16" in message
    assert "up_proj" not in message and "lower rank" in message
    message = refused(base, tmp_path / "out", recipe(rank=1000, target_modules=names))
    assert message.count("1000 >") == 3 and "and 3 more" in message


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"target_modules": ("q_pro", "v_proj")}, "no module matches 'q_pro'; closest names: q_proj"),
        ({"template": "chat"}, "chat"),
        ({"max_length": 2}, "no response begins within max_length = 2 tokens"),
        ({"report_to": "tensorboard"}, "pip install tensorboard"),
    ],
    ids=["no module", "no chat template", "too short", "no tensorboard"],
)
def test_settings_that_do_not_fit_the_model_are_refused(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], said: str
) -> None:
    import sys

    tiny_tokenizer(chat_template=None).save_pretrained(base)
    (base / "chat_template.jinja").unlink(missing_ok=True)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    assert said in refused(base, tmp_path / "out", recipe(**settings))


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{not json", "data.jsonl:3 is not JSON"),
        ('{"instruction": "a", "output": " "}', "data.jsonl:3 has an empty response"),
        ('{"texts": "a"}', "data.jsonl:3 is of an unknown shape"),
    ],
)
def test_a_row_that_cannot_be_used_is_named_by_file_and_line(base: Path, tmp_path: Path, line: str, said: str) -> None:
    data = tmp_path / "data.jsonl"
    good = json.dumps(rows(1)[0])
    data.write_text(f"{good}\n{good}\n{line}\n{good}\n")
    assert said in refused(base, tmp_path / "out", recipe(), str(data))


def test_a_batch_that_processes_cannot_share_is_refused_before_the_model_is_read(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    missing(base)
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert "3 processes" in refused(base, tmp_path / "out", recipe())


@pytest.mark.parametrize("content", ["file", "directory", "foreign state", "broken record"])
def test_an_output_that_holds_something_else_is_refused_untouched(base: Path, tmp_path: Path, content: str) -> None:
    out = tmp_path / "out"
    if content == "file":
        out.write_text("mine")
    else:
        (out / "state").mkdir(parents=True)
        name = {"directory": "mine.txt", "foreign state": "state/mine.txt", "broken record": "state/run.json"}[content]
        (out / name).write_text("mine")
    before = snapshot_of(out)
    with pytest.raises(OutputError, match=re.escape(str(out))):
        run(base, out, recipe())
    assert snapshot_of(out) == before


@pytest.mark.parametrize("leftover", [f"{TEMPORARY_PREFIX}abc", f"state/{TEMPORARY_PREFIX}abc"])
def test_what_a_killed_process_left_does_not_stop_the_next(base: Path, tmp_path: Path, leftover: str) -> None:
    out = tmp_path / "out"
    (out / "state").mkdir(parents=True)
    (out / leftover).write_text("half")
    run(base, out, recipe(max_steps=1))
    assert not list(out.rglob(f"{TEMPORARY_PREFIX}*")) and (out / "adapter_config.json").is_file()


@pytest.mark.parametrize("content", ["", '{"losses": [1.', "[]", "{}"])
def test_damaged_results_are_one_line_and_can_be_written_again(base: Path, tmp_path: Path, content: str) -> None:
    out = tmp_path / "out"
    expected = run(base, out, recipe(max_steps=1)).results["losses"]
    (out / "results.json").write_text(content)
    with pytest.raises(OutputError, match=r"results\.json .* its results are damaged") as caught:
        run(base, out, recipe(max_steps=1))
    assert "\n" not in str(caught.value)
    (out / "results.json").unlink()
    assert run(base, out, recipe(max_steps=1)).results["losses"] == expected


def test_a_place_below_a_file_is_refused(base: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OutputError, match=re.escape(f"{tmp_path / 'file'} is a file")):
        run(base, tmp_path / "file" / "out", recipe())


def test_a_name_that_no_disk_takes_is_refused(base: Path, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="cannot be written: File name too long"):
        run(base, tmp_path / ("n" * 300), recipe())


def test_a_place_that_may_not_be_written_is_refused_before_the_work(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    missing(base)  # is never looked for
    monkeypatch.setattr(os, "access", lambda path, mode: str(path) != str(tmp_path))
    message = refused(base, tmp_path / "new" / "out", recipe())
    assert f"cannot be written: no permission in {tmp_path}" in message


def test_a_read_only_disk_is_one_line(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "mkdir", fail)
    with pytest.raises(OutputError, match="cannot be written: Read-only file system"):
        run(base, tmp_path / "out", recipe())


@pytest.fixture(scope="module")
def undisturbed(base_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    run(base_directory, out, recipe())
    return out


def test_a_disk_full_at_a_checkpoint_leaves_the_one_before(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undisturbed: Path
) -> None:
    out = tmp_path / "run"
    original = saved_module.write_lora

    def full(export: Any, directory: Path) -> None:
        original(export, directory)
        if "checkpoint-4" in str(directory):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(saved_module, "write_lora", full)
    with pytest.raises(OutputError, match="is full; make room and run the same command again"):
        run(base, out, recipe())
    assert listing(out) == {"state"}
    assert listing(out / "state") == {"run.json", "log.jsonl", "checkpoint-2"}
    monkeypatch.undo()
    run(base, out, recipe())
    assert log_of(out) == log_of(undisturbed)
    assert same_tensors(result_tensors(out), result_tensors(undisturbed))


def test_a_disk_full_at_the_end_leaves_no_result_but_the_last_checkpoint(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undisturbed: Path
) -> None:
    out = tmp_path / "run"

    def full(*_: Any) -> str:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(outcome, "model_card", full)
    with pytest.raises(OutputError, match="is full; make room"):
        run(base, out, recipe())
    assert listing(out) == {"state"}
    assert listing(out / "state") == {"run.json", "log.jsonl", "checkpoint-4", "checkpoint-6"}
    monkeypatch.undo()
    run(base, out, recipe())
    assert log_of(out) == log_of(undisturbed)
    assert same_tensors(result_tensors(out), result_tensors(undisturbed))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """A real disk of as many KiB as asked for, to be asked for more later; a skip where none can be mounted."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = False

    def of_size(kibibytes: int) -> Path:
        nonlocal mounted
        options = f"{'remount,' if mounted else ''}size={kibibytes}k"
        try:
            subprocess.run(
                ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)], check=True, capture_output=True
            )
        except (OSError, subprocess.CalledProcessError):
            pytest.skip("needs the right to mount a small disk")
        mounted = True
        return place

    yield of_size
    if mounted:
        subprocess.run(["umount", str(place)], check=True)


def test_a_disk_that_is_really_full_is_one_line_until_there_is_room(
    base: Path, small_disk: Callable[[int], Path], undisturbed: Path
) -> None:
    refusals = 0
    for size in (20, 60, 100, 140, 180, 220, 260, 300, 340, 500, 1000):
        out = small_disk(size) / "run"
        try:
            run(base, out, recipe())
            break
        except OutputError as error:
            refusals += 1
            assert re.search("full|No space left", str(error)) and "\n" not in str(error)
            for config in out.rglob("adapter_config.json"):
                # whatever is there can be loaded
                assert largest_difference(plain_logits(base, config.parent), plain_logits(base, undisturbed)) < 1
    assert refusals >= 3
    assert log_of(out) == log_of(undisturbed)
    assert same_tensors(result_tensors(out), result_tensors(undisturbed))


def test_the_command_says_it_in_one_line_with_exit_code_2(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_rows(tmp_path / "data.jsonl")
    data.write_text(data.read_text() + "{\n")
    done = in_process(arguments(base, data, tmp_path / "out", recipe()), capsys)
    assert done.returncode == 2 and not done.stdout and not (tmp_path / "out").exists()
    assert done.stderr.count("pissa: ") == 1 and "Traceback" not in done.stderr
    assert f"{data}:21 is not JSON" in done.stderr.splitlines()[-1]


def test_errors_are_of_the_kind_that_they_name(base: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        run(base, tmp_path / "out", recipe(rank=100))
    missing(base)
    with pytest.raises(CheckpointError):
        run(base, tmp_path / "out", recipe())
