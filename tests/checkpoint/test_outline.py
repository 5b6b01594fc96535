"""A configuration is held against a checkpoint's headers alone; what the live model would take is never refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from pissa import PissaConfig, PissaError
from pissa.checkpoint.source.outline import check_outline
from pissa.errors import CheckpointError
from pissa.live.targets import resolve_targets

SMALL = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=64)
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 2},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4},
    "mixtral": {"num_key_value_heads": 2, "num_local_experts": 4},
    "phi3": {"num_key_value_heads": 2, "pad_token_id": 0},
    "gemma3_text": {"head_dim": 8, "num_key_value_heads": 2},
}
WRONG: list[dict[str, Any]] = [
    {"rank": 17},
    {"rank": 33},
    {"rank": 1000},
    {"rank": 17, "target_modules": ["k_proj", "down_proj"]},
    {"rank": 4, "target_modules": ["q_prj"]},
    {"rank": 4, "target_modules": ".*q_prj"},
    {"rank": 4, "exclude_modules": ["lm_hed"]},
    {"rank": 40, "exclude_modules": ["k_proj", "v_proj"]},
    {"rank": 4, "target_modules": ["gate_up_proj"]},
    {"rank": 4, "target_modules": ["c_attn", "lm_head"]},
    {"rank": 4, "rank_pattern": {"k_prj": 8}},
]
"""What the headers of a Llama tell to be wrong."""
OTHERS: list[dict[str, Any]] = [
    {"rank": 4},
    {"rank": 4, "target_modules": ["q_proj"]},
    {"rank": 4, "target_modules": r".*\.(q_prj|k_proj)"},
    {"rank": 4, "exclude_modules": ["lm_head"]},
    {"rank": 4, "rank_pattern": {"k_proj": 8}},
    {"rank": 40, "rank_pattern": {"q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj": 8}},
    {"rank": 1000, "rank_budget": 5000},
]


def small(family: str, place: Path) -> PreTrainedModel:
    """A tiny model of a family, saved."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**SMALL, **FAMILIES[family]}))
    model.save_pretrained(place)
    return model


def complaint(act: Any, *arguments: Any, **options: Any) -> str | None:
    """What a call says, if anything."""
    try:
        act(*arguments, **options)
    except PissaError as error:
        return str(error)
    return None


@pytest.mark.parametrize("family", FAMILIES)
def test_only_what_the_live_model_refuses_is_refused(family: str, tmp_path: Path) -> None:
    model = small(family, tmp_path)
    found = {}
    for asked in (*WRONG, *OTHERS):
        config = PissaConfig(**asked)
        early, late = complaint(check_outline, tmp_path, config), complaint(resolve_targets, model, config)
        assert early is None or late is not None, (asked, early)
        found[str(asked)] = early
    (tmp_path / "pissa_init").mkdir()
    (tmp_path / "pissa_init" / "adapter_config.json").write_text("{}")
    assert complaint(check_outline, tmp_path, PissaConfig(1000)) is None  # the rank is that of the split
    if family == "llama":
        assert [asked for asked, early in found.items() if early is not None] == [*map(str, WRONG)]


def test_what_is_not_downloaded_yet_is_not_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = tmp_path / "models--some--model" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    (snapshot / "config.json").write_text('{"model_type": "llama"}')
    assert complaint(check_outline, "some/model", PissaConfig(1000)) is None
    small("llama", snapshot)
    assert "1000 > 16" in str(complaint(check_outline, "some/model", PissaConfig(1000)))
    with pytest.raises(CheckpointError, match="has no weights"):
        (snapshot / "model.safetensors").unlink()
        check_outline(snapshot, PissaConfig(1000))
