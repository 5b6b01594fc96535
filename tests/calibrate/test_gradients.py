"""Gradients in portions: those of plain autograd, in bounded memory, with the model left as it was."""

from __future__ import annotations

import copy
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pissa.calibrate.gradients as gradients
from pissa.calibrate.gradients import weight_gradients
from pissa.errors import DataError, TargetError
from tiny import same_tensors, snapshot, tiny_gpt2, tiny_llama, token_batch


def batches(count: int = 3) -> list[dict[str, Tensor]]:
    """Batches with different numbers of labels."""
    found = []
    for i in range(count):
        ids = token_batch(seed=i)
        labels = ids.clone()
        labels[:, : 2 + 3 * i] = -100
        found.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels})
    return found


def plain_gradients(model: Any, names: list[str], data: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """One loss over all labels, through autograd in fp64."""
    model = copy.deepcopy(model).double()
    parameters = dict(model.named_parameters())
    total, count = torch.zeros((), dtype=torch.float64), 0
    for batch in data:
        labels = int((batch["labels"] != -100).sum())
        total, count = total + model(**batch).loss * labels, count + labels
    found = torch.autograd.grad(total / count, [parameters[name] for name in names])
    return dict(zip(names, found, strict=True))


def linear_weights(model: nn.Module) -> list[str]:
    return [name for name, p in model.named_parameters() if p.ndim == 2 and ("layers" in name or ".c_" in name)]


@pytest.mark.parametrize("portion_bytes", [1, 20_000, 1 << 30])
@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_gradients_are_those_of_the_mean_loss(make: Any, portion_bytes: int) -> None:
    model = make()
    names = [name for name in linear_weights(model) if name.endswith("weight")]
    expected = plain_gradients(model, names, batches())
    found: dict[str, Tensor] = {}
    for portion in weight_gradients(model, batches(), names, portion_bytes=portion_bytes):
        size = sum(4 * tensor.numel() for tensor in portion.values())
        assert size <= portion_bytes or len(portion) == 1
        found |= portion
    assert list(found) == names
    for name in names:
        torch.testing.assert_close(found[name].double(), expected[name], rtol=1e-3, atol=1e-6)


def test_a_tied_weight_is_differentiated_where_it_was_asked_for() -> None:
    tied, untied = tiny_llama(tie=True), tiny_llama(tie=True)
    untied.lm_head.weight = nn.Parameter(tied.lm_head.weight.detach().clone())
    expected = plain_gradients(untied, ["lm_head.weight"], batches())
    (found,) = weight_gradients(tied, batches(), ["lm_head.weight"])
    torch.testing.assert_close(found["lm_head.weight"].double(), expected["lm_head.weight"], rtol=1e-3, atol=1e-6)
    assert tied.lm_head.weight is tied.model.embed_tokens.weight


def test_the_model_is_left_as_it_was_also_where_the_iteration_is_given_up() -> None:
    model = tiny_llama().train()
    model.model.layers[0].requires_grad_(False)
    model.lm_head.weight.grad = torch.ones_like(model.lm_head.weight)
    parameters, before = dict(model.named_parameters()), snapshot(model)
    flags = {name: (p.requires_grad, p.grad is not None) for name, p in parameters.items()}
    iterator: Any = weight_gradients(model, batches(), linear_weights(model), portion_bytes=1)
    next(iterator)

    def unchanged() -> bool:
        same = all(parameters[name] is p for name, p in model.named_parameters())
        now = {name: (p.requires_grad, p.grad is not None) for name, p in model.named_parameters()}
        return same and now == flags and model.training and same_tensors(before, snapshot(model))

    assert unchanged()
    iterator.close()
    assert unchanged()
    with pytest.raises(DataError):
        list(weight_gradients(model, [{"input_ids": token_batch()}], linear_weights(model)))
    assert unchanged()


def test_no_more_than_one_portion_is_alive_at_a_time() -> None:
    model = tiny_llama()
    alive: list[weakref.ref] = []
    for portion in weight_gradients(model, batches(), linear_weights(model), portion_bytes=10_000):
        assert sum(4 * ref().numel() for ref in alive if ref() is not None) == 0  # type: ignore[union-attr]
        alive += [weakref.ref(tensor) for tensor in portion.values()]
        del portion
    assert len(alive) == len(linear_weights(model))


def test_during_the_backward_pass_one_gradient_is_held_beside_the_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    model, held = tiny_llama(), []
    original = gradients._standing_in

    from contextlib import contextmanager

    @contextmanager
    def watching(*args: Any) -> Any:
        with original(*args) as leaves:
            for leaf in leaves.values():
                leaf.register_post_accumulate_grad_hook(
                    lambda _: held.append(sum(other.grad is not None for other in leaves.values()))
                )
            yield leaves

    monkeypatch.setattr(gradients, "_standing_in", watching)
    list(weight_gradients(model, batches(2), linear_weights(model)))
    assert len(held) == 2 * len(linear_weights(model)) and max(held) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sums_are_fp32_whatever_the_weights_are(dtype: torch.dtype) -> None:
    model = tiny_llama(dtype=dtype)
    name = "model.layers.0.mlp.up_proj.weight"
    (found,) = weight_gradients(model, batches(), [name])
    expected = plain_gradients(model, [name], batches())[name]
    assert found[name].dtype == torch.float32
    assert float((found[name].double() - expected).norm() / expected.norm()) < 0.05


class Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.idle = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        out = self.used(x)
        loss = None if labels is None else (out - labels).square().mean()
        return type("Output", (), {"loss": loss})()


def test_what_cannot_be_differentiated_is_refused_by_name() -> None:
    data = [{"x": torch.ones(2, 4), "labels": torch.zeros(2, 4)}]
    with pytest.raises(DataError, match=r"no gradient reaches idle\.weight on this data"):
        list(weight_gradients(Unused(), data, ["used.weight", "idle.weight"]))
    with pytest.raises(TargetError, match=r"no parameter other\.weight"):
        list(weight_gradients(Unused(), data, ["other.weight"]))
    with pytest.raises(DataError, match="there are no batches"):
        list(weight_gradients(Unused(), [], ["used.weight"]))
    with pytest.raises(DataError, match="a batch holds x; it needs labels"):
        list(weight_gradients(Unused(), [{"x": torch.ones(2, 4)}], ["used.weight"]))
    with pytest.raises(DataError, match=r"the gradient of used\.weight is not finite"):
        infinite = [{"x": torch.full((2, 4), 1e30), "labels": torch.zeros(2, 4)}]
        list(weight_gradients(Unused(), infinite, ["used.weight"]))
    whole = Unused()
    whole.used.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
    with pytest.raises(TargetError, match=r"used\.weight is torch\.int8"):
        list(weight_gradients(whole, data, ["used.weight"]))
