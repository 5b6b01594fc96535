"""Adapting a live model: the same function at step 0, and nobody else's tensors change."""

from __future__ import annotations

import copy
import warnings
from itertools import product
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from pissa import PissaConfig, adapt, reference, restore
from pissa.config import METHODS, Method
from pissa.live.layers import place_of
from pissa.live.state import INITIAL, TRAINABLE, adapter_factors, adapter_layers, base_layer
from sampled import thinned
from tiny import (
    global_generators,
    largest_difference,
    logits_of,
    same_tensors,
    snapshot,
    tiny_gpt2,
    tiny_llama,
    train_steps,
)

MODELS = {"llama": tiny_llama, "gpt2": tiny_gpt2}
# residual and product are rounded once per layer; the logits of the tiny models are of size 1
LOGIT_NOISE = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 5e-2}
PATTERNS: dict[str, Any] = {
    "alpha": 3.0,
    "use_rslora": True,
    "rank_pattern": {r"layers\.0\..*|h\.0\..*": 2},
    "alpha_pattern": {r"layers\.1\..*|h\.1\..*": 7.5},
}

SETTINGS: dict[str, dict[str, Any]] = {"plain": {}, "patterns": PATTERNS}


def matrices(model: nn.Module, names: list[str]) -> dict[str, Tensor]:
    return {name: place_of(model.get_submodule(name)).matrices().clone() for name in names}


def lora_parameters(model: nn.Module, adapter: str) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if ".lora_" in name and f".{adapter}." in name}


@pytest.mark.parametrize(
    ("kind", "method", "dtype", "settings"),
    thinned(MODELS, METHODS, product(LOGIT_NOISE, SETTINGS), always=[(torch.float32, "patterns")]),
    ids=str,
)
def test_the_function_at_step_0_is_the_base_s(kind: str, dtype: torch.dtype, method: Method, settings: str) -> None:
    base: Any = MODELS[kind](dtype=dtype)
    model = adapt(MODELS[kind](dtype=dtype), PissaConfig(4, method=method, **SETTINGS[settings]))
    factors = adapter_factors(model)
    originals = matrices(base, list(factors))
    record: Any = model.pissa
    for name, f in factors.items():
        assert f.A.dtype == f.B.dtype == torch.float32
        W, residual = originals[name].double(), place_of(base_layer(adapter_layers(model)[name])).matrices()
        assert residual.dtype == dtype
        error = float((residual.double() + f.scale * f.B.double() @ f.A.double() - W).norm() / W.norm())
        assert error <= record.certificates[name].rounding + 1e-6
        assert error <= 2.0**-8 if not method.startswith("lora-") else error == 0
    assert largest_difference(logits_of(model), logits_of(base)) <= (
        LOGIT_NOISE[dtype] if not method.startswith("lora-") else 0
    )


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", MODELS)
def test_the_caller_s_tensors_are_never_mutated(kind: str, method: Method) -> None:
    model: Any = MODELS[kind]()
    held = dict(model.named_parameters())
    before = {name: parameter.detach().clone() for name, parameter in held.items()}
    adapted = adapt(model, PissaConfig(4, method=method))
    train_steps(adapted)
    assert same_tensors(before, {name: parameter.detach() for name, parameter in held.items()})


@pytest.mark.parametrize("method", METHODS)
def test_adapt_is_deterministic_and_leaves_global_generators_alone(method: Method) -> None:
    first_model, second_model = tiny_llama(), tiny_llama()
    before = global_generators()
    config = PissaConfig(4, method=method, seed=11, modules_to_save=["lm_head"])
    first = snapshot(adapt(first_model, config))
    assert global_generators() == before
    torch.manual_seed(2)
    assert same_tensors(first, snapshot(adapt(second_model, config)))
    other = snapshot(adapt(tiny_llama(), PissaConfig(4, method=method, seed=12, modules_to_save=["lm_head"])))
    assert same_tensors(first, other) == (method in ("pissa", "robust-pissa"))


@pytest.mark.parametrize("method", METHODS)
def test_only_the_default_adapter_is_trainable_and_active(method: Method) -> None:
    model = adapt(tiny_llama(), PissaConfig(4, method=method))
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable == set(lora_parameters(model, TRAINABLE)) and len(trainable) == 2 * 14
    assert model.active_adapters == [TRAINABLE]
    assert list(model.peft_config) == ([TRAINABLE, INITIAL] if not method.startswith("lora-") else [TRAINABLE])


