"""Double quantisation: bitsandbytes' map, and scales of either sign."""

from __future__ import annotations

import pytest
import torch

from pissa.quantize.nested import dynamic_map, quantize_scales


def scales(count: int = 1000) -> torch.Tensor:
    return 0.05 + 0.03 * torch.rand(count, generator=torch.Generator().manual_seed(0))


def test_map_and_dequantisation_are_those_of_bitsandbytes() -> None:
    functional = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is not installed: the oracle here")
    assert torch.equal(dynamic_map(), functional.create_dynamic_map())
    nested = quantize_scales(scales())
    state = functional.QuantState(absmax=nested.absmax, blocksize=256, code=nested.table, dtype=torch.float32)
    theirs = functional.dequantize_blockwise(nested.codes, state) + nested.offset
    assert torch.equal(nested.dequantize(), theirs)


def test_plain_scales_are_quantised_as_bitsandbytes_does_up_to_its_rounding_at_ties() -> None:
    functional = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is not installed: the oracle here")
    values = scales(5000)
    nested = quantize_scales(values)
    codes, state = functional.quantize_blockwise(values - values.mean(), blocksize=256)
    assert torch.equal(nested.offset, values.mean()) and torch.equal(nested.absmax, state.absmax)
    # Its CPU kernel rounds by a 16-bit lookup, which is off by one beside a boundary.
    differ = nested.codes.int() - codes.int()
    assert float((differ != 0).float().mean()) < 0.01 and int(differ.abs().max()) <= 1


def test_scales_of_both_signs_keep_theirs_and_stay_close() -> None:
    signs = torch.where(torch.rand(1000, generator=torch.Generator().manual_seed(1)) < 0.5, -1.0, 1.0)
    values = scales() * signs
    back = quantize_scales(values).dequantize()
    assert torch.equal(back.sign(), signs)
    assert float((back - values).abs().max()) < 0.0072 * float(values.abs().max())


@pytest.mark.parametrize("values", [torch.zeros(5), torch.full((300,), 0.5), torch.tensor([1e-30, 2e-30]), scales(1)])
def test_scales_without_spread_come_back(values: torch.Tensor) -> None:
    torch.testing.assert_close(quantize_scales(values).dequantize(), values, rtol=0.02, atol=0)
