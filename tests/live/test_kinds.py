"""Every kind of layer, in both placements: one function from step 0 to the merged model."""

from __future__ import annotations

import warnings
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn

import pissa
from kinds import CASES, Case
from pissa import PissaConfig, adapt, export_lora, reference, restore
from pissa.config import METHODS, Method
from pissa.live.state import adapter_factors, adapter_layers, place_at
from sampled import thinned
from tiny import same_tensors, snapshot

PLACEMENTS = ("residual", "offset")
NOISE = {torch.float32: 2e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}
"""Relative to the largest output: a few roundings of weights and activations."""


def config(case: Case, **settings: Any) -> PissaConfig:
    return PissaConfig(**{"rank": 2, "target_modules": list(case.targets), **case.settings, **settings})


def adapted(case: Case, model: Any = None, **settings: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return adapt(case.model() if model is None else model, config(case, **settings))


def output(model: Any, batch: Tensor) -> Tensor:
    with torch.no_grad():
        return model(batch).double()


def distance(left: Tensor, right: Tensor) -> float:
    return float((left - right).abs().max() / right.abs().max())


def train(case: Case, model: Any, steps: int = 3) -> None:
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-2, weight_decay=0.1)
    for step in range(steps):
        optimizer.zero_grad()
        model(case.batch(seed=10 + step)).float().square().mean().backward()
        optimizer.step()
    model.eval()


@pytest.fixture(scope="module")
def table() -> Any:
    rows: list[tuple[str, ...]] = []
    yield rows
    print("\nfunction at step 0, distance relative to the largest output")
    for row in rows:
        print("{:22} {:13} {:9} {:15} {}".format(*row))


@pytest.mark.parametrize(
    ("name", "method", "placement", "dtype"),
    thinned(CASES, METHODS, product(PLACEMENTS, NOISE), always=[("residual", torch.float32)]),
    ids=str,
)
def test_the_function_at_step_0_is_the_base_s(
    name: str, dtype: torch.dtype, method: Method, placement: str, table: Any
) -> None:
    case = CASES[name]
    batch, base = case.batch(dtype), case.model(dtype)
    fraction = 0.5 if method == "random-pissa" else 1.0  # a router of three outputs has few triplets to draw from
    model = adapted(case, case.model(dtype), placement=placement, method=method, random_fraction=fraction)
    assert tuple(adapter_layers(model)) == case.names
    assert {f.A.dtype for f in adapter_factors(model).values()} == {torch.float32}
    expected = output(base, batch)
    found = distance(output(model, batch), expected)
    table.append((name, method, placement, str(dtype), f"{found:.1e}"))
    assert found <= NOISE[dtype]
    with reference(model):
        back = distance(output(model, batch), expected)
    untouched = placement == "offset" or model.pissa.config.starts_at_zero
    assert back == 0 if untouched else back <= NOISE[dtype]


@pytest.mark.parametrize(("name", "placement"), thinned(CASES, PLACEMENTS))
def test_trained_saved_loaded_exported_and_merged_it_is_one_function(name: str, placement: str, tmp_path: Path) -> None:
    case = CASES[name]
    batch, base = case.batch(), output(case.model(), case.batch())
    model = adapted(case, placement=placement)
    start = output(model, batch)
    train(case, model)
    expected = output(model, batch)
    assert distance(expected, start) > 1e-3
    with reference(model):
        assert distance(output(model, batch), base) <= NOISE[torch.float32]
    assert torch.equal(output(model, batch), expected)

    model.save_pretrained(tmp_path / "state", save_embedding_layers=False)
    export_lora(model, tmp_path / "lossless")
    export_lora(model, tmp_path / "full-rank", rank=100)
    export_lora(tmp_path / "lossless", tmp_path / "again")
    export_lora(tmp_path / "state", tmp_path / "from-state")
    for saved in ("state", "lossless", "full-rank", "again", "from-state"):
        loaded = silently(pissa.load, tmp_path / saved, case.model()).eval()
        assert distance(output(loaded, batch), expected) <= 4e-6, saved

    for saved in ("lossless", "full-rank", "again", "from-state"):
        check_plain_peft(case, tmp_path / saved, batch, expected)
    train(case, silently(pissa.load, tmp_path / "state", case.model(), is_trainable=True))

    merged = untied(case.model())
    merged.load_state_dict(merged_weights(model))
    assert distance(output(merged, batch), expected) <= 4e-6


