"""`pissa export` to other runtimes."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from commands import exit_code

from pissa import PissaConfig, adapt, export_lora
from tiny import tiny_llama, train_steps


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A LoRA of rank 8 that records its base."""
    base: Any = tiny_llama()
    base.save_pretrained(tmp_path / "base")
    base.name_or_path = str(tmp_path / "base")
    base.config._name_or_path = str(tmp_path / "base")
    model = adapt(base, PissaConfig(4))
    train_steps(model, 1)
    export_lora(model, tmp_path / "saved")
    return tmp_path / "saved"


def test_gguf_lora_is_one_file(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("gguf")
    assert exit_code("export", str(saved), str(tmp_path / "lora.gguf"), "--to", "gguf-lora", "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert document["rank"] == 8 and (tmp_path / "lora.gguf").read_bytes().startswith(b"GGUF")
    assert exit_code("export", str(saved), str(tmp_path / "directory"), "--to", "gguf-lora") == 2
    assert ".gguf" in capsys.readouterr().err and not (tmp_path / "directory").exists()


def test_check_vllm_says_the_rank_or_refuses(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code("export", str(saved), str(tmp_path / "lora"), "--check", "vllm", "--json") == 0
    assert json.loads(capsys.readouterr().out)["vllm_max_lora_rank"] == 8
    model = adapt(tiny_llama(), PissaConfig(4, modules_to_save=["model.norm"]))
    export_lora(model, tmp_path / "norm")
    before = sorted(os.listdir(tmp_path))
    assert exit_code("export", str(tmp_path / "norm"), str(tmp_path / "out"), "--check", "vllm") == 2
    said = capsys.readouterr().err
    assert "model.norm" in said and said.count("\n") == 1 and sorted(os.listdir(tmp_path)) == before


@pytest.mark.parametrize(
    "flags",
    [
        ["--to", "onnx"],
        ["--check", "tgi"],
        ["--merged", "--to", "gguf-lora"],
        ["--merged", "--check", "vllm"],
        ["--to", "gguf-lora", "--check", "vllm"],
        ["--base", "somewhere"],
    ],
)
def test_flags_that_contradict_are_refused(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str]
) -> None:
    assert exit_code("export", str(saved), str(tmp_path / "lora.gguf"), *flags) == 2
    assert capsys.readouterr().err.count("\n") == 1 and not (tmp_path / "lora.gguf").exists()
