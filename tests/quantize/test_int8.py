"""LLM.int8()'s format against bitsandbytes."""

from __future__ import annotations

import pytest
import torch
from matrices import AWKWARD, awkward, trained_like

from pissa.quantize.int8 import quantize_int8


@pytest.mark.parametrize("shape", [(64, 64), (300, 40), (1, 7)])
def test_plain_codes_and_values_are_those_of_bitsandbytes(shape: tuple[int, int]) -> None:
    functional = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is not installed: the oracle here")
    W = trained_like(*shape)
    codes, stats, _ = functional.int8_vectorwise_quant(W.clone())
    packed = quantize_int8(W)
    assert torch.equal(packed.codes, codes) and torch.equal(packed.absmax, stats)
    assert torch.equal(packed.dequantize(), functional.int8_vectorwise_dequant(codes, stats))


@pytest.mark.parametrize("kind", AWKWARD)
def test_searched_scales_are_never_worse(kind: str) -> None:
    W = awkward(kind)
    plain = (W - quantize_int8(W).dequantize()).double().norm()
    found = (W - quantize_int8(W, scale_search="signed").dequantize()).double().norm()
    assert bool(torch.isfinite(found)) and found <= plain * (1 + 1e-6)


def test_dtype_is_that_of_the_weight_unless_asked_otherwise() -> None:
    W = trained_like(16, 16, dtype=torch.bfloat16)
    assert quantize_int8(W).dequantize().dtype == torch.bfloat16
    assert quantize_int8(W, dtype=torch.float16).dequantize().dtype == torch.float16
