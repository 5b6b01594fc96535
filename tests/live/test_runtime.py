"""Where PEFT's layers go wrong, and that ours do not, or say so."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from test_kinds import adapted, output, train
from torch import Tensor, nn

from kinds import CASES, Attention, Mixture, chain
from pissa import PissaConfig, adapt
from pissa.errors import TargetError
from pissa.live.runtime import taps, with_holes
from pissa.live.targets import resolve_targets
from tiny import same_tensors, snapshot


def by_peft(model: Any, *targets: str, scale: float = 0.3) -> Any:
    """Adapted by PEFT, with factors that are not zero."""
    adapted = get_peft_model(model, LoraConfig(r=2, lora_alpha=2, target_modules=list(targets)))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in adapted.named_parameters():
        if ".lora_" in name:
            parameter.data.normal_(std=scale, generator=generator)
    return adapted.eval()


def test_peft_adds_the_product_of_out_proj_twice() -> None:
    """The reason for keeping it at zero; when this fails, PEFT is repaired and out_proj can be adapted."""
    case = CASES["attention"]
    model = by_peft(case.model(), "attn")
    layer = model.base_model.model.attn
    before = layer.base_layer.out_proj.base_layer.weight.detach().clone()
    delta = layer.base_layer.out_proj.get_delta_weight("default").detach()
    merged = model.merge_and_unload().attn.out_proj.weight
    torch.testing.assert_close(merged, before + 2 * delta)


def test_out_proj_is_left_alone_whatever_is_made_trainable() -> None:
    case = CASES["attention"]
    model = adapted(case)
    model.requires_grad_(True)
    inner = model.get_base_model().attn.base_layer.out_proj
    train(case, model)
    assert not inner.lora_A["default"].weight.any() and not inner.lora_B["default"].weight.any()


def test_an_attention_s_base_drifts_in_peft_and_not_in_ours() -> None:
    case = CASES["attention"]
    batch = case.batch(torch.bfloat16)

    def weights(model: Any) -> list[Tensor]:
        attention = model.get_base_model().attn.base_layer
        return [attention.in_proj_weight.clone(), attention.out_proj.base_layer.weight.clone()]

    for model, kept in (
        (adapted(case, case.model(torch.bfloat16)), True),
        (by_peft(case.model(torch.bfloat16), "attn"), False),
    ):
        before = weights(model)
        for _ in range(3):
            output(model, batch)
        assert all(torch.equal(b, a) for b, a in zip(before, weights(model), strict=True)) == kept


def test_an_attention_s_base_is_put_back_when_the_forward_fails() -> None:
    case = CASES["attention"]
    model = adapted(case)
    before = snapshot(model)
    for _ in range(2):
        with pytest.raises((RuntimeError, AssertionError)):
            model(torch.zeros(2, 5, 7))
    assert same_tensors(before, snapshot(model))
    assert len(list(model.parameters())) == len(list(adapted(case).parameters()))


@pytest.mark.parametrize("target", ["self_attn", "linear1"])
def test_torch_s_fast_path_skips_adapters_in_peft_and_not_in_ours(target: str) -> None:
    case = CASES["encoder"]
    batch = case.batch()
    model = by_peft(case.model(), target)
    with torch.no_grad():
        fast = model(batch)
        with model.disable_adapter():
            assert torch.equal(fast, model(batch))
    with pytest.warns(UserWarning, match="fast path"):
        ours = adapt(case.model(), PissaConfig(2, target_modules=[target]))
    train(case, ours)
    with torch.no_grad():
        fast = ours(batch)
        with ours.disable_adapter():
            assert not torch.allclose(fast, ours(batch), atol=1e-3)
    torch.testing.assert_close(fast, ours(batch).detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dilation", [(1, 2), (3, 1), (2, 2)])
def test_a_kernel_with_holes_is_the_dilated_one(dilation: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    kernel = torch.randn(5, 3, 3, 2, generator=generator)
    x = torch.randn(2, 3, 12, 11, generator=generator)
    dense = with_holes(kernel, dilation)
    torch.testing.assert_close(
        nn.functional.conv2d(x, dense), nn.functional.conv2d(x, kernel, dilation=dilation), rtol=1e-5, atol=1e-5
    )
    assert torch.equal(dense[taps(dilation)], kernel) and int((dense != 0).sum()) == kernel.numel()


def test_peft_alone_computes_a_dilated_convolution_wrongly_without_a_word() -> None:
    """Which is why it is not to load ours."""
    case = CASES["conv2d-dilated-same"]
    batch = case.batch()
    model = by_peft(case.model(), "0")
    forward = output(model, batch)
    assert float((forward - output(model.merge_and_unload(), batch)).abs().max()) > 1e-2


class OffsetEmbedding(nn.Embedding):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input + 2)


class StandardisedConv(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, self.weight - self.weight.mean(), self.bias)


REFUSED: dict[str, tuple[Any, dict[str, Any], str]] = {
    "groups": (lambda: chain(nn.Conv2d(4, 4, 3, groups=2)), {}, r"0 \(Conv2d: groups=2"),
    "depthwise": (lambda: chain(nn.Conv1d(4, 4, 3, groups=4)), {}, r"0 \(Conv1d: groups=4"),
    "circular": (lambda: chain(nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular")), {}, "padding_mode='circular'"),
    "own convolution": (lambda: chain(StandardisedConv(4, 4, 3)), {}, r"0 \(StandardisedConv: its forward is its own"),
    "transposed": (lambda: chain(nn.ConvTranspose2d(4, 4, 3)), {}, r"cannot adapt 0 \(ConvTranspose2d\)"),
    "own embedding": (lambda: chain(OffsetEmbedding(9, 4)), {}, r"0 \(OffsetEmbedding: its forward is its own"),
    "max_norm": (lambda: chain(nn.Embedding(9, 4, max_norm=1.0)), {}, "max_norm and sparse"),
    "sparse": (lambda: chain(nn.Embedding(9, 4, sparse=True)), {}, "max_norm and sparse"),
    "kdim": (lambda: chain(nn.MultiheadAttention(8, 2, kdim=4)), {}, "three weights where PEFT's layer expects one"),
    "out_proj": (Attention, {"target_modules": ["out_proj"]}, "attn.out_proj: .*name the attention itself"),
    "dropout": (Mixture, {"target_modules": ["experts"], "method": "lora-kaiming", "dropout": 0.1}, "set dropout 0"),
    "expert's activation": (Mixture, {"target_modules": ["gate.bias"]}, "no module matches 'gate.bias'"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_peft_cannot_carry_is_refused_by_name(what: str) -> None:
    make, settings, message = REFUSED[what]
    model = make()
    before = snapshot(model)
    with pytest.raises(TargetError, match=message) as caught:
        adapt(model, PissaConfig(2, **{"target_modules": ["0"], **settings}))
    assert "\n" not in str(caught.value) and same_tensors(before, snapshot(model))


def test_a_padding_mode_without_padding_is_no_matter() -> None:
    model = chain(nn.Conv2d(4, 4, 3, padding_mode="reflect"))
    assert [t.name for t in resolve_targets(model, PissaConfig(2, target_modules=["0"]))] == ["0"]


def test_all_linear_takes_attentions_and_experts_and_leaves_routers() -> None:
    def found(model: nn.Module, **settings: Any) -> list[str]:
        return [target.name for target in resolve_targets(model, PissaConfig(2, **settings))]

    assert found(CASES["encoder"].model()) == ["layer.self_attn", "layer.linear1", "layer.linear2"]
    mixture = CASES["experts"].model()
    assert found(mixture, exclude_modules=["experts"]) == ["head"] == found(mixture, target_modules=["head"])
    experts = ["0.experts.gate_up_proj", "0.experts.down_proj"]
    assert found(chain(mixture)) == [*experts, "0.head"]
    assert found(chain(mixture), target_modules=["gate"]) == ["0.gate"]
    assert found(chain(mixture), exclude_modules=["down_proj"]) == [experts[0], "0.head"]
    for outputs in (5, 1):  # a router of the usual kind, and the gate of a shared expert
        mixture.head = nn.Linear(8, outputs)
        assert found(chain(mixture)) == experts
        assert found(chain(mixture), target_modules=["head"], rank_pattern={"head": 1}) == ["0.head"]


def test_targets_of_a_model_without_values() -> None:
    with torch.device("meta"):
        model = Mixture()
    targets = resolve_targets(chain(model), PissaConfig(2), loaded=False)
    assert {t.weight_key: (t.kind.title, t.is_stack) for t in targets} == {
        "0.experts.gate_up_proj": ("experts", True),
        "0.experts.down_proj": ("experts", True),
        "0.head.weight": ("linear layer", False),
    }


def test_the_convolution_that_peft_cannot_load_is_announced() -> None:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        adapt(CASES["conv2d-dilated"].model(), PissaConfig(2, target_modules=["0"]))
    assert [
        str(w.message) for w in said if "drops the dilation" in str(w.message) and "export_merged" in str(w.message)
    ]
