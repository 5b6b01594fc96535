"""Exit codes, one-line complaints and JSON of the command line."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest
from commands import exit_code

from pissa.cli.main import run
from pissa.cli.parser import COMMANDS


@pytest.fixture
def data(tmp_path: Path) -> str:
    """Eight rows."""
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"question": f"{i} + 1?", "answer": f"#### {i + 1}"}) + "\n" for i in range(8)))
    return str(path)


def train_arguments(model: str, data: str, out: Path, *more: str) -> list[str]:
    """A run of two steps."""
    sizes = ["--rank", "2", "--batch-size", "4", "--micro-batch-size", "4", "--max-steps", "2", "--dtype", "fp32"]
    return ["train", model, "--data", data, "--out", str(out), *sizes, *more]


def test_help_lists_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code("--help") == 0
    text = capsys.readouterr().out
    assert all(command in text for command in ("train", "export", "compare", "demo"))


def test_train_and_export_print_one_json_document(
    model: str, data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_code(*train_arguments(model, data, tmp_path / "run", "--json")) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["directory"] == str(tmp_path / "run")
    assert len(document["losses"]) == 2
    assert exit_code("export", str(tmp_path / "run"), str(tmp_path / "lora"), "--json") == 0
    assert json.loads(capsys.readouterr().out)["rank"] == 4
    assert exit_code("export", str(tmp_path / "run"), str(tmp_path / "small"), "--rank", "1") == 0
    assert "LoRA of rank 1" in capsys.readouterr().out
    assert exit_code("export", str(tmp_path / "run"), str(tmp_path / "merged"), "--merged") == 0
    assert (tmp_path / "merged" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--frobnicate"], "No such option"),
        (["fly"], "fly is no command; allowed: init, train"),
        (["train"], "--data and --out missing"),
        (
            ["train", "M", "--data", "D", "--out", "O", "--rank", "many"],
            "--rank is 'many'; give a whole number",
        ),
        (["export", "/no/such/run", "OUT"], "/no/such/run is not a directory"),
        (["export", "RUN", "OUT", "--merged", "--rank", "2"], "takes neither --rank nor --tolerance"),
        (["export", "RUN", "OUT", "--rank", "0"], "rank is 0; give at least 1"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_two(
    arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_code(*arguments) == 2
    printed = capsys.readouterr()
    assert complaint in printed.err
    assert printed.err.startswith("pissa: ") and printed.err.count("\n") == 1
    assert printed.out == ""


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--rank", "0"], "rank is 0"),
        (["--rank", "33"], "_proj (16, 32): 33 > 16 and 11 more; lower rank"),
        (["--method", "magic"], "method is 'magic'; allowed: pissa"),
        (["--target-modules", "q_prj"], "closest names: q_proj"),
        (["--dropout", "0.1"], "--allow-dropout"),
        (["--dtype", "int3"], "dtype is 'int3'"),
    ],
)
def test_wrong_settings_of_train_write_nothing(
    flags: list[str], complaint: str, model: str, data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    arguments = train_arguments(model, data, out)
    assert exit_code(*arguments, *flags) == 2
    # whatever was under way before has lines of its own; the complaint is one, and the last
    *before, last = capsys.readouterr().err.splitlines()
    assert last.startswith("pissa: ") and complaint in last
    assert not any(line.startswith("pissa: ") for line in before)
    assert not out.exists()


def test_data_that_is_not_json_is_named_with_its_line(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text('{"question": "1 + 1?", "answer": "2"}\nnot json\n')
    assert exit_code(*train_arguments(model, str(data), tmp_path / "run")) == 2
    assert "rows.jsonl:2" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def hollow_adapter(place: Path) -> Path:
    """What is an adapter as far as names tell."""
    adapter = place / "adapter"
    adapter.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (adapter / name).touch()
    return adapter


def test_our_own_fault_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("ours")

    monkeypatch.setattr("pissa.export.lora.export_lora", broken)
    with pytest.raises(ZeroDivisionError):
        run(["export", str(hollow_adapter(tmp_path)), str(tmp_path / "out")])


@pytest.mark.parametrize(
    "words",
    [
        "init LONG out",
        "init BASE LONG",
        "inspect LONG",
        "train LONG --data DATA --out out",
        "train BASE --data LONG --out out",
        "train BASE --data DATA --out LONG",
        "eval BASE --task perplexity --data LONG",
        "export LONG out",
        "verify LONG",
        "compare --model LONG --data DATA --out out",
        "chat LONG",
        "demo --out LONG",
    ],
)
def test_a_path_that_the_system_does_not_take_is_one_line(
    words: str, model: str, data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nobody asks beforehand for each of the reasons for which a system refuses a name."""
    known = {"LONG": "x" * 5000, "BASE": model, "DATA": data, "out": str(tmp_path / "out")}
    assert exit_code(*(known.get(word, word) for word in words.split())) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("pissa: ") and "File name too long" in line


def test_interruption_exits_with_130(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt("nothing is saved")

    monkeypatch.setattr("pissa.export.lora.export_lora", interrupted)
    assert exit_code("export", hollow_adapter(tmp_path), tmp_path / "out") == 130
    assert capsys.readouterr().err == "pissa: nothing is saved\n"


@pytest.fixture
def in_the_foreground() -> Iterator[None]:
    """Hear Ctrl-C, which a shell's `&` has its children ignore."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("in_the_foreground")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_sigterm_say_what_is_saved_at_any_stage(
    number: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def stopped(*_: object, **__: object) -> None:
        os.kill(os.getpid(), number)
        time.sleep(60)

    monkeypatch.setattr("pissa.export.lora.export_lora", stopped)
    before = signal.getsignal(number)
    assert exit_code("export", hollow_adapter(tmp_path), tmp_path / "out") == 130
    assert signal.getsignal(number) == before
    assert capsys.readouterr().err == "pissa: interrupted; nothing is written: the same command starts again\n"


@pytest.mark.usefixtures("in_the_foreground")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_that_a_library_makes_an_error_of_is_one(
    number: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def swallowing(*_: object, **__: object) -> None:
        try:
            os.kill(os.getpid(), number)
            time.sleep(5)
        except KeyboardInterrupt:
            raise ValueError("could not determine the shape") from None

    monkeypatch.setattr("pissa.export.lora.export_lora", swallowing)
    assert exit_code("export", hollow_adapter(tmp_path), tmp_path / "out") == 130
    said = capsys.readouterr().err
    assert said == "pissa: interrupted; nothing is written: the same command starts again\n"


@pytest.mark.usefixtures("in_the_foreground")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_that_python_drops_comes_once_more(
    number: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Dropping:
        def __del__(self) -> None:
            os.kill(os.getpid(), number)
            time.sleep(5)

    def dropped(*_: object, **__: object) -> None:
        thing = Dropping()
        del thing  # what its end raises is ignored
        time.sleep(60)

    monkeypatch.setattr("pissa.export.lora.export_lora", dropped)
    assert exit_code("export", hollow_adapter(tmp_path), tmp_path / "out") == 130
    said = capsys.readouterr().err
    assert said == "pissa: interrupted; nothing is written: the same command starts again\n"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_says_what_an_interruption_leaves(name: str) -> None:
    assert re.search(r"the same command|goes on", import_module(f"pissa.cli.{name}").INTERRUPTED)


def test_an_interruption_before_a_command_begins_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stopped(_: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("pissa.cli.parser.load_command", stopped)
    assert exit_code("export", "a", "b") == 130
    said = capsys.readouterr().err.split("\n")
    assert "pissa: interrupted before anything began: the same command starts again" in said
