"""Every recipe runs as a user would run it: its own file, with a tiny model and few rows given by flags."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from peft import PeftModel
from transformers import AutoModelForCausalLM

from pissa.cli.main import run
from pissa.training.recipe import recipe_from
from tiny import largest_difference, logits_of, tiny_llama, tiny_tokenizer

RECIPES = Path(__file__).parents[1] / "examples" / "recipes"
FILES = sorted(RECIPES.glob("*.yaml"))
TOOLS_TEMPLATE = (
    "{% if tools %}[tools]{{ tools | tojson }}<end>\n{% endif %}{% for m in messages %}[{{ m.role }}]\n{{ m.content }}"
    "{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]\n{% endif %}"
)
ROWS: dict[str, list[dict[str, Any]]] = {
    "continued-pretraining.yaml": [{"text": f"There was {'a word ' * (i % 5 + 1)}and an end."} for i in range(12)],
    "": [{"question": f"{i} + 1?", "answer": f"#### {i + 1}"} for i in range(12)],
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, wide enough for blocks of 64, whose chat template writes tools."""
    directory = tmp_path_factory.mktemp("base")
    tiny_llama(hidden=64).save_pretrained(directory)
    tiny_tokenizer(chat_template=TOOLS_TEMPLATE).save_pretrained(directory)
    return directory


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_recipe_trains_a_tiny_model_on_few_rows(
    file: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    written = yaml.safe_load(file.read_text())
    out, data = tmp_path / "run", tmp_path / "rows.jsonl"
    rows = ROWS.get(file.name, ROWS[""])
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--max-steps", "2", "--batch-size", "4", "--micro-batch-size", "2", "--rank", "4"]
    if str(written["data"]).endswith(".jsonl"):
        monkeypatch.chdir(RECIPES.parents[1])  # the rows that lie beside the recipe
    else:
        flags += ["--data", str(data)]
    if written["method"].startswith("q"):
        pytest.importorskip("bitsandbytes")
        flags += ["--optimizer", "adamw_torch", "--iterations", "1"]  # 8-bit optimizers run on GPUs alone
    with pytest.raises(SystemExit) as stopped:
        run(["train", str(model), "--config", str(file), "--out", str(out), "--json", *flags])
    said = capsys.readouterr()
    assert stopped.value.code == 0, said.err
    results = json.loads(said.out)
    assert len(results["losses"]) == 2 and results["method"] == written["method"]
    if results["quantization"] is None:
        trained = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), str(out))
        assert largest_difference(logits_of(trained.eval()), logits_of(tiny_llama(hidden=64))) > 0


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_recipe_says_where_everything_is_and_every_setting_is_one(file: Path) -> None:
    written = yaml.safe_load(file.read_text())
    places = {written.pop(name) for name in ("model", "data", "out")}
    assert len(places) == 3
    recipe_from(written, file.name)


def test_the_page_names_every_recipe() -> None:
    page = (RECIPES / "README.md").read_text()
    files = [path for path in RECIPES.rglob("*") if path.suffix in (".yaml", ".py", ".jsonl")]
    assert [path.name for path in files if f"]({path.relative_to(RECIPES).as_posix()})" not in page] == []


@pytest.mark.parametrize("file", sorted((RECIPES / "accelerate").glob("*.yaml")), ids=lambda file: file.stem)
def test_accelerate_reads_its_files_without_a_word(file: Path) -> None:
    written = yaml.safe_load(file.read_text())
    read = load_config_from_file(str(file)).to_dict()
    assert {name: read[name] for name in written} == written


def test_grpo_starts_without_divergence(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"{i} + 1 =", "answer": str(i + 1)}) + "\n" for i in range(8)))
    out = tmp_path / "out"
    script = ["grpo.py", str(out), "--model", str(model), "--data", str(rows), "--steps", "2", "--tokens", "6"]
    monkeypatch.setattr(sys, "argv", script)
    runpy.run_path(str(RECIPES / "grpo.py"), run_name="__main__")
    assert "divergence from the base: 0 at the first step" in capsys.readouterr().out
    assert json.loads((out / "lora" / "adapter_config.json").read_text())["r"] == 16
