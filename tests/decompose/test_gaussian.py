"""LoRA's initial factors are drawn as PEFT draws them, from a generator of their own."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from pissa.decompose.gaussian import random_factors

Distribution = Literal["kaiming", "gaussian"]
OUT, IN, RANK = 24, 600, 50


def peft_draw(distribution: Distribution) -> torch.Tensor:
    torch.manual_seed(0)
    how: Any = True if distribution == "kaiming" else "gaussian"
    model: Any = nn.Sequential(nn.Linear(IN, OUT))
    adapted: Any = get_peft_model(model, LoraConfig(r=RANK, target_modules=["0"], init_lora_weights=how))
    return adapted.base_model.model[0].lora_A["default"].weight.detach()


@pytest.mark.parametrize("distribution", ["kaiming", "gaussian"])
def test_factors_have_peft_s_distribution(distribution: Distribution) -> None:
    A, B, certificate = random_factors((OUT, IN), RANK, distribution=distribution, seed=5)
    theirs = peft_draw(distribution)
    assert A.shape == theirs.shape == (RANK, IN) and A.dtype == torch.float32
    assert B.shape == (OUT, RANK) and not B.any()
    # 30,000 draws: quantiles of two samples of one distribution lie this close
    levels = torch.linspace(0.02, 0.98, 25)
    distance = (A.flatten().quantile(levels) - theirs.flatten().quantile(levels)).abs().max()
    assert float(distance / theirs.std()) < 0.06
    assert certificate.captured_energy_loss == 1 and certificate.passes == 0


def test_kaiming_draws_fill_their_interval_and_never_leave_it() -> None:
    A, _, _ = random_factors((OUT, IN), RANK, distribution="kaiming", seed=0)
    bound = IN**-0.5
    assert 0.999 * bound < float(A.abs().max()) <= bound


@pytest.mark.parametrize("distribution", ["kaiming", "gaussian"])
def test_draws_follow_the_seed_alone(distribution: Distribution) -> None:
    before = torch.get_rng_state()
    first = random_factors((3, 5), 2, distribution=distribution, seed=1)[0]
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(99)
    assert torch.equal(first, random_factors((3, 5), 2, distribution=distribution, seed=1)[0])
    assert not torch.equal(first, random_factors((3, 5), 2, distribution=distribution, seed=2)[0])
