"""`pissa init` and `pissa verify` as a user runs them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from commands import exit_code

from pissa.checkpoint.stream.unfinished import WORK
from pissa.cli.init import _bytes
from pissa.errors import ConfigError
from tiny import tiny_llama, tiny_tokenizer


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base for all."""
    directory = tmp_path_factory.mktemp("base") / "base"
    tiny_llama(hidden=64).save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory


def test_init_and_verify(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert exit_code("init", base, out, "--rank", 4, "--json") == 0
    captured = capsys.readouterr()
    document = json.loads(captured.out)
    assert document["modules"] == 14 and document["tensors"] == 21 and document["continued_tensors"] == 0
    assert document["largest_captured_energy_loss"] < 1e-3 and document["seconds"] > 0
    assert "21/21 " in captured.err
    assert exit_code("init", base, out, "--rank", 4) == 0
    assert capsys.readouterr().out == f"{out} is finished already\n"
    assert exit_code("verify", out, "--base", base, "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert document["tensors"] == 49 and document["largest_error"] < 1e-6 and len(document["errors"]) == 14
    assert exit_code("verify", out) == 0
    assert capsys.readouterr().out.startswith(f"{out} is what its pissa.json says: 10 files, 49 tensors, ")
    with (out / "config.json").open("a") as stream:
        stream.write("\n")
    assert exit_code("verify", out) == 2
    captured = capsys.readouterr()
    lines = captured.err.strip().splitlines()
    assert captured.out == "" and "pissa.json says: config.json has" in lines[-1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rank", "0"], "rank is 0"),
        (["--rank", "5", "--method", "full"], "method full has no adapter"),
        (["--method", "lora"], "nothing to prepare"),
        (["--dtype", "fp8"], "allowed: auto, fp32, bf16, fp16"),
        (["--memory", "lots"], "give a size such as 8G"),
        (["--target-modules", "nowhere"], "no module matches 'nowhere'"),
        (["--quantize", "nf5"], "quantize is 'nf5'"),
    ],
)
def test_wrong_input_is_one_line_and_leaves_nothing(
    arguments: list[str], message: str, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_code("init", base, tmp_path / "out", *arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and message in captured.err.strip().splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_a_missing_base_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code("init", tmp_path / "nowhere", tmp_path / "out") == 2
    assert "does not exist" in capsys.readouterr().err


def test_quantised(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("bitsandbytes")
    out = tmp_path / "out"
    assert exit_code("init", base, out, "--rank", 4, "--quantize", "nf4", "--iterations", 1) == 0
    captured = capsys.readouterr()
    assert "/21 error " in captured.err or "21/21 " in captured.err
    assert exit_code("verify", out, "--base", base) == 0
    assert "residual + adapter are" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "size"), [("8G", 8 * 10**9), ("8GB", 8 * 10**9), ("1.5GiB", 3 << 29), ("512m", 512 * 10**6), ("7", 7)]
)
def test_sizes(text: str, size: int) -> None:
    assert _bytes(text) == size


@pytest.mark.parametrize("text", ["", "G", "-1G", "8X", "1e9"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="such as 8G"):
        _bytes(text)


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_stopped_command_says_what_is_saved_and_exits_with_130(number: int, base: Path, tmp_path: Path) -> None:
    slow = "import time\nfrom pissa.checkpoint.disk.outputs import Outputs\noriginal = Outputs.put\n"
    slow += "def put(self, *a):\n    time.sleep(0.3)\n    original(self, *a)\nOutputs.put = put\n"
    (tmp_path / "sitecustomize.py").write_text(slow)
    out = tmp_path / "out"
    process = subprocess.Popen(
        [sys.executable, "-m", "pissa", "init", str(base), str(out), "--rank", "4"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"},
    )
    deadline = time.monotonic() + 100
    while not (out / WORK / "run.json").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.5)
    process.send_signal(number)
    text, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    said = errors.strip().splitlines()[-1]
    assert "interrupted; " in said and f"of 21 tensors are saved in {out}: the same command continues" in said
    assert text == "" and "Traceback" not in errors
    assert exit_code("init", base, out, "--rank", 4) == 0
