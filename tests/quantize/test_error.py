"""Figures of merit."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from matrices import second_moment, trained_like

from pissa.config import PissaConfig, quantization_preset
from pissa.errors import ConfigError
from pissa.quantize.error import output_error, reduction_ratio
from pissa.quantize.nf4 import quantize_nf4
from pissa.split import split_weight


def config(name: str, **more: Any) -> PissaConfig:
    method = "lora-kaiming" if name == "qlora" else "pissa"
    return PissaConfig(8, method=method, quantization=quantization_preset(name, **more))


@pytest.mark.parametrize("form", ["nf4", "int8", "gptq"])
@pytest.mark.parametrize("norm", ["nuclear", "frobenius"])
def test_qlora_and_the_zero_matrix_have_no_reduction(form: Any, norm: Any) -> None:
    W = trained_like(64, 128)
    assert reduction_ratio(W, split_weight(W, config("qlora", format=form)), norm=norm) == pytest.approx(0, abs=1e-5)
    zero = torch.zeros(64, 128)
    assert reduction_ratio(zero, split_weight(zero, config("ours-5", format=form)), norm=norm) == 0.0


def test_reduction_is_its_definition() -> None:
    W = trained_like(64, 128)
    split = split_weight(W, config("qpissa-5", double_quant=False))
    for norm, order in (("nuclear", "nuc"), ("frobenius", "fro")):
        error = torch.linalg.matrix_norm(W - split.residual - split.scale * split.B @ split.A, order)
        plain = torch.linalg.matrix_norm(W - quantize_nf4(W).dequantize(), order)
        expected = float(100 * (1 - error / plain))
        assert reduction_ratio(W, split, norm=cast(Any, norm)) == pytest.approx(expected, abs=1e-3)
    assert reduction_ratio(W, split, norm="frobenius") == pytest.approx(
        split.certificate.quantization_reduction, abs=1e-3
    )


def test_what_has_no_reduction_is_refused() -> None:
    W = trained_like(16, 64)
    with pytest.raises(ConfigError, match="not quantised"):
        reduction_ratio(W, split_weight(W, PissaConfig(2)))
    with pytest.raises(ConfigError, match="nuclear, frobenius"):
        reduction_ratio(W, split_weight(W, config("ours-1")), norm=cast(Any, "spectral"))  # pyright: ignore[reportArgumentType]


def test_output_error_is_the_mean_over_inputs() -> None:
    x, E = torch.randn(50, 12, dtype=torch.float64), trained_like(7, 12)
    expected = (x @ E.double().mT).square().sum(1).mean().sqrt()
    assert output_error(E, x.mT @ x / 50) == pytest.approx(float(expected))
    assert output_error(E, torch.eye(12)) == pytest.approx(float(E.norm()))
    assert output_error(torch.zeros(7, 12), second_moment(12, 9)) == 0