@pytest.mark.parametrize("method", METHODS)
def test_training_moves_the_default_adapter_alone(method: Method) -> None:
    model = adapt(tiny_llama(), PissaConfig(4, method=method))
    before, moving = snapshot(model), set(lora_parameters(model, TRAINABLE))
    losses = train_steps(model)
    changed = {name for name, tensor in snapshot(model).items() if not torch.equal(tensor, before[name])}
    assert changed == moving and len(set(losses)) == len(losses)


def test_gradients_at_step_0_reach_both_factors_of_pissa_and_only_b_of_lora() -> None:
    def gradients(method: Method) -> dict[str, float]:
        model = adapt(tiny_llama(), PissaConfig(4, method=method))
        tokens = torch.arange(20)[None]
        model(input_ids=tokens, labels=tokens).loss.backward()
        gradients = {name: p.grad for name, p in lora_parameters(model, TRAINABLE).items()}
        return {name: float(gradient.abs().max()) for name, gradient in gradients.items() if gradient is not None}

    assert all(size > 0 for size in gradients("pissa").values())
    for name, size in gradients("lora-kaiming").items():
        assert (size == 0) == (".lora_A." in name)


def test_training_mode_stays_as_it_was_layer_by_layer() -> None:
    for mode in (True, False):
        model = adapt(tiny_llama().train(mode), PissaConfig(4, modules_to_save=["lm_head"]))
        assert {module.training for module in model.modules()} == {mode}
    mixed = tiny_llama().train()
    mixed.model.layers[0].eval()
    adapted = adapt(mixed, PissaConfig(4))
    assert {name: layer.training for name, layer in adapted.get_base_model().named_modules()} == {
        name: ".layers.0" not in f".{name}" for name, _ in adapted.get_base_model().named_modules()
    }


def test_forced_dropout_acts_in_training_only() -> None:
    base = logits_of(tiny_llama())
    model = adapt(tiny_llama(), PissaConfig(8, dropout=0.5, allow_dropout=True))
    assert largest_difference(logits_of(model), base) < 1e-5
    model.train()
    assert largest_difference(logits_of(model), base) > 1e-2
    with reference(model):
        assert largest_difference(logits_of(model), base) < 1e-5


def test_progress_names_every_target_in_order() -> None:
    calls: list[tuple[str, int, int]] = []
    model = adapt(tiny_llama(), PissaConfig(2, target_modules=["q_proj"]), progress=lambda *call: calls.append(call))
    names = ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"]
    assert calls == [(names[0], 1, 2), (names[1], 2, 2)]
    record: Any = model.pissa
    assert list(record.certificates) == names


def test_modules_to_save_are_trained_in_full_and_the_reference_keeps_the_base_s() -> None:
    base = tiny_llama()
    model: Any = adapt(tiny_llama(), PissaConfig(4, modules_to_save=["lm_head"]))
    train_steps(model)
    head = model.get_base_model().lm_head
    assert not torch.equal(head.modules_to_save[TRAINABLE].weight, base.lm_head.weight)
    assert torch.equal(head.original_module.weight, base.lm_head.weight)
    with reference(model):
        assert largest_difference(logits_of(model), logits_of(base)) < 1e-5


def test_a_model_without_a_config_is_adapted_too() -> None:
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 9), nn.GELU(), nn.Linear(9, 3))
    x = torch.randn(4, 6, generator=generator)
    before = model(x)
    torch.testing.assert_close(adapt(model, PissaConfig(2))(x), before, rtol=1e-5, atol=1e-6)


# Tied embeddings


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_adapting_a_tied_head_leaves_the_embedding_bit_for_bit_and_warns_once(kind: str) -> None:
    model: Any = tiny_llama(tie=True) if kind == "llama" else tiny_gpt2()
    embedding = model.get_input_embeddings()
    before, function = embedding.weight.detach().clone(), logits_of(model)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        adapted = adapt(model, PissaConfig(4, target_modules=["lm_head"]))
    untied = [str(warning.message) for warning in said if "untied" in str(warning.message)]
    assert len(untied) == 1 and "lm_head" in untied[0] and "restore" in untied[0]
    assert largest_difference(logits_of(adapted), function) < 1e-5
    train_steps(adapted)
    assert torch.equal(embedding.weight, before)
    assert largest_difference(logits_of(adapted), function) > 1e-2
    with reference(adapted):
        assert largest_difference(logits_of(adapted), function) < 1e-5


