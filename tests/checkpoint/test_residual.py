"""What is saved is what is loaded: residuals through transformers alone, in a process of its own, bit for bit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import pissa
from pissa import PissaConfig, Quantization, adapt, export_lora, quantization_preset, reference, restore, save_residual
from pissa.checkpoint.residual import residual_state
from pissa.checkpoint.saved_residual import residual_at
from pissa.checkpoint.source.load import load_base
from pissa.errors import CheckpointError, OutputError, PissaError
from pissa.live.layers import place_of
from pissa.live.quantized import keep_unpacked, quantized_layers
from pissa.live.state import INITIAL, adapter_layers, base_layer
from pissa.provenance import fingerprint
from tiny import largest_difference, logits_of, same_tensors, save_by_peft_alone, tiny_gpt2, tiny_llama, train_steps

pytest.importorskip("bitsandbytes")
FORMATS: dict[str, Quantization | None] = {
    "nf4-double": Quantization(iterations=1, momentum=0.0),
    "nf4-single": Quantization(iterations=1, momentum=0.0, double_quant=False),
    "int8": Quantization("int8", iterations=1, momentum=0.0),
    "qlora": quantization_preset("qlora"),
    "unquantised": None,
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# Knows transformers and bitsandbytes, and nothing of pissa.
READER = """
import sys, torch
import bitsandbytes as bnb
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

for path in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(path)
    found = {}
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, bnb.nn.Params4bit):
            found[name] = bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
        elif isinstance(weight, bnb.nn.Int8Params):
            found[name] = bnb.functional.int8_vectorwise_dequant(weight.data, weight.SCB)
        elif weight is not None:
            found[name] = weight.detach().clone()
    save_file({name: tensor.contiguous() for name, tensor in found.items()}, path + "/seen.safetensors")
