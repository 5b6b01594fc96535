"""How a frozen residual is stored in few bits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from ..errors import ConfigError
from .kinds import Count, File, ShareBelowOne
from .settings import check_settings, did_you_mean

QuantizationFormat = Literal["nf4", "int8", "gptq", "nvfp4"]
QuantizationMethod = Literal["qlora", "loftq", "qpissa"]
ScaleSearch = Literal["absmax", "unsigned", "signed"]
Rounding = Literal["nearest", "gptq"]
BlockSize = Literal[32, 64, 128, 256, 512, 1024, 2048, 4096]
PRESETS = "qlora, loftq-T, qpissa-T (as published), ours-T; T is the number of iterations"


@dataclass(frozen=True)
class Quantization:
    """How the frozen residual is stored in few bits, and how residual and adapter are fitted to each other.

    Raises:
        ConfigError: a value out of its range, or a combination that means nothing.

    Example:
        >>> from pissa import PissaConfig, Quantization
        >>> config = PissaConfig(rank=16, quantization=Quantization(format="nf4", iterations=5))
        >>> config.title
        'qpissa'
    """

    format: QuantizationFormat = "nf4"
    """bitsandbytes' 4-bit NF4, bitsandbytes' row-wise INT8, GPTQ's integers, or NVFP4."""
    method: QuantizationMethod = "qpissa"
    """"qlora" quantises the weight and leaves the adapter at zero, "loftq" alternates from the quantised weight,
    "qpissa" from the principal components."""
    iterations: Count = 10
    """How often residual and adapter are fitted to each other. Where the best iterate is taken, at most so often: one
    that gains next to nothing is the last. "qlora" has nothing to iterate and ignores it."""
    refit: bool = True
    """End on an SVD of what the quantised residual leaves over. LoftQ always does, published QPiSSA does not."""
    scale_search: ScaleSearch = "signed"
    """"absmax" takes each block's largest magnitude as its scale, as bitsandbytes does; "unsigned" and "signed" search
    the scale of least error. In int8 and gptq a sign gains nothing and the two are the same."""
    momentum: ShareBelowOne | None = None
    """How far each iteration is extrapolated beyond the last one; 0 is plain alternation. Left out, 0.9, and 0.5 where
    text says which directions matter."""
    rounding: Rounding = "nearest"
    """"gptq" carries each rounding error on to the columns not yet rounded; it needs calibration."""
    double_quant: bool = True
    """Store NF4's block scales in 8 bits themselves."""
    calibration: File | None = None
    """What the activations that say which directions matter come from: a text file, or "data" for the rows that the
    model is trained on. Left out, all directions count alike."""
    block_size: BlockSize = 64
    """How many values share a scale: NF4's block, GPTQ's group. INT8 has one scale per row, NVFP4 one for 16."""
    bits: Literal[2, 3, 4] = 4
    """How many bits a code of format gptq has."""
    symmetric: bool | None = None
    """Whether every zero point of format gptq is the middle code, which is what vLLM's kernels for 4 bits take. Left
    out, it is with 4 bits; with fewer, for which vLLM has no kernels, each group has its own."""

    def __post_init__(self) -> None:
        check_settings(self, "quantization: ")
        if not self.refit and (self.method == "loftq" or self.momentum != 0):
            raise ConfigError(
                "quantization: refit is off; LoftQ and momentum both end on an SVD, so leave refit on, or take method "
                '"qpissa" with momentum 0'
            )
        if self.bits != 4 and self.format != "gptq":
            raise ConfigError(f"quantization: bits {self.bits} are for format gptq; leave them out for {self.format}")
        if self.symmetric is not None and self.format != "gptq":
            raise ConfigError(f"quantization: symmetric is for format gptq; leave it out for {self.format}")
        if self.rounding == "gptq" and self.format not in ("nf4", "gptq"):
            raise ConfigError(
                f'quantization: rounding "gptq" is for the formats nf4 and gptq; {self.format} takes "nearest"'
            )

    @property
    def is_symmetric(self) -> bool:
        """Whether the zero point of format gptq is the middle code everywhere."""
        return self.bits == 4 if self.symmetric is None else self.symmetric

    @property
    def is_fitted(self) -> bool:
        """Whether text that says which directions matter would change the result."""
        return self.method != "qlora" or self.rounding == "gptq" or self.scale_search != "absmax"

    @property
    def keeps_best(self) -> bool:
        """Whether the best iterate is taken; the published methods take the last one."""
        return self.scale_search != "absmax" or self.momentum != 0


def quantization_preset(name: str, **changes: Any) -> Quantization:
    """Give the `Quantization` that a short name stands for.

    Args:
        name: "qlora"; "loftq-T" or "qpissa-T" as published, with T iterations; "ours-T", the default with T
            iterations.
        changes: other fields of `Quantization`, for example `double_quant=False`.

    Returns:
        The settings.

    Raises:
        ConfigError: there is no such preset, or a change is not allowed.

    Example:
        >>> from pissa import quantization_preset
        >>> quantization_preset("loftq-5").iterations
        5
    """
    method, _, count = name.partition("-")
    published: dict[str, Any] = {"scale_search": "absmax", "momentum": 0.0}
    if name == "qlora":
        return Quantization(**{"method": "qlora", "iterations": 1, **published, **changes})
    if method in ("loftq", "qpissa", "ours") and count.isdecimal() and int(count) >= 1:
        settings: dict[str, Any] = {"iterations": int(count)}
        if method != "ours":
            settings |= {"method": method, "refit": method == "loftq", **published}
        return Quantization(**{**settings, **changes})
    near = did_you_mean(name, ("qlora", "loftq-5", "qpissa-5", "ours-5"))
    raise ConfigError(f"no quantisation is called {name!r}; allowed: {PRESETS}{near}")
