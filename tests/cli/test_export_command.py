"""`pissa export` to other runtimes."""

from __future__ import annotations

import json
import os
import shlex
from pathlib import Path
from typing import Any

import pytest
from commands import exit_code

from pissa import PissaConfig, adapt, export_lora
from pissa.export.vllm import CHECKED
from tiny import tiny_llama, tiny_tokenizer, train_steps


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


def test_check_vllm_says_rank_and_release_or_refuses(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_code("export", str(saved), str(tmp_path / "lora"), "--check", "vllm", "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["vllm_max_lora_rank"], document["vllm_version"]) == (8, CHECKED)
    pattern = adapt(tiny_llama(), PissaConfig(4, alpha_pattern={"q_proj": 9.0}))
    export_lora(pattern, tmp_path / "pattern")
    assert exit_code("export", str(tmp_path / "pattern"), str(tmp_path / "taken"), "--check", "vllm") == 0
    assert f"release {CHECKED}" in capsys.readouterr().out
    export_lora(adapt(tiny_llama(), PissaConfig(4, use_dora=True)), tmp_path / "dora")
    before = sorted(os.listdir(tmp_path))
    assert exit_code("export", str(tmp_path / "dora"), str(tmp_path / "out"), "--check", "vllm") == 2
    said = capsys.readouterr().err
    assert "DoRA" in said and CHECKED in said and said.count("\n") == 1 and sorted(os.listdir(tmp_path)) == before


@pytest.mark.parametrize(
    "flags",
    [
        ["--to", "onnx"],
        ["--check", "tgi"],
        ["--merged", "--to", "gguf-lora"],
        ["--merged", "--check", "vllm"],
        ["--to", "gguf-lora", "--check", "vllm"],
        ["--base", "somewhere"],
        ["--form", "f16"],
        ["--template", "chat", "--merged"],
        ["--to", "gguf", "--rank", "4"],
        ["--to", "gguf", "--merged"],
        ["--to", "gguf", "--check", "vllm"],
        ["--to", "gguf", "--form", "q4_0"],
        ["--to", "gguf", "--llama-cpp", "nowhere"],
    ],
)
def test_flags_that_contradict_are_refused(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str]
) -> None:
    assert exit_code("export", str(saved), str(tmp_path / "lora.gguf"), *flags) == 2
    assert capsys.readouterr().err.count("\n") == 1 and not (tmp_path / "lora.gguf").exists()


PAGES = [Path(__file__).parents[2] / "README.md", *sorted((Path(__file__).parents[2] / "docs").rglob("*.md"))]
DOCUMENTED = sorted(
    {
        line.partition("#")[0].strip()
        for page in PAGES
        for line in page.read_text(encoding="utf-8").splitlines()
        if line.startswith("pissa export ")
    }
)


@pytest.mark.parametrize("line", DOCUMENTED)
def test_every_export_command_of_the_pages_works_as_it_is_written(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str
) -> None:
    pytest.importorskip("gguf")
    (tmp_path / "cpp").mkdir()
    script = "import sys; open(sys.argv[sys.argv.index('--outfile') + 1], 'w').write('GGUF')"
    (tmp_path / "cpp" / "convert_hf_to_gguf.py").write_text(script)
    monkeypatch.setenv("PISSA_LLAMA_CPP", str(tmp_path / "cpp"))
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    Path("runs").mkdir()
    _, _, run, *rest = shlex.split(line)
    Path(run).symlink_to(saved)
    assert exit_code("export", run, *rest) == 0
    assert Path(rest[0]).exists()
