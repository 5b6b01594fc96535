"""Components scored on a user's data, from the model to the adapter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pissa import PissaConfig, adapt, reference
from pissa.calibrate.gradients import weight_gradients
from pissa.errors import ConfigError
from pissa.live import splits
from pissa.live.layers import place_of
from pissa.live.state import adapter_factors
from tiny import largest_difference, logits_of, tiny_gpt2, tiny_llama, token_batch, train_steps


def batches() -> list[dict[str, Tensor]]:
    return [{"input_ids": token_batch(seed=i), "labels": token_batch(seed=i)} for i in range(3)]


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_the_adapter_holds_the_triplets_of_largest_effect_on_the_loss(make: Any, monkeypatch: Any) -> None:
    base, model = make(), make()
    # portions of one weight each: no more than that is ever held
    monkeypatch.setattr(
        splits, "weight_gradients", lambda *args: weight_gradients(*args, portion_bytes=1), raising=True
    )
    adapted = adapt(model, PissaConfig(4, component="scored"), batches=batches())
    assert largest_difference(logits_of(adapted), logits_of(base)) < 1e-4
    modules = dict(base.named_modules())
    different = 0
    for name, factors in adapter_factors(adapted).items():
        module: Any = modules[name]
        loss = torch.stack([base(**batch).loss for batch in batches()]).mean()
        (G,) = torch.autograd.grad(loss, module.weight)
        G = G.T if make is tiny_gpt2 else G
        U, S, Vh = torch.linalg.svd(place_of(module).matrices(), full_matrices=False)
        effects = torch.stack([torch.outer(u, v).mul(G).sum().abs() for u, v in zip(U.mT, Vh, strict=True)])
        best = effects.topk(4).indices
        expected = (U[:, best] * S[best]) @ Vh[best]
        torch.testing.assert_close(factors.scale * factors.B @ factors.A, expected, rtol=1e-3, atol=1e-4)
        different += sorted(best.tolist()) != [0, 1, 2, 3]
    assert different > 0, "the case must differ from PiSSA"
    train_steps(adapted)
    with reference(adapted):
        assert largest_difference(logits_of(adapted), logits_of(base)) < 1e-4


def test_batches_are_needed_where_components_are_scored_and_nowhere_else() -> None:
    with pytest.raises(ConfigError, match='component "scored" chooses by your data: pass batches with labels'):
        adapt(tiny_llama(), PissaConfig(4, component="scored"))
    with pytest.raises(ConfigError, match="batches are for a quantisation"):
        adapt(tiny_llama(), PissaConfig(4), batches=batches())


def test_a_model_whose_data_is_unusable_is_left_as_it_was() -> None:
    model = tiny_llama()
    layers = {name: type(module) for name, module in model.named_modules()}
    with pytest.raises(ValueError, match="it needs labels"):
        adapt(model, PissaConfig(4, component="scored"), batches=[{"input_ids": token_batch()}])
    assert layers == {name: type(module) for name, module in model.named_modules()}
    assert all(isinstance(parameter, nn.Parameter) and parameter.requires_grad for parameter in model.parameters())
