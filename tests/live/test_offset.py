"""Placement "offset": the base stays, one plain LoRA of rank 2r starts at the principal components."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import pissa
from pissa import PissaConfig, adapt, export_lora, export_merged, reference, restore
from pissa.errors import ConfigError, WeightError
from pissa.live.offset import second_half
from pissa.live.quantized import keep_unpacked, quantized_layers
from pissa.live.state import adapter_factors, adapter_layers
from tiny import largest_difference, logits_of, same_tensors, snapshot, tiny_gpt2, tiny_llama, token_batch, train_steps

BASES = ("fp32", "nf4", "int8")


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One tiny Llama, unquantised and as transformers quantises it."""
    folder = tmp_path_factory.mktemp("offset")
    tiny_llama(hidden=64).save_pretrained(folder / "fp32")
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    for name, config in {
        "nf4": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True),
        "int8": BitsAndBytesConfig(load_in_8bit=True),
    }.items():
        model = AutoModelForCausalLM.from_pretrained(folder / "fp32", quantization_config=config)
        model.save_pretrained(folder / name)
    return {name: folder / name for name in BASES}


def loaded(path: Path) -> Any:
    """The base through transformers, safe from repacking."""
    model = AutoModelForCausalLM.from_pretrained(path).eval()
    keep_unpacked(model)
    return model


def halves(model: PeftModel) -> dict[str, tuple[Tensor, Tensor]]:
    """Copies of A0 and B0 as they are in the adapter."""
    factors = adapter_factors(model)
    found = {}
    for name, f in factors.items():
        assert f.A0 is not None and f.B0 is not None
        found[name] = f.A0.clone(), f.B0.clone()
    return found


def same(left: dict[str, tuple[Tensor, Tensor]], right: dict[str, tuple[Tensor, Tensor]]) -> bool:
    return left.keys() == right.keys() and all(
        torch.equal(a, b) for name in left for a, b in zip(left[name], right[name], strict=True)
    )


@pytest.mark.parametrize("rslora", [False, True], ids=["lora", "rslora"])
@pytest.mark.parametrize("kind", BASES)
def test_the_base_is_untouched_and_the_adapter_trains_from_it(
    bases: dict[str, Path], tmp_path: Path, kind: str, rslora: bool
) -> None:
    base = loaded(bases[kind])
    before, weights = logits_of(base), snapshot(base)
    model = adapt(base, PissaConfig(rank=4, placement="offset", use_rslora=rslora))
    assert largest_difference(before, logits_of(model)) < 1e-6
    initial = halves(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.5)
    train_steps(model.train(), 3, optimizer=optimizer)
    trained = logits_of(model.eval())
    assert largest_difference(trained, before) > 1e-3
    assert same(halves(model), initial)
    with model.disable_adapter():
        assert torch.equal(logits_of(model), before)
    with reference(model):
        assert torch.equal(logits_of(model), before)
    model.save_pretrained(str(tmp_path / "saved"))
    plain = PeftModel.from_pretrained(loaded(bases[kind]), str(tmp_path / "saved")).eval()
    assert torch.equal(logits_of(plain), trained)
    assert same_tensors(dict(export_lora(model)), load_file(tmp_path / "saved" / "adapter_model.safetensors"))
    assert same_tensors(snapshot(restore(model)), weights)


@pytest.mark.parametrize("kind", BASES)
def test_a_loaded_adapter_keeps_its_frozen_half_and_trains_on_to_the_same_bits(
    bases: dict[str, Path], tmp_path: Path, kind: str
) -> None:
    model = adapt(loaded(bases[kind]), PissaConfig(rank=4, placement="offset"))
    train_steps(model.train(), 1)
    model.save_pretrained(str(tmp_path / "saved"))
    export_lora(model, tmp_path / "exported")
    for saved in ("saved", "exported"):
        again = pissa.load(tmp_path / saved, is_trainable=True)
        assert torch.equal(logits_of(again.eval()), logits_of(model.eval()))
        losses = train_steps(again.train(), 2, first=1)
        assert same(halves(again), halves(model))
        if saved == "exported":
            assert train_steps(model.train(), 2, first=1) == losses


@pytest.mark.parametrize("kind", ["fp32", "nf4"])
def test_truncated_and_merged_exports_are_plain(bases: dict[str, Path], tmp_path: Path, kind: str) -> None:
    model = adapt(loaded(bases[kind]), PissaConfig(rank=4, placement="offset"))
    train_steps(model.train(), 2)
    trained = logits_of(model.eval())
    small = export_lora(model, tmp_path / "small", rank=6)
    assert small.config.r == 6 and small.config.auto_mapping is None
    assert "pissa_init" not in pissa.load(tmp_path / "small").peft_config
    export_merged(model, tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert not quantized_layers(merged)
    assert largest_difference(logits_of(merged.eval()), trained) < 1e-5


def test_the_frozen_half_gets_no_gradient_however_a_batch_is_cut() -> None:
    model = adapt(tiny_llama(), PissaConfig(rank=2, placement="offset")).train()
    for seed in (1, 2):
        batch = token_batch(seed)
        model(input_ids=batch, labels=batch).loss.backward()
    for layer in adapter_layers(model).values():
        for dimension, holders in enumerate((layer.lora_A, layer.lora_B)):
            holder: Any = holders["default"]
            gradient = holder.weight.grad
            assert gradient.any() and not second_half(gradient, dimension).any()


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW, torch.optim.Adam])
def test_no_optimizer_moves_the_frozen_half(optimizer: Any) -> None:
    model = adapt(tiny_gpt2(), PissaConfig(rank=2, placement="offset"))
    initial = halves(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    train_steps(model.train(), 3, optimizer=optimizer(trained, lr=0.1, weight_decay=0.3))
    assert same(halves(model), initial)


def test_a_copy_of_a_model_keeps_its_frozen_halves() -> None:
    model: Any = copy.deepcopy(adapt(tiny_llama(), PissaConfig(rank=2, placement="offset"))).train()
    initial = halves(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    train_steps(model, 3, optimizer=torch.optim.AdamW(trained, lr=0.1, weight_decay=0.3))
    assert same(halves(model), initial)
    for layer in adapter_layers(model).values():
        holder: Any = layer.lora_A["default"]
        assert not second_half(holder.weight.grad, 0).any()


def test_a_quantised_base_is_refused_elsewhere_with_the_way_out(bases: dict[str, Path]) -> None:
    base = loaded(bases["nf4"])
    before = snapshot(base)
    with pytest.raises(WeightError, match='placement="offset"'):
        adapt(base, PissaConfig(rank=4))
    with pytest.raises(WeightError, match="unquantised"):
        adapt(base, PissaConfig(rank=4, quantization=pissa.Quantization()))
    assert same_tensors(snapshot(base), before)
    plain = adapt(base, PissaConfig(rank=4, method="lora-kaiming"))  # leaves the base alone as it is
    assert isinstance(plain, nn.Module)


def test_settings_that_contradict_are_refused() -> None:
    with pytest.raises(ConfigError, match="offset"):
        PissaConfig(rank=4, placement="offset", quantization=pissa.Quantization())
    with pytest.raises(ConfigError, match="residual, offset"):
        PissaConfig(rank=4, placement="ofset")  # pyright: ignore[reportArgumentType]
