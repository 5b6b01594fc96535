"""A rank budget on a live model: optimal ranks, written as PEFT's rank_pattern, and the same function as ever."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import nn

import pissa
from pissa import PissaConfig, Quantization, adapt, export_lora
from pissa.calibrate.moments import second_moments
from pissa.errors import ConfigError, DataError
from pissa.live.layers import place_of
from pissa.live.state import adapter_layers
from tiny import largest_difference, logits_of, tiny_llama, token_batch, train_steps


def spread() -> Any:
    """A tiny Llama whose weights differ much in size, so that a uniform rank is far from optimal."""
    model = tiny_llama(hidden=64)
    with torch.no_grad():
        for i, (name, parameter) in enumerate(model.named_parameters()):
            if "_proj" in name:
                parameter.mul_(2.0 ** (i % 5))
    return model


def ranks_of(model: PeftModel) -> dict[str, int]:
    return {name: layer.r["default"] for name, layer in adapter_layers(model).items()}


def parameters(model: PeftModel) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def captured(base: nn.Module, ranks: dict[str, int]) -> float:
    return sum(
        float(torch.linalg.svdvals(place_of(base.get_submodule(name)).matrices().double())[:rank].square().sum())
        for name, rank in ranks.items()
    )


def test_the_budget_is_kept_and_captures_more_than_the_uniform_rank() -> None:
    uniform = adapt(spread(), PissaConfig(4))
    budget = parameters(uniform)
    model = adapt(spread(), PissaConfig(32, rank_budget=budget))
    ranks = ranks_of(model)
    assert parameters(model) <= budget and parameters(model) > 0.97 * budget
    assert min(ranks.values()) >= 1 and max(ranks.values()) > 4 and len(set(ranks.values())) > 2
    assert captured(spread(), ranks) > 1.05 * captured(spread(), ranks_of(uniform))
    # moving one component from anywhere to anywhere gains nothing
    base, best = spread(), captured(spread(), ranks)
    cost = {name: sum(place_of(base.get_submodule(name)).matrices().shape) for name in ranks}
    for giver in ranks:
        for taker in ranks:
            moved = {**ranks, giver: ranks[giver] - 1, taker: ranks[taker] + 1} if giver != taker else ranks
            fits = min(moved.values()) >= 1 and moved[taker] <= 32
            if fits and sum(r * cost[name] for name, r in moved.items()) <= budget:
                assert captured(base, moved) <= best * (1 + 1e-6)
    assert largest_difference(logits_of(model), logits_of(spread())) < 1e-3


def test_the_plan_is_peft_s_rank_pattern_and_survives_saving_and_export(tmp_path: Path) -> None:
    model = adapt(spread(), PissaConfig(16, rank_budget=20_000))
    train_steps(model, 2)
    trained, ranks = logits_of(model), ranks_of(model)
    assert all(layer.scaling["default"] == 1 for layer in adapter_layers(model).values())
    export_lora(model, tmp_path / "lora")
    pattern = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())["rank_pattern"]
    assert {name: rank for name, rank in pattern.items()} == {n: 2 * r for n, r in ranks.items() if r != 16}
    plain = PeftModel.from_pretrained(spread(), str(tmp_path / "lora")).eval()
    assert largest_difference(logits_of(plain), trained) < 1e-3
    assert ranks_of(pissa.load(tmp_path / "lora", spread())) == ranks


def test_a_quantised_residual_and_moments_change_what_is_worth_most() -> None:
    base = spread()
    names = [name for name, module in base.named_modules() if isinstance(module, nn.Linear) and "layers" in name]
    batches = [{"input_ids": token_batch(seed=i)} for i in range(4)]
    moments = {name: moment.matrix for moment in second_moments(base, batches, names) for name in moment.names}
    common: dict[str, Any] = {"rank": 64, "rank_budget": 30_000}
    quantization = Quantization(iterations=1, momentum=0.0)
    plans = [
        ranks_of(adapt(spread(), PissaConfig(**common))),
        ranks_of(adapt(spread(), PissaConfig(**common), moments=moments)),
        ranks_of(adapt(spread(), PissaConfig(**common, quantization=quantization))),
        ranks_of(adapt(spread(), PissaConfig(**common, quantization=quantization), moments=moments)),
    ]
    assert len({tuple(plan.values()) for plan in plans}) == 4


def test_what_a_budget_cannot_be_is_refused_in_one_line() -> None:
    for settings, said in (
        ({"rank_budget": 0}, "rank_budget is 0; give a whole number of at least 1"),
        ({"rank_budget": 1.5}, "rank_budget is 1.5"),
        ({"rank_budget": 10**4, "rank_pattern": {"q_proj": 2}}, "rank_budget and rank_pattern both say"),
        ({"rank_budget": 10**4, "method": "cura"}, "rank_budget weighs principal components"),
        ({"rank_budget": 10**4, "component": "minor"}, "rank_budget weighs principal components"),
        ({"rank_budget": 10**4, "use_adalora": True}, "PEFT gives all AdaLoRA layers one rank"),
    ):
        with pytest.raises(ConfigError, match=said) as caught:
            PissaConfig(4, **settings)  # pyright: ignore
        assert "\n" not in str(caught.value)
    model = tiny_llama()
    with pytest.raises(ConfigError, match=r"rank_budget is 100; 14 weights at rank 1 take \d+ parameters"):
        adapt(model, PissaConfig(4, rank_budget=100))
    with pytest.raises(ConfigError, match="pass moments as a mapping"):
        adapt(model, PissaConfig(4, rank_budget=10**4), moments=iter([]))
    with pytest.raises(DataError, match="no second moment is given for"):
        adapt(model, PissaConfig(4, rank_budget=10**4), moments={})
    assert not isinstance(model, PeftModel) and all(p.requires_grad for p in model.parameters())


def test_a_rank_that_small_weights_cannot_have_is_no_error_under_a_budget() -> None:
    ranks = ranks_of(adapt(tiny_llama(), PissaConfig(500, rank_budget=60_000)))
    assert max(ranks.values()) <= 32 and min(ranks.values()) >= 1
