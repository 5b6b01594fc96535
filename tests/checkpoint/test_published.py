"""Residuals as the paper's authors publish them, `pissa_init/` beside the weights, are told from bases."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from pissa import PissaConfig, export_lora, export_merged, init_checkpoint, load
from pissa.checkpoint.saved_residual import _in_hub, residual_at
from pissa.errors import CheckpointError, ConfigError
from pissa.evaluation.load import load_subject
from pissa.lab.comparison.plan import ComparisonPlan
from pissa.lab.comparison.run import compare
from pissa.lab.demo.demo import run_demo
from pissa.lab.inspection.inspect import inspect
from pissa.lab.inspection.settings import InspectionSettings
from pissa.training.recipe import Recipe
from pissa.training.run import train
from tiny import largest_difference, logits_of, tiny_llama, tiny_tokenizer, train_steps

NOISE = 5e-6
ROWS = [{"instruction": f"Add {i} and {i}.", "output": f"{2 * i}"} for i in range(8)]
FAR = 1e-3
"""Well above rounding, well below what a few steps or the components of rank 4 make."""


def plain(directory: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory).eval()


@pytest.fixture
def base(tmp_path: Path) -> Path:
    tiny_llama().save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def residual(base: Path, tmp_path: Path) -> Path:
    """A residual made by PEFT alone, in the steps of the authors' scripts."""
    config = LoraConfig(r=4, lora_alpha=4, init_lora_weights="pissa", target_modules=["q_proj", "v_proj", "up_proj"])
    model: Any = get_peft_model(plain(base), config)
    model.peft_config["default"].init_lora_weights = True
    out = tmp_path / "residual"
    model.save_pretrained(str(out / "pissa_init"))
    model.unload().save_pretrained(out)
    tiny_tokenizer().save_pretrained(out)
    return out


def trained_by_peft(residual: Path, out: Path, *, named: Path | None) -> Any:
    """An adapter that PEFT alone trained on the residual; its configuration names the base, or what is given."""
    model: Any = PeftModel.from_pretrained(plain(residual), str(residual), subfolder="pissa_init", is_trainable=True)
    train_steps(model, 3)
    if named is not None:
        model.peft_config["default"].base_model_name_or_path = str(named)
    model.save_pretrained(str(out))
    return model.eval()


