"""Bases in few bits by the studies' one path, against the live layers and against the weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pissa.adapted.adapt import adapt
from pissa.config import PissaConfig, quantization_preset
from pissa.errors import DataError
from studies.few_bits import FORMATS, PRESETS, build
from tiny import logits_of, tiny_llama

RANK = 4


def batches() -> list[dict[str, Any]]:
    ids = torch.randint(3, 384, (4, 24), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}]


def step(model: Any) -> torch.Tensor:
    """The loss of one batch after a step of plain gradient descent on the adapter."""
    [batch] = batches()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for gradient, parameter in zip(
        torch.autograd.grad(model(**batch, labels=batch["input_ids"]).loss, trained), trained, strict=True
    ):
        parameter.data -= 0.1 * gradient
    with torch.no_grad():
        return model(**batch, labels=batch["input_ids"]).loss


@pytest.mark.parametrize("method", PRESETS)
def test_nf4_is_the_function_of_the_live_layers_and_trains_as_they_do(method: str) -> None:
    pytest.importorskip("bitsandbytes")
    config = PissaConfig(
        rank=RANK,
        method="pissa" if method == "pissa" else "lora-kaiming",
        quantization=quantization_preset(PRESETS[method], format="nf4"),
        seed=3,
    )
    live = adapt(tiny_llama(hidden=64), config)
    ours = build(tiny_llama(hidden=64), "nf4", method, rank=RANK, seed=3)
    base = logits_of(tiny_llama(hidden=64))
    assert (logits_of(ours) - logits_of(live)).norm() < 1e-4 * (logits_of(ours) - base).norm()
    assert {n for n, p in ours.named_parameters() if p.requires_grad} == {
        n for n, p in live.named_parameters() if p.requires_grad
    }
    assert float(step(ours)) == pytest.approx(float(step(live)), rel=1e-4)


@pytest.mark.parametrize("form", FORMATS)
def test_qpissa_starts_nearer_to_the_base_than_the_plain_format(form: Any) -> None:
    base = tiny_llama(hidden=64)
    with torch.no_grad():  # principal components that stand out, as trained weights have them
        for name, weight in base.named_parameters():
            if "proj" in name:
                U, S, Vh = torch.linalg.svd(weight)
                k = len(S)
                weight.copy_(U[:, :k] * (S * torch.linspace(1, 0, k) ** 8 * 4) @ Vh[:k])
    expected = logits_of(base)
    errors = {}
    for method in PRESETS:
        found = build(tiny_copy(base), form, method, rank=RANK, batches=batches())
        weights = [m.weight for n, m in found.named_modules() if n.endswith("base_layer")]
        assert len(weights) == 14 and all(w.dtype == torch.float32 and not w.requires_grad for w in weights)
        errors[method] = float((logits_of(found) - expected).norm())
    assert 0 < errors["pissa"] < errors["lora"]


def test_gptq_needs_text_and_rounds_by_it() -> None:
    with pytest.raises(DataError, match="no calibration batches"):
        build(tiny_llama(hidden=64), "gptq", "lora", rank=RANK)
    [batch] = batches()
    halves = [[{name: value[rows] for name, value in batch.items()}] for rows in (slice(0, 2), slice(2, 4))]
    one, other = (build(tiny_llama(hidden=64), "gptq", "lora", rank=RANK, batches=half) for half in halves)
    assert not torch.equal(logits_of(one), logits_of(other))


def tiny_copy(model: Any) -> Any:
    fresh = tiny_llama(hidden=64)
    fresh.load_state_dict(model.state_dict())
    return fresh
