"""What vLLM would refuse is told before it does."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig
from safetensors import safe_open

from pissa import PissaConfig, adapt, export_lora
from pissa.export.vllm import needed_rank, vllm_refusals
from pissa.live.state import adapter_factors
from tiny import tiny_llama, train_steps

VLLM_FIELDS = {"r", "lora_alpha", "target_modules", "bias", "modules_to_save", "use_rslora", "use_dora"}
"""What vLLM's PEFTHelper reads of adapter_config.json."""


def exported(out: Path | None = None, rank: int | None = None, **settings: Any) -> Any:
    model = adapt(tiny_llama(), PissaConfig(4, **settings))
    train_steps(model, 1)
    return export_lora(model, out, rank=rank)


TAKEN = {
    "plain": {},
    "offset": {"placement": "offset"},
    "rslora": {"use_rslora": True, "alpha": 3.0},
    "alpha_pattern": {"alpha_pattern": {"q_proj": 9.0}},
    "rank_pattern": {"rank_pattern": {"q_proj": 2}, "alpha": 4.0},
    "both, rslora": {"use_rslora": True, "alpha": 3.0, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 2.0}},
}


@pytest.mark.parametrize("settings", TAKEN.values(), ids=TAKEN)
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


def scale_by_vllm(config: dict[str, Any], module: str) -> tuple[int, float]:
    """Rank and scale of a module, by the rule of vLLM 0.32: a key fits a suffix of the name that begins at a dot."""

    def of(patterns: dict[str, Any], usual: float) -> float:
        return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", module)), usual)

    rank, alpha = of(config["rank_pattern"], config["r"]), of(config["alpha_pattern"], config["lora_alpha"])
    return int(rank), alpha / (math.sqrt(rank) if config["use_rslora"] else rank)


@pytest.mark.parametrize("rank", [None, 3])
@pytest.mark.parametrize("settings", TAKEN.values(), ids=TAKEN)
def test_every_module_has_the_rank_and_scale_that_vllm_reads_from_the_patterns(
    tmp_path: Path, settings: dict[str, Any], rank: int | None
) -> None:
    model = adapt(tiny_llama(), PissaConfig(4, **settings))
    train_steps(model, 1)
    export = export_lora(model, tmp_path / "lora", rank=rank)
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    for name, factors in adapter_factors(model).items():
        A, B = (export[f"base_model.model.{name}.lora_{side}.weight"].double() for side in "AB")
        found, scale = scale_by_vllm(config, name)
        assert A.shape[0] == found
        assert factors.A0 is not None and factors.B0 is not None
        change = factors.scale * (factors.B.double() @ factors.A.double() - factors.B0.double() @ factors.A0.double())
        error = float((scale * (B @ A) - change).norm())
        assert error <= 1e-6 + 1.001 * export.errors[name] * float(change.norm())


@pytest.mark.parametrize(
    ("settings", "said"),
    [({"modules_to_save": ["lm_head"]}, "lm_head"), ({"trainable_token_indices": [3, 7]}, "trainable_token_indices")],
)
def test_what_vllm_would_refuse_is_named(settings: dict[str, Any], said: str) -> None:
    export = exported(**settings)
    (line,) = vllm_refusals(export, export.config)
    assert said in line and "--merged" in line


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"bias": "lora_only"}, "lora_only"),
        ({"bias": "all"}, "bias"),
        ({"layer_replication": [(0, 2), (1, 2)]}, "layer_replication"),
        ({"alora_invocation_tokens": [5, 6]}, "alora_invocation_tokens"),
        ({"lora_bias": True}, "lora_bias"),
        ({"use_dora": True}, "DoRA"),
        ({"init_lora_weights": "pissa"}, "pissa"),
        ({"modules_to_save": ["score", "classifier"]}, "score, classifier"),
    ],
)
def test_every_feature_that_vllm_refuses_is_refused(settings: dict[str, Any], said: str) -> None:
    (line,) = vllm_refusals({}, LoraConfig(r=4, task_type="CAUSAL_LM", **settings))
    assert said in line and "--merged" in line


def test_the_head_of_a_classifier_is_taken() -> None:
    assert vllm_refusals({}, LoraConfig(r=4, modules_to_save=["score"])) == []


def test_a_trained_dora_is_refused_once() -> None:
    export = exported(use_dora=True)
    assert any("magnitude" in key for key in export) and len(vllm_refusals(export, export.config)) == 1


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
