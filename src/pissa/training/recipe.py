"""How a model is trained: the paper's recipe (section 5) as defaults, every value a field of one of five groups."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from ..config import METHODS, AdapterSettings, PissaConfig, Quantization, quantization_preset
from ..config.settings import check_settings, did_you_mean, nearest, read_settings, settings_of
from ..errors import ConfigError
from ..optimizers.default_rates import SPECTRAL, default_rate
from ..outside.documents import LARGEST_YAML, Unreadable, parse_yaml, read_bounded
from .passed_on import check_passed_on, optimizer_names
from .recipe_groups import TRAINING_METHODS as TRAINING_METHODS
from .recipe_groups import AdapterGroup, DataGroup, QuantizationGroup, TrainingGroup, ValidationGroup

ALIASES = {"lora": "lora-kaiming", "qlora": "lora-kaiming", "loftq": "pissa", "qpissa": "pissa"}
ALIASES |= {"dora": "lora-kaiming", "adalora": "lora-kaiming", "pissa+dora": "pissa", "pissa+adalora": "pissa"}
QUANTIZED_METHODS = ("qlora", "loftq", "qpissa")
ITERATIONS = {"loftq": 5, "qpissa": 10}
"""Where nothing else is said."""
ADAPTER_ONLY = (
    *(f.name for f in fields(AdapterGroup) if f.name not in ("method", "rank", "seed")),
    *(f.name for f in fields(QuantizationGroup)),
    "loraplus_ratio",
)
"""Settings that full fine-tuning would ignore, and therefore refuses; a comparison gives it the others' rank."""
QUANTIZATION_OWN = ("refit", "scale_search", "momentum", "double_quant", "block_size", "bits", "symmetric")
"""Settings of a quantisation that change its preset where they are given."""
DATA, NONE = "data", "none"
"""In the place of a calibration file: the training rows, and no text."""
AUTO = "auto"
"""In the place of a learning rate: it is estimated."""


@dataclass(frozen=True)
class Recipe(DataGroup, ValidationGroup, TrainingGroup, QuantizationGroup, AdapterGroup):
    """One training run's settings: those of its groups (adapter, quantisation, training, validation, data).

    Text is taken for what it means, as flags and YAML hold it: "2e-4" for a number, "q_proj,v_proj" for names.

    Raises:
        ConfigError: a value out of its range, or a combination that means nothing, with the field's name and what is
            allowed.

    Example:
        >>> from pissa import Recipe
        >>> recipe = Recipe(method="qpissa", rank=32, learning_rate=2e-4, max_steps=100)
        >>> recipe.quantization.format
        'nf4'
    """

    def __post_init__(self) -> None:
        read_settings(self)
        check_settings(self)
        _check_optimizer(self)
        check_passed_on(self.training)
        if self.learning_rate is None:
            object.__setattr__(self, "learning_rate", default_rate(self.optimizer))
        if self.micro_batch_size is not None and self.batch_size % self.micro_batch_size:
            raise ConfigError(
                f"batch_size {self.batch_size} is no multiple of micro_batch_size {self.micro_batch_size}; change one"
            )
        if not self.adapts:
            _check_unused(self)
        _check_quantization(self)
        _check_validation(self)
        if self.component != "scored" and self.scored_examples != Recipe.scored_examples:
            raise ConfigError('scored_examples is for component "scored"; leave it out')
        if self.adapts:
            self.pissa_config()

    @property
    def adapts(self) -> bool:
        """Whether adapters are trained; False for full fine-tuning."""
        return self.method != "full"

    @property
    def quantization(self) -> Quantization | None:
        """How the residual is quantised; None where it is not."""
        short = self.method if self.method in QUANTIZED_METHODS else None
        form = self.quantize or ("nf4" if short else None)
        if form is None:
            return None
        kind = self.quantize_method or short or _quantize_method(self.method)
        if kind in ITERATIONS:
            name = {"loftq": "loftq", "qpissa": "ours"}[kind]
            kind = f"{name}-{self.iterations or ITERATIONS[kind]}"
        own = {name: getattr(self, name) for name in QUANTIZATION_OWN if getattr(self, name) is not None}
        chosen = quantization_preset(kind, format=form, rounding=self.rounding, **own)
        return replace(chosen, calibration=self._calibration(chosen))

    def _calibration(self, quantization: Quantization) -> str | None:
        """The text that a quantisation is fitted to: a file, "data", or None."""
        if self.calibration is not None:
            return None if self.calibration == NONE else self.calibration
        ours = quantization.format != "int8" and quantization.keeps_best and self.rank_budget is None
        return DATA if ours or quantization.rounding == "gptq" else None

    @property
    def validates(self) -> bool:
        """Whether a validation loss is measured."""
        return self.eval_data is not None or self.eval_fraction is not None

    def pissa_config(self) -> PissaConfig:
        """The adapter's configuration."""
        method = ALIASES.get(self.method, self.method)
        assert method in METHODS
        shared = {setting.name: getattr(self, setting.name) for setting in fields(AdapterSettings)}
        return PissaConfig(
            **{**shared, "method": method},
            use_dora=self.method in ("dora", "pissa+dora"),
            use_adalora=self.method in ("adalora", "pissa+adalora"),
            quantization=self.quantization,
        )

    def as_dict(self) -> dict[str, Any]:
        """The settings as plain values, for YAML and JSON."""
        return asdict(self)


