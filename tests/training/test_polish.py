"""A polish lowers the error of the hidden states, changes no code, and goes on where it was stopped."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from small_runs import recipe, result_tensors, rows, run

import pissa
from pissa import PissaConfig, Quantization, adapt
from pissa.checkpoint.residual import residual_state
from pissa.errors import ConfigError
from pissa.live.record import record_of
from pissa.live.state import INITIAL, TRAINABLE, adapter_layers, parameters_of
from pissa.training import polish as polishing
from pissa.training.polish import Polish, hidden_states, polish
from tiny import largest_difference, logits_of, same_tensors, tiny_llama, tiny_tokenizer

pytest.importorskip("bitsandbytes")
STEPS = 40


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    """A rate at which few steps show on a tiny model."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(polishing, "RATE", 1e-3)
        yield


def text(count: int = 6) -> list[dict[str, torch.Tensor]]:
    """Batches of tokens with padding that must not count."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 384, (count, 4, 24), generator=generator)
    mask = torch.ones(4, 24, dtype=torch.int64)
    mask[0, 20:] = 0
    return [{"input_ids": rows, "attention_mask": mask} for rows in ids]


def start() -> tuple[PeftModel, list[dict[str, torch.Tensor]], list[torch.Tensor]]:
    """A model in 4 bits, its head too, the text, and what the full one puts out for it."""
    base, batches = tiny_llama(hidden=64), text()
    targets = hidden_states(base, batches)
    config = PissaConfig(4, target_modules=r".*(_proj|lm_head)", quantization=Quantization("nf4", iterations=2))
    return adapt(base, config), batches, targets


def factors(model: PeftModel, adapter: str = TRAINABLE) -> dict[str, torch.Tensor]:
    """Every factor by its layer's name and side."""
    found = {name: parameters_of(layer, adapter) for name, layer in adapter_layers(model).items()}
    return {
        f"{name}.{side}": p.detach().clone() for name, pair in found.items() for side, p in zip("AB", pair, strict=True)
    }


@pytest.fixture(scope="module")
def polished(tmp_path_factory: pytest.TempPathFactory) -> tuple[PeftModel, Polish, dict[str, torch.Tensor]]:
    """A polished model, what was done, and its residual as it was before."""
    model, batches, targets = start()
    plain: Any = model.get_base_model()
    before = {name: tensor.clone() for name, tensor in residual_state(plain).items()}
    return model, polish(model, batches, targets, STEPS, state=tmp_path_factory.mktemp("state") / "p"), before


def test_it_lowers_the_error_held_out_and_says_by_how_much(polished: Any) -> None:
    model, made, _ = polished
    assert made.error_after < 0.95 * made.error_before
    again = hidden_states(model.get_base_model(), text())
    targets = hidden_states(tiny_llama(hidden=64), text())
    mask = text()[0]["attention_mask"][..., None]
    held = (1, 4)
    apart = sum(float(((again[i] - targets[i]).square() * mask).sum()) for i in held)
    whole = sum(float((targets[i].square() * mask).sum()) for i in held)
    assert (apart / whole) ** 0.5 == pytest.approx(made.error_after, rel=1e-3)


def test_codes_and_everything_else_stay(polished: Any) -> None:
    model, _, before = polished
    assert same_tensors(residual_state(model.get_base_model()), before)


def test_the_polished_factors_are_the_initial_adapter(polished: Any, tmp_path: Path) -> None:
    model, made, _ = polished
    assert same_tensors(factors(model), factors(model, INITIAL))
    assert not any(p.requires_grad for layer in adapter_layers(model).values() for p in parameters_of(layer, INITIAL))
    pissa.save_residual(model, tmp_path / "saved")
    manifest = json.loads((tmp_path / "saved" / "pissa.json").read_text(encoding="utf-8"))
    assert manifest["polish"]["error_after"] == made.error_after
    assert torch.equal(logits_of(pissa.load(tmp_path / "saved").eval()), logits_of(model))


