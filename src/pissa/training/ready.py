"""Training what `pissa init` has split already: its settings are those of the split, and nothing is decomposed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..checkpoint.saved_residual import SavedResidual, residual_at
from ..checkpoint.source.names import initial_in
from ..config.kinds import module_names
from ..errors import ConfigError
from .recipe import QUANTIZATION_OWN, Recipe

SPLIT = (
    "rank", "alpha", "component", "random_fraction", "cur_core", "cur_rcond", "target_modules", "exclude_modules",
    "rank_pattern", "alpha_pattern", "use_rslora", "tolerance", "algorithm",
)  # fmt: skip
"""Settings of a split, which go by the same name in a recipe."""
FIXED = ("dropout", "placement", "modules_to_save", "calibration", "rounding", "quantize_method", "iterations")
FIXED += ("polish", *QUANTIZATION_OWN)
"""Settings that only a new adapter could have."""
PLAIN = {"pissa": ("pissa", "qpissa", "loftq")}
"""Methods that are one where a weight has been split."""


def ready_split(source: str) -> SavedResidual | None:
    """The residual in a directory that holds its initial adapter too; None for any other source."""
    found = residual_at(source, ask=True)
    return found if found is not None and initial_in(found.path) is not None else None


def recipe_of_split(ready: SavedResidual, recipe: Recipe) -> Recipe:
    """The recipe with the settings of the split in the place of defaults.

    Raises:
        ConfigError: a setting was given and the split was made with another.
    """
    if ready.quantized_by_others:
        raise ConfigError(
            f"{ready.path} is quantised, and does not say how far residual and initial adapter are from "
            f"{ready.base or 'its base'}, so that no result could say it: train that, with --quantize nf4"
        )
    usual, settings = Recipe(), _settings(ready)
    if settings.get("quantize") == "nvfp4":
        raise ConfigError(f"{ready.path} is in NVFP4, on which no layer trains; split the base with --quantize nf4")
    wanted = {**{name: getattr(usual, name) for name in FIXED}, **settings}
    given = {name: getattr(recipe, name) for name in wanted}
    changed = [
        f"{name} {given[name]!r} (it has {value!r})"
        for name, value in wanted.items()
        if given[name] not in (getattr(usual, name), value)
    ]
    method = (ready.config or {}).get("method", "pissa")
    if recipe.method not in PLAIN[usual.method] and recipe.method not in PLAIN.get(method, (method,)):
        changed.insert(0, f"method {recipe.method} (it has {method})")
    if changed:
        raise ConfigError(
            f"{ready.path} is split already, and {', '.join(changed)} cannot be had from it: leave these settings out, "
            f"or train {ready.base or 'its base'} itself"
        )
    return replace(recipe, **settings, method=method)


def _settings(ready: SavedResidual) -> dict[str, Any]:
    """The split's settings as a recipe names them; nothing of a split whose manifest does not have them."""
    config = ready.config
    if config is None:
        return {}
    settings = {name: config[name] for name in SPLIT if name in config}
    for name in {"target_modules", "exclude_modules"} & settings.keys():
        settings[name] = module_names(settings[name] if isinstance(settings[name], str) else tuple(settings[name]))
    quantization = config.get("quantization")
    return {**settings, "quantize": quantization["format"] if quantization else None}
