"""The alternations: as published, and better."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matrices import second_moment, trained_like
from torch import Tensor

from pissa.config import Quantization, quantization_preset
from pissa.quantize.alternate import alternate
from pissa.quantize.error import output_error
from pissa.quantize.metric import metric
from pissa.quantize.nf4 import quantize_nf4
from tiny import global_generators


def svd(E: Tensor, rank: int) -> Tensor:
    U, S, Vh = torch.linalg.svd(E, full_matrices=False)
    return (U[:, :rank] * S[:rank]) @ Vh[:rank]


def nf4(W: Tensor) -> Tensor:
    return quantize_nf4(W).dequantize()


def error(W: Tensor, config: Quantization, rank: int = 8, **more: Any) -> float:
    return alternate(W, rank, config, dtype=torch.float32, **more).errors[-1]


@pytest.mark.parametrize("T", [1, 3])
def test_published_methods_are_their_listing_with_exact_svds(T: int) -> None:
    W = trained_like(128, 192)
    E = W
    for _ in range(T):
        L = svd(E, 8)
        Q = nf4(W - L)
        E = W - Q
    qpissa = float((W - Q - L).norm())
    L = torch.zeros_like(W)
    for _ in range(T):
        Q = nf4(W - L)
        L = svd(W - Q, 8)
    loftq = float((W - Q - L).norm())

    exact = {"algorithm": "exact", "tolerance": 0.0}
    for name, expected in {"qpissa": qpissa, "loftq": loftq}.items():
        config = quantization_preset(f"{name}-{T}", double_quant=False)
        assert error(W, config, **exact) == pytest.approx(expected, rel=1e-3)
        assert error(W, config) == pytest.approx(expected, rel=1e-2)
    plain = float((W - nf4(W)).norm())
    assert error(W, quantization_preset("qlora", double_quant=False)) == pytest.approx(plain)


def test_each_step_up_from_the_published_method_lowers_the_error() -> None:
    W = trained_like(192, 256)
    steps = [
        quantization_preset("loftq-5", double_quant=False),
        quantization_preset("qpissa-5", double_quant=False),
        quantization_preset("qpissa-5", double_quant=False, refit=True),
        quantization_preset("ours-5", double_quant=False, momentum=0.0),
        quantization_preset("ours-5", double_quant=False),
        quantization_preset("ours-10", double_quant=False),
    ]
    errors = [error(W, config) for config in steps]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.9 * errors[1]
    assert error(W, quantization_preset("ours-10")) < 1.01 * errors[-1]


@settings(max_examples=25, deadline=None)
@given(
    st.tuples(st.integers(4, 60), st.integers(4, 150)),
    st.sampled_from([0.0, 0.5, 0.9]),
    st.booleans(),
    st.sampled_from(["nf4", "int8"]),
    st.integers(0, 100),
)
def test_the_error_never_rises_and_is_that_of_the_result(
    shape: tuple[int, int], momentum: float, double_quant: bool, form: Any, seed: int
) -> None:
    W = trained_like(*shape, seed=seed)
    config = Quantization(form, iterations=6, momentum=momentum, double_quant=double_quant)
    found = alternate(W, 2, config, dtype=torch.float32)
    assert 1 <= found.iterations <= len(found.errors) <= 6
    assert list(found.errors) == sorted(found.errors, reverse=True)
    assert found.low_rank is not None
    left = found.low_rank.subtract_from(W - found.packed.dequantize())
    # where next to nothing is left, fp32 rounds what was subtracted from W
    floor = torch.finfo(W.dtype).eps * float(W.norm())
    assert float(left.double().norm()) == pytest.approx(found.errors[-1], rel=1e-5, abs=floor)


def test_no_iteration_follows_one_that_gained_next_to_nothing() -> None:
    W, M = trained_like(96, 128), metric(second_moment(128, 2000), 128)
    for weighting in (None, M):
        found = alternate(W, 8, Quantization(iterations=40), dtype=torch.float32, metric=weighting).errors
        *gaining, last = [1 - after / before for before, after in pairwise(found)]
        least = 0.005 if weighting is None else 0.02
        assert len(found) < 30 and all(gain > 0.99 * least for gain in gaining) and last < 1.01 * least


def test_a_moment_lowers_the_output_error_and_feedback_lowers_it_further() -> None:
    W, M, held_out = trained_like(96, 128), second_moment(128, 2000), second_moment(128, 500)
    base = Quantization(iterations=4, momentum=0.0)
    errors = [
        output_error(found.low_rank.subtract_from(W - found.packed.dequantize()), held_out)
        for found in (
            alternate(W, 8, base, dtype=torch.float32),
            alternate(W, 8, base, dtype=torch.float32, metric=metric(M, 128)),
            alternate(W, 8, replace(base, rounding="gptq"), dtype=torch.float32, metric=metric(M, 128)),
        )
        if found.low_rank is not None
    ]
    assert errors[1] < 0.9 * errors[0] and errors[2] < 0.9 * errors[1]


@pytest.mark.parametrize("form", ["int8", "gptq"])
def test_other_formats_gain_from_the_adapter_too(form: Any) -> None:
    W = trained_like(96, 128)
    published = error(W, quantization_preset("qpissa-3", format=form))
    assert published < 0.95 * error(W, quantization_preset("qlora", format=form))
    assert error(W, quantization_preset("ours-3", format=form)) < published


def test_the_same_bits_every_time_and_no_global_random_numbers() -> None:
    W, before = trained_like(64, 96), global_generators()
    first, second = (alternate(W, 8, Quantization(), dtype=torch.bfloat16) for _ in range(2))
    assert global_generators() == before
    assert torch.equal(first.packed.dequantize(), second.packed.dequantize())
    assert first.low_rank is not None and second.low_rank is not None
    assert torch.equal(first.low_rank.left, second.low_rank.left) and first.errors == second.errors
