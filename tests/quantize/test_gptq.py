"""GPTQ's format and solver."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from matrices import awkward, second_moment, trained_like

from pissa.errors import WeightError
from pissa.quantize.error import output_error
from pissa.quantize.gptq import pack_rows, quantize_gptq, unpack_rows
from pissa.quantize.metric import metric


def test_words_hold_eight_codes_the_earliest_in_the_lowest_bits() -> None:
    codes = torch.tensor([[1], [2], [3], [4], [5], [6], [7], [15]])
    words = pack_rows(codes)
    assert words.dtype == torch.int32 and words.item() == 0xF7654321 - (1 << 32)
    assert torch.equal(unpack_rows(words), codes.int())


@pytest.mark.parametrize("act_order", [False, True])
def test_feedback_lowers_the_expected_output_error(act_order: bool) -> None:
    W, M = trained_like(64, 128), second_moment(128, 1000)
    damped = metric(M, 128).moment
    nearest = quantize_gptq(W, group_size=32)
    found = quantize_gptq(W, damped, group_size=32, act_order=act_order)
    assert output_error(W - found.dequantize(), M) < 0.8 * output_error(W - nearest.dequantize(), M)
    assert found.qweight.shape == (16, 64) and found.qzeros.shape == (4, 8)
    assert found.scales.shape == (4, 64) and found.scales.dtype == torch.float16 and found.g_idx.shape == (128,)
    assert torch.equal(found.g_idx, torch.arange(128) // 32) != act_order


def test_dequantised_values_follow_the_format_by_an_independent_loop() -> None:
    W = trained_like(8, 16)
    packed = quantize_gptq(W, metric(second_moment(16, 50), 16).moment, group_size=8, act_order=True)
    values = packed.dequantize()
    for o in range(8):
        for i in range(16):
            code = (int(packed.qweight[i // 8, o]) >> (4 * (i % 8))) & 15
            g = int(packed.g_idx[i])
            zero = (((int(packed.qzeros[g, o // 8]) >> (4 * (o % 8))) & 15) + 1) & 15
            assert float(values[o, i]) == (code - zero) * float(packed.scales[g, o])


@pytest.mark.parametrize("search", ["absmax", "unsigned", "signed"])
def test_nearest_rounding_is_within_half_a_step(search: Any) -> None:
    W = trained_like(16, 64)
    packed = quantize_gptq(W, group_size=64, scale_search=search)
    steps = packed.scales.float()[0][:, None]
    error = (W - packed.dequantize()).abs()
    assert float((error / steps).median()) <= 0.5
    assert error.norm() <= (W - quantize_gptq(W, group_size=64).dequantize()).norm() * (1 + 1e-6)


@pytest.mark.parametrize("bits", [4, 3, 2])
def test_a_symmetric_grid_has_one_zero_point_and_gains_by_signs(bits: int) -> None:
    W = trained_like(64, 64)
    searches: Any = ("absmax", "unsigned", "signed")
    found = [quantize_gptq(W, group_size=32, scale_search=s, bits=bits, symmetric=True) for s in searches]
    assert all(packed.is_symmetric for packed in found)
    assert not quantize_gptq(W, group_size=32, bits=bits).is_symmetric
    assert (found[2].scales < 0).any() and (found[2].scales > 0).any()
    errors = [float((W - packed.dequantize()).norm()) for packed in found]
    assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize("kind", ["zero", "zero blocks", "constant blocks", "outliers"])
def test_awkward_matrices_stay_finite(kind: str) -> None:
    W = awkward(kind)
    assert bool(torch.isfinite(quantize_gptq(W, group_size=64).dequantize()).all())


def test_a_side_that_does_not_pack_is_refused() -> None:
    with pytest.raises(WeightError, match="multiple of 8"):
        quantize_gptq(torch.randn(10, 16))
