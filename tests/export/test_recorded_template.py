"""The prompt template of a run goes with every export of it: its card names it, and evaluation goes by it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pissa import EvaluationOptions, PissaConfig, adapt, evaluate, export_lora, export_merged
from pissa.checkpoint.recorded import recorded_template
from tiny import tiny_llama, tiny_tokenizer, train_steps

ROWS = '{"question": "1 + 1?", "answer": "#### 2"}\n' * 2


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run's directory as far as exports look, trained with prompts of alpaca."""
    tiny_llama().save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    model: Any = tiny_llama()
    model.name_or_path = model.config._name_or_path = str(tmp_path / "base")
    adapted = adapt(model, PissaConfig(4))
    train_steps(adapted, 1)
    export_lora(adapted, tmp_path / "run")
    (tmp_path / "run" / "results.json").write_text(json.dumps({"template": "alpaca", "settings": {}}))
    return tmp_path / "run"


@pytest.mark.parametrize("kind", ["lossless", "truncated", "merged", "export of an export"])
def test_an_export_is_evaluated_with_the_prompts_of_its_run(kind: str, run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    if kind == "merged":
        export_merged(run, out)
    elif kind == "export of an export":
        export_lora(run, tmp_path / "first")
        export_lora(tmp_path / "first", out, rank=1)
    else:
        export_lora(run, out, rank=2 if kind == "truncated" else None)
    assert recorded_template(out) == "alpaca"
    assert "- prompt template: alpaca\n" in (out / "README.md").read_text()
    (tmp_path / "rows.jsonl").write_text(ROWS)
    found = evaluate(str(out), "gsm8k", tmp_path / "rows.jsonl", options=EvaluationOptions(max_new_tokens=2))
    assert found["settings"]["template"] == "alpaca"


def test_a_gguf_lora_names_the_template(run: Path, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    export_lora(run, tmp_path / "lora.gguf", format="gguf")
    field = gguf.GGUFReader(tmp_path / "lora.gguf").fields["general.description"]
    assert field.contents() == "LoRA made with pissa; prompt template: alpaca"


def test_nothing_is_said_where_nothing_is_known(run: Path, tmp_path: Path) -> None:
    (run / "results.json").unlink()
    export_lora(run, tmp_path / "lora")
    export_merged(run, tmp_path / "merged")
    for out in (tmp_path / "lora", tmp_path / "merged"):
        assert recorded_template(out) is None and "prompt template" not in (out / "README.md").read_text()
    assert not (tmp_path / "merged" / "pissa.json").exists()
