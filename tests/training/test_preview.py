"""What is said before the first step is what then happens, and nothing is done to say it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from small_runs import arguments, in_process, recipe, rows, run, write_rows
from transformers import LlamaForCausalLM

from pissa.data.encode import IGNORED, encode
from pissa.data.rows import examples_from_rows
from pissa.errors import ConfigError, DataError, PissaError
from pissa.lab.models import smollm2
from pissa.training import memory
from pissa.training.preview import CLOSE, OPEN, decoded, planned_steps, preview
from tiny import tiny_llama, tiny_tokenizer

METHODS: dict[str, dict[str, Any]] = {
    "pissa": {},
    "lora": {"method": "lora"},
    "dora": {"method": "dora"},
    "adalora": {"method": "adalora"},
    "offset": {"placement": "offset"},
    "full": {"method": "full"},
    "modules in full": {"modules_to_save": "lm_head", "exclude_modules": "o_proj"},
    "tokens in full": {"trainable_token_indices": "3, 7", "target_modules": "q_proj"},
    "patterns": {"rank_pattern": {"q_proj": 2}},
}


@pytest.mark.parametrize("name", METHODS)
def test_what_is_said_to_be_trained_is_trained(name: str, base_directory: Path, tmp_path: Path) -> None:
    settings = recipe(max_steps=1, **METHODS[name])
    said = preview(str(base_directory), rows(), settings)
    results = run(base_directory, tmp_path / "run", settings).results
    assert said.trainable_parameters == results["trainable_parameters"]
    assert said.memory.activations is not None and said.memory.activations > 0
    assert said.memory.gradients == 4 * said.trainable_parameters


@pytest.mark.parametrize(
    "settings", [{"epochs": 1}, {"epochs": 2.5}, {"max_steps": 3}, {"batch_size": 7, "micro_batch_size": 7}], ids=str
)
def test_the_steps_are_those_of_the_run(settings: dict[str, Any], base_directory: Path, tmp_path: Path) -> None:
    chosen = recipe(**{"max_steps": None, **settings})
    done = run(base_directory, tmp_path / "run", chosen).results["losses"]
    assert planned_steps(chosen, len(rows())) == len(done)


def test_the_example_is_the_row_with_what_is_learned_marked() -> None:
    tokenizer = tiny_tokenizer()
    encoded = encode(examples_from_rows(rows(3)), tokenizer, template="alpaca", max_length=512)
    for row in (encoded[index] for index in range(3)):
        pieces = decoded(row, tokenizer)
        assert "".join(text for text, _ in pieces) == tokenizer.decode(row["input_ids"])
        learned = [token for token, label in zip(row["input_ids"], row["labels"], strict=True) if label != IGNORED]
        assert "".join(text for text, is_learned in pieces if is_learned) == tokenizer.decode(learned)


def test_a_dry_run_says_what_a_run_does_and_writes_nothing(
    base_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = write_rows(tmp_path / "data.jsonl"), tmp_path / "run"
    given = [*arguments(base_directory, data, out, recipe(max_length=40, eval_fraction=0.1)), "--dry-run"]
    done = in_process(given, capsys)
    assert done.returncode == 0, done.stderr
    assert "18, " in done.stdout and "validation  2 rows" in done.stdout
    assert OPEN in done.stdout and "GiB" in done.stdout and "to lower it:" in done.stdout
    document = json.loads(in_process([*given, "--json"], capsys).stdout)
    encoded = encode(examples_from_rows(rows()), tiny_tokenizer(), template="none", max_length=40)
    assert document["truncated"] == encoded.truncated > 0
    assert document["rows"] + document["validation_rows"] == len(encoded)
    assert (
        0 < document["learned_share"] < 1 and document["example"].count(OPEN) == document["example"].count(CLOSE) == 1
    )
    assert document["memory"]["peak"] > document["memory"]["weights"] > 0
    assert not out.exists()


def test_a_dry_run_refuses_what_a_run_refuses(base_directory: Path) -> None:
    for settings, error in (
        ({"rank": 1000}, ConfigError),
        ({"target_modules": "q_pro"}, PissaError),
        ({"max_length": 20, "max_cut_share": 0.1}, DataError),
    ):
        with pytest.raises(error):
            preview(str(base_directory), rows(), recipe(**settings))


def test_more_of_everything_takes_more(base_directory: Path) -> None:
    def peak(**settings: Any) -> int:
        return preview(str(base_directory), rows(), recipe(**settings)).memory.activations or 0

    usual = peak()
    assert peak(micro_batch_size=2) < usual and peak(gradient_checkpointing=True) < usual
    assert peak(batch_size=8, micro_batch_size=8) > usual


@pytest.mark.parametrize("settings", [{}, {"gradient_checkpointing": True}, {"method": "full"}], ids=str)
def test_a_few_layers_stand_for_all(settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_llama().config
    config.num_hidden_layers = 10
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    chosen = recipe(batch_size=8, **settings)
    few = preview(str(tmp_path), rows(), chosen).memory.activations
    monkeypatch.setattr(memory, "_alike", lambda model: None)
    every = preview(str(tmp_path), rows(), chosen).memory.activations
    assert few == pytest.approx(every, rel=0.02)


MEASURED = """
import json, sys
from pissa.lab.memory import peak_gib, start_peak
from pissa.training.memory import GIB
from pissa.training.preview import preview
from pissa.training.recipe import Recipe
from pissa.training.run import train
model, out, rows, settings = sys.argv[1], sys.argv[2], json.loads(sys.argv[3]), json.loads(sys.argv[4])
recipe = Recipe(**settings)
said = preview(model, rows, recipe).memory
start_peak()
train(model, rows, out, recipe, quiet=True)
print(json.dumps({"said": said.peak / GIB, "measured": peak_gib()}))
"""


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"gradient_checkpointing": True, "micro_batch_size": 8, "batch_size": 8},
        {"method": "lora", "micro_batch_size": 2},
        {"method": "full", "learning_rate": 1e-5},
        {"dtype": "bf16"},
        {"quantize": "nf4"},
    ],
    ids=str,
)
def test_the_estimate_is_near_what_a_run_takes(settings: dict[str, Any], tmp_path: Path) -> None:
    try:
        model = smollm2()
    except PissaError as reason:
        pytest.skip(f"needs the real model: {reason}")
    long = [{"instruction": "Count.", "output": " ".join(map(str, range(40 + 20 * i)))} for i in range(12)]
    chosen = {"max_steps": 2, "batch_size": 4, "rank": 16, "dtype": "fp32", **settings}
    given = [sys.executable, "-W", "ignore", "-c", MEASURED, str(model), str(tmp_path / "run")]
    done = subprocess.run(
        [*given, json.dumps(long), json.dumps(chosen)], capture_output=True, text=True, check=True, timeout=900
    )
    found = json.loads(done.stdout.splitlines()[-1])
    print(settings, found)
    assert found["measured"] == pytest.approx(found["said"], rel=0.25), found
