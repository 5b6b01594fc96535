"""What cards say of other libraries is so: a caution goes when the library that it is about is mended."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from pissa import PissaConfig, adapt, export_lora, export_merged
from pissa.checkpoint.card import ADDING, DORA
from tiny import largest_difference, logits_of, tiny_llama, train_steps

NOISE = 2e-6


def export(base: Path, out: Path, seed: int = 0, **settings: Any) -> Any:
    """A trained model, exported; returns it."""
    model = adapt(AutoModelForCausalLM.from_pretrained(base), PissaConfig(4, **settings))
    train_steps(model, 3, first=10 * seed)
    export_lora(model, out)
    return model.eval()


@pytest.fixture
def base(tmp_path: Path) -> Path:
    tiny_llama().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}, {"use_dora": True}], ids=str)
def test_transformers_load_adapter_computes_all_but_dora_which_the_card_says(
    base: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    trained = logits_of(export(base, tmp_path / "lora", **settings))
    native: Any = AutoModelForCausalLM.from_pretrained(base)
    native.load_adapter(str(tmp_path / "lora"))
    is_dora = bool(settings.get("use_dora"))
    assert (largest_difference(logits_of(native.eval()), trained) > 100 * NOISE) == is_dora
    by_peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(tmp_path / "lora"))
    assert largest_difference(logits_of(by_peft), trained) < NOISE
    card = (tmp_path / "lora" / "README.md").read_text()
    assert (DORA in card) == is_dora and ADDING in card


def test_a_merged_dora_computes_what_was_trained(base: Path, tmp_path: Path) -> None:
    model = export(base, tmp_path / "lora", use_dora=True)
    export_merged(model, tmp_path / "merged")
    assert (
        largest_difference(logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), logits_of(model))
        < NOISE
    )


@pytest.mark.parametrize("how", ["cat", "linear", "svd", "ties", "dare_linear", "magnitude_prune"])
def test_of_added_adapters_cat_alone_is_the_sum(base: Path, tmp_path: Path, how: str) -> None:
    models = [export(base, tmp_path / name, seed) for seed, name in enumerate("ab")]
    added: Any = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base), str(tmp_path / "a"), adapter_name="a"
    )
    added.load_adapter(str(tmp_path / "b"), adapter_name="b")
    weights = [0.7, 0.4]
    options = {} if how in ("cat", "linear", "svd") else {"density": 0.5}
    added.add_weighted_adapter(["a", "b"], weights, "sum", combination_type=how, **options)
    added.set_adapter("sum")
    expected: Any = AutoModelForCausalLM.from_pretrained(base)
    for letter, weight in zip("ab", weights, strict=True):
        exported = export_lora(models["ab".index(letter)])
        for name, module in expected.named_modules():
            if f"base_model.model.{name}.lora_A.weight" in exported:
                A, B = (exported[f"base_model.model.{name}.lora_{side}.weight"] for side in "AB")
                scale = exported.config.lora_alpha / exported.config.r
                module.weight = torch.nn.Parameter(module.weight.detach() + weight * scale * (B @ A))
    difference = largest_difference(logits_of(added.eval()), logits_of(expected.eval()))
    assert difference < NOISE if how == "cat" else difference > 100 * NOISE
