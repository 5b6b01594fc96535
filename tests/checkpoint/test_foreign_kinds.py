"""Adapters that PEFT alone made of every kind of layer, read and loaded as what they are."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

import pissa
from families import FAMILIES, logits
from kinds import CASES
from pissa import export_lora
from pissa.checkpoint.read import read_adapter
from pissa.errors import CheckpointError, PissaError

pytestmark = pytest.mark.filterwarnings("ignore")


def by_peft(model: Any, scale: float = 0.3, **settings: Any) -> Any:
    """Adapted by PEFT, with factors that are not zero."""
    adapted = get_peft_model(model, LoraConfig(r=2, lora_alpha=3, **settings))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in adapted.named_parameters():
        if ".lora_" in name:
            parameter.data.normal_(std=scale, generator=generator)
    return adapted.eval()


MIXTURES: dict[str, tuple[str, dict[str, Any], int]] = {
    "endings": ("mixtral", {"target_modules": ["q_proj"], "target_parameters": ["down_proj", "gate_up_proj"]}, 2 * 3),
    "one of two": ("mixtral", {"target_modules": [], "target_parameters": ["mlp.experts.down_proj"]}, 2),
    "router": ("mixtral", {"target_modules": ["v_proj"], "target_parameters": ["mlp.gate.weight"]}, 2 * 2),
    "old names": ("mixtral", {"target_modules": ["gate", "w1", "w2", "w3", "q_proj"]}, 2 * 4),
    "ranks": (
        "mixtral",
        {
            "target_modules": [],
            "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
            "rank_pattern": {"down_proj": 4},
            "alpha_pattern": {"gate_up_proj": 7},
        },
        2 * 2,
    ),
    "transposed": (
        "gpt-oss",
        {"target_modules": ["q_proj"], "target_parameters": ["gate_up_proj", "down_proj"]},
        2 * 3,
    ),
    "shared": ("deepseek-moe", {"target_modules": ["kv_b_proj"], "target_parameters": ["down_proj.weight"]}, 2 + 2),
    "embedding": ("gpt-2", {"target_modules": ["wte", "c_fc"]}, 1 + 2),
    "convolution": ("resnet", {"target_modules": ["convolution"]}, 6),
}


@pytest.mark.parametrize("name", MIXTURES)
def test_what_peft_saved_is_loaded_as_the_same_function(name: str, tmp_path: Path) -> None:
    family_name, settings, count = MIXTURES[name]
    family = FAMILIES[family_name]
    model = by_peft(family.make(), **settings)
    expected = logits(model, family.batch())
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    assert len(read_adapter(tmp_path / "adapter").factors) == count
    export_lora(tmp_path / "adapter", tmp_path / "export")
    for saved in ("adapter", "export"):
        again = pissa.load(tmp_path / saved, family.make()).eval()
        torch.testing.assert_close(logits(again, family.batch()), expected, rtol=1e-4, atol=1e-5)


def test_an_attention_whose_out_proj_peft_adds_twice_is_refused(tmp_path: Path) -> None:
    model = by_peft(CASES["attention"].model(), target_modules=["attn"])
    model.save_pretrained(tmp_path / "adapter")
    for action in (lambda: pissa.load(tmp_path / "adapter", CASES["attention"].model()), lambda: export_lora(model)):
        with pytest.raises(PissaError, match=r"attn adapts out_proj, which PEFT adds twice or once"):
            action()


def test_a_convolution_that_peft_computes_without_its_dilation_is_refused(tmp_path: Path) -> None:
    model = by_peft(CASES["conv2d-dilated-same"].model(), target_modules=["0"])
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(CheckpointError, match="0 adapts a convolution without its dilation"):
        pissa.load(tmp_path / "adapter", CASES["conv2d-dilated-same"].model())
    with pytest.raises(PissaError, match="0 adapts a convolution without its dilation"):
        export_lora(model)


def test_experts_of_another_number_are_another_base(tmp_path: Path) -> None:
    family = FAMILIES["mixtral"]
    by_peft(family.make(), target_modules=[], target_parameters=["down_proj"]).save_pretrained(tmp_path / "adapter")
    other = family.model(family.config(**{**family.sizes, "num_local_experts": 5}))
    with warnings.catch_warnings(), pytest.raises(CheckpointError, match=r"experts\.down_proj"):
        pissa.load(tmp_path / "adapter", other)
