"""Which precision the first products of a decomposition run in, by what the processor has units for.

A processor with units for bf16 products (AVX512-BF16, AMX) multiplies bf16 several times as fast as fp32; one without
them emulates, which is slower. The answer comes from the processor's own flags and never from a clock, so that the same
machine always computes the same bits. GPUs have such units too, but on them nothing switches until `make gpu` has
measured that it pays. The environment variable PISSA_PRODUCTS (fp32 or bf16) decides for tests and benchmarks.
"""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import Any

import torch

from ..errors import ConfigError

VARIABLE = "PISSA_PRODUCTS"
LOWEST_TOLERANCE = 1e-4
"""Below this the fp32 iteration has so much left to do that a start in bf16 saves nothing."""
FLAGS = ("avx512_bf16", "amx_bf16")
"""Processor flags of units for bf16 products, as torch and Linux call them."""


def first_products(device: torch.device, tolerance: float) -> torch.dtype:
    """The dtype of the products that find a first subspace: fp32, or bf16 where the processor is made for it.

    Raises:
        ConfigError: PISSA_PRODUCTS holds something else than fp32 or bf16.
    """
    chosen = os.environ.get(VARIABLE, "")
    if chosen not in ("", "fp32", "bf16"):
        raise ConfigError(f"{VARIABLE} is {chosen!r}; allowed: fp32, bf16, or leave it out")
    wanted = chosen == "bf16" if chosen else device.type == "cpu" and has_bf16_units()
    return torch.bfloat16 if wanted and tolerance >= LOWEST_TOLERANCE else torch.float32


@cache
def has_bf16_units() -> bool:
    """Whether this machine's processor has units for bf16 products, and oneDNN may use them."""
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA", "").upper()
    if limit and limit not in ("ALL", "DEFAULT") and "BF16" not in limit and "AMX" not in limit:
        return False
    return any(processor_flags().get(flag, False) for flag in FLAGS)


def processor_flags() -> dict[str, bool]:
    """The processor's flags by name, from torch where it tells them, else from Linux."""
    cpu: Any = torch.cpu
    if hasattr(cpu, "get_capabilities"):
        return {name: value is True for name, value in cpu.get_capabilities().items()}
    listing = Path("/proc/cpuinfo")
    lines = listing.read_text().splitlines() if listing.exists() else []
    flags = next((line.partition(":")[2].split() for line in lines if line.startswith("flags")), [])
    return dict.fromkeys(flags, True)
