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
LARGEST_ALPHA = 1e30
Algorithm = Literal["auto", "exact", "gram", "chebyshev", "krylov", "subspace"]
ALGORITHMS: tuple[Algorithm, ...] = get_args(Algorithm)


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
    """"all-linear" (every linear layer but the output head), a list of module names or name endings, or one regular
    expression that matches whole names."""
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
        if not self.target_modules:
            raise ConfigError('target_modules is empty; give names, a regular expression or "all-linear"')

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
