"""What vLLM would refuse is told before it does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig
from safetensors import safe_open

from pissa import PissaConfig, adapt, export_lora
from pissa.export.vllm import needed_rank, vllm_refusals
from tiny import tiny_llama, train_steps

VLLM_FIELDS = {"r", "lora_alpha", "target_modules", "bias", "modules_to_save", "use_rslora", "use_dora"}
"""What vLLM's PEFTHelper reads of adapter_config.json."""


def exported(out: Path | None = None, rank: int | None = None, **settings: Any) -> Any:
    model = adapt(tiny_llama(), PissaConfig(4, **settings))
    train_steps(model, 1)
    return export_lora(model, out, rank=rank)


@pytest.mark.parametrize("settings", [{}, {"placement": "offset"}, {"use_rslora": True, "alpha": 3.0}])
def test_an_export_has_the_layout_that_vllm_reads(tmp_path: Path, settings: dict[str, Any]) -> None:
    export = exported(tmp_path / "lora", **settings)
    assert vllm_refusals(export, export.config) == [] and needed_rank(export.config) == 8
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert config.keys() >= VLLM_FIELDS and config["bias"] == "none" and not config["modules_to_save"]
    assert not config["use_dora"] and config["peft_type"] == "LORA"
    with safe_open(tmp_path / "lora" / "adapter_model.safetensors", "pt") as file:
        for key in file.keys():  # noqa: SIM118 -- not a dict
            parts = key.split(".")
            assert parts[:2] == ["base_model", "model"] and parts[-1] == "weight" and parts[-2] in ("lora_A", "lora_B")
            assert parts[-3] in config["target_modules"] or any(key.find(t) > 0 for t in config["target_modules"])


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"modules_to_save": ["lm_head"]}, "lm_head"),
        ({"trainable_token_indices": [3, 7]}, "trainable_token_indices"),
        ({"alpha_pattern": {"q_proj": 9.0}}, r"q_proj.*--rank 8"),
        ({"rank_pattern": {"q_proj": 2}, "alpha": 4.0}, "q_proj"),
        ({"use_rslora": True, "alpha": 3.0, "rank_pattern": {"q_proj": 2}}, "q_proj"),
    ],
)
def test_what_vllm_would_refuse_or_scale_wrongly_is_named(settings: dict[str, Any], said: str) -> None:
    import re

    export = exported(**settings)
    found = vllm_refusals(export, export.config)
    assert len(found) == 1 and re.search(said, found[0])
    if not {"modules_to_save", "trainable_token_indices"} & settings.keys():
        mended = exported(rank=8, **settings)
        assert vllm_refusals(mended, mended.config) == []


def test_the_input_embedding_is_taken_and_others_are_not() -> None:
    export = exported(target_modules=["embed_tokens", "q_proj"])
    assert any("lora_embedding_A" in key for key in export) and vllm_refusals(export, export.config) == []
    other = {key.replace("embed_tokens", "positions"): tensor for key, tensor in export.items()}
    (line,) = vllm_refusals(other, export.config)
    assert "positions.lora_embedding_A" in line and "--merged" in line


def test_dora_and_ranks_beyond_the_largest_are_named() -> None:
    config = LoraConfig(r=1024, lora_alpha=1024, use_dora=True)
    assert [line for line in vllm_refusals({}, config) if "DoRA" in line or "512" in line] == vllm_refusals({}, config)
    assert len(vllm_refusals({}, config)) == 2 and needed_rank(config) is None
    assert [needed_rank(LoraConfig(r=r)) for r in (1, 2, 16, 33, 512)] == [1, 8, 16, 64, 512]