def test_a_lora_on_a_tied_head_needs_no_untying() -> None:
    model = tiny_llama(tie=True)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        adapted: Any = adapt(model, PissaConfig(4, target_modules=["lm_head"], method="lora-kaiming"))
    assert not [warning for warning in said if "untied" in str(warning.message)]
    inner = adapted.get_base_model()
    assert inner.lm_head.base_layer.weight is inner.model.embed_tokens.weight


# PEFT as the oracle, and where it fails


def adapted_by_peft(model: Any, how: Any, **settings: Any) -> Any:
    return get_peft_model(model, LoraConfig(lora_alpha=settings["r"], init_lora_weights=how, **settings))


def exact_svd_bounds(W: torch.Tensor, rank: int) -> dict[str, float]:
    """How far two backward-stable fp32 SVDs of W (m, n) can differ, on any processor.

    Each is exact for some W + E with ‖E‖ ≤ max(m, n)·u·‖W‖ (LAPACK Users' Guide, section 4.9), u the unit roundoff. E
    moves the product of the first r triplets by at most ‖E‖·σ_r / (σ_r − σ_{r+1}), and the i-th pair of vectors by
    ‖E‖ / (the distance of σ_i to its neighbours) (Wedin); a factor's column is √σ_i times such a vector, and √σ_i moves
    by ‖E‖ / (2√σ_i). Taking the difference W − B·A rounds once more, by at most u·‖W‖.
    """
    s = torch.linalg.svdvals(W.double())
    u = torch.finfo(torch.float32).eps / 2
    E = max(W.shape) * u * float(W.double().norm())
    gaps = s[:-1] - s[1:]
    nearest = torch.minimum(gaps[:rank], torch.cat([gaps[:1], gaps[: rank - 1]]))
    columns = s[:rank].sqrt() / nearest + 0.5 / s[:rank].sqrt()
    return {
        "product": 2 * (E * float(s[rank - 1] / gaps[rank - 1]) + u * float(W.double().norm())),
        "factor": 2 * E * float(columns.norm()),
    }


def test_residual_and_factors_equal_peft_s_exact_pissa() -> None:
    targets = ["q_proj", "k_proj", "up_proj", "down_proj"]
    ours = adapt(tiny_llama(), PissaConfig(4, target_modules=targets, algorithm="exact"))
    theirs = adapted_by_peft(tiny_llama(), "pissa", r=4, target_modules=targets)
    expected = adapter_factors(theirs)
    assert list(expected) == list(adapter_factors(ours))
    weights = dict(tiny_llama().named_modules())
    for name, f in adapter_factors(ours).items():
        mine, its = (place_of(base_layer(adapter_layers(model)[name])).matrices() for model in (ours, theirs))
        e, bounds = expected[name], exact_svd_bounds(place_of(weights[name]).matrices(), 4)
        assert float((mine - its).norm()) <= bounds["product"]
        assert float((f.scale * f.B @ f.A - e.scale * e.B @ e.A).norm()) <= bounds["product"]
        signs = torch.sign((f.A * e.A).sum(1))
        assert float((f.A * signs[:, None] - e.A).norm()) <= bounds["factor"]
        assert float((f.B * signs - e.B).norm()) <= bounds["factor"]


def test_disabling_the_adapter_gives_the_residual_in_peft_and_the_base_in_ours() -> None:
    base = tiny_llama()
    ours = adapt(tiny_llama(), PissaConfig(8))
    theirs = adapted_by_peft(tiny_llama(), "pissa", r=8, target_modules=list(adapter_layers(ours)))
    residual = copy.deepcopy(base)
    with torch.no_grad():
        for name, layer in adapter_layers(ours).items():
            residual.get_submodule(name).weight.copy_(base_layer(layer).weight)  # pyright: ignore
    with theirs.disable_adapter():
        assert largest_difference(logits_of(theirs), logits_of(residual)) < 1e-5
        assert largest_difference(logits_of(theirs), logits_of(base)) > 0.05
    with ours.disable_adapter():
        assert largest_difference(logits_of(ours), logits_of(base)) < 1e-5


