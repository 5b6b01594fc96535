"""Names of quantised splits, as the studies and `pissa inspect` take them.

qlora   loftq-T   qpissa-T   ours-T     the presets of `quantization_preset`, T iterations
NAME+aware                              fitted to calibration text: errors count as the layer's output has them
NAME+gptq                               and each rounding error is carried on to the columns not yet rounded
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ...config import PRESETS, PissaConfig, Quantization, quantization_preset
from ...errors import ConfigError

PUBLISHED = ("qlora", "loftq-1", "loftq-5", "qpissa-1", "qpissa-5", "ours-5", "ours-10")
CALIBRATED = ("ours-10+aware", "ours-5+gptq")
SUFFIXES = ("aware", "gptq")


@dataclass(frozen=True)
class Variant:
    """One way to split and quantise a weight."""

    name: str
    """As the user gave it."""
    quantization: Quantization
    """Its settings."""
    aware: bool
    """Whether it is fitted to the second moment of the layer's input."""

    @property
    def plain(self) -> Quantization:
        """The same format as it comes, which errors are compared with."""
        q = self.quantization
        same = {name: getattr(q, name) for name in ("format", "double_quant", "block_size", "bits", "symmetric")}
        return quantization_preset("qlora", **same)

    def config(self, rank: int, seed: int) -> PissaConfig:
        """The settings with which `split_weight` makes this variant, at this rank."""
        method = "lora-kaiming" if self.quantization.method == "qlora" else "pissa"
        return PissaConfig(rank=rank, method=method, quantization=self.quantization, seed=seed)


def variant(name: str, **changes: Any) -> Variant:
    """The variant of this name.

    Args:
        name: see above.
        changes: fields of `Quantization`, for example `format="int8"`.

    Raises:
        ConfigError: no such name.
    """
    preset, _, suffix = name.partition("+")
    if suffix and suffix not in SUFFIXES:
        raise ConfigError(f"no method is called {name!r}; allowed: {PRESETS}, each also with +aware or +gptq")
    rounding = {"rounding": "gptq"} if suffix == "gptq" else {}
    return Variant(name, quantization_preset(preset, **{**changes, **rounding}), bool(suffix))


def variants(names: Sequence[str], *, calibrated: bool, **changes: Any) -> list[Variant]:
    """The variants of these names, each once.

    Raises:
        ConfigError: a name that does not exist, or one that needs calibration text where there is none.
    """
    found = [variant(name, **changes) for name in dict.fromkeys(names)]
    uncalibrated = [v.name for v in found if v.aware and not calibrated]
    if uncalibrated:
        raise ConfigError(f"{', '.join(uncalibrated)} needs calibration text; give --calibration FILE")
    if not found:
        raise ConfigError(f"no methods are given; allowed: {PRESETS}")
    return found
