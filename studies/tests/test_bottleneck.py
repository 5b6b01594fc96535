"""Bottleneck adapters: the base's function at the start, as many parameters as LoRA, only they are trained."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from families import FAMILIES
from pissa import PissaConfig, adapt
from pissa.errors import TargetError
from studies.bottleneck import Bottleneck, add_bottlenecks


@pytest.mark.parametrize(("kind", "each"), [("houlsby", 2), ("pfeiffer", 1)])
@pytest.mark.parametrize("family", ["bert", "deberta-v3"])
def test_an_encoder_starts_as_it_was_and_trains_the_adapters_alone(family: str, kind: str, each: int) -> None:
    model = FAMILIES[family].make()
    ids = torch.randint(3, 60, (2, 7), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = model(input_ids=ids).logits
    add_bottlenecks(model, kind, 2, seed=0)  # pyright: ignore[reportArgumentType]
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, before)
    blocks = model.config.num_hidden_layers
    assert sum(isinstance(module, Bottleneck) for module in model.modules()) == each * blocks
    model(input_ids=ids).logits.square().sum().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (".1.down." in name or ".1.up." in name)


def test_both_kinds_have_loras_number_of_weights() -> None:
    def weights(model: nn.Module) -> int:
        named = [(n, p) for n, p in model.named_parameters() if n.endswith("weight") and "classifier" not in n]
        return sum(p.numel() for _, p in named if p.requires_grad)

    make = FAMILIES["bert"].make
    lora = adapt(make(), PissaConfig(2, method="lora-kaiming", target_modules=["query", "key", "value"]))
    counts = [weights(add_bottlenecks(make(), kind, 2, seed=0)) for kind in ("houlsby", "pfeiffer")]
    assert counts == [weights(lora)] * 2


def test_a_model_of_another_shape_is_refused() -> None:
    with pytest.raises(TargetError, match=r"no layers named output\.dense"):
        add_bottlenecks(nn.Linear(2, 2), "houlsby", 2, seed=0)
