"""`PissaConfig`: how a model is split into a frozen residual and a trainable adapter."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ..errors import ConfigError
from .adapter import AdapterSettings
from .kinds import LARGEST_ALPHA
from .quantization import Quantization
from .settings import check_settings, is_number

OF_METHOD = {"component": "pissa", "random_fraction": "random-pissa", "cur_core": "cura", "cur_rcond": "cura"}
"""Settings that only one method uses."""


@dataclass(frozen=True)
class PissaConfig(AdapterSettings):
    """How a model is split into a frozen residual and a trainable adapter.

    The fields are those below and the adapter's own, of which only `rank` has no default.

    Raises:
        ConfigError: a value out of its range, or a combination that would break function preservation.

    Example:
        >>> from pissa import PissaConfig
        >>> config = PissaConfig(rank=16, target_modules=["q_proj", "v_proj"], rank_pattern={"q_proj": 32})
        >>> config.scale(rank=16, alpha=None)
        1.0
    """

    use_dora: bool = False
    """Train the length of each output's weights apart from their direction (DoRA); it starts at the weight's own."""
    use_adalora: bool = False
    """Train singular values as a vector of their own, between nearly orthonormal factors (AdaLoRA, without its pruning
    of ranks)."""
    quantization: Quantization | None = None
    """How the residual is quantised. None keeps it in the base's dtype."""

    def __post_init__(self) -> None:
        check_settings(self)
        self._check_of_method()
        self._check_patterns()
        self._check_names()
        self._check_budget()
        if self.dropout > 0 and not self.starts_at_zero and not self.allow_dropout:
            raise ConfigError(
                f"dropout is {self.dropout:g} with method {self.method!r}: dropping principal components changes the "
                "pretrained function in training mode (0.05 already costs 18 % output error). Use dropout 0, or set "
                "allow_dropout (--allow-dropout) to accept that"
            )
        self._check_quantization()
        self._check_variants()
        if not self.target_modules:
            raise ConfigError('target_modules is empty; give names, a regular expression or "all-linear"')

    def _check_of_method(self) -> None:
        wrong = [
            f'{name} is for method "{method}", and the method is {self.method!r}; leave it out'
            for name, method in OF_METHOD.items()
            if self.method != method and getattr(self, name) != getattr(PissaConfig, name)
        ]
        if wrong:
            raise ConfigError("; ".join(wrong))

    def _check_patterns(self) -> None:
        for where, rank in _named("rank_pattern", self.rank_pattern).items():
            if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
                raise ConfigError(f"{where} is {rank!r}; give a whole number of at least 1")
        for where, alpha in _named("alpha_pattern", self.alpha_pattern).items():
            if not is_number(alpha) or not 0 < alpha < LARGEST_ALPHA:
                raise ConfigError(f"{where} is {alpha!r}; give a positive number, or leave it out for a scale of 1")

    def _check_quantization(self) -> None:
        if self.quantization is None:
            return
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
        if self.rank_pattern:
            raise ConfigError("rank_budget and rank_pattern both say which module gets which rank; leave one out")
        if not self.takes_principal:
            raise ConfigError(
                f"rank_budget weighs principal components, and method {self.method!r} with component "
                f'{self.component!r} takes others; use method "pissa" with component "principal", or leave it out'
            )

    def _check_variants(self) -> None:
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
    def title(self) -> str:
        """The method's name for people, with what it is combined with."""
        name = self.quantization.method if self.quantization is not None else self.method
        return name + ("+dora" if self.use_dora else "") + ("+adalora" if self.use_adalora else "")

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


def _named(prefix: str, pattern: Mapping[str, Any]) -> dict[str, Any]:
    return {f"{prefix}[{key!r}]": value for key, value in pattern.items()}