def read_recipe(path: str | Path, **flags: Any) -> Recipe:
    """A recipe from a YAML file of field: value pairs; flags that are not None win.

    Args:
        path: the file; dashes may stand for underscores in its names.
        flags: fields of `Recipe`.

    Raises:
        ConfigError: the file is missing, is not YAML, or names a field that does not exist.
    """
    return recipe_from(with_flags(read_yaml(path), flags), path)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """What a YAML file of settings holds, with underscores for dashes in its names.

    Raises:
        ConfigError: the file is missing, or is no YAML of name: value pairs.
    """
    try:
        document = parse_yaml(read_bounded(Path(path), LARGEST_YAML))
    except Unreadable as reason:
        raise ConfigError(f"{path} {reason}; give lines of the form `learning_rate: 2e-4`") from reason
    if not isinstance(document or {}, dict):
        raise ConfigError(f"{path} holds {type(document).__name__}; give lines of the form `learning_rate: 2e-4`")
    return _named(document or {})


def with_flags(values: Mapping[str, Any], flags: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a file with the flags that were given in their place; of `training` each name by itself."""
    given = {name: value for name, value in flags.items() if value is not None}
    in_file, on_line = values.get("training"), given.get("training")
    if isinstance(in_file, Mapping) and isinstance(on_line, Mapping):
        given["training"] = {**in_file, **on_line}
    return {**values, **given}


def recipe_from(values: Mapping[str, Any], source: str | Path = "the recipe") -> Recipe:
    """A recipe from plain values, with dashes allowed for underscores.

    Raises:
        ConfigError: unknown names, or values that are not allowed.
    """
    known = settings_of(Recipe)
    values = _named(values)
    unknown = {name: nearest(name, known) for name in values if name not in known}
    if unknown:
        listed = [f"{name} (did you mean {near}?)" if near else name for name, near in unknown.items()]
        allowed = "" if all(unknown.values()) else f"; known: {', '.join(known)}"
        raise ConfigError(f"{source} names {', '.join(listed)}{allowed}")
    return Recipe(**values)


def _named(values: Mapping[Any, Any]) -> dict[str, Any]:
    return {str(name).replace("-", "_"): value for name, value in values.items()}


def _check_unused(recipe: Recipe) -> None:
    """Refuse what full fine-tuning would ignore."""
    settings = settings_of(Recipe)
    given = [name for name in settings if name in ADAPTER_ONLY and getattr(recipe, name) != settings[name].default]
    if given:
        raise ConfigError(f"method full has no adapter: leave out {', '.join(given)}, or choose another method")


def _check_optimizer(recipe: Recipe) -> None:
    """Refuse an optimizer that nobody has, and what the one of products cannot do."""
    if recipe.optimizer != SPECTRAL:
        known = (SPECTRAL, *optimizer_names()) if recipe.optimizer != Recipe.optimizer else ()
        if known and recipe.optimizer not in known:
            near = did_you_mean(recipe.optimizer, known) or f"; allowed: {', '.join(known)}"
            raise ConfigError(f"optimizer is {recipe.optimizer!r}, which transformers does not have{near}")
        return
    if not recipe.adapts or "adalora" in recipe.method:
        has = "three factors" if recipe.adapts else "no adapter"
        raise ConfigError(
            f"optimizer {SPECTRAL} moves products of two factors, and method {recipe.method} has {has}: leave "
            "optimizer out, or choose another method"
        )
    if recipe.loraplus_ratio is not None:
        raise ConfigError(f"optimizer {SPECTRAL} weighs A and B itself; leave loraplus_ratio out")
    if recipe.learning_rate == AUTO:
        raise ConfigError(
            f"learning_rate auto estimates AdamW's rate; leave it out with optimizer {SPECTRAL}, whose own is "
            f"{default_rate(SPECTRAL):g}"
        )


def _check_validation(recipe: Recipe) -> None:
    """Refuse settings that need validation rows where there are none."""
    if recipe.eval_data is not None and recipe.eval_fraction is not None:
        raise ConfigError("eval_data and eval_fraction both say what is measured on; leave one out")
    given = [name for name in ("eval_every", "early_stopping", "keep_best") if getattr(recipe, name)]
    if given and not recipe.validates:
        raise ConfigError(
            f"{' and '.join(given)} without a validation loss; add eval_fraction (--eval-fraction 0.05) or eval_data"
        )


def _check_quantization(recipe: Recipe) -> None:
    """Refuse settings of a quantisation that nothing would use."""
    short = recipe.method if recipe.method in QUANTIZED_METHODS else None
    names = ("quantize_method", "iterations", "polish", *QUANTIZATION_OWN)
    given = [name for name in names if getattr(recipe, name) is not None]
    if given and recipe.quantize is None and short is None:
        raise ConfigError(f"{' and '.join(given)} without a format; add quantize (--quantize nf4)")
    if recipe.quantize_method is not None and short is not None:
        raise ConfigError(
            f"method {short} says how to quantise already; leave out quantize_method, or use method pissa"
        )
    kind = recipe.quantize_method or short or _quantize_method(recipe.method)
    _check_calibration(recipe)
    if recipe.polish is not None and (kind == "qlora" or "dora" in recipe.method or "adalora" in recipe.method):
        raise ConfigError(
            f"polish trains two factors that begin at more than zero, and {kind} with method {recipe.method} has none: "
            "leave polish out, or take method pissa"
        )
    if recipe.iterations is not None and kind not in ITERATIONS:
        raise ConfigError(f"quantize_method {kind} takes no iterations; leave them out")
    if recipe.export_rank is not None and (recipe.quantize is not None or short is not None):
        raise ConfigError(
            "export_rank with a quantised residual: the run is an adapter for that residual; leave export_rank out and "
            "use pissa export --rank for a LoRA of the base"
        )


def _quantize_method(method: str) -> str:
    """How a residual is quantised where nothing else is said."""
    return "qlora" if ALIASES.get(method, method).startswith("lora-") else "qpissa"


def _check_calibration(recipe: Recipe) -> None:
    quantization = recipe.quantization
    fitted = quantization is not None and quantization.calibration is not None
    if fitted and recipe.rank_budget is not None:
        raise ConfigError(
            "rank_budget and calibration each go through all the calibration's moments; leave one out, or pass moments "
            "as a mapping to pissa.adapt"
        )
    if recipe.rounding == "gptq" and recipe.calibration == NONE:
        raise ConfigError('rounding "gptq" needs text to see what the layers see; leave out calibration none')
    if recipe.calibration is None or (recipe.calibration == NONE and quantization is not None):
        return
    if quantization is None:
        raise ConfigError("calibration is for a quantised residual; add quantize (--quantize nf4), or leave it out")
    if not quantization.is_fitted:
        raise ConfigError("rounding to the nearest value fits nothing to calibration text; leave calibration out")
