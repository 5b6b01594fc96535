"""Weights that code reads without calling their layer are no targets, whatever model it is."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from torch import Tensor, nn

from pissa import PissaConfig, adapt, init_checkpoint
from pissa.errors import TargetError
from pissa.live.reads import read_elsewhere
from pissa.live.selection import select_weights
from pissa.live.targets import resolve_targets
from tiny import tiny_llama


def fused(x: Tensor, block: Any) -> Tensor:
    return F.linear(x, block.proj.weight)


class Settings:
    exact, parts = False, 1


class Block(nn.Module):
    """Two layers; `out` is called, what is done with `proj` is the subclasses' affair."""

    def __init__(self) -> None:
        super().__init__()
        self.proj, self.out = nn.Linear(6, 6), nn.Linear(6, 6)
        self.config = Settings()

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.mixed(x))

    def mixed(self, x: Tensor) -> Tensor:
        return self.proj(x)


class ReadsInAnExpression(Block):
    def mixed(self, x: Tensor) -> Tensor:
        return x @ self.proj.weight.T


class ReadsByAName(Block):
    def mixed(self, x: Tensor) -> Tensor:
        weight = self.proj.weight
        return F.linear(x, weight[:, :], self.proj.bias)


class ReadsAsAKeyword(Block):
    def mixed(self, x: Tensor) -> Tensor:
        return F.linear(input=x, weight=self.proj.weight)


class ReadsInAFunction(Block):
    def mixed(self, x: Tensor) -> Tensor:
        return fused(x, self)


class ReadsWhenTraining(Block):
    def mixed(self, x: Tensor) -> Tensor:
        return F.linear(x, self.proj.weight) if self.training else self.proj(x)


class Inherits(ReadsInAnExpression):
    pass


class CallsTheInherited(ReadsInAnExpression):
    def mixed(self, x: Tensor) -> Tensor:
        return super().mixed(x) + 1


class Replaces(ReadsInAnExpression):
    def mixed(self, x: Tensor) -> Tensor:
        return self.proj(x)


class AsksForTheDtype(Block):
    def mixed(self, x: Tensor) -> Tensor:
        weight = self.proj.weight
        if isinstance(self.proj.weight, Tensor) and x.dtype != self.proj.weight.dtype:
            x = x.to(weight.dtype)
        return self.proj(x.to(self.proj.weight).to(weight.device))


class ReadsWhereSettingsSayNo(Block):
    def mixed(self, x: Tensor) -> Tensor:
        if self.config.exact and self.config.parts > 1:
            return F.linear(x, self.proj.weight)
        return self.proj(x)

    def init_weights(self) -> None:
        self.proj.weight.data.zero_()


READING = (
    *(ReadsInAnExpression, ReadsByAName, ReadsAsAKeyword, ReadsInAFunction, ReadsWhenTraining),
    *(Inherits, CallsTheInherited),
)


def found(model: nn.Module) -> set[str]:
    return {*read_elsewhere(model, select_weights(model, dict(model.named_modules()), PissaConfig(rank=2)))}


@pytest.mark.parametrize("cls", READING)
def test_a_read_in_the_source_is_found(cls: type[Block]) -> None:
    model = nn.Sequential(cls(), Block())
    assert found(model) == {"0.proj", *({"1.proj"} if cls is ReadsInAFunction else set())}


@pytest.mark.parametrize("cls", [Block, Replaces, AsksForTheDtype, ReadsWhereSettingsSayNo])
def test_calls_and_questions_about_a_weight_are_none(cls: type[Block]) -> None:
    assert found(nn.Sequential(cls())) == set()


def test_a_setting_decides() -> None:
    model = ReadsWhereSettingsSayNo()
    model.config.exact, model.config.parts = True, 2
    assert found(model) == {"proj"}


