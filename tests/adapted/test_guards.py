"""What other libraries do to an adapted model through PEFT's methods keeps the base the base."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

import pissa
from pissa import PissaConfig, adapt, export_lora, reference
from pissa.errors import PissaError
from pissa.live.offset import second_half
from pissa.live.state import adapter_layers
from tiny import largest_difference, logits_of, same_tensors, snapshot, tiny_llama, train_steps

PLACEMENTS = ("residual", "offset")
NOISE = 1e-5
both = pytest.mark.parametrize("placement", PLACEMENTS)


def trained(placement: Any, **settings: Any) -> PeftModel:
    model = adapt(tiny_llama(), PissaConfig(4, placement=placement, **settings))
    train_steps(model, 3)
    return model


def base_logits() -> torch.Tensor:
    return logits_of(tiny_llama())


@both
def test_disable_adapter_is_the_base_and_leaves_no_trace(placement: str) -> None:
    model = trained(placement, modules_to_save=["lm_head"])
    before, now = snapshot(model), logits_of(model)
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    with model.disable_adapter():
        assert largest_difference(logits_of(model), base_logits()) <= (NOISE if placement == "residual" else 0)
    assert same_tensors(snapshot(model), before) and torch.equal(logits_of(model), now)
    assert flags == {name: parameter.requires_grad for name, parameter in model.named_parameters()}


@both
@pytest.mark.parametrize("settings", [{}, {"rank_pattern": {"q_proj": 2}}, {"use_rslora": True, "alpha": 3.0}])
def test_a_second_adapter_starts_at_the_base_and_trains_as_the_first_did(
    placement: str, settings: dict[str, Any]
) -> None:
    model = trained(placement, **settings)
    first, weights = logits_of(model), snapshot(model)
    model.add_adapter("second", model.peft_config["default"])
    assert {name: weights[name] for name in weights} == {n: weights[n] for n in snapshot(model) if n in weights}
    assert torch.equal(logits_of(model), first)
    model.set_adapter("second")
    assert largest_difference(logits_of(model), base_logits()) < NOISE
    train_steps(model, 3)
    torch.testing.assert_close(logits_of(model), first, rtol=0, atol=1e-4)
    export = export_lora(model)
    model.set_adapter("default")
    assert torch.equal(logits_of(model), first)
    for name, tensor in export_lora(model).items():
        torch.testing.assert_close(export[name], tensor, rtol=0, atol=1e-4)
    with reference(model):
        assert largest_difference(logits_of(model), base_logits()) < NOISE


def test_a_second_adapter_s_frozen_half_stays() -> None:
    model = trained("offset")
    model.add_adapter("second", model.peft_config["default"])
    model.set_adapter("second")
    held: Any = next(iter(adapter_layers(model).values())).lora_A["second"]
    before = second_half(held.weight.detach(), 0).clone()
    trainable = [p for p in model.parameters() if p.requires_grad]
    train_steps(model, 2, optimizer=torch.optim.AdamW(trainable, lr=1e-2, weight_decay=0.5))
    assert torch.equal(second_half(held.weight.detach(), 0), before)


@both
@pytest.mark.parametrize("how", ["pissa", "pissa_niter_4", "olora"])
def test_peft_s_own_decomposition_of_a_second_adapter_is_refused(placement: str, how: Any) -> None:
    """PEFT takes the residual apart once more and tells nobody; see tests/peers."""
    model = trained(placement)
    before = snapshot(model)
    with pytest.raises(PissaError, match=r'model\.peft_config\["default"\]') as caught:
        model.add_adapter("second", LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=how))
    assert "\n" not in str(caught.value) and same_tensors(snapshot(model), before)
    assert "second" not in model.peft_config


def test_a_plain_lora_is_refused_on_residuals_and_taken_on_the_base() -> None:
    plain = LoraConfig(r=2, target_modules=["q_proj"])
    with pytest.raises(PissaError, match="offset"):
        trained("residual").add_adapter("second", plain)
    model = trained("offset")
    model.add_adapter("second", plain)
    model.set_adapter("second")
    assert torch.equal(logits_of(model), base_logits())


def test_another_adapter_is_not_loaded_onto_residuals(tmp_path: Path) -> None:
    model = trained("residual")
    export_lora(model, tmp_path / "export")
    wrong = adapt(tiny_llama(), PissaConfig(4))
    with pytest.raises(PissaError, match=r"pissa\.load"):
        wrong.load_adapter(str(tmp_path / "export"), "second")
    offset = trained("offset")
    offset.load_adapter(str(tmp_path / "export"), "second")
    offset.set_adapter("second")
    torch.testing.assert_close(logits_of(offset), logits_of(model), rtol=0, atol=NOISE)


def test_an_offset_adapter_loaded_over_another_keeps_its_own_frozen_half(tmp_path: Path) -> None:
    other: Any = tiny_llama(seed=1)
    saved = adapt(other, PissaConfig(4, placement="offset"))
    saved.save_pretrained(str(tmp_path / "saved"))
    model = adapt(tiny_llama(), PissaConfig(4, placement="offset"))
    model.load_adapter(str(tmp_path / "saved"), "default", is_trainable=True)
    train_steps(model, 2)
    for name, layer in adapter_layers(model).items():
        mine: Any = layer.lora_B["default"]
        theirs: Any = adapter_layers(saved)[name].lora_B["default"]
        assert torch.equal(second_half(mine.weight.detach(), 1), second_half(theirs.weight.detach(), 1))


def test_a_copied_model_guards_itself() -> None:
    model = trained("residual")
    twin = copy.deepcopy(model)
    train_steps(twin, 2)
    assert largest_difference(logits_of(twin), logits_of(model)) > 1e-3
    with twin.disable_adapter():
        assert largest_difference(logits_of(twin), base_logits()) < NOISE
        assert largest_difference(logits_of(model), base_logits()) > 1e-3
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(logits_of(again), logits_of(model))


def test_a_saved_offset_adapter_is_one_adapter_that_plain_peft_loads_right(tmp_path: Path) -> None:
    model = trained("offset")
    model.save_pretrained(str(tmp_path / "saved"))
    assert {path.name for path in (tmp_path / "saved").iterdir()} == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "pissa.json",
    }
    plain = PeftModel.from_pretrained(tiny_llama(), str(tmp_path / "saved")).eval()
    assert torch.equal(logits_of(plain), logits_of(model))
    beside = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"]))  # pyright: ignore
    beside.load_adapter(str(tmp_path / "saved"), "second")
    beside.set_adapter("second")
    assert torch.equal(logits_of(beside.eval()), logits_of(model))
    assert torch.equal(logits_of(pissa.load(tmp_path / "saved", tiny_llama())), logits_of(model))
