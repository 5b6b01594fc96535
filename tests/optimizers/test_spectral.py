"""The optimizer of products on whole models: every kind of layer, what does not change a step, what is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from kinds import CASES, Case
from pissa import PissaConfig, SpectralProduct, adapt
from pissa.errors import ConfigError, PissaError, TrainingError
from pissa.live.offset import second_half
from pissa.live.state import adapter_factors, adapter_layers, parameters_of
from tiny import largest_difference, logits_of, tiny_llama, token_batch, train_steps

PLACEMENTS = ("residual", "offset")
FOR_EVERY_WEIGHT = 1e-3
"""A rate at which the second order is invisible."""


def changes(model: Any) -> dict[str, Tensor]:
    """s·(B·A − B0·A0) of every adapted weight, in fp64."""
    found = {}
    for name, f in adapter_factors(model).items():
        product = f.B.double() @ f.A.double()
        start = 0 if f.A0 is None or f.B0 is None else f.B0.double() @ f.A0.double()
        found[name] = f.scale * (product - start)
    return found


def gradients(case: Case, model: Any) -> None:
    model.zero_grad()
    model.train()(case.batch(seed=10)).float().square().mean().backward()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("kind", CASES)
def test_one_step_changes_every_weight_by_the_rate_in_spectral_norm(kind: str, placement: Any) -> None:
    case = CASES[kind]
    settings = {"rank": 2, "alpha": 6, "target_modules": list(case.targets), "placement": placement, **case.settings}
    model = adapt(case.model(), PissaConfig(**settings))
    optimizer = SpectralProduct(model, FOR_EVERY_WEIGHT)
    gradients(case, model)
    layers = adapter_layers(model)
    reached = {
        name: any(bool(p.grad.any()) for p in parameters_of(layers[name], "default") if p.grad is not None)
        for name in layers
    }
    optimizer.step()
    assert len(optimizer.param_groups) == 1
    assert {*adapter_layers(model)} == {pair["name"] for pair in optimizer.param_groups[0]["pairs"]}
    for name, change in changes(model).items():
        norms = torch.linalg.matrix_norm(change, 2).flatten()
        for norm in norms[norms > 0]:
            assert float(norm) == pytest.approx(FOR_EVERY_WEIGHT, rel=0.05), name
        assert bool((norms > 0).any()) == reached[name], name


def reference_step(A: Tensor, B: Tensor, M_A: Tensor, M_B: Tensor, rate: float) -> tuple[Tensor, Tensor]:
    """The step as its issue wrote it down, one pair, by eigendecompositions of Gram matrices and a dense norm, fp64."""

    def root(C: Tensor) -> Tensor:
        w, V = torch.linalg.eigh(C)
        return torch.zeros_like(C) if w[-1] <= 0 else V @ torch.diag(w.clamp_min(1e-14 * w[-1]) ** -0.5) @ V.T

    def sign(Y: Tensor) -> Tensor:
        U, S, Vh = torch.linalg.svd(Y, full_matrices=False)
        return U @ Vh if S[0] > 0 else torch.zeros_like(Y)

    C_A, C_B = root(A @ A.T), root(B.T @ B)
    D_A, D_B = C_B @ sign(C_B @ M_A), sign(M_B @ C_A) @ C_A
    norm = torch.linalg.matrix_norm(B @ D_A + D_B @ A, 2)
    return A - rate / norm * D_A, B - rate / norm * D_B


@pytest.mark.parametrize("method", ["pissa", "lora-kaiming"])
def test_four_steps_are_those_of_the_formula(method: Any) -> None:
    model = adapt(tiny_llama(), PissaConfig(rank=3, alpha=6, method=method, target_modules=r".*q_proj")).double()
    optimizer = SpectralProduct(model, 0.05, damping=0.0)
    [pair, *_] = [parameters_of(layer, "default") for layer in adapter_layers(model).values()]
    moments = [torch.zeros_like(p) for p in pair]
    for step in range(4):
        batch = token_batch(seed=step)
        optimizer.zero_grad()
        model(input_ids=batch, labels=batch).loss.backward()
        averages = []
        for place, p in enumerate(pair):
            assert p.grad is not None
            moments[place] = 0.9 * moments[place] + p.grad
            averages.append(p.grad + 0.9 * moments[place])
        with torch.no_grad():
            A, B = reference_step(pair[0], pair[1], averages[0], averages[1], 0.05 / 2)
        optimizer.step()
        assert torch.allclose(pair[0], A, atol=2e-5) and torch.allclose(pair[1], B, atol=2e-5), step


@pytest.mark.parametrize("method", ["pissa", "lora-kaiming"])
def test_alpha_changes_nothing(method: Any) -> None:
    outcomes = []
    for alpha in (4, 8):
        model = adapt(tiny_llama(), PissaConfig(rank=4, alpha=alpha, method=method)).train()
        train_steps(model, 4, optimizer=SpectralProduct(model))
        outcomes.append(logits_of(model.eval()))
    assert largest_difference(outcomes[0], logits_of(tiny_llama())) > 1e-2
    assert largest_difference(*outcomes) < 2e-3


def test_both_placements_train_alike_and_the_frozen_half_stays() -> None:
    models = {p: adapt(tiny_llama(), PissaConfig(rank=4, placement=p)).train() for p in PLACEMENTS}
    start = {n: [f.clone() for f in parameters_of(m, "default")] for n, m in adapter_layers(models["offset"]).items()}
    for model in models.values():
        train_steps(model, 3, optimizer=SpectralProduct(model, weight_decay=0.1))
    assert largest_difference(*(logits_of(model.eval()) for model in models.values())) < 2e-3
    for name, layer in adapter_layers(models["offset"]).items():
        for dimension, (now, then) in enumerate(zip(parameters_of(layer, "default"), start[name], strict=True)):
            assert torch.equal(second_half(now.detach(), dimension), second_half(then, dimension))
            assert not torch.equal(now, then)


def trained_model() -> Any:
    return adapt(tiny_llama(), PissaConfig(rank=4, method="lora-kaiming", use_dora=True, modules_to_save=("lm_head",)))


def test_a_state_dict_goes_on_bit_for_bit(tmp_path: Any) -> None:
    whole, model = trained_model(), trained_model()
    train_steps(whole, 4, optimizer=SpectralProduct(whole, weight_decay=0.01))
    first = SpectralProduct(model, weight_decay=0.01)
    train_steps(model, 2, optimizer=first)
    torch.save(first.state_dict(), tmp_path / "optimizer.pt")
    second = SpectralProduct(model, lr=1.0)
    second.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    train_steps(model, 2, first=2, optimizer=second)
    for (name, there), here in zip(whole.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(there, here), name
    factors = second.param_groups[0]["params"]
    assert all({*second.state[p]} == {"moment"} for p in factors)


def test_what_is_no_product_is_moved_by_adamw() -> None:
    model, rival = trained_model(), trained_model()
    optimizer = SpectralProduct(model, 0.05, weight_decay=0.1)
    products = {id(p) for p in optimizer.param_groups[0]["params"]}
    named = {n: p for n, p in model.named_parameters() if p.requires_grad and id(p) not in products}
    assert {"lora_magnitude_vector" in n or "lm_head" in n for n in named} == {True} and len(named) == 15
    twins = dict(rival.named_parameters())
    decays = [
        {"params": [twins[n] for n in named if (named[n].ndim > 1) is decayed], "weight_decay": 0.1 * decayed}
        for decayed in (True, False)
    ]
    adamw = torch.optim.AdamW(decays, lr=0.0005)
    for step in range(3):
        train_steps(model, 1, first=step, optimizer=optimizer)
        for name, parameter in named.items():
            twins[name].grad = parameter.grad
        adamw.step()
    for name, parameter in named.items():
        assert torch.allclose(parameter, twins[name], rtol=1e-5), name


def test_a_factor_before_the_loss_and_a_clipped_first_step_change_nothing() -> None:
    outcomes = []
    for factor, clip in ((1.0, None), (1e-6, None), (1e6, None), (1.0, 1e-2)):
        model = adapt(tiny_llama(), PissaConfig(rank=4)).train()
        optimizer = SpectralProduct(model)
        batch = token_batch(seed=3)
        (factor * model(input_ids=batch, labels=batch).loss).backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        outcomes.append(logits_of(model.eval()))
    for other in outcomes[1:]:
        assert largest_difference(outcomes[0], other) < 1e-4


def test_weight_decay_shrinks_the_product() -> None:
    model = adapt(tiny_llama(), PissaConfig(rank=4, alpha=8))
    before = {name: f.B @ f.A for name, f in adapter_factors(model).items()}
    optimizer = SpectralProduct(model, 0.1, weight_decay=0.5)
    for parameter in optimizer.param_groups[0]["params"]:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, f in adapter_factors(model).items():
        assert torch.allclose(f.B @ f.A, 0.95 * before[name], rtol=1e-4, atol=1e-6), name


def test_nothing_moves_where_a_gradient_is_not_finite() -> None:
    model = adapt(tiny_llama(), PissaConfig(rank=4))
    optimizer = SpectralProduct(model)
    train_steps(model, 1, optimizer=optimizer)
    name, layer = next(iter(adapter_layers(model).items()))
    gradient = parameters_of(layer, "default")[1].grad
    assert gradient is not None
    gradient[0, 0] = torch.nan
    before, moments = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict()["state"])
    with pytest.raises(TrainingError, match=rf"{name} is not finite; nothing was moved"):
        optimizer.step()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(torch.equal(s["moment"], moments[k]["moment"]) for k, s in optimizer.state_dict()["state"].items())


def test_layers_without_a_gradient_stay() -> None:
    model = adapt(tiny_llama(), PissaConfig(rank=4))
    optimizer = SpectralProduct(model)
    [(_, first), (_, second), *_] = adapter_layers(model).items()
    before = [p.clone() for p in parameters_of(first, "default")]
    A, B = parameters_of(second, "default")
    A.grad, B.grad = torch.ones_like(A), None
    optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(parameters_of(first, "default"), before, strict=True))


def test_peft_s_own_models_are_taken() -> None:
    model: Any = get_peft_model(tiny_llama(), LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
    before = logits_of(model)
    losses = train_steps(model, 6, optimizer=SpectralProduct(model, 0.2))
    assert all(torch.isfinite(torch.tensor(losses))) and largest_difference(before, logits_of(model)) > 1e-2


def half_trained() -> Any:
    model = adapt(tiny_llama(), PissaConfig(rank=4, target_modules=r".*layers\.0.*q_proj"))
    next(p for n, p in model.named_parameters() if "lora_A" in n and p.requires_grad).requires_grad_(False)
    return model


REFUSED = {
    "is no PEFT model: adapt it first": lambda: tiny_llama(),
    "AdaLoRA's third factor.*; take AdamW": lambda: adapt(tiny_llama(), PissaConfig(rank=4, use_adalora=True)),
    "only lora_B is trained": half_trained,
    "14 adapters, .*q_proj first, are in less than fp32": lambda: adapt(tiny_llama(), PissaConfig(rank=4)).bfloat16(),
    "no factors of adapter 'default' are trained": lambda: adapt(tiny_llama(), PissaConfig(rank=4)).requires_grad_(
        False
    ),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_it_cannot_move_is_refused(message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SpectralProduct(REFUSED[message]())


@pytest.mark.parametrize(
    "setting", [{"lr": -1.0}, {"momentum": 1.0}, {"damping": -1e-3}, {"weight_decay": -0.1}, {"others": -1.0}]
)
def test_settings_out_of_their_range_are_refused(setting: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(setting))} must be at least 0"):
        SpectralProduct(adapt(tiny_llama(), PissaConfig(rank=4)), **setting)


def test_flattened_factors_are_refused() -> None:
    optimizer = SpectralProduct(adapt(tiny_llama(), PissaConfig(rank=4)))
    flat = [nn.Parameter(p.detach().flatten()) for p in optimizer.param_groups[0]["params"]]
    for parameter in flat:
        parameter.grad = torch.ones_like(parameter)
    optimizer.param_groups[0]["params"] = flat
    with pytest.raises(PissaError, match=r"were flattened or cut in pieces.*take FSDP2 or DDP"):
        optimizer.step()