def test_all_linear_leaves_it_out_and_says_so_and_a_name_is_refused() -> None:
    with pytest.warns(UserWarning, match=r"not adapted: proj \(read by ReadsByAName.mixed without a call\)"):
        model = adapt(ReadsByAName(), PissaConfig(rank=2))
    assert [*model.peft_config["default"].target_modules] == ["out"]  # pyright: ignore
    with pytest.raises(TargetError, match=r"proj \(read by .*exclude_modules"):
        adapt(ReadsByAName(), PissaConfig(rank=2, target_modules=["proj", "out"]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adapt(ReadsByAName(), PissaConfig(rank=2, exclude_modules=["proj"]))


def settings(**values: Any) -> dict[str, Any]:
    return values


def wavlm() -> tuple[Any, dict[str, Any]]:
    config = hf.WavLMConfig(
        **settings(vocab_size=32, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48),
        **settings(conv_dim=(16, 16), conv_stride=(5, 2), conv_kernel=(10, 3), num_conv_pos_embeddings=8),
        **settings(num_conv_pos_embedding_groups=4, hidden_dropout=0.0, attention_dropout=0.0, feat_proj_dropout=0.0),
        **settings(layerdrop=0.0, final_dropout=0.0, mask_time_prob=0.0),
    )
    x = torch.randn(2, 400, generator=torch.Generator().manual_seed(4))
    return hf.WavLMForCTC(config), {"input_values": x, "labels": torch.randint(1, 30, (2, 4))}


def mamba() -> tuple[Any, dict[str, Any]]:
    ids = torch.arange(18).reshape(2, 9)
    config = hf.MambaConfig(vocab_size=64, hidden_size=32, state_size=4, num_hidden_layers=1)
    return hf.MambaForCausalLM(config), {"input_ids": ids, "labels": ids}


def mobilebert() -> tuple[Any, dict[str, Any]]:
    ids = torch.arange(3, 21).reshape(2, 9)
    config = hf.MobileBertConfig(
        **settings(vocab_size=64, hidden_size=32, intermediate_size=32, embedding_size=16, intra_bottleneck_size=16),
        **settings(num_hidden_layers=1, num_attention_heads=2, num_feedforward_networks=1, hidden_dropout_prob=0.0),
    )
    return hf.MobileBertForMaskedLM(config), {"input_ids": ids, "labels": ids}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make", [wavlm, mamba, mobilebert])
def test_step_0_is_the_base_and_every_adapter_learns(make: Callable[[], tuple[Any, dict[str, Any]]]) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, batch = make()
    before = model.eval()(**batch).logits
    adapted = adapt(model, PissaConfig(rank=2))
    # two factorisations' roundings through a few layers of fp32
    torch.testing.assert_close(adapted(**batch).logits, before, rtol=1e-4, atol=1e-5)
    adapted.train()(**batch).loss.backward()
    assert [name for name, p in adapted.named_parameters() if p.requires_grad and p.grad is None] == []


@pytest.mark.filterwarnings("ignore")
def test_init_splits_what_adapt_adapts(tmp_path: Path) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, _ = mamba()
    model.save_pretrained(tmp_path / "base")
    made = init_checkpoint(tmp_path / "base", tmp_path / "split", PissaConfig(rank=2))
    assert {*made.manifest["modules"]} == {t.name for t in resolve_targets(model, PissaConfig(rank=2))}
    with pytest.raises(TargetError, match="dt_proj"):
        init_checkpoint(tmp_path / "base", tmp_path / "other", PissaConfig(rank=2, target_modules=["dt_proj"]))


def test_what_peft_refuses_is_refused_before_anything_is_split(monkeypatch: pytest.MonkeyPatch) -> None:
    model = mamba()[0]
    with pytest.raises(TargetError, match="incompatible with Mamba"):
        adapt(model, PissaConfig(rank=2, target_modules=["out_proj"]))

    def refuse(*_: Any, **__: Any) -> None:
        raise ValueError("No,\nnot this one")

    def split(*_: Any) -> None:
        raise AssertionError("something was split")

    monkeypatch.setattr("pissa.live.trial.get_peft_model", refuse)
    monkeypatch.setattr("pissa.adapted.adapt.splits_of", split)
    with pytest.raises(TargetError, match=r"No, not this one\. Name other") as caught:
        adapt(tiny_llama(), PissaConfig(rank=2))
    assert "\n" not in str(caught.value)