def test_a_second_adapter_decomposes_the_residual_in_peft_and_not_in_ours() -> None:
    base = logits_of(tiny_llama())
    ours = adapt(tiny_llama(), PissaConfig(8))
    theirs = adapted_by_peft(tiny_llama(), "pissa", r=8, target_modules=list(adapter_layers(ours)))
    for model, right in ((ours, True), (theirs, False)):
        model.add_adapter("second", model.peft_config[TRAINABLE])
        assert (largest_difference(logits_of(model), base) < 1e-5) == right


def test_a_tied_embedding_changes_in_peft_and_not_in_ours() -> None:
    base: Any = tiny_llama(tie=True)
    theirs = adapted_by_peft(tiny_llama(tie=True), "pissa", r=8, target_modules=["lm_head"])
    assert largest_difference(theirs.get_input_embeddings().weight, base.get_input_embeddings().weight) > 1e-3
    with pytest.warns(UserWarning, match="untied lm_head"):
        ours: Any = adapt(tiny_llama(tie=True), PissaConfig(8, target_modules=["lm_head"]))
    assert torch.equal(ours.get_input_embeddings().weight, base.get_input_embeddings().weight)


def test_peft_truncates_a_rank_and_drops_components_without_a_word() -> None:
    """Both of which ours refuses, see test_targets.py and test_config.py."""
    base = logits_of(tiny_llama())
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        low = adapted_by_peft(tiny_llama(), "pissa", r=24, target_modules=["k_proj"])
        dropping = adapted_by_peft(tiny_llama(), "pissa", r=8, target_modules=["v_proj"], lora_dropout=0.5)
    assert adapter_factors(low)["model.layers.0.self_attn.k_proj"].A.shape[0] == 16
    assert largest_difference(logits_of(dropping.train()), base) > 1e-2


@pytest.mark.parametrize("placement", ["residual", "offset"])
def test_autocast_around_adapt_changes_no_bit(placement: Any) -> None:
    config = PissaConfig(4, placement=placement)
    plain = adapt(tiny_llama(), config)
    with torch.autocast("cpu", torch.bfloat16):
        inside = adapt(tiny_llama(), config)
    assert same_tensors(snapshot(plain), snapshot(inside))
    with torch.autocast("cpu", torch.bfloat16):
        restored = restore(inside)
    assert same_tensors(snapshot(restore(plain)), snapshot(restored))


def test_a_failure_after_wrapping_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = tiny_llama(tie=True)
    before, modules = snapshot(model), dict(model.named_modules())
    calls = []

    def fail_late(*arguments: Any) -> Tensor:
        calls.append(arguments)
        if len(calls) == 3:
            raise MemoryError
        return torch.zeros_like(arguments[0])

    monkeypatch.setattr("pissa.live.attach.combine_each", fail_late)
    with pytest.raises(MemoryError), pytest.warns(UserWarning, match="untied"):
        adapt(model, PissaConfig(4, target_modules=["q_proj", "up_proj", "lm_head"]))
    assert dict(model.named_modules()) == modules
    assert same_tensors(before, snapshot(model))
    assert model.lm_head.weight is model.model.embed_tokens.weight and model.config.tie_word_embeddings
    assert "lm_head.weight" in model.all_tied_weights_keys and not hasattr(model, "peft_config")
    assert all(parameter.requires_grad for parameter in model.parameters())
    monkeypatch.undo()
    with pytest.warns(UserWarning, match="untied"):
        adapt(model, PissaConfig(4, target_modules=["q_proj", "lm_head"]))


def test_a_weight_of_zeros_is_named_because_its_adapter_cannot_learn() -> None:
    def model() -> Any:
        zero: Any = tiny_llama()
        zero.model.layers[1].mlp.up_proj.weight.data.zero_()
        return zero

    with pytest.warns(UserWarning, match=r"^model\.layers\.1\.mlp\.up_proj: the weight is zero.* cannot learn"):
        adapted = adapt(model(), PissaConfig(4))
    assert largest_difference(logits_of(adapted), logits_of(model())) < 1e-5
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        adapt(model(), PissaConfig(4, method="lora-kaiming"))
        adapt(tiny_llama(), PissaConfig(4))