def in_hub(directory: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The directory as huggingface_hub keeps a download of it; returns the id."""
    snapshot = cache / "models--someone--residual" / "snapshots" / ("0" * 40)
    shutil.copytree(directory, snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(cache), raising=False)
    _in_hub.cache_clear()
    return "someone/residual"


def test_the_layout_is_told_from_bases_runs_and_adapters(base: Path, residual: Path, tmp_path: Path) -> None:
    found = residual_at(residual)
    assert found is not None and (found.base, found.method) == (str(base), "pissa")
    assert found.config is not None and (found.config["rank"], found.config["alpha"]) == (4, 4)
    assert residual_at(base) is None and residual_at(residual / "pissa_init") is None
    shutil.copytree(residual / "pissa_init", tmp_path / "adapter")
    shutil.copytree(residual / "pissa_init", tmp_path / "adapter" / "pissa_init")
    assert residual_at(tmp_path / "adapter") is None and residual_at(tmp_path / "missing") is None


@pytest.mark.parametrize("name", ["corda_init", "loftq_init"])
def test_residuals_of_other_methods_are_told_too(base: Path, residual: Path, tmp_path: Path, name: str) -> None:
    trained = logits_of(trained_by_peft(residual, tmp_path / "adapter", named=residual))
    (residual / "pissa_init").rename(residual / name)
    with pytest.raises(CheckpointError, match=f"is a residual, .* in its {name}/; give {base}"):
        init_checkpoint(str(residual), tmp_path / "out", PissaConfig(4))
    assert largest_difference(logits_of(load(residual)), logits_of(plain(base))) < NOISE
    recipe = Recipe(max_steps=1, template="none", dtype="fp32")
    if name == "loftq_init":  # rounded to a format, and nobody knows by how much
        with pytest.raises(ConfigError, match="does not say how far"):
            train(str(residual), ROWS, tmp_path / "run", recipe, quiet=True)
        with pytest.warns(UserWarning, match="does not say how far"):
            export_lora(tmp_path / "adapter", tmp_path / "lora")
        return
    assert train(str(residual), ROWS, tmp_path / "run", recipe, quiet=True).results["base"] == str(base)
    export_lora(tmp_path / "adapter", tmp_path / "lora")
    on_base = PeftModel.from_pretrained(plain(base), str(tmp_path / "lora"))
    assert largest_difference(logits_of(on_base), trained) < NOISE


def test_loading_and_evaluating_it_is_loading_the_base(base: Path, residual: Path) -> None:
    expected = logits_of(plain(base))
    assert largest_difference(logits_of(plain(residual)), expected) > FAR
    assert largest_difference(logits_of(load(residual)), expected) < NOISE
    assert largest_difference(logits_of(load_subject(residual).model), expected) < NOISE


@pytest.mark.parametrize("where", ["directory", "hub"])
def test_training_starts_from_its_adapter_and_gives_a_lora_for_the_true_base(
    base: Path, residual: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    model = str(residual) if where == "directory" else in_hub(residual, tmp_path / "cache", monkeypatch)
    recipe = Recipe(batch_size=4, max_steps=3, dtype="fp32", template="none", learning_rate=1e-2)
    result = train(model, ROWS, tmp_path / "run", recipe, quiet=True)
    assert (result.results["base"], result.results["rank"]) == (str(base), 4)
    trained = logits_of(result.model)
    assert largest_difference(trained, logits_of(plain(base))) > FAR
    on_base = PeftModel.from_pretrained(plain(base), str(tmp_path / "run"))
    assert largest_difference(logits_of(on_base), trained) < NOISE
    assert json.loads((tmp_path / "run" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(base)


def test_a_residual_in_the_hub_is_evaluated_with_its_adapter(
    base: Path, residual: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = in_hub(residual, tmp_path / "cache", monkeypatch)
    assert largest_difference(logits_of(load_subject(model).model), logits_of(plain(base))) < NOISE
    with pytest.raises(CheckpointError, match="someone/residual is a residual"):
        init_checkpoint(model, tmp_path / "out", PissaConfig(4))


@pytest.mark.parametrize("says", [True, False], ids=["names the residual", "names the base"])
def test_an_adapter_that_peft_trained_on_it_becomes_a_lora_for_the_true_base(
    base: Path, residual: Path, tmp_path: Path, says: bool
) -> None:
    trained = logits_of(trained_by_peft(residual, tmp_path / "adapter", named=residual if says else base))
    given = None if says else str(residual)
    wrong = PeftModel.from_pretrained(plain(base), str(tmp_path / "adapter"))
    assert largest_difference(logits_of(wrong), trained) > FAR
    for name, rank in (("lossless", None), ("rank", 8)):
        export = export_lora(tmp_path / "adapter", tmp_path / name, base=given, rank=rank)
        assert (export.base, export.config.r) == (str(base), 8)
        on_base = PeftModel.from_pretrained(plain(base), str(tmp_path / name))
        assert largest_difference(logits_of(on_base), trained) < NOISE
    export_merged(tmp_path / "adapter", tmp_path / "merged", base=given)
    assert largest_difference(logits_of(plain(tmp_path / "merged")), trained) < NOISE
    assert largest_difference(logits_of(load(tmp_path / "adapter", given)), trained) < NOISE


REFUSALS: dict[str, Callable[[str, Path], object]] = {
    "init": lambda model, out: init_checkpoint(model, out, PissaConfig(4)),
    "inspect": lambda model, out: inspect(model, InspectionSettings(rank=(4,))),
    "compare": lambda model, out: compare(
        model, "rows.jsonl", out, ComparisonPlan(methods=("pissa",), steps=2), quiet=True
    ),
    "demo": lambda model, out: run_demo(out, model=model),
}


@pytest.mark.parametrize("ours", [False, True], ids=["published", "pissa init's"])
@pytest.mark.parametrize("command", REFUSALS.values(), ids=REFUSALS)
def test_what_wants_a_base_refuses_a_residual_and_names_the_base(
    base: Path, residual: Path, tmp_path: Path, command: Callable[[str, Path], object], ours: bool
) -> None:
    if ours:
        shutil.rmtree(residual)
        init_checkpoint(base, residual, PissaConfig(4))
    with pytest.raises(CheckpointError, match="is a residual") as caught:
        command(str(residual), tmp_path / "out")
    assert f"give {base}" in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_one_that_others_quantised_is_not_trained_and_its_exports_say_what_is_not_known(
    base: Path, residual: Path, tmp_path: Path
) -> None:
    trained_by_peft(residual, tmp_path / "adapter", named=residual)
    config = json.loads((residual / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (residual / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="does not say how far"):
        train(str(residual), ROWS, tmp_path / "run", Recipe(max_steps=1, template="none"), quiet=True)
    with pytest.warns(UserWarning, match="does not say how far"):
        export_lora(tmp_path / "adapter", tmp_path / "lora")
