"""Training what `pissa init` has split already: its settings are those of the split, and nothing is decomposed."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from ..checkpoint.factors import CONFIG
from ..checkpoint.residual import SavedResidual, residual_at
from ..errors import ConfigError
from ..live.state import INITIAL
from .recipe import Recipe, module_names

SAME = ("rank", "alpha", "target_modules", "exclude_modules", "rank_pattern", "alpha_pattern", "use_rslora")
"""Settings of a split that go by the same name in a recipe."""


def ready_split(source: str) -> SavedResidual | None:
    """The residual in a directory that holds its initial adapter too; None for any other source."""
    found = residual_at(Path(source))
    return found if found is not None and (found.path / INITIAL / CONFIG).is_file() else None


def recipe_of_split(ready: SavedResidual, recipe: Recipe) -> Recipe:
    """The recipe with the settings of the split in the place of defaults.

    Raises:
        ConfigError: a setting was given and the split was made with another.
    """
    defaults = {field.name: getattr(Recipe(), field.name) for field in fields(Recipe)}
    wanted = {**_settings(ready), "dropout": 0.0, "placement": "residual", "modules_to_save": ()}
    wanted |= {"calibration": None, "rounding": "nearest"}
    given = {name: getattr(recipe, name) for name in defaults}
    changed = [
        f"{name} {given[name]!r} (it has {value!r})"
        for name, value in wanted.items()
        if given.get(name) not in (defaults.get(name), value)
    ]
    if given["method"] not in ("pissa", "qpissa", "loftq"):
        changed.insert(0, f"method {given['method']}")
    for name in ("quantize_method", "iterations"):
        if given[name] is not None:
            changed.append(f"{name} {given[name]!r}")
    if changed:
        raise ConfigError(
            f"{ready.path} is split already, and {', '.join(changed)} cannot be had from it: leave these settings out, "
            f"or train {ready.base or 'its base'} itself"
        )
    return replace(recipe, **{name: value for name, value in wanted.items() if name in defaults}, method="pissa")


def _settings(ready: SavedResidual) -> dict[str, Any]:
    """The split's settings as a recipe names them; nothing of a split whose manifest does not have them."""
    config = ready.config
    if config is None:
        return {}
    settings = {name: config[name] for name in SAME}
    for name in ("target_modules", "exclude_modules"):
        settings[name] = module_names(settings[name] if isinstance(settings[name], str) else tuple(settings[name]))
    quantization = config.get("quantization")
    return {**settings, "quantize": quantization["format"] if quantization else None}
