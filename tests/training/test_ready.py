"""`pissa train` on what `pissa init` made: the same run as on the base, without a decomposition."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from small_runs import log_of, recipe, run, write_rows
from transformers import AutoModelForCausalLM

import pissa
from pissa import init_checkpoint
from pissa.errors import ConfigError
from pissa.training.ready import ready_split
from pissa.training.recipe import Recipe
from tiny import largest_difference, logits_of, tiny_llama, tiny_tokenizer

RANK = 8


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base whose layers NF4 can hold."""
    directory = tmp_path_factory.mktemp("base") / "base"
    tiny_llama(hidden=64).save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory


@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_the_run_is_that_of_the_base(base: Path, tmp_path: Path, quantize: str | None, monkeypatch) -> None:
    if quantize:
        pytest.importorskip("bitsandbytes")
    quantized = {"quantize": quantize, "iterations": 1, "calibration": "none"} if quantize else {}
    settings = recipe(rank=RANK, dtype="fp32", **quantized)
    data = str(write_rows(tmp_path / "data.jsonl"))
    run(base, tmp_path / "expected", settings, data)
    made = tmp_path / "made"
    init_checkpoint(base, made, settings.pissa_config())
    monkeypatch.setattr("pissa.split.split_weight", lambda *_, **__: pytest.fail("a weight was decomposed"))
    plain = recipe(rank=Recipe.rank)  # nothing of the split has to be said again
    run(made, tmp_path / "run", plain, data)
    ours, theirs = log_of(tmp_path / "run"), log_of(tmp_path / "expected")
    assert [record["loss"] for record in ours] == pytest.approx([record["loss"] for record in theirs], abs=1e-6)
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["base"] == str(base) and results["rank"] == RANK
    trained = logits_of(pissa.load(tmp_path / "run"))
    assert largest_difference(trained, logits_of(pissa.load(tmp_path / "expected"))) < 1e-5
    if quantize is None:
        on_base = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(tmp_path / "run"))
        assert largest_difference(logits_of(on_base.eval()), trained) < 1e-5
    else:
        assert not (tmp_path / "run" / "residual").exists()
        assert results["quantization"]["iterations"] == 1
        assert torch.equal(logits_of(pissa.load(tmp_path / "run")), trained)


def test_another_method_s_split_keeps_its_settings(base: Path, tmp_path: Path) -> None:
    made, data = tmp_path / "made", str(write_rows(tmp_path / "data.jsonl"))
    settings = recipe(rank=RANK, method="cura", cur_core="intersection", target_modules="q_proj,up_proj")
    init_checkpoint(base, made, settings.pissa_config())
    run(made, tmp_path / "run", recipe(rank=Recipe.rank), data)
    run(base, tmp_path / "expected", settings, data)
    ours, theirs = (log_of(tmp_path / name) for name in ("run", "expected"))
    assert [record["loss"] for record in ours] == pytest.approx([record["loss"] for record in theirs], abs=1e-6)
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["method"] == "cura" and results["settings"]["cur_core"] == "intersection"
    with pytest.raises(ConfigError, match=r"method robust-pissa \(it has cura\)"):
        run(made, tmp_path / "other", recipe(rank=RANK, method="robust-pissa"), data)


def test_a_stopped_run_continues(base: Path, tmp_path: Path) -> None:
    made, data = tmp_path / "made", str(write_rows(tmp_path / "data.jsonl"))
    init_checkpoint(base, made, recipe(rank=RANK).pissa_config())
    run(made, tmp_path / "expected", recipe(rank=Recipe.rank, max_steps=6, save_every=3), data)
    state = tmp_path / "expected" / "state"
    (tmp_path / "run").mkdir()
    state.rename(tmp_path / "run" / "state")
    last = tmp_path / "run" / "state" / "checkpoint-6"
    for file in last.iterdir():
        file.unlink()
    last.rmdir()
    run(made, tmp_path / "run", recipe(rank=Recipe.rank, max_steps=6, save_every=3), data)
    ours, theirs = (logits_of(pissa.load(tmp_path / name, base)) for name in ("run", "expected"))
    assert torch.equal(ours, theirs)


def test_other_settings_than_the_splits_are_refused(base: Path, tmp_path: Path) -> None:
    made, data = tmp_path / "made", str(write_rows(tmp_path / "data.jsonl"))
    init_checkpoint(base, made, recipe(rank=RANK).pissa_config())
    for changes, message in (
        ({"rank": 4}, r"rank 4 \(it has 8\)"),
        ({"method": "lora"}, "method lora"),
        ({"method": "full"}, "method full"),
        ({"quantize": "int8"}, r"quantize 'int8' \(it has None\)"),
        ({"target_modules": "q_proj"}, "target_modules"),
    ):
        with pytest.raises(ConfigError, match=f"is split already, and .*{message}"):
            run(made, tmp_path / "run", recipe(**{"rank": RANK, **changes}), data)
    assert not (tmp_path / "run").exists()
    assert ready_split(str(base)) is None and ready_split("org/name") is None
