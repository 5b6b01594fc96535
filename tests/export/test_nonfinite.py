"""An adapter with NaN or Inf, wherever in it, is refused by every way out, in one line that names the place."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from pissa import PissaConfig, adapt, export_lora, export_merged, load
from pissa.errors import PissaError
from pissa.live.state import adapter_layers
from tiny import tiny_llama, train_steps

BAD = (math.nan, math.inf, -math.inf)
OUT: dict[str, Callable[[Any, Path], Any]] = {
    "lossless": lambda source, out: export_lora(source, out),
    "tensors alone": lambda source, _: export_lora(source),
    "of a rank": lambda source, out: export_lora(source, out, rank=2),
    "within a tolerance": lambda source, out: export_lora(source, out, tolerance=0.1),
    "merged": lambda source, out: export_merged(source, out),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved adapter whose base is on the disk as well."""
    directory = tmp_path_factory.mktemp("adapters")
    tiny_llama().save_pretrained(directory / "base")
    base = AutoModelForCausalLM.from_pretrained(directory / "base")
    model = adapt(base, PissaConfig(4, target_modules=["q_proj", "up_proj"], modules_to_save=["norm"]))
    train_steps(model, 1)
    model.save_pretrained(str(directory / "run"))
    return directory / "run"


def refused(source: Any, out: Path, name: str) -> str:
    with pytest.raises(PissaError) as caught:
        OUT[name](source, out)
    assert "\n" not in str(caught.value) and not out.exists()
    return str(caught.value)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), bad=st.sampled_from(BAD), name=st.sampled_from([*OUT]))
def test_in_a_file(saved: Path, tmp_path_factory: pytest.TempPathFactory, data: Any, bad: float, name: str) -> None:
    directory = tmp_path_factory.mktemp("bad")
    for file in saved.iterdir():
        (directory / file.name).write_bytes(file.read_bytes())
    tensors = load_file(directory / "adapter_model.safetensors")
    key = data.draw(st.sampled_from(sorted(tensors)))
    tensors[key].view(-1)[data.draw(st.integers(0, tensors[key].numel() - 1))] = bad
    save_file(tensors, directory / "adapter_model.safetensors", {"format": "pt"})
    assert key.removeprefix("base_model.model.") in refused(directory, directory / "out", name)
    with pytest.raises(PissaError, match="NaN or Inf"):
        load(directory)


@pytest.mark.parametrize("name", OUT)
@pytest.mark.parametrize("bad", BAD)
def test_in_a_live_model(bad: float, name: str, tmp_path: Path) -> None:
    model = adapt(tiny_llama(), PissaConfig(4, target_modules=["q_proj", "up_proj"]))
    layer: Any = adapter_layers(model)["model.layers.1.mlp.up_proj"]
    with torch.no_grad():
        layer.lora_B["default"].weight[3, 1] = bad
    said = refused(model, tmp_path / "out", name)
    assert "up_proj" in said
    with pytest.raises(PissaError, match="up_proj"):
        model.save_pretrained(str(tmp_path / "saved"))


@pytest.mark.parametrize("name", OUT)
@pytest.mark.parametrize("bad", ["NaN", "Infinity", "-Infinity", "1e999", '"16"', "null", "true"])
def test_in_an_alpha(saved: Path, bad: str, name: str, tmp_path: Path) -> None:
    for field in ("lora_alpha", "alpha_pattern"):
        directory = tmp_path / field
        directory.mkdir()
        for file in saved.iterdir():
            (directory / file.name).write_bytes(file.read_bytes())
        document = json.loads((directory / "adapter_config.json").read_text())
        document[field] = "@" if field == "lora_alpha" else {"q_proj": "@"}
        text = json.dumps(document).replace('"@"', bad)
        (directory / "adapter_config.json").write_text(text)
        refused(directory, directory / "out", name)


@pytest.mark.parametrize("live", [True, False])
def test_a_merged_weight_beyond_its_dtype(live: bool, tmp_path: Path) -> None:
    tiny_llama(dtype=torch.float16).save_pretrained(tmp_path / "base")
    model = adapt(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), PissaConfig(2, target_modules=["q_proj"]))
    layer: Any = adapter_layers(model)["model.layers.0.self_attn.q_proj"]
    with torch.no_grad():
        layer.lora_A["default"].weight.fill_(1e3)
        layer.lora_B["default"].weight.fill_(1e3)
    model.save_pretrained(str(tmp_path / "run"))
    assert "q_proj" in refused(model if live else tmp_path / "run", tmp_path / "out", "merged")