def test_certificates_bound_what_is_left_of_each_weight(polished: Any) -> None:
    model, base = polished[0], dict(tiny_llama(hidden=64).named_parameters())
    record = record_of(model)
    assert record is not None
    layers: dict[str, Any] = {**adapter_layers(model)}
    for name, layer in layers.items():
        W, whole = base[f"{name}.weight"].detach(), layer.get_delta_weight(TRAINABLE).detach()
        left = torch.linalg.vector_norm(W - pissa.live.quantized.dequantized(layer.base_layer) - whole)
        assert float(left / torch.linalg.vector_norm(W)) <= 1.0001 * record.certificates[name].rounding


def test_one_that_was_stopped_gives_the_same_factors(polished: Any, tmp_path: Path) -> None:
    class Stopped(Exception):
        pass

    def stop(step: int, error: float) -> None:
        if step == polishing.SAVE_EVERY + 1:
            raise Stopped

    state, steps = tmp_path / "p", []
    with pytest.raises(Stopped):
        polish(*start(), STEPS, state=state, progress=stop)
    model, batches, targets = start()
    polish(model, batches, targets, STEPS, state=state, progress=lambda step, error: steps.append(step))
    assert steps[0] == polishing.SAVE_EVERY + 1
    assert same_tensors(factors(model), factors(polished[0]))


def test_the_state_of_another_start_is_not_gone_on_with(tmp_path: Path) -> None:
    state, steps = tmp_path / "p", []
    polish(*start(), polishing.SAVE_EVERY, state=state)
    polish(*start(), polishing.SAVE_EVERY + 1, state=state, progress=lambda step, error: steps.append(step))
    assert steps[0] == 1


def test_a_polish_that_gains_nothing_is_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(polishing, "RATE", 10.0)
    model, batches, targets = start()
    before = factors(model)
    made = polish(model, batches, targets, 2, state=tmp_path / "p")
    assert made.error_after == made.error_before
    assert same_tensors(factors(model), before)


def test_a_run_is_polished_stopped_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, data = tmp_path / "base", rows(200)
    tiny_llama(hidden=64).save_pretrained(base)
    tiny_tokenizer().save_pretrained(base)
    settings = recipe(quantize="nf4", iterations=2, calibration="none", polish=polishing.SAVE_EVERY + 2, max_steps=2)
    whole = run(base, tmp_path / "whole", settings, data)
    assert whole.results["hidden_error_after"] < whole.results["hidden_error_before"]
    assert not (tmp_path / "whole" / "state" / "polish.safetensors").exists()

    save = polishing._save

    def cut(*arguments: Any) -> None:
        save(*arguments)
        raise RuntimeError("power cut")

    with monkeypatch.context() as patched:
        patched.setattr(polishing, "_save", cut)
        with pytest.raises(RuntimeError, match="power cut"):
            run(base, tmp_path / "stopped", settings, data)
    assert (tmp_path / "stopped" / "state" / "polish.safetensors").exists()
    again = run(base, tmp_path / "stopped", settings, data)
    assert same_tensors(result_tensors(tmp_path / "stopped"), result_tensors(tmp_path / "whole"))
    assert again.results["losses"] == whole.results["losses"]
    assert largest_difference(logits_of(pissa.load(tmp_path / "whole").eval()), logits_of(whole.model)) == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "polish without a format"),
        ({"method": "qlora"}, "leave polish out"),
        ({"method": "pissa+dora", "quantize": "nf4"}, "leave polish out"),
    ],
)
def test_a_polish_of_nothing_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        recipe(polish=4, **settings)


def test_a_single_batch_is_refused(tmp_path: Path) -> None:
    model, batches, targets = start()
    with pytest.raises(ConfigError, match="one batch"):
        polish(model, batches[:1], targets[:1], 2, state=tmp_path / "p")
