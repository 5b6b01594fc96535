"""What `pissa inspect` is asked for; each field is a flag."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from ...config import Quantization, quantization_preset
from ...config.kinds import Count, File, Modules, Name, Names, listed
from ...config.quantization import BlockSize, QuantizationFormat
from ...config.settings import Rule, check_settings, read_settings
from ...errors import ConfigError
from .variants import CALIBRATED, PUBLISHED, Variant, variants


def _ranks(given: Any) -> Any:
    parts = listed(given)
    return tuple(map(int, parts)) if isinstance(given, str) and all(map(str.isdecimal, parts)) else parts


Ranks = Annotated[
    tuple[int, ...],
    Rule(
        "give a whole number of at least 1, or several separated by commas",
        lambda value: bool(value) and all(type(rank) is int and rank >= 1 for rank in value), _ranks, "INTS",
    ),
]  # fmt: skip


@dataclass(frozen=True)
class InspectionSettings:
    """What is measured.

    Raises:
        ConfigError: a value out of its range, or a combination that means nothing.
    """

    panel: ClassVar[str] = "Inspection"

    rank: Ranks = (16,)
    """How many components each adapter has; several ranks, separated by commas, make curves."""
    rank_budget: Count | None = None
    """How many parameters all adapters may have together: shows how the layers would share them out, and draws it with
    figures. The rank is then the largest one, and quantize says whose error is to be captured."""
    quantize: QuantizationFormat | None = None
    """Format of the residual. Left out, ranks and energies of the plain split are shown."""
    methods: Names | None = None
    """Ways to quantise, separated by commas: qlora, loftq-T, qpissa-T, ours-T, each with T iterations, and with
    calibration text also NAME+aware and NAME+gptq. Left out, qlora,loftq-1,loftq-5,qpissa-1,qpissa-5,ours-5,ours-10."""
    calibration: File | None = None
    """Text, .txt or rows as .jsonl, .json or .parquet: adds the held-out error of layer outputs."""
    held_out: File | None = None
    """Text to measure that on. Left out, a fifth of the calibration text."""
    windows: Count = 80
    """How many windows of the calibration text are used."""
    length: Count = 256
    """How many tokens a window has."""
    norm: Literal["nuclear", "frobenius"] | None = None
    """In which norm errors are measured. Left out, in both."""
    double_quant: bool = True
    """Store NF4's block scales in 8 bits themselves."""
    block_size: BlockSize = 64
    """How many values share a scale: NF4's block, GPTQ's group."""
    bits: Literal[2, 3, 4] = 4
    """How many bits a code of gptq has."""
    target_modules: Modules = "all-linear"
    """Which modules would get an adapter: "all-linear", names or name endings, or one regular expression."""
    max_layers: Count | None = None
    """Only so many of the model's blocks, evenly spread."""
    figures: Name | None = None
    """Directory for reduction.png and singular_values.png, or ranks.png."""

    def __post_init__(self) -> None:
        read_settings(self)
        check_settings(self)
        if self.quantize is None and self.methods is not None:
            raise ConfigError("--methods are ways to quantise; say --quantize nf4, int8, gptq or nvfp4")
        if self.rank_budget is not None and self.methods is not None:
            raise ConfigError("--rank-budget plans for a format, not for --methods; leave either out")
        if self.rank_budget is not None and (self.calibration is not None or len(self.rank) > 1):
            raise ConfigError("rank_budget takes one rank, the largest; no methods, no calibration")
        plain = self.quantize is None and self.rank_budget is None
        if plain and (self.calibration is not None or self.figures is not None or len(self.rank) > 1):
            raise ConfigError(
                "without --quantize, inspect shows the plain split at one rank: no calibration, no figures"
            )
        if self.bits != 4 and self.quantize != "gptq":
            raise ConfigError("--bits are of gptq's codes; say --quantize gptq, or leave them out")
        if self.held_out is not None and self.calibration is None:
            raise ConfigError("held-out text is for methods with calibration; give --calibration FILE")
        _ = self.variants  # each has checked itself

    @property
    def quantization(self) -> Quantization | None:
        """With a budget, the format whose error is to be captured."""
        if self.quantize is None or self.rank_budget is None:
            return None
        return quantization_preset("ours-1", **self._format)

    @property
    def variants(self) -> list[Variant]:
        """The ways to quantise; none where the plain split or a budget is inspected."""
        if self.quantize is None or self.rank_budget is not None:
            return []
        names = list(self.methods or PUBLISHED)
        if self.calibration is not None and self.methods is None:
            names += CALIBRATED if self.quantize != "int8" else CALIBRATED[:1]
        return variants(names, calibrated=self.calibration is not None, **self._format)

    @property
    def norms(self) -> list[Literal["nuclear", "frobenius"]]:
        """The norms to measure in."""
        return [self.norm] if self.norm is not None else ["nuclear", "frobenius"]

    @property
    def _format(self) -> dict[str, Any]:
        return {
            "format": self.quantize,
            "double_quant": self.double_quant,
            "block_size": self.block_size,
            "bits": self.bits,
        }
