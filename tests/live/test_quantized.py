"""Layers of bitsandbytes hold the split's own codes: what they compute with is `split.residual`, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pissa import PissaConfig, Quantization, adapt, quantization_preset, reference, restore, split_weight
from pissa.calibrate.moments import second_moments
from pissa.errors import DataError, MissingExtraError, TargetError
from pissa.live.layers import place_of
from pissa.live.quantized import bits_of, dequantized, quantized_layer, quantized_layers, skip_patterns
from pissa.live.state import adapter_layers, base_layer
from pissa.live.targets import resolve_targets
from pissa.quantize.nf4 import quantize_nf4
from tiny import (
    largest_difference,
    logits_of,
    same_tensors,
    snapshot,
    tiny_gpt2,
    tiny_llama,
    token_batch,
    train_steps,
)

bnb = pytest.importorskip("bitsandbytes")
FORMATS = {
    "nf4": Quantization(iterations=1, momentum=0.0),
    "nf4, single": Quantization(iterations=1, momentum=0.0, double_quant=False, block_size=32),
    "int8": Quantization("int8", iterations=1, momentum=0.0),
    "qlora": quantization_preset("qlora"),
}
on_every_format = pytest.mark.parametrize("form", FORMATS)


def config(form: str, **settings: Any) -> PissaConfig:
    method = "lora-kaiming" if form == "qlora" else "pissa"
    return PissaConfig(**{"rank": 4, "method": method, "quantization": FORMATS[form], **settings})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@on_every_format
def test_a_layer_holds_the_splits_residual_and_multiplies_by_it(form: str, dtype: torch.dtype) -> None:
    linear = nn.Linear(128, 64, dtype=dtype)
    split = split_weight(linear.weight, config(form))
    assert split.packed is not None
    layer = quantized_layer(linear, split.packed)
    assert torch.equal(dequantized(layer), split.residual)
    x = torch.randn(3, 128, dtype=dtype, generator=torch.Generator().manual_seed(1))
    expected = x.double() @ split.residual.double().T + linear.bias.double()
    # LLM.int8() rounds its inputs to 8 bits as well
    tolerance = 0.05 if form == "int8" else {torch.float32: 1e-5, torch.bfloat16: 0.03, torch.float16: 0.01}[dtype]
    assert largest_difference(layer.eval()(x), expected) < tolerance
    assert torch.equal(dequantized(layer), split.residual)


def test_negative_scales_are_honoured_in_the_product() -> None:
    W = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    packed = quantize_nf4(W, double_quant=True, scale_search="signed")
    assert bool((packed.scales < 0).any()) and bool((packed.scales > 0).any())
    layer = quantized_layer(nn.Linear(64, 64, bias=False), packed).eval()
    assert torch.equal(dequantized(layer), packed.dequantize())
    assert largest_difference(layer(torch.eye(64)), packed.dequantize().T) < 1e-6


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
@on_every_format
def test_an_adapted_model_is_the_base_within_the_stated_error(form: str, make: Any) -> None:
    model, base = make(hidden=64), make(hidden=64)
    before = logits_of(model)
    adapted = adapt(model, config(form))
    start = logits_of(adapted)
    assert 0 < largest_difference(start, before) < 0.15
    layers = adapter_layers(adapted)
    for name, layer in layers.items():
        split = split_weight(place_of(base.get_submodule(name)).matrices(), config(form), name=f"{name}.weight")
        assert torch.equal(place_of(base_layer(layer)).matrices(), split.residual), name
        assert type(layer).__name__ in ("Linear4bit", "Linear8bitLt")
    train_steps(adapted.train(), 2)
    trained = logits_of(adapted.eval())
    assert largest_difference(trained, start) > 1e-3
    with reference(adapted):
        assert torch.equal(logits_of(adapted), start)
    assert torch.equal(logits_of(adapted), trained)
    restored = restore(adapted)
    assert not quantized_layers(restored) and not hasattr(restored.config, "quantization_config")
    assert largest_difference(logits_of(restored), before) < 0.15
    again = adapt(make(hidden=64), config(form))
    assert same_tensors(snapshot(restore(again, base)), snapshot(base))


def test_evaluating_before_training_and_saving_changes_nothing() -> None:
    """On CPUs with AVX512-bf16 bitsandbytes would repack the weights in the first evaluation."""
    results = []
    for evaluate_first in (False, True):
        model = adapt(tiny_llama(hidden=64, dtype=torch.bfloat16), config("nf4"))
        if evaluate_first:
            logits_of(model.eval())
        losses = train_steps(model.train(), 2)
        if evaluate_first:
            logits_of(model.eval())
        results.append((losses, snapshot(model)))
    (losses, state), (others, other_state) = results
    assert losses == others
    assert same_tensors(state, other_state)


def test_gradients_on_codes_are_those_on_the_dequantised_weights() -> None:
    quantised: Any = adapt(tiny_llama(hidden=64), config("nf4"))
    dense: Any = adapt(tiny_llama(hidden=64), config("nf4"))
    for layer in adapter_layers(dense).values():
        wrapped: Any = layer
        plain = nn.Linear(1, 1, bias=False)
        plain.weight = nn.Parameter(place_of(base_layer(layer)).matrices(), requires_grad=False)
        wrapped.base_layer = plain
    batch = token_batch()
    for model in (quantised, dense):
        model.train()(input_ids=batch, labels=batch).loss.backward()
    for (name, ours), theirs in zip(quantised.named_parameters(), dense.parameters(), strict=True):
        if ours.grad is not None:
            assert theirs.grad is not None
            assert largest_difference(ours.grad, theirs.grad) <= 1e-5 * (1 + float(theirs.grad.abs().max())), name


@pytest.mark.filterwarnings("ignore:untied")
def test_a_tied_head_is_untied_and_tied_again() -> None:
    model = tiny_llama(hidden=64, tie=True)
    embedding = model.model.embed_tokens.weight.detach().clone()
    adapted: Any = adapt(model, config("nf4", target_modules=r".*(lm_head|q_proj)"))
    plain = adapted.get_base_model()
    assert bits_of(base_layer(plain.lm_head)) == 4
    assert torch.equal(plain.model.embed_tokens.weight, embedding)
    restored: Any = restore(adapted)
    assert restored.lm_head.weight is restored.model.embed_tokens.weight
    assert torch.equal(restored.lm_head.weight, embedding)


def test_what_cannot_be_quantised_is_named_before_anything_changes() -> None:
    class Special(nn.Linear):
        pass

    model = tiny_llama(hidden=32)
    before = snapshot(model)
    with pytest.raises(TargetError, match=r"layers\.0\.self_attn\.q_proj \(32 inputs\).*block size, 64"):
        adapt(model, config("nf4", target_modules=["q_proj", "down_proj"]))
    assert same_tensors(snapshot(model), before) and not quantized_layers(model)
    adapt(tiny_llama(hidden=32), config("nf4, single"))
    special = nn.Sequential(Special(64, 64))
    with pytest.raises(TargetError, match=r"0 \(Special\)"):
        adapt(special, config("nf4"))


def test_a_missing_bitsandbytes_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    model = tiny_llama(hidden=64)
    before = snapshot(model)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'pissa\[quant\]'"):
        adapt(model, config("nf4"))
    assert same_tensors(snapshot(model), before)


def test_a_name_inside_anothers_does_not_skip_it() -> None:
    model = nn.ModuleDict({"gate": nn.Linear(2, 2), "gate_proj": nn.Linear(2, 2), "head": nn.Linear(2, 2)})
    assert skip_patterns(model, {"gate_proj"}) == ["gate$", "head"]


def test_a_deep_copy_holds_the_same_codes(tmp_path: Path) -> None:
    from copy import deepcopy

    model = adapt(tiny_llama(hidden=64), config("nf4"))
    assert torch.equal(logits_of(deepcopy(model)), logits_of(model))


def test_streamed_moments_give_the_same_model_as_all_of_them_at_once() -> None:
    settings = config("nf4", quantization=Quantization(iterations=2, rounding="gptq"))
    names = [target.name for target in resolve_targets(tiny_llama(hidden=64), settings)]
    batches = [{"input_ids": token_batch()}]
    moments = list(second_moments(tiny_llama(hidden=64), batches, names))
    at_once = adapt(tiny_llama(hidden=64), settings, moments={name: m.matrix for m in moments for name in m.names})
    model = tiny_llama(hidden=64)
    streamed = adapt(model, settings, moments=second_moments(model, batches, names))
    assert same_tensors(snapshot(streamed), snapshot(at_once))
    model = tiny_llama(hidden=64)
    before = snapshot(model)
    with pytest.raises(DataError, match=r"no second moment is given for .*down_proj"):
        adapt(model, settings, moments=[m for m in moments if "down_proj" not in m.names[0]])
    assert same_tensors(snapshot(model), before)
