"""What the user asks for: frozen dataclasses that check themselves."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

from .errors import ConfigError

Method = Literal["pissa", "lora-kaiming", "lora-gaussian"]
METHODS: tuple[Method, ...] = get_args(Method)
Placement = Literal["residual", "offset"]
PLACEMENTS: tuple[Placement, ...] = get_args(Placement)
LARGEST_ALPHA = 1e30
Algorithm = Literal["auto", "exact", "gram", "chebyshev", "krylov", "subspace"]
ALGORITHMS: tuple[Algorithm, ...] = get_args(Algorithm)

QuantizationFormat = Literal["nf4", "int8", "gptq"]
QuantizationMethod = Literal["qlora", "loftq", "qpissa"]
ScaleSearch = Literal["absmax", "unsigned", "signed"]
Rounding = Literal["nearest", "gptq"]
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
PRESETS = "qlora, loftq-T, qpissa-T (as published), ours-T; T is the number of iterations"


@dataclass(frozen=True)
class Quantization:
    """How the frozen residual is stored in few bits, and how residual and adapter are fitted to each other.

    Raises:
        ConfigError: a value out of its range, or a combination that means nothing.
    """

    format: QuantizationFormat = "nf4"
    """bitsandbytes' 4-bit NF4, bitsandbytes' row-wise INT8, or GPTQ's 4-bit integers."""
    method: QuantizationMethod = "qpissa"
    """"qlora" quantises the weight and leaves the adapter at zero, "loftq" alternates from the quantised weight,
    "qpissa" from the principal components."""
    iterations: int = 10
    """T, at least 1; "qlora" has nothing to iterate and ignores it."""
    refit: bool = True
    """End on an SVD of what the quantised residual leaves over. LoftQ always does, published QPiSSA does not."""
    scale_search: ScaleSearch = "signed"
    """"absmax" takes each block's largest magnitude as its scale, as bitsandbytes does; "unsigned" and "signed" search
    the scale of least error. In int8 and gptq a sign gains nothing and the two are the same."""
    momentum: float = 0.9
    """β in [0, 1): how far each iteration is extrapolated beyond the last one. 0 is plain alternation."""
    rounding: Rounding = "nearest"
    """"gptq" carries each rounding error on to the columns not yet rounded; it needs calibration."""
    double_quant: bool = True
    """Store NF4's block scales in 8 bits themselves."""
    calibration: str | None = None
    """A text file whose activations say which directions matter. None: all directions count alike."""
    block_size: int = 64
    """Values that share a scale: NF4's block, GPTQ's group. INT8 has one scale per row."""

    def __post_init__(self) -> None:
        allowed = {
            "format": get_args(QuantizationFormat),
            "method": get_args(QuantizationMethod),
            "scale_search": get_args(ScaleSearch),
            "rounding": get_args(Rounding),
            "block_size": BLOCK_SIZES,
        }
        wrong = [
            f"{name} is {getattr(self, name)!r}; allowed: {', '.join(map(str, values))}"
            for name, values in allowed.items()
            if getattr(self, name) not in values
        ]
        if isinstance(self.iterations, bool) or not isinstance(self.iterations, int) or self.iterations < 1:
            wrong.append(f"iterations is {self.iterations!r}; give a whole number of at least 1")
        if not 0 <= self.momentum < 1:
            wrong.append(f"momentum is {self.momentum!r}; allowed: 0 up to, not including, 1")
        if wrong:
            raise ConfigError("quantization: " + "; ".join(wrong))
        if not self.refit and (self.method == "loftq" or self.momentum > 0):
            raise ConfigError(
                "quantization: refit is off; LoftQ and momentum both end on an SVD, so leave refit on, or take method "
                '"qpissa" with momentum 0'
            )
        if self.rounding == "gptq" and self.format == "int8":
            raise ConfigError('quantization: rounding "gptq" is for the formats nf4 and gptq; int8 takes "nearest"')

    @property
    def keeps_best(self) -> bool:
        """Whether the best iterate is taken; the published methods take the last one."""
        return self.scale_search != "absmax" or self.momentum > 0


