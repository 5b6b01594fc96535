"""Every example runs as its docstring says, on a tiny model."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest

from tiny import tiny_llama, tiny_tokenizer

EXAMPLES = Path(__file__).parent.parent / "examples"


def run_example(name: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Run an example as a script in this process."""
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")


def test_every_example_has_a_test() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == {"gsm8k.py"}


def test_gsm8k_compares_both_methods(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = tmp_path / "model", tmp_path / "train.jsonl"
    tiny_llama().save_pretrained(model)
    tiny_tokenizer().save_pretrained(model)
    rows = [{"question": f"What is {i} + {i}?", "answer": f"It is {2 * i}.\n#### {2 * i}"} for i in range(8)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "out"
    run_example("gsm8k.py", [str(data), str(out), "--model", str(model), "--steps", "2", "--rank", "4"], monkeypatch)
    document = json.loads((out / "gsm8k.json").read_text())
    assert [run["method"] for run in document["runs"]] == ["pissa", "lora"]
    assert (out / "gsm8k.png").read_bytes().startswith(b"\x89PNG")