def untied(model: Any) -> Any:
    """The model with each weight its own."""
    for module in model.modules():
        for key, parameter in list(module._parameters.items()):
            if parameter is not None:
                setattr(module, key, nn.Parameter(parameter.detach().clone()))
    return model


def check_plain_peft(case: Case, path: Path, batch: Tensor, expected: Tensor) -> None:
    """An export means the same to PEFT alone, or is not accepted by it."""
    if case.plain_peft == "refused":
        with pytest.raises(RuntimeError, match="size mismatch"):
            silently(PeftModel.from_pretrained, case.model(), path)
        return
    plain = silently(PeftModel.from_pretrained, case.model(), path)
    forward = distance(output(plain, batch), expected)
    assert (forward <= 4e-6) != (case.plain_peft == "forwards wrongly"), path.name
    if case.plain_peft == "forwards wrongly":  # as the warning says
        torch.backends.mha.set_fastpath_enabled(False)
        assert distance(output(plain, batch), expected) <= 4e-6, path.name
        torch.backends.mha.set_fastpath_enabled(True)
    merged = distance(output(silently(plain.merge_and_unload), batch), expected)
    assert (merged <= 4e-6) != (case.plain_peft == "merges wrongly"), path.name


def silently(call: Any, *arguments: Any, **options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return call(*arguments, **options)


def merged_weights(model: Any) -> dict[str, Tensor]:
    from pissa.export.merged import merged_state

    return merged_state(model)


@pytest.mark.parametrize(("name", "placement"), thinned(CASES, PLACEMENTS))
def test_restore_gives_the_base_back_bit_for_bit(name: str, placement: str) -> None:
    case = CASES[name]
    base = case.model(torch.bfloat16)
    model = adapted(case, case.model(torch.bfloat16), placement=placement)
    for _ in range(3):
        output(model, case.batch(torch.bfloat16))
    plain = restore(model, base)
    assert same_tensors(snapshot(base), snapshot(plain))
    assert [type(m) for m in plain.modules()] == [type(m) for m in base.modules()]
    owned = {id(p) for p in plain.parameters()}
    assert len(owned) == len(list(base.parameters())) and all(p.requires_grad for p in plain.parameters())


@pytest.mark.parametrize("name", CASES)
def test_restore_without_the_base_is_within_the_certified_rounding(name: str) -> None:
    case = CASES[name]
    base = case.model(torch.bfloat16)
    model = adapted(case, case.model(torch.bfloat16))
    certificates = model.pissa.certificates
    places = {n: (place_at(layer), layer) for n, layer in adapter_layers(model).items()}
    keys = {n: place_at(layer).key(n) for n, (_, layer) in places.items()}
    state = restore(model).state_dict()
    for n, key in keys.items():
        W = base.state_dict()[key].double()
        error = float((state[key].double() - W).norm() / W.norm())
        assert error <= certificates[n].rounding + 2.0**-8


@pytest.mark.parametrize(("name", "placement"), thinned(CASES, PLACEMENTS))
def test_nothing_but_the_adapter_moves_in_training(name: str, placement: str) -> None:
    case = CASES[name]
    model = adapted(case, placement=placement)
    before, trainable = snapshot(model), {n for n, p in model.named_parameters() if p.requires_grad}
    initial = {n: f.A0.clone() for n, f in adapter_factors(model).items() if f.A0 is not None}
    train(case, model)
    after = snapshot(model)
    changed = {n for n in after if not torch.equal(before[n], after[n])}
    assert changed == trainable and all(".default" in n for n in changed)
    assert len(trainable) == 2 * len(case.names)
    for n, f in adapter_factors(model).items():
        assert f.A0 is not None and torch.equal(f.A0, initial[n])