def quantization_preset(name: str, **changes: Any) -> Quantization:
    """The `Quantization` that a short name stands for.

    Args:
        name: "qlora"; "loftq-T" and "qpissa-T" as published, with T iterations; "ours-T", the default with T
        iterations. changes: other fields, for example `double_quant=False`.

    Raises:
        ConfigError: no such preset.
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
    raise ConfigError(f"no quantisation is called {name!r}; allowed: {PRESETS}")


@dataclass(frozen=True)
class PissaConfig:
    """How a model is split into a frozen residual and a trainable adapter.

    Raises:
        ConfigError: a value out of its range, or a combination that would break function preservation.
    """

    rank: int
    """Components per adapter, `r`: at least 1, at most the smaller side of every target."""
    alpha: float | None = None
    """LoRA's numerator: the adapter is scaled by `alpha / rank`. None: `rank`, a scale of 1 (paper, section 5)."""
    method: Method = "pissa"
    """Where the initial adapter comes from: the principal components, or a LoRA baseline."""
    target_modules: str | tuple[str, ...] | list[str] = "all-linear"
    """"all-linear" (every linear layer, attention and fused expert, but neither the output head nor routers), a list of
    names or name endings of modules and parameters, or one regular expression that matches whole names."""
    exclude_modules: str | tuple[str, ...] | list[str] = ()
    """Names, name endings or a regular expression of modules that are left alone."""
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    """Module name ending or regular expression -> rank, where it differs from `rank`."""
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    """Module name ending or regular expression -> alpha, where it differs from `alpha`."""
    use_rslora: bool = False
    """Scale by `alpha / sqrt(rank)` instead of `alpha / rank`; `alpha=None` then means `sqrt(rank)`, scale 1 again."""
    dropout: float = 0.0
    """Dropout on the adapter's input. PiSSA needs 0: see `allow_dropout`."""
    allow_dropout: bool = False
    """Permit dropout with PiSSA although it drops principal components, so that the model is not the base at step 0."""
    tolerance: float = 1e-3
    """Largest certified captured-energy loss of the truncated SVD, in [0, 1)."""
    algorithm: Algorithm = "auto"
    """Algorithm of the truncated SVD, see `pissa.truncated_svd`."""
    modules_to_save: tuple[str, ...] | list[str] = ()
    """Modules trained in full beside the adapters and saved with them, as in PEFT."""
    quantization: Quantization | None = None
    """How the residual is quantised; None keeps it in the base's dtype."""
    placement: Placement = "residual"
    """"residual" replaces each weight by its residual. "offset" leaves the base as it is, quantised or not, and trains
    `W + s(B·A − B0·A0)`: one LoRA of rank 2r whose second half is frozen."""
    seed: int = 0
    """Seed of every random draw (sketches, LoRA's `lora_A`); the global generators are never touched."""

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ConfigError(f"method is {self.method!r}; allowed: {', '.join(METHODS)}")
        if self.algorithm not in ALGORITHMS:
            raise ConfigError(f"algorithm is {self.algorithm!r}; allowed: {', '.join(ALGORITHMS)}")
        for where, rank in {"rank": self.rank, **_named("rank_pattern", self.rank_pattern)}.items():
            if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
                raise ConfigError(f"{where} is {rank!r}; give a whole number of at least 1")
        alphas = _named("alpha_pattern", self.alpha_pattern)
        if self.alpha is not None:
            alphas["alpha"] = self.alpha
        for where, alpha in alphas.items():
            if not (isinstance(alpha, (int, float)) and 0 < alpha < LARGEST_ALPHA):
                raise ConfigError(f"{where} is {alpha!r}; give a positive number, or leave it out for a scale of 1")
        self._check_names()
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"dropout is {self.dropout!r}; allowed: 0 up to, not including, 1")
        if not 0 <= self.tolerance < 1:
            raise ConfigError(f"tolerance is {self.tolerance!r}; allowed: 0 up to, not including, 1")
        if self.dropout > 0 and not self.starts_at_zero and not self.allow_dropout:
            raise ConfigError(
                f"dropout is {self.dropout:g} with method {self.method!r}: dropping principal components changes the "
                "pretrained function in training mode (0.05 already costs 18 % output error). Use dropout 0, or set "
                "allow_dropout (--allow-dropout) to accept that"
            )
        self._check_quantization()
        if self.placement not in PLACEMENTS:
            raise ConfigError(f"placement is {self.placement!r}; allowed: {', '.join(PLACEMENTS)}")
        if not self.target_modules:
            raise ConfigError('target_modules is empty; give names, a regular expression or "all-linear"')

    def _check_quantization(self) -> None:
        if self.quantization is None:
            return
        if not isinstance(self.quantization, Quantization):
            raise ConfigError(f"quantization is {self.quantization!r}; give a pissa.Quantization or None")
        if self.placement == "offset":
            raise ConfigError(
                'placement "offset" leaves the base as it is, so there is no residual to quantise: leave quantization '
                'out (and load the base in 4 or 8 bits where that is wanted), or use placement "residual"'
            )
        if (self.quantization.method == "qlora") != self.starts_at_zero:
            raise ConfigError(
                f"method {self.method!r} does not go with quantization method {self.quantization.method!r}: adapters "
                'that start at zero (lora-kaiming, lora-gaussian) take "qlora", "pissa" takes "qpissa" or "loftq"'
            )

    def _check_names(self) -> None:
        if isinstance(self.modules_to_save, str):
            raise ConfigError(f"modules_to_save is {self.modules_to_save!r}; give a list of names")
        expressions = {
            "target_modules": self.target_modules,
            "exclude_modules": self.exclude_modules,
            **{f"rank_pattern[{key!r}]": key for key in self.rank_pattern},
            **{f"alpha_pattern[{key!r}]": key for key in self.alpha_pattern},
        }
        for where, expression in expressions.items():
            try:
                if isinstance(expression, str):
                    re.compile(expression)
            except re.error as error:
                raise ConfigError(f"{where} is no regular expression: {error}") from error

    @property
    def starts_at_zero(self) -> bool:
        """Whether the initial adapter's product is zero (LoRA), so that the base itself is the residual."""
        return self.method.startswith("lora-")

    def scale(self, rank: int, alpha: float | None) -> float:
        """The factor before `B·A` for an adapter of this rank and alpha (None: scale 1)."""
        if alpha is None:
            return 1.0
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)

    def for_module(self, rank: int, alpha: float | None) -> PissaConfig:
        """This configuration with one module's own rank and alpha, as `split_weight` takes it."""
        return replace(self, rank=rank, alpha=alpha, rank_pattern={}, alpha_pattern={})


def _named(prefix: str, pattern: Mapping[str, Any]) -> dict[str, Any]:
    return {f"{prefix}[{key!r}]": value for key, value in pattern.items()}
