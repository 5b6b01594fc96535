"""`split_weight` with a quantisation: one path, exact books."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from matrices import AWKWARD, awkward, second_moment, trained_like

from pissa.config import PissaConfig, Quantization, quantization_preset
from pissa.errors import ConfigError, WeightError
from pissa.quantize.error import plain_error, split_error
from pissa.quantize.metric import metric
from pissa.split import STORAGE_DTYPES, split_weight

FAST: dict[str, Any] = {"iterations": 2}


@pytest.mark.parametrize("dtype", STORAGE_DTYPES)
@pytest.mark.parametrize("form", ["nf4", "int8", "gptq"])
@pytest.mark.parametrize("alpha", [None, 3.0])
def test_residual_is_what_the_codes_say_and_the_adapter_fits_it(dtype: torch.dtype, form: Any, alpha: Any) -> None:
    W = trained_like(64, 128, dtype=dtype)
    before = W.clone()
    split = split_weight(W, PissaConfig(8, alpha=alpha, quantization=Quantization(form, **FAST)))
    assert torch.equal(W, before)
    assert split.packed is not None
    assert split.residual.dtype == dtype and torch.equal(split.residual, split.packed.dequantize())
    assert split.A.shape == (8, 128) and split.B.shape == (64, 8)
    assert split.A.dtype == split.B.dtype == torch.float32 and split.A.is_contiguous() and split.B.is_contiguous()
    whole = split.residual.double() + split.scale * split.B.double() @ split.A.double()
    error = float((W.double() - whole).norm())
    assert split.certificate.quantization_error == pytest.approx(error, rel=1e-4)
    assert split.certificate.rounding == pytest.approx(error / float(W.double().norm()), rel=1e-4)
    assert split.certificate.iterations in (1, 2)
    balance = split.B.norm(dim=0) / split.A.norm(dim=1)
    torch.testing.assert_close(balance, torch.ones(8), rtol=1e-3, atol=1e-3)


def test_without_quantisation_nothing_changes() -> None:
    split = split_weight(trained_like(16, 24), PissaConfig(4))
    assert split.packed is None and split.certificate.quantization_error is None


@pytest.mark.parametrize("kind", AWKWARD)
def test_awkward_weights_split_or_say_why(kind: str) -> None:
    W = awkward(kind)
    split = split_weight(W, PissaConfig(4, quantization=Quantization(**FAST)))
    assert bool(torch.isfinite(split.residual).all()) and bool(torch.isfinite(split.A).all())
    assert bool(torch.isfinite(split.B).all())
    if kind == "zero":
        assert split.certificate.quantization_error == 0 and split.certificate.quantization_reduction == 0
    else:
        assert split.certificate.quantization_reduction is not None and split.certificate.quantization_reduction > -1e-3


def test_a_rank_deficient_moment_and_feedback_work_through_the_front_door() -> None:
    W, M = trained_like(48, 64), second_moment(64, 20)
    config = PissaConfig(4, quantization=Quantization(rounding="gptq", **FAST))
    split = split_weight(W, config, moment=M)
    assert split.packed is not None and torch.equal(split.residual, split.packed.dequantize())


def test_bad_input_is_refused_by_name() -> None:
    W, quantized = trained_like(16, 64), PissaConfig(2, quantization=Quantization(**FAST))
    with pytest.raises(WeightError, match=r"h\.0 .*quantised already"):
        split_weight(torch.zeros(512, 1, dtype=torch.uint8), quantized, name="h.0")
    with pytest.raises(ConfigError, match="second moment"):
        split_weight(W, PissaConfig(2), moment=torch.eye(64))
    with pytest.raises(ConfigError, match="gradient"):
        split_weight(W, PissaConfig(2), gradient=W)
    with pytest.raises(ConfigError, match=r"h\.0.*calibration"):
        split_weight(W, PissaConfig(2, quantization=Quantization(rounding="gptq")), name="h.0")
    with pytest.raises(WeightError, match=r"h\.0.*not a multiple of block_size 64"):
        split_weight(trained_like(64, 96), quantized, name="h.0")
    with pytest.raises(WeightError, match=r"h\.0.*\(64, 64\)"):
        split_weight(W, quantized, moment=torch.eye(16), name="h.0")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "quantization",
    [
        Quantization(),
        Quantization("int8"),
        Quantization("gptq", bits=2),
        Quantization("nvfp4"),
        Quantization(rounding="gptq", iterations=2),
        quantization_preset("qpissa-2"),
    ],
    ids=lambda quantization: f"{quantization.format}-{quantization.rounding}-{quantization.scale_search}",
)
def test_the_stated_gain_in_output_error_is_the_one_there_is(quantization: Quantization, dtype: torch.dtype) -> None:
    M = second_moment(128, 2000)
    W = trained_like(96, 128).to(dtype)
    split = split_weight(W, PissaConfig(8, quantization=quantization), moment=M)
    assert split.packed is not None
    C = metric(M, 128).factor
    left, plain = split_error(W, split).double() @ C, plain_error(W, split.packed).double() @ C
    assert split.certificate.output_reduction == pytest.approx(100 * (1 - float(left.norm() / plain.norm())), abs=0.05)
    unfitted = PissaConfig(8, quantization=replace(quantization, rounding="nearest"))
    assert split_weight(W, unfitted).certificate.output_reduction is None
