"""What the user asks for: frozen dataclasses that check themselves."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

from .errors import ConfigError

Method = Literal["pissa", "random-pissa", "cura", "robust-pissa", "lora-kaiming", "lora-gaussian"]
METHODS: tuple[Method, ...] = get_args(Method)
Component = Literal["principal", "medium", "minor", "scored"]
COMPONENTS: tuple[Component, ...] = get_args(Component)
CurCore = Literal["optimal", "intersection"]
CUR_CORES: tuple[CurCore, ...] = get_args(CurCore)
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
    """Where the initial adapter comes from: singular triplets ("pissa", "random-pissa"), rows and columns of the weight
    ("cura"), its best approximation in the l1 norm ("robust-pissa"), or a LoRA baseline."""
    component: Component = "principal"
    """Which triplets "pissa" takes: the largest, the middle or the smallest ones, or "scored": those with the largest
    first-order effect on the loss of the user's own data, which `adapt` then needs as `batches`."""
    random_fraction: float = 1.0
    """Share of the r triplets that "random-pissa" draws from the residual ones; 0 is PiSSA."""
    cur_core: CurCore = "optimal"
    """What "cura" puts between columns and rows: the best fit, or the report's inverse of their intersection, which
    makes the residual several times as large as the weight on real models."""
    cur_rcond: float | None = None
    """Singular values below this share of the largest count as zero in "cura"'s inverses. None: fp64 rounding."""
    target_modules: str | tuple[str, ...] | list[str] = "all-linear"
    """"all-linear" (every linear layer, attention and fused expert, but neither the output head nor routers), a list of
    names or name endings of modules and parameters, or one regular expression that matches whole names."""
    exclude_modules: str | tuple[str, ...] | list[str] = ()
    """Names, name endings or a regular expression of modules that are left alone."""
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    """Module name ending or regular expression -> rank, where it differs from `rank`."""
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    """Module name ending or regular expression -> alpha, where it differs from `alpha`."""
    rank_budget: int | None = None
    """Parameters of all adapters together (their factors A and B): the modules then share them out so that together
    they capture most, each getting from 1 to `rank` components, see `ranks.py`. None: `rank` for every module."""
    use_rslora: bool = False
    """Scale by `alpha / sqrt(rank)` instead of `alpha / rank`; `alpha=None` then means `sqrt(rank)`, scale 1 again."""
    use_dora: bool = False
    """Train the length of each output's weights apart from their direction (DoRA); it starts at the weight's own."""
    use_adalora: bool = False
    """Train singular values as a vector of their own, between nearly orthonormal factors (AdaLoRA, without its pruning
    of ranks)."""
    orthogonality: float = 0.5
    """Weight of AdaLoRA's penalty on factors that are not orthonormal."""
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
    trainable_token_indices: Sequence[int] | Mapping[str, Sequence[int]] = ()
    """Tokens whose embeddings are trained in full and saved with the adapters, as in PEFT: ids, or the name of an
    embedding module -> ids."""
    quantization: Quantization | None = None
    """How the residual is quantised; None keeps it in the base's dtype."""
    placement: Placement = "residual"
    """"residual" replaces each weight by its residual. "offset" leaves the base as it is, quantised or not, and trains
    `W + s(B·A − B0·A0)`: one LoRA of rank 2r whose second half is frozen."""
    seed: int = 0
    """Seed of every random draw (sketches, LoRA's `lora_A`); the global generators are never touched."""

    @property
    def title(self) -> str:
        """The method's name for people, with what it is combined with."""
        name = self.quantization.method if self.quantization is not None else self.method
        return name + ("+dora" if self.use_dora else "") + ("+adalora" if self.use_adalora else "")

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ConfigError(f"method is {self.method!r}; allowed: {', '.join(METHODS)}")
        if self.algorithm not in ALGORITHMS:
            raise ConfigError(f"algorithm is {self.algorithm!r}; allowed: {', '.join(ALGORITHMS)}")
        self._check_components()
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
        self._check_budget()
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
        self._check_variants()
        if self.placement not in PLACEMENTS:
            raise ConfigError(f"placement is {self.placement!r}; allowed: {', '.join(PLACEMENTS)}")
        if not self.target_modules:
            raise ConfigError('target_modules is empty; give names, a regular expression or "all-linear"')

    def _check_components(self) -> None:
        choices = {"component": COMPONENTS, "cur_core": CUR_CORES}
        wrong = [
            f"{name} is {getattr(self, name)!r}; allowed: {', '.join(allowed)}"
            for name, allowed in choices.items()
            if getattr(self, name) not in allowed
        ]
        if not is_number(self.random_fraction) or not 0 <= self.random_fraction <= 1:
            wrong.append(f"random_fraction is {self.random_fraction!r}; allowed: 0 to 1")
        if self.cur_rcond is not None and not (is_number(self.cur_rcond) and 0 <= self.cur_rcond < 1):
            wrong.append(f"cur_rcond is {self.cur_rcond!r}; allowed: 0 up to, not including, 1")
        of_method = {"component": "pissa", "random_fraction": "random-pissa", "cur_core": "cura", "cur_rcond": "cura"}
        wrong += [
            f'{name} is for method "{method}", and the method is {self.method!r}; leave it out'
            for name, method in of_method.items()
            if self.method != method and getattr(self, name) != getattr(PissaConfig, name)
        ]
        if wrong:
            raise ConfigError("; ".join(wrong))

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
        if not self.starts_at_zero and not self.takes_principal:
            chosen = f"component {self.component!r}" if self.method == "pissa" else f"method {self.method!r}"
            raise ConfigError(
                f"{chosen} cannot be quantised: fitting adapter and residual to each other ends on the principal "
                'components of what is left; use method "pissa" with component "principal", or leave quantization out'
            )
        if (self.quantization.method == "qlora") != self.starts_at_zero:
            raise ConfigError(
                f"method {self.method!r} does not go with quantization method {self.quantization.method!r}: adapters "
                'that start at zero (lora-kaiming, lora-gaussian) take "qlora", "pissa" takes "qpissa" or "loftq"'
            )

    def _check_budget(self) -> None:
        if self.rank_budget is None:
            return
        if isinstance(self.rank_budget, bool) or not isinstance(self.rank_budget, int) or self.rank_budget < 1:
            raise ConfigError(f"rank_budget is {self.rank_budget!r}; give a number of parameters, of at least 1")
        if self.rank_pattern:
            raise ConfigError("rank_budget and rank_pattern both say which module gets which rank; leave one out")
        if not self.takes_principal:
            raise ConfigError(
                f"rank_budget weighs principal components, and method {self.method!r} with component "
                f'{self.component!r} takes others; use method "pissa" with component "principal", or leave it out'
            )

    def _check_variants(self) -> None:
        if not is_number(self.orthogonality) or not 0 <= self.orthogonality < math.inf:
            raise ConfigError(f"orthogonality is {self.orthogonality!r}; give 0 or a positive number")
        if not self.use_adalora and self.orthogonality != PissaConfig.orthogonality:
            raise ConfigError("orthogonality is AdaLoRA's; leave it out, or set use_adalora")
        refused = {
            "use_dora (PEFT has no layer that is both)": self.use_dora,
            "quantization (its export to the base could not be checked)": self.quantization is not None,
            'placement "offset"': self.placement == "offset",
            "rank_pattern, alpha_pattern and rank_budget (PEFT gives all AdaLoRA layers one rank)": self.rank_pattern
            or self.alpha_pattern
            or self.rank_budget,
            "use_rslora": self.use_rslora,
        }
        wrong = [what for what, given in refused.items() if given]
        if self.use_adalora and wrong:
            raise ConfigError(f"use_adalora does not go with {', '.join(wrong)}; leave either out")
        if self.use_dora and self.quantization is not None:
            raise ConfigError(
                "use_dora scales rows by the norms of the weight, which its quantised residual does not have: leave "
                "quantization out, or use_dora"
            )

    def _check_names(self) -> None:
        if isinstance(self.modules_to_save, str):
            raise ConfigError(f"modules_to_save is {self.modules_to_save!r}; give a list of names")
        tokens = self.trainable_token_indices
        for where, ids in (tokens if isinstance(tokens, Mapping) else {"trainable_token_indices": tokens}).items():
            odd = isinstance(ids, str) or any(isinstance(i, bool) or not isinstance(i, int) or i < 0 for i in ids)
            if odd or len(set(ids)) < len(ids):
                raise ConfigError(
                    f"the token ids of {where} are {ids!r}; give whole numbers, as the tokenizer has them, each once"
                )
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

    @property
    def takes_principal(self) -> bool:
        """Whether the initial adapter is the best approximation of its rank: PiSSA itself."""
        return self.method == "pissa" and self.component == "principal"

    @property
    def needs_gradient(self) -> bool:
        """Whether the components are chosen by the gradient of a loss."""
        return self.component == "scored"

    def scale(self, rank: int, alpha: float | None) -> float:
        """The factor before `B·A` for an adapter of this rank and alpha (None: scale 1)."""
        if alpha is None:
            return 1.0
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)

    def for_module(self, rank: int, alpha: float | None) -> PissaConfig:
        """This configuration with one module's own rank and alpha, as `split_weight` takes it."""
        return replace(self, rank=rank, alpha=alpha, rank_pattern={}, alpha_pattern={})


def is_number(value: Any) -> bool:
    """Whether a value is an int or a float; True and False are not meant to be."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _named(prefix: str, pattern: Mapping[str, Any]) -> dict[str, Any]:
    return {f"{prefix}[{key!r}]": value for key, value in pattern.items()}
