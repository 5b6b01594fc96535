"""NF4 as bitsandbytes has it, bit for bit, and with codes and scales of our own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matrices import AWKWARD, awkward, trained_like
from torch import Tensor

from pissa.quantize.nested import NestedScales
from pissa.quantize.nf4 import PackedNF4, quantize_nf4

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SEARCHES = ("absmax", "unsigned", "signed")


@pytest.fixture(scope="module")
def functional() -> Any:
    return pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is not installed: it is the oracle here")


def as_read_by_bitsandbytes(functional: Any, packed: PackedNF4) -> Tensor:
    absmax, nested = packed.absmax, {}
    if isinstance(absmax, NestedScales):
        inner = functional.QuantState(absmax=absmax.absmax, blocksize=256, code=absmax.table, dtype=torch.float32)
        absmax, nested = absmax.codes, {"offset": absmax.offset, "state2": inner}
    state = functional.QuantState(
        absmax=absmax,
        shape=torch.Size(packed.shape),
        code=packed.table,
        blocksize=packed.block_size,
        quant_type="nf4",
        dtype=packed.dtype,
        **nested,
    )
    return functional.dequantize_4bit(packed.codes, state)


def same_bits(left: Tensor, right: Tensor) -> bool:
    return left.dtype == right.dtype and torch.equal(
        left.contiguous().view(torch.uint8), right.contiguous().view(torch.uint8)
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(64, 128), (96, 384), (3, 256), (1, 128)])
@pytest.mark.parametrize("block_size", [32, 64, 128])
def test_plain_codes_and_scales_are_those_of_bitsandbytes(
    functional: Any, dtype: torch.dtype, shape: tuple[int, int], block_size: int
) -> None:
    W = trained_like(*shape, dtype=dtype)
    W.view(-1)[: min(block_size, W.numel())] = 0
    codes, state = functional.quantize_4bit(W, blocksize=block_size, quant_type="nf4")
    packed = quantize_nf4(W, block_size=block_size)

    assert torch.equal(packed.codes, codes)
    assert isinstance(packed.absmax, Tensor) and torch.equal(packed.absmax, state.absmax)
    assert torch.equal(packed.table, state.code)
    assert same_bits(packed.dequantize(), functional.dequantize_4bit(codes, state))


@settings(max_examples=60, deadline=None)
@given(
    st.tuples(st.integers(1, 40), st.integers(1, 3)),
    st.sampled_from(DTYPES),
    st.sampled_from(SEARCHES),
    st.booleans(),
    st.sampled_from([32, 64, 128]),
)
def test_dequantised_values_are_the_bits_that_bitsandbytes_reads(
    functional: Any, size: tuple[int, int], dtype: torch.dtype, search: Any, double_quant: bool, block_size: int
) -> None:
    W = trained_like(size[0], size[1] * block_size, seed=sum(size), dtype=dtype)
    packed = quantize_nf4(W, block_size=block_size, double_quant=double_quant, scale_search=search)
    assert packed.codes.shape == ((W.numel() + 1) // 2, 1) and packed.codes.dtype == torch.uint8
    assert packed.scales.shape == (-(-W.numel() // block_size),)
    assert same_bits(packed.dequantize(), as_read_by_bitsandbytes(functional, packed))


@pytest.mark.parametrize("shape", [(100, 30), (7, 13), (5, 96), (3, 16), (1, 1), (2, 33)])
@pytest.mark.parametrize("search", SEARCHES)
def test_blocks_that_run_over_rows_follow_the_format(functional: Any, shape: tuple[int, int], search: Any) -> None:
    W = trained_like(*shape)
    packed = quantize_nf4(W, scale_search=search)
    if search == "absmax":
        # Its codes are right; its CPU kernel for reading them back takes wrong scales for such shapes (0.50.2).
        codes, state = functional.quantize_4bit(W, blocksize=64, quant_type="nf4")
        assert torch.equal(packed.codes, codes) and torch.equal(packed.scales, state.absmax)
    nibbles = torch.stack([packed.codes >> 4, packed.codes & 15], 1).view(-1)[: W.numel()]
    values = packed.table[nibbles.long()] * packed.scales.repeat_interleave(64)[: W.numel()]
    assert same_bits(packed.dequantize(), values.view(shape))


@pytest.mark.parametrize("double_quant", [False, True])
def test_searching_scales_lowers_the_error_and_signs_lower_it_further(double_quant: bool) -> None:
    W = trained_like(128, 256)
    errors = [
        float((W - quantize_nf4(W, scale_search=search, double_quant=double_quant).dequantize()).norm())
        for search in SEARCHES
    ]
    assert errors[1] < 0.96 * errors[0]
    assert errors[2] < 0.98 * errors[1]


def test_codes_are_chosen_for_the_scales_that_are_stored() -> None:
    W = trained_like(32, 128)
    packed = quantize_nf4(W, scale_search="signed", double_quant=True)
    blocks, scales = W.view(-1, 64), packed.scales
    nearest = (blocks[..., None] - scales[:, None, None] * packed.table).abs().amin(-1)
    error = (blocks - packed.dequantize().view(-1, 64)).abs()
    torch.testing.assert_close(error, nearest, rtol=1e-5, atol=1e-9)
    assert bool((scales < 0).any()) and bool((scales > 0).any())


@pytest.mark.parametrize("kind", AWKWARD)
@pytest.mark.parametrize("search", SEARCHES)
def test_awkward_matrices_quantise_to_finite_values_no_worse_than_plain(kind: str, search: Any) -> None:
    W = awkward(kind)
    before = W.clone()
    error = (W - quantize_nf4(W, scale_search=search).dequantize()).double().norm()
    plain = (W - quantize_nf4(W).dequantize()).double().norm()
    assert torch.equal(W, before)
    assert bool(torch.isfinite(error)) and error <= plain * (1 + 1e-6)


def test_quantising_is_the_same_for_any_strides() -> None:
    W = trained_like(64, 96)
    packed = quantize_nf4(W, scale_search="signed")
    again = quantize_nf4(W.mT.contiguous().mT, scale_search="signed")
    assert torch.equal(packed.codes, again.codes) and torch.equal(packed.scales, again.scales)
