"""A small model of each family of the paper: what it takes to give its adapter away."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor

import pissa
from families import FAMILIES, logits
from pissa import PissaConfig, adapt, export_lora, export_merged, reference, restore
from pissa.live.marks import marks
from pissa.live.peft_config import peft_config
from pissa.live.state import adapter_layers, adapter_layouts, place_at
from pissa.live.targets import layouts_of, resolve_targets
from sampled import thinned
from tiny import same_tensors


def distance(left: Tensor, right: Tensor) -> float:
    return float((left - right).abs().max() / right.abs().max())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "placement"), thinned(FAMILIES, ["residual", "offset"]))
def test_a_family_is_adapted_trained_exported_and_loaded_by_peft_alone(
    name: str, placement: Any, tmp_path: Path
) -> None:
    family = FAMILIES[name]
    batch, base = family.batch(), family.make()
    expected = logits(base, batch)
    config = PissaConfig(2, target_modules=family.targets, placement=placement, **family.settings)
    model: Any = adapt(family.make(), config)
    assert len(adapter_layers(model)) == family.adapted, list(adapter_layers(model))
    assert distance(logits(model, batch), expected) < 2e-5

    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    model(**batch).logits.square().mean().backward()
    missing = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert missing == []
    optimizer.step()
    trained = logits(model, batch)
    assert distance(trained, expected) > 1e-3
    with reference(model):
        assert distance(logits(model, batch), expected) < 2e-5

    export_lora(model, tmp_path / "lora")
    export_lora(tmp_path / "lora", tmp_path / "low", rank=3)
    plain = PeftModel.from_pretrained(family.make(), tmp_path / "lora").eval()
    assert distance(logits(plain, batch), trained) < 2e-5
    assert distance(logits(pissa.load(tmp_path / "lora", family.make()).eval(), batch), trained) < 2e-5
    low = logits(PeftModel.from_pretrained(family.make(), tmp_path / "low").eval(), batch)
    assert distance(low, logits(pissa.load(tmp_path / "low", family.make()).eval(), batch)) < 2e-5
    export_merged(model, tmp_path / "merged")
    merged = family.model.from_pretrained(tmp_path / "merged").eval()
    assert distance(logits(merged, batch), trained) < 2e-5
    assert same_tensors(dict(base.named_parameters()), dict(restore(model, base).named_parameters()))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", FAMILIES)
def test_targets_are_the_same_without_values_and_say_how_peft_will_store_them(name: str) -> None:
    family = FAMILIES[name]
    config = PissaConfig(2, target_modules=family.targets)
    with torch.device("meta"):
        empty = family.model(family.config(**family.sizes))
    planned = resolve_targets(empty, config, loaded=False)
    model = adapt(family.make(), config)
    assert layouts_of(planned) == adapter_layouts(model)
    assert {t.name: t.weight_key for t in planned} == {n: place_at(x).key(n) for n, x in adapter_layers(model).items()}
    assert {t.weight_key for t in planned} <= set(family.make().state_dict())
    ours, theirs = peft_config(empty, planned, config), model.peft_config["default"]
    for key in ("target_parameters", "rank_pattern", "fan_in_fan_out", "task_type"):
        assert getattr(ours, key) == getattr(theirs, key), key
    assert marks(ours).get("parameters") == marks(theirs).get("parameters")
