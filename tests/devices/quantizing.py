"""Formats and quantised splits on a device: the same codes as on the CPU, and the same gain."""

from __future__ import annotations

from typing import Any

import torch
from decomposing import decaying
from registry import holds
from torch import Tensor

from pissa import PissaConfig, Quantization, quantization_preset, reduction_ratio, split_weight
from pissa.quantize.gptq import quantize_gptq
from pissa.quantize.int8 import quantize_int8
from pissa.quantize.nf4 import quantize_nf4, rounded_nf4

DIFFERENT = 0.005
"""Share of codes that may differ where sums in another order decide between two scales."""
PERCENT = 0.5
"""By how much reductions of error may differ, in percent."""


def weight(out: int = 96, columns: int = 128, dtype: torch.dtype = torch.float32) -> Tensor:
    """A matrix in the size of trained weights."""
    noise = torch.randn(out, columns, generator=torch.Generator().manual_seed(9))
    return (0.5 * decaying(out, columns) + 0.02 * noise).to(dtype)


def moment(columns: int = 128) -> Tensor:
    """The second moment of correlated inputs."""
    x = decaying(400, columns, 4, -0.3)
    return x.T @ x


def share_apart(here: Tensor, there: Tensor) -> float:
    """Share of entries that differ."""
    assert here.shape == there.shape
    return float((here.cpu() != there.cpu()).float().mean())


@holds
def nf4_has_the_codes_of_the_cpu(device: torch.device) -> None:
    W = weight()
    for double_quant in (False, True):
        here = quantize_nf4(W, double_quant=double_quant)
        there = quantize_nf4(W.to(device), double_quant=double_quant)
        assert there.codes.device.type == device.type
        # means and reciprocals may be rounded otherwise on another device, and a value lies on a boundary
        assert share_apart(here.codes, there.codes) <= (DIFFERENT if double_quant else 1e-3)
        torch.testing.assert_close(here.dequantize(), there.dequantize().cpu(), rtol=0, atol=0.05)


@holds
def nf4_scales_are_searched_as_well_as_on_the_cpu(device: torch.device) -> None:
    W = weight()
    for search in ("unsigned", "signed"):
        for importance in (None, torch.linspace(0.5, 2, W.shape[1])):
            there_weights = None if importance is None else importance.to(device)
            here = quantize_nf4(W, scale_search=search, weights=importance).dequantize()
            there = quantize_nf4(W.to(device), scale_search=search, weights=there_weights).dequantize().cpu()
            weights = torch.ones(W.shape[1]) if importance is None else importance
            errors = [float(((W - Q).square() * weights).sum()) for Q in (here, there)]
            assert abs(errors[1] / errors[0] - 1) <= 0.01


@holds
def rounding_alone_is_as_near_as_codes(device: torch.device) -> None:
    W = weight().to(device)
    errors = [float(torch.dist(Q, W)) for Q in (rounded_nf4(W), quantize_nf4(W).dequantize())]
    assert abs(errors[0] / errors[1] - 1) <= 0.01


@holds
def blocks_that_end_short_and_odd_sizes_are_packed(device: torch.device) -> None:
    for shape in ((5, 13), (1, 1), (3, 64), (7, 65)):
        W = weight()[: shape[0], : shape[1]].contiguous()
        here, there = quantize_nf4(W), quantize_nf4(W.to(device))
        assert share_apart(here.codes, there.codes) <= 0.02
        assert there.dequantize().shape == shape


@holds
def int8_has_the_codes_of_the_cpu(device: torch.device) -> None:
    W = weight()
    for search in ("absmax", "unsigned"):
        here, there = quantize_int8(W, scale_search=search), quantize_int8(W.to(device), scale_search=search)
        assert share_apart(here.codes, there.codes) <= DIFFERENT
        torch.testing.assert_close(here.absmax, there.absmax.cpu(), rtol=0.05, atol=0)


@holds
def gptq_rounds_as_well_as_on_the_cpu(device: torch.device) -> None:
    W, M = weight(), moment()
    M = M / M.diagonal().mean() + 0.01 * torch.eye(len(M))
    for act_order in (False, True):
        errors = []
        for where in (torch.device("cpu"), device):
            packed = quantize_gptq(W.to(where), M.to(where), group_size=32, act_order=act_order)
            E = W - packed.dequantize().cpu()
            errors.append(float(((E @ M) * E).sum()))
        assert abs(errors[1] / errors[0] - 1) <= 0.02
    assert quantize_gptq(W.to(device), group_size=32).dequantize().device.type == device.type


@holds
def quantised_splits_take_away_as_much_error_as_on_the_cpu(device: torch.device) -> None:
    presets: dict[str, Quantization] = {name: quantization_preset(name) for name in ("loftq-2", "qpissa-2", "ours-3")}
    presets["qpissa-3, plain"] = quantization_preset("qpissa-3", double_quant=False)
    presets["int8"] = Quantization("int8", iterations=2)
    for dtype in (torch.float32, torch.bfloat16):
        W = weight(dtype=dtype)
        for name, quantization in presets.items():
            config = PissaConfig(rank=8, quantization=quantization)
            ratios = [
                reduction_ratio(W.to(where), split_weight(W.to(where), config), norm="frobenius")
                for where in (torch.device("cpu"), device)
            ]
            assert abs(ratios[1] - ratios[0]) <= PERCENT and ratios[1] > 0, f"{name}, {dtype}: {ratios}"


@holds
def a_second_moment_from_any_device_is_used(device: torch.device) -> None:
    W = weight()
    for rounding in ("nearest", "gptq"):
        quantization = Quantization("nf4", iterations=2, rounding=rounding, calibration="text.txt")
        config = PissaConfig(rank=8, quantization=quantization)
        for M in (moment(), moment().to(device)):
            split: Any = split_weight(W.to(device), config, moment=M)
            restored = split.residual.float() + split.scale * split.B @ split.A
            assert float(torch.dist(restored.cpu(), W)) <= 0.2 * float(W.norm())
