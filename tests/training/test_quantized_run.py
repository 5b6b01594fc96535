"""A run on a quantised residual is one thing: it can be stopped, continued, loaded, exported, and never mistaken."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import command, listing, log_of, recipe, result_tensors, run, scripted, write_rows
from transformers import AutoModelForCausalLM

import pissa
from pissa.checkpoint.source.load import load_base
from pissa.cli import main
from pissa.data.encode import Encoded
from pissa.data.text import calibration_batches
from pissa.errors import CheckpointError, ConfigError, WeightError
from pissa.live.quantized import quantized_layers
from pissa.training.fitting import row_batches, token_count
from pissa.training.progress import StepLog
from pissa.training.recipe import Recipe
from tiny import largest_difference, logits_of, same_tensors, tiny_llama, tiny_tokenizer

pytest.importorskip("bitsandbytes")
QUANTIZED: dict[str, Any] = {"quantize": "nf4", "iterations": 2}


@pytest.fixture(scope="session")
def wide_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama whose layers NF4's blocks of 64 divide, and its tokenizer."""
    directory = tmp_path_factory.mktemp("wide")
    tiny_llama(hidden=64).save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def finished(wide_base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    out = tmp_path_factory.mktemp("finished") / "run"
    return out, run(wide_base, out, recipe(**QUANTIZED))


def interrupted_run(base: Path, out: Path, settings: Recipe, monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    """Stop a run hard after the line of one step is written."""
    write = StepLog.on_log

    def stop(self: StepLog, args: Any, state: Any, control: Any, **context: Any) -> None:
        write(self, args, state, control, **context)
        if state.global_step == at:
            raise RuntimeError("power cut")

    with monkeypatch.context() as patched:
        patched.setattr(StepLog, "on_log", stop)
        with pytest.raises(RuntimeError, match="power cut"):
            run(base, out, settings)


def test_the_best_step_is_kept(wide_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scripted(monkeypatch, {2: 1.0, 4: 2.0})
    out = tmp_path / "run"
    settings = recipe(eval_fraction=0.2, eval_every=2, keep_best=True, max_steps=4, **QUANTIZED)
    result = run(wide_base, out, settings)
    assert result.results["step"] == 2
    assert same_tensors(result_tensors(out), result_tensors(out / "state" / "checkpoint-2"))
    assert torch.equal(logits_of(pissa.load(out).eval()), logits_of(result.model))


def test_a_run_is_an_adapter_for_its_own_residual_and_says_so(finished: tuple[Path, Any], wide_base: Path) -> None:
    out, result = finished
    assert listing(out / "residual") >= {
        "model.safetensors",
        "config.json",
        "pissa.json",
        "pissa_init",
        "tokenizer.json",
    }
    config = json.loads((out / "adapter_config.json").read_text(encoding="utf-8"))
    assert (config["r"], config["base_model_name_or_path"]) == (4, str(out / "residual"))
    for checkpoint in (out / "state").glob("checkpoint-*"):
        named = json.loads((checkpoint / "adapter_config.json").read_text(encoding="utf-8"))
        assert named["base_model_name_or_path"] == str(out / "residual")
    assert result.results["quantization"]["format"] == "nf4"
    assert 0 < result.results["mean_quantization_gap"] <= result.results["largest_quantization_gap"] < 0.2
    card = (out / "README.md").read_text(encoding="utf-8")
    assert "quantised residual" in card and str(wide_base) in card
    assert result.results["losses"][-1] < result.results["losses"][0]


def test_a_finished_run_and_its_checkpoint_load_as_the_trained_function(
    finished: tuple[Path, Any], tmp_path: Path
) -> None:
    out, result = finished
    trained = logits_of(result.model)
    assert torch.equal(logits_of(pissa.load(out)), trained)
    assert torch.equal(logits_of(pissa.load(out / "state" / "checkpoint-6")), trained)
    moved = out.rename(tmp_path / "moved")
    try:
        assert torch.equal(logits_of(pissa.load(moved)), trained)
    finally:
        moved.rename(out)


def test_a_run_cannot_be_loaded_on_the_base_by_mistake(finished: tuple[Path, Any], wide_base: Path) -> None:
    with pytest.raises(CheckpointError, match="save_residual"):
        pissa.load(finished[0], base=wide_base)


def test_exports_of_a_run_are_the_trained_function_or_state_the_gap(
    finished: tuple[Path, Any], wide_base: Path, tmp_path: Path
) -> None:
    out, result = finished
    trained = logits_of(result.model)
    pissa.export_merged(out, tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert not quantized_layers(merged)
    assert largest_difference(logits_of(merged.eval()), trained) < 1e-5
    export = pissa.export_lora(out, tmp_path / "lora")
    assert (export.config.r, export.base, set(export.errors.values())) == (8, str(wide_base), {0.0})
    assert max(export.gaps.values()) == pytest.approx(result.results["largest_quantization_gap"])
    manifest = json.loads((tmp_path / "lora" / "pissa.json").read_text(encoding="utf-8"))
    assert manifest["mean_quantization_gap"] == pytest.approx(result.results["mean_quantization_gap"])
    on_base = logits_of(pissa.load(tmp_path / "lora"))
    assert 0 < largest_difference(on_base, trained) < 0.2


@pytest.mark.parametrize("at", [1, 5], ids=["before the first checkpoint", "after the second"])
def test_a_stopped_run_continues_to_the_same_bits_without_another_split(
    finished: tuple[Path, Any], wide_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    out, settings = tmp_path / "run", recipe(**QUANTIZED)
    interrupted_run(wide_base, out, settings, monkeypatch, at)

    def no_split(*_: Any, **__: Any) -> None:
        raise AssertionError("split again")

    monkeypatch.setattr("pissa.live.splits.split_each", no_split)
    run(wide_base, out, settings)
    assert log_of(out) == log_of(finished[0])
    assert same_tensors(result_tensors(out), result_tensors(finished[0]))


def test_evaluating_during_a_run_changes_nothing(
    finished: tuple[Path, Any], wide_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An eval-mode forward repacks bitsandbytes' weights on some CPUs, where nobody prevents it."""
    write = StepLog.on_log

    def evaluate(self: StepLog, args: Any, state: Any, control: Any, **context: Any) -> None:
        model = self.trainer.model
        logits_of(model.eval())
        model.train()
        write(self, args, state, control, **context)

    monkeypatch.setattr(StepLog, "on_log", evaluate)
    run(wide_base, tmp_path / "run", recipe(**QUANTIZED))
    assert log_of(tmp_path / "run") == log_of(finished[0])
    assert same_tensors(result_tensors(tmp_path / "run"), result_tensors(finished[0]))


@pytest.mark.parametrize("settings", [{"method": "qlora"}, {"method": "loftq", "iterations": 1}, {"quantize": "int8"}])
def test_other_formats_and_methods_train(wide_base: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    result = run(wide_base, tmp_path / "run", recipe(max_steps=2, **{"iterations": None, **settings}))
    assert torch.equal(logits_of(pissa.load(tmp_path / "run")), logits_of(result.model))


def test_placement_offset_trains_a_base_that_is_quantised_already(
    finished: tuple[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tmp_path / "base"  # without its initial adapter, the residual is as good a 4-bit model as any other
    shutil.copytree(finished[0] / "residual", base, ignore=shutil.ignore_patterns("pissa*"))
    settings = recipe(placement="offset", weight_decay=0.1)
    with pytest.raises(WeightError, match="--placement offset"):
        run(base, tmp_path / "refused", recipe())
    whole = run(base, tmp_path / "whole", settings)
    assert whole.results["losses"][-1] < whole.results["losses"][0]
    interrupted_run(base, tmp_path / "cut", settings, monkeypatch, 5)
    run(base, tmp_path / "cut", settings)
    assert log_of(tmp_path / "cut") == log_of(tmp_path / "whole")
    assert same_tensors(result_tensors(tmp_path / "cut"), result_tensors(tmp_path / "whole"))
    assert torch.equal(logits_of(pissa.load(tmp_path / "whole", load_base(base))), logits_of(whole.model))


def test_a_run_in_gptqs_format_continues_to_the_same_result(
    wide_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = recipe(quantize="gptq", bits=2, iterations=1, max_steps=3, save_every=1)
    whole = run(wide_base, tmp_path / "whole", settings)
    interrupted_run(wide_base, tmp_path / "cut", settings, monkeypatch, at=2)
    run(wide_base, tmp_path / "cut", settings)
    assert log_of(tmp_path / "cut") == log_of(tmp_path / "whole")
    assert whole.results["quantization"]["format"] == "gptq" and whole.results["mean_output_reduction"] > 0
    assert torch.equal(logits_of(pissa.load(tmp_path / "whole")), logits_of(whole.model))


def test_the_command_line_trains_and_exports_a_quantised_run(
    wide_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def pissa_command(*arguments: str) -> str:
        with pytest.raises(SystemExit) as ended:
            main.run(list(arguments))
        assert ended.value.code == 0
        return capsys.readouterr().out

    settings = recipe(method="qpissa", iterations=1, max_steps=1)
    run_it = command(wide_base, write_rows(tmp_path / "rows.jsonl"), tmp_path / "run", settings)
    assert "residual/" in pissa_command(*run_it[run_it.index("train") :])
    assert "quantisation error" in pissa_command("export", str(tmp_path / "run"), str(tmp_path / "lora"))


def test_calibration_text_lowers_the_error_of_what_the_layers_put_out(
    finished: tuple[Path, Any], wide_base: Path, tmp_path: Path
) -> None:
    """At step 0 the run with the text is closer to the base on such text than the run without it."""
    rows = write_rows(tmp_path / "rows.jsonl", count=64)
    text = {"calibration": str(rows), "calibration_windows": 16, "calibration_length": 32}
    results = run(wide_base, tmp_path / "fitted", recipe(**QUANTIZED, **text, max_steps=1)).results
    assert results["mean_output_reduction"] > 5 and results["quantization"]["calibration"] == str(rows)
    batches = calibration_batches(rows, tiny_tokenizer(), 32, 16)
    base = load_base(wide_base).eval()

    def error(residual: Path) -> float:
        model = pissa.load(residual).eval()
        with torch.no_grad():
            return sum(float((model(**batch).logits - base(**batch).logits).square().sum()) for batch in batches)

    plain = {**QUANTIZED, "calibration": "none"}
    assert run(wide_base, tmp_path / "plain", recipe(**plain, max_steps=1)).results["mean_output_reduction"] is None
    unfitted = error(tmp_path / "plain" / "residual")
    assert error(tmp_path / "fitted" / "residual") < 0.9 * unfitted
    assert error(finished[0] / "residual") < 0.9 * unfitted  # to its own rows, where nothing else is said


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"quantize": "nf4"}, "data"),
        ({"method": "qpissa"}, "data"),
        ({"quantize": "nf4", "calibration": "none"}, None),
        ({"quantize": "nf4", "calibration": "t.txt"}, "t.txt"),
        ({"quantize": "int8"}, None),
        ({"method": "qlora"}, None),
        ({"method": "loftq"}, None),
        ({"method": "qlora", "rounding": "gptq"}, "data"),
        ({"quantize": "nf4", "quantize_method": "qpissa-5"}, None),
        ({"quantize": "nf4", "rank_budget": 10**6}, None),
    ],
)
def test_the_librarys_own_way_is_fitted_to_the_training_rows_and_published_ways_are_not(
    settings: dict[str, Any], text: str | None
) -> None:
    quantization = Recipe(**settings).quantization
    assert quantization is not None and quantization.calibration == text


def test_rows_of_like_length_are_taken_all_over_the_data() -> None:
    ids = [[row] * (5 + row % 7) for row in range(100)]
    encoded = Encoded(ids, ids, [False] * len(ids), 0, 64, 64)
    batches = row_batches(encoded, tokens=160, pad_id=0)
    rows = [row[mask != 0].tolist() for b in batches for row, mask in zip(*b.values(), strict=True)]
    assert all(row in ids for row in rows) and 0.8 * 160 < token_count(batches) < 1.2 * 160
    assert len({row[0] // 10 for row in rows}) == 10
    assert token_count(row_batches(encoded, tokens=10**6, pad_id=0)) == sum(map(len, ids))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"calibration": "text.txt"}, "quantised residual"),
        ({"method": "qlora", "calibration": "text.txt", "rounding": "nearest"}, "fits nothing"),
        ({"quantize": "nf4", "rounding": "gptq", "calibration": "none"}, "calibration none"),
        ({"method": "qlora", "calibration": "data"}, "fits nothing"),
        ({"calibration": "none"}, "quantised residual"),
        ({"quantize": "int8", "calibration": "text.txt", "rounding": "gptq"}, "int8"),
        ({"quantize": "nf4", "calibration": "text.txt", "calibration_windows": 0}, "at least 1"),
        ({"iterations": 3}, "quantize"),
        ({"quantize": "nf4", "quantize_method": "qlora"}, "qlora"),
        ({"method": "qpissa", "quantize_method": "loftq"}, "already"),
        ({"quantize": "nf4", "quantize_method": "qpissa-5", "iterations": 3}, "no iterations"),
        ({"quantize": "nf4", "export_rank": 4}, "export"),
        ({"quantize": "nf4", "placement": "offset"}, "offset"),
        ({"method": "full", "quantize": "nf4"}, "full"),
    ],
)
def test_settings_that_nothing_would_use_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Recipe(**settings)
