"""Every method in every dtype: the base's function at step 0, and one function from there to the merged model."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, PeftModel
from torch import nn
from transformers import AutoModelForCausalLM

import pissa
from pissa import PissaConfig, adapt, export_lora, export_merged, reference, restore
from pissa.errors import ConfigError, TargetError, WeightError
from pissa.export.files import write_lora
from pissa.export.lora import export_state
from pissa.live.adalora import penalty
from pissa.live.state import INITIAL, TRAINABLE, adapter_layers
from pissa.training.optimizer import parameter_groups
from sampled import thinned
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

METHODS: dict[str, dict[str, Any]] = {
    "pissa": {},
    "medium": {"component": "medium"},
    "minor": {"component": "minor"},
    "scored": {"component": "scored"},
    "random-pissa": {"method": "random-pissa"},
    "random-pissa 0.5": {"method": "random-pissa", "random_fraction": 0.5},
    "cura": {"method": "cura"},
    "cura intersection": {"method": "cura", "cur_core": "intersection", "cur_rcond": 0.3},
    "robust-pissa": {"method": "robust-pissa"},
    "lora": {"method": "lora-kaiming"},
    "dora": {"method": "lora-kaiming", "use_dora": True},
    "pissa+dora": {"use_dora": True},
    "pissa+dora rslora": {"use_dora": True, "use_rslora": True, "alpha": 3},
    "cura+dora": {"method": "cura", "use_dora": True},
    "adalora": {"method": "lora-gaussian", "use_adalora": True},
    "pissa+adalora": {"use_adalora": True},
    "minor+adalora": {"component": "minor", "use_adalora": True, "alpha": 6},
}
MODELS = {"llama": partial(tiny_llama, layers=1), "gpt2": partial(tiny_gpt2, layers=1)}
NOISE = {torch.float32: 2e-6, torch.float16: 3e-3, torch.bfloat16: 2e-2}
"""Of a logit; logits are about 0.5."""


def adapted(name: str, model: Any, placement: str = "residual") -> PeftModel:
    settings = {"rank": 4, "placement": placement, **METHODS[name]}
    batches = None
    if settings.get("component") == "scored":
        batches = [{"input_ids": token_batch(seed=1), "labels": token_batch(seed=1)}]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*a bad draw")
        return adapt(model, PissaConfig(**settings), batches=batches)


def placements(name: str) -> list[str]:
    return ["residual"] if METHODS[name].get("use_adalora") else ["residual", "offset"]


CASES = [(name, placement) for name in METHODS for placement in placements(name)]


@pytest.fixture(scope="module")
def table() -> Iterator[list[tuple[str, ...]]]:
    rows: list[tuple[str, ...]] = []
    yield rows
    print("\nfunction at step 0: largest difference of a logit")
    for row in rows:
        print("{:20} {:9} {:6} {:15} {}".format(*row))


@pytest.mark.parametrize(
    ("name", "placement", "dtype", "kind"),
    thinned(CASES, product(NOISE, MODELS), always=[(torch.float32, "llama")]),
    ids=str,
)
def test_the_function_at_step_0_is_the_base_s(
    name: str, placement: str, dtype: torch.dtype, kind: str, table: list[tuple[str, ...]]
) -> None:
    base = logits_of(MODELS[kind](dtype=dtype))
    model = adapted(name, MODELS[kind](dtype=dtype), placement)
    found = largest_difference(logits_of(model), base)
    table.append((name, placement, kind, str(dtype), f"{found:.1e}"))
    assert found <= NOISE[dtype]
    with reference(model):
        assert largest_difference(logits_of(model), base) <= NOISE[dtype]


@pytest.mark.parametrize(("name", "placement", "kind"), thinned(CASES, MODELS))
def test_trained_saved_loaded_exported_and_merged_it_is_one_function(
    name: str, placement: str, kind: str, tmp_path: Path
) -> None:
    make = MODELS[kind]
    base = logits_of(make())
    model = adapted(name, make(), placement)
    train_steps(model, 4)
    trained, bits = logits_of(model), snapshot(model)
    assert largest_difference(trained, base) > 1e-3
    with reference(model):
        assert largest_difference(logits_of(model), base) <= NOISE[torch.float32]
    assert torch.equal(logits_of(model), trained)

    model.save_pretrained(str(tmp_path / "saved"))
    export = export_lora(model, tmp_path / "lossless")
    state = export_state(model)
    (tmp_path / "state").mkdir()
    write_lora(state, tmp_path / "state")
    assert export.config.use_dora == ("dora" in name) and not isinstance(export.config, AdaLoraConfig)
    continued: list[list[float]] = []
    for directory in ("saved", "lossless", "state"):
        loaded = pissa.load(tmp_path / directory, make(), is_trainable=True)
        assert largest_difference(logits_of(loaded), trained) < 5e-6, directory
        with reference(loaded):
            assert largest_difference(logits_of(loaded), base) < 5e-6, directory
        if directory != "lossless" or "adalora" not in name:
            assert same_tensors(bits, snapshot(loaded)), directory
            continued.append(train_steps(loaded, 1, first=9))
    # what is loaded from one place trains as what is loaded from another
    assert len(continued) >= 2 and all(losses == continued[0] for losses in continued)
    for directory in ("lossless", "state"):
        plain = PeftModel.from_pretrained(make(), str(tmp_path / directory)).eval()
        assert largest_difference(logits_of(plain), trained) < 5e-6, directory
    for source in (model, tmp_path / "lossless"):
        out = tmp_path / f"merged-{type(source).__name__}"
        make().save_pretrained(tmp_path / "base")
        export_merged(source, out, base=str(tmp_path / "base")) if source is not model else export_merged(source, out)
        merged = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
        assert largest_difference(logits_of(merged), trained) < 5e-6
    runtime: Any = model
    runtime.merge_adapter()
    assert largest_difference(logits_of(model), trained) < 5e-6
    runtime.unmerge_adapter()
    assert largest_difference(logits_of(restore(model)), base) < 5e-6


# DoRA


@pytest.mark.parametrize("placement", ["residual", "offset"])
def test_dora_computes_the_paper_s_formula_with_the_true_weight_s_magnitudes(placement: str) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(12, 9)
    W, bias = layer.weight.detach().clone(), layer.bias.detach().clone()
    model: Any = adapt(nn.Sequential(layer), PissaConfig(3, alpha=2, use_dora=True, placement=placement))  # pyright: ignore
    held = adapter_layers(model)["0"]
    torch.testing.assert_close(held.lora_magnitude_vector[TRAINABLE].weight, W.norm(dim=1))
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.mul_(1.1).add_(0.05)
    x = torch.randn(4, 12)
    computed = model(x)  # which also puts an offset adapter's frozen half back
    A, B, m = (
        held.lora_A[TRAINABLE].weight,
        held.lora_B[TRAINABLE].weight,
        held.lora_magnitude_vector[TRAINABLE].weight,
    )
    V = held.get_base_layer().weight + held.scaling[TRAINABLE] * B @ A
    expected = x @ (m / V.norm(dim=1))[:, None].mul(V).mT + bias
    torch.testing.assert_close(computed, expected)


def test_a_row_of_zeros_which_dora_would_divide_by_is_refused_by_name() -> None:
    model: Any = tiny_llama()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3] = 0
    with pytest.raises(WeightError, match=r"some are zero in model\.layers\.1\.mlp\.up_proj"):
        adapt(model, PissaConfig(4, use_dora=True))
    adapt(model, PissaConfig(4, use_dora=True, exclude_modules=["layers.1.mlp.up_proj"]))


@pytest.mark.parametrize("variant", ["use_dora", "use_adalora"])
def test_kinds_of_layers_that_a_variant_does_not_know_are_refused_by_name(variant: str) -> None:
    model, settings = nn.Sequential(nn.Embedding(10, 8), nn.Linear(8, 8)), dict[str, Any]({variant: True})
    with pytest.raises(TargetError, match=r"cannot adapt 0 \(Embedding: (DoRA|AdaLoRA) is for linear layers\)"):
        adapt(model, PissaConfig(2, target_modules=["0", "1"], **settings))


# AdaLoRA


def test_adalora_trains_values_apart_and_never_prunes() -> None:
    model: Any = adapted("pissa+adalora", tiny_llama())
    trainable = {name.split(".")[-2] for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == {"lora_A", "lora_B", "lora_E"}
    assert list(model.peft_config) == [TRAINABLE, INITIAL]
    for step in range(5):
        model(input_ids=token_batch(), labels=token_batch()).loss.backward()
        model.base_model.update_and_allocate(step)
        model.zero_grad()
    for layer in adapter_layers(model).values():
        held: Any = layer
        assert (held.lora_E[TRAINABLE] != 0).all()
        P, Q = held.lora_A[TRAINABLE].detach(), held.lora_B[TRAINABLE].detach()
        torch.testing.assert_close(P @ P.mT, torch.eye(4), rtol=0, atol=1e-5)
        torch.testing.assert_close(Q.mT @ Q, torch.eye(4), rtol=0, atol=1e-5)
    found = penalty(model, TRAINABLE)
    assert found is not None and float(found) < 1e-8
    assert penalty(adapted("pissa", tiny_llama()), TRAINABLE) is None


def test_what_does_not_go_together_is_refused_in_one_line() -> None:
    for settings, said in (
        ({"use_dora": True, "use_adalora": True}, "use_adalora does not go with use_dora"),
        ({"use_adalora": True, "alpha_pattern": {"q_proj": 2.0}}, "rank_pattern, alpha_pattern and rank_budget"),
        ({"orthogonality": 0.1}, "orthogonality is AdaLoRA's"),
    ):
        with pytest.raises(ConfigError, match=said) as caught:
            PissaConfig(4, **settings)  # pyright: ignore
        assert "\n" not in str(caught.value)


# LoRA+


@pytest.mark.parametrize("name", ["lora", "pissa", "pissa+dora", "pissa+adalora"])
def test_lora_plus_gives_b_its_own_rate_and_every_parameter_one_group(name: str) -> None:
    model = adapted(name, tiny_llama())
    names = {parameter: name for name, parameter in model.named_parameters() if parameter.requires_grad}
    decayed = [n for n in names.values() if "magnitude" not in n]
    groups = parameter_groups(model, decayed, learning_rate=1e-3, ratio=16, weight_decay=0.1)
    assert groups[0]["lr"] == 1e-3
    seen = [names[parameter] for group in groups for parameter in group["params"]]
    assert sorted(seen) == sorted(names.values())
    for group in groups:
        for parameter in group["params"]:
            assert (group["lr"] == 16e-3) == (".lora_B." in names[parameter])
            assert (group["weight_decay"] == 0) == ("magnitude" in names[parameter])


def test_a_base_in_4_bits_takes_dora_and_adalora_and_one_in_8_bits_adalora_alone(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    tiny_llama(hidden=64).save_pretrained(str(tmp_path / "base"))

    def base(bits: int) -> Any:
        options: dict[str, Any] = (
            {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32}
            if bits == 4
            else {"load_in_8bit": True}
        )
        settings = BitsAndBytesConfig(**options)
        return AutoModelForCausalLM.from_pretrained(
            tmp_path / "base", quantization_config=settings, dtype=torch.float32
        )

    cases: list[tuple[int, dict[str, Any]]] = [
        (4, {"use_dora": True, "placement": "offset"}),
        (4, {"use_dora": True, "method": "lora-kaiming"}),
        (4, {"use_adalora": True, "method": "lora-kaiming"}),
        (8, {"use_adalora": True, "method": "lora-kaiming"}),
    ]
    for number, (bits, settings) in enumerate(cases):
        model = adapt(base(bits), PissaConfig(4, **settings))
        with reference(model):
            start = logits_of(model)
        assert largest_difference(logits_of(model), start) < 1e-5
        train_steps(model.train(), 3)
        trained = logits_of(model.eval())
        assert largest_difference(trained, start) > 1e-4
        export_lora(model, tmp_path / f"export-{number}")
        assert (
            largest_difference(logits_of(pissa.load(tmp_path / f"export-{number}", base(bits)).eval()), trained) < 1e-5
        )
    for settings in ({"placement": "offset"}, {"method": "lora-kaiming"}):
        with pytest.raises(WeightError, match=r"PEFT has no DoRA of 8-bit layers \(model\.layers\.0"):
            adapt(base(8), PissaConfig(4, use_dora=True, **settings))  # pyright: ignore
