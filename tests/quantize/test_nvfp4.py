"""NVFP4: the format by an independent loop, and what searching its scales gains."""

from __future__ import annotations

import pytest
import torch
from matrices import awkward, second_moment, trained_like

from pissa import PissaConfig, Quantization, split_weight
from pissa.errors import WeightError
from pissa.quantize.nvfp4 import quantize_nvfp4

VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def test_dequantised_values_follow_the_format_by_an_independent_loop() -> None:
    W = trained_like(6, 32)
    packed = quantize_nvfp4(W)
    assert packed.weight_packed.shape == (6, 16) and packed.weight_scale.shape == (6, 2)
    assert packed.weight_scale.dtype == torch.float8_e4m3fn
    assert float(packed.weight_global_scale) == 256
    values = packed.dequantize()
    for o in range(6):
        for i in range(32):
            code = (int(packed.weight_packed[o, i // 2]) >> (4 * (i % 2))) & 15
            sign = -1 if code & 8 else 1
            scale = float(packed.weight_scale[o, i // 16]) / float(packed.weight_global_scale)
            assert float(values[o, i]) == pytest.approx(sign * VALUES[code & 7] * scale, rel=1e-6)


def test_codes_are_the_nearest_ones_for_the_stored_scales() -> None:
    W = trained_like(16, 64)
    packed = quantize_nvfp4(W, scale_search="unsigned")
    grid = torch.tensor([sign * value for value in VALUES for sign in (1, -1)])
    blocks, scales = W.view(-1, 16), packed.scales
    best = (blocks[:, :, None] - grid * scales[:, None, None]).abs().amin(-1)
    torch.testing.assert_close((W - packed.dequantize()).view(-1, 16).abs(), best, rtol=1e-5, atol=1e-7)


def test_each_step_lowers_the_error() -> None:
    W, M = trained_like(128, 192), second_moment(192, 2000)
    plain, searched = (float((W - quantize_nvfp4(W, scale_search=s).dequantize()).norm()) for s in ("absmax", "signed"))
    assert searched < 0.99 * plain
    split = split_weight(W, PissaConfig(8, quantization=Quantization("nvfp4")), moment=M)
    assert split.certificate.output_reduction is not None and split.certificate.output_reduction > 10


@pytest.mark.parametrize("kind", ["zero", "zero blocks", "constant blocks", "outliers"])
def test_awkward_matrices_stay_finite(kind: str) -> None:
    assert bool(torch.isfinite(quantize_nvfp4(awkward(kind), scale_search="signed").dequantize()).all())


def test_rows_that_are_not_whole_blocks_are_refused() -> None:
    with pytest.raises(WeightError, match="each 16 inputs"):
        quantize_nvfp4(torch.randn(4, 24))


@pytest.mark.parametrize("size", [1e-30, 1e-5, 1e-2, 1.0, 1e3, 1e30])
def test_the_error_does_not_depend_on_the_size_of_the_weights(size: float) -> None:
    W = trained_like(64, 64)
    W = W / W.abs().max()
    error, usual = (
        float((X - quantize_nvfp4(X).dequantize()).double().norm() / X.double().norm()) for X in (W * size, W)
    )
    assert error < 1.05 * usual
