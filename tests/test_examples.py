"""Every example runs as its docstring says, on a tiny model."""

from __future__ import annotations

import json
import re
import runpy
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from pissa import PissaConfig, adapt, export_lora
from tiny import tiny_llama, tiny_tokenizer, train_steps

EXAMPLES = Path(__file__).parent.parent / "examples"


def run_example(name: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Run an example as a script in this process."""
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")


def test_every_example_has_a_test() -> None:
    tested = {"five_minutes.py", "gsm8k.py", "qpissa.py", "vision.py", "export.py"}
    assert {path.name for path in EXAMPLES.glob("*.py")} == tested  # test_recipes.py has those of recipes/


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


@pytest.fixture
def model(tmp_path: Path) -> str:
    """A tiny model's directory, wide enough for blocks of 64."""
    directory = tmp_path / "base"
    tiny_llama(hidden=64).save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return str(directory)


def test_qpissa_trains_in_four_bits_and_merges(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("bitsandbytes")
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps({"question": f"{i} + 1?", "answer": f"#### {i + 1}"}) + "\n" for i in range(8)))
    out = tmp_path / "run"
    run_example("qpissa.py", [str(data), str(out), "--model", model, "--steps", "2", "--rank", "4"], monkeypatch)
    assert (out / "residual" / "config.json").is_file() and (out / "merged" / "model.safetensors").is_file()


@pytest.mark.filterwarnings("ignore")
def test_dpo_starts_at_margin_0(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("trl")
    for placement in ("residual", "offset"):
        out = tmp_path / placement
        run_example(
            "recipes/dpo.py", [str(out), "--model", model, "--steps", "2", "--placement", placement], monkeypatch
        )
        assert "margin: 0 at the first step" in capsys.readouterr().out
        assert json.loads((out / "lora" / "adapter_config.json").read_text())["r"] == 16


def test_export_writes_for_every_runtime(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gguf")
    adapted = adapt(AutoModelForCausalLM.from_pretrained(model), PissaConfig(4))
    train_steps(adapted, 2)
    export_lora(adapted, tmp_path / "run")
    run_example("export.py", [str(tmp_path / "run"), str(tmp_path / "out"), "--base", model], monkeypatch)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"lossless", "small", "merged", "llama-cpp.gguf"}


def printed_errors(text: str) -> list[float]:
    """The numbers after "up to" and "off by"."""
    return [float(number) for number in re.findall(r"(?:up to|off by) (\S+)", text)]


def test_five_minutes_keeps_the_function_the_base_and_what_was_learned(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_example("five_minutes.py", [str(tmp_path / "out"), "--model", model, "--steps", "5"], monkeypatch)
    text = capsys.readouterr().out
    errors = printed_errors(text)
    assert len(errors) == 3 and max(errors) < 1e-4
    first, last = (float(number) for number in re.findall(r"(\S+) at the", text))
    assert last < first and (tmp_path / "out" / "README.md").is_file()


def test_vision_learns_another_kind_of_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_example("vision.py", [str(tmp_path), "--pretraining", "20", "--steps", "20", "--rank", "4"], monkeypatch)
    text = capsys.readouterr().out
    before, after = (float(number) for number in re.findall(r"([\d.]+) (?:before|after)", text))
    assert after > before + 0.1 and max(printed_errors(text)) < 1e-4
    assert {path.name for path in tmp_path.iterdir()} == {"base", "lora", "merged"}