assert "pissa" not in sys.modules
"""


def adapted(form: str, *, dtype: torch.dtype = torch.float32, tie: bool = False, targets: Any = "all-linear") -> Any:
    method = "lora-kaiming" if form == "qlora" else "pissa"
    settings = PissaConfig(rank=4, method=method, quantization=FORMATS[form], target_modules=targets)
    return adapt(tiny_llama(hidden=64, dtype=dtype, tie=tie), settings)


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[PeftModel, Path]]:
    """Every format, dtype and kind of head, saved, and read by one fresh process."""
    folder = tmp_path_factory.mktemp("residuals")
    cases: dict[str, PeftModel] = {}
    for form in FORMATS:
        if form not in ("qlora", "unquantised"):
            cases |= {f"{form} {name}": adapted(form, dtype=dtype) for name, dtype in DTYPES.items()}
    cases["qlora"] = adapted("qlora")
    cases["unquantised bf16"] = adapted("unquantised", dtype=torch.bfloat16)
    cases["tied"] = adapted("nf4-double", tie=True)
    with pytest.warns(UserWarning, match="untied"):
        cases["untied"] = adapted("nf4-double", tie=True, targets=r".*(lm_head|up_proj)")
    cases["gpt2"] = adapt(tiny_gpt2(hidden=64), PissaConfig(rank=4, quantization=FORMATS["nf4-double"]))
    for name, model in cases.items():
        save_residual(model, folder / name)
    subprocess.run(
        [sys.executable, "-W", "ignore", "-c", READER, *[str(folder / name) for name in cases]],
        check=True,
        capture_output=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": ""},
    )
    return {name: (model, folder / name) for name, model in cases.items()}


CASES = [f"{form} {dtype}" for form in ("nf4-double", "nf4-single", "int8") for dtype in DTYPES]


@pytest.mark.parametrize("case", [*CASES, "qlora", "unquantised bf16", "tied", "untied", "gpt2"])
def test_transformers_alone_reads_the_same_bits(seen: dict[str, tuple[PeftModel, Path]], case: str) -> None:
    model, path = seen[case]
    read = load_file(path / "seen.safetensors")
    plain: Any = model.get_base_model()
    names: dict[str, Any] = {n.replace(".base_layer", ""): m for n, m in plain.named_modules() if hasattr(m, "weight")}
    assert read.keys() >= {name for name in names if ".lora_" not in name}
    for name, tensor in read.items():
        mine = place_of(names[name]).matrices() if name in adapter_layers(model) else names[name].weight.detach()
        if mine.shape != tensor.shape:
            mine = mine.T  # an unquantised Conv1D
        assert torch.equal(tensor.to(mine.dtype), mine), name
    if case == "nf4-single fp32":
        layers: list[Any] = [*quantized_layers(plain).values()]
        assert all(bool((layer.weight.absmax < 0).any()) for layer in layers)


def test_the_checkpoint_is_a_true_quantised_one(seen: dict[str, tuple[PeftModel, Path]]) -> None:
    _, path = seen["nf4-double fp32"]
    tensors = load_file(path / "model.safetensors")
    kinds = {key.partition(".weight")[2] for key in tensors if ".q_proj." in key}
    assert kinds == {
        "", ".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", ".quant_state.bitsandbytes__nf4"
    }  # fmt: skip
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    assert config["quantization_config"]["llm_int8_skip_modules"] == ["lm_head"]
    names = {file.name for file in path.iterdir()} - {"seen.safetensors"}
    written = {"config.json", "generation_config.json", "model.safetensors", "pissa.json", "pissa_init", "README.md"}
    assert names == written
    assert {file.name for file in (path / INITIAL).iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}


def test_existing_scripts_continue_from_pissa_init(tmp_path: Path) -> None:
    model = adapted("nf4-double")
    start = logits_of(model)
    save_residual(model, tmp_path / "residual")
    residual = AutoModelForCausalLM.from_pretrained(tmp_path / "residual")
    keep_unpacked(residual)
    plain = PeftModel.from_pretrained(residual, str(tmp_path / "residual"), subfolder=INITIAL, is_trainable=True)
    assert torch.equal(logits_of(plain.eval()), start)
    assert train_steps(plain.train(), 2) == train_steps(model.train(), 2)


@pytest.mark.parametrize("form", FORMATS)
def test_an_adapter_saved_afterwards_loads_as_the_trained_function(form: str, tmp_path: Path) -> None:
    model = adapted(form)
    train_steps(model.train(), 2)
    trained = logits_of(model.eval())
    save_residual(model, tmp_path / "residual")
    model.save_pretrained(str(tmp_path / "adapter"))
    again = pissa.load(tmp_path / "adapter", is_trainable=True)
    assert torch.equal(logits_of(again.eval()), trained)
    with reference(model), reference(again):
        assert torch.equal(logits_of(again), logits_of(model))
    assert train_steps(again.train(), 2) == train_steps(model.train(), 2)
    exported, expected = export_lora(tmp_path / "adapter"), export_lora(again)
    assert exported.keys() == expected.keys() and exported.gaps == expected.gaps
    if form != "qlora":
        assert torch.equal(logits_of(pissa.load(tmp_path / "residual")), logits_of(_start(model)))
    assert not quantized_layers(restore(again))


def _start(model: PeftModel) -> PeftModel:
    """The model with its initial factors in place of the trained ones."""
    for layer in adapter_layers(model).values():
        for holders in (layer.lora_A, layer.lora_B):
            holder: Any = holders
            holder["default"].weight.data.copy_(holder[INITIAL].weight)
    return model.eval()


def test_a_quantised_adapter_without_its_residual_is_refused(tmp_path: Path) -> None:
    tiny_llama(hidden=64).save_pretrained(tmp_path / "base")
    model = adapt(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), PissaConfig(4, quantization=FORMATS["int8"]))
    save_by_peft_alone(model, tmp_path / "adapter")
    for base in (None, tmp_path / "base", AutoModelForCausalLM.from_pretrained(tmp_path / "base")):
        with pytest.raises(CheckpointError, match="save_residual"):
            pissa.load(tmp_path / "adapter", base)
    save_residual(model, tmp_path / "residual")
    loaded = pissa.load(tmp_path / "adapter", tmp_path / "residual")
    assert torch.equal(logits_of(loaded), logits_of(model))
    found = residual_at(tmp_path / "residual")
    assert found is not None and found.base == str(tmp_path / "base")
    assert found.certificates == model.pissa.certificates  # pyright: ignore
    export = export_lora(loaded)
    assert export.base == str(tmp_path / "base") and set(export.gaps) == set(found.certificates)


def test_fingerprints_of_the_live_and_the_loaded_residual_agree(tmp_path: Path) -> None:
    for form in ("nf4-double", "int8", "unquantised"):
        model = adapted(form)
        save_residual(model, tmp_path / form)
        logits_of(model)
        again = load_base(tmp_path / form)
        live = residual_state(model.get_base_model())  # pyright: ignore
        assert same_tensors(residual_state(again), live)
        assert fingerprint(residual_state(again)) == fingerprint(live)


def test_nothing_is_written_where_there_is_no_residual_or_no_room(tmp_path: Path) -> None:
    with pytest.raises(PissaError, match="the base's own"):
        save_residual(adapt(tiny_llama(), PissaConfig(4, placement="offset")), tmp_path / "none")
    with pytest.raises(PissaError, match="the base's own"):
        save_residual(adapt(tiny_llama(), PissaConfig(4, method="lora-kaiming")), tmp_path / "none")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").write_text("mine", encoding="utf-8")
    with pytest.raises(OutputError, match="already holds"):
        save_residual(adapt(tiny_llama(), PissaConfig(4)), tmp_path / "taken")
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_saving_leaves_the_live_model_as_it_was(tmp_path: Path) -> None:
    model = adapted("nf4-double", dtype=torch.bfloat16)
    before = logits_of(model)
    save_residual(model, tmp_path / "residual")
    assert torch.equal(logits_of(model), before)
    for name, layer in adapter_layers(model).items():
        assert place_of(base_layer(layer)).matrices().dtype == torch.bfloat16, name
    assert largest_difference(before, logits_of(tiny_llama(hidden=64))) < 0.2
