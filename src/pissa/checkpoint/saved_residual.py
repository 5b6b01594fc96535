"""Residuals as they are found on a disk or in the hub's cache, and what their directories say of themselves.

    ours         `pissa.json` says so, and how every module was split
    published    no `pissa.json`: a transformers model with the initial adapter in `pissa_init/` beside its weights, as
                 the authors' scripts and PEFT's examples write it (for CorDA in `corda_init/`, for LoftQ in
                 `loftq_init/`). The initial adapter's configuration names the base

Whoever takes a MODEL for a base asks here first: a residual is a model to transformers, and computes something else
than the base.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

from ..decompose.certificate import Certificate
from ..errors import CheckpointError
from .factors import CONFIG
from .manifest import read_manifest
from .source.files import read_json
from .source.hub import adapter_directory, in_cache, is_in_hub
from .source.names import INITIAL, INITIALS, initial_in, looks_like_path

RESIDUAL = "residual"
MODEL_CONFIG = "config.json"
LOFTQ = INITIALS[2]
SETTINGS = {
    "r": "rank", "lora_alpha": "alpha", "use_rslora": "use_rslora", "target_modules": "target_modules",
    "exclude_modules": "exclude_modules", "rank_pattern": "rank_pattern", "alpha_pattern": "alpha_pattern",
}  # fmt: skip
"""PEFT's name of a setting of a split -> ours."""


@dataclass(frozen=True)
class SavedResidual:
    """What a residual's directory says of itself."""

    path: Path
    """Where it lies."""
    base: str | None
    """Directory or hub id of the base that was split."""
    certificates: dict[str, Certificate]
    """Module name -> certificate of its split."""
    config: dict[str, Any] | None = None
    """The fields of the PissaConfig by which it was split, as far as they are known."""
    method: str | None = None
    """Name of the method, where it is known."""
    quantized_by_others: bool = False
    """Whether it is in few bits and nothing is known of the error that this made."""

    @property
    def gaps(self) -> dict[str, float]:
        """Module name -> `‖W − Q − s·B0·A0‖ / ‖W‖` where the residual is quantised; empty where it is not."""
        return {n: c.rounding for n, c in self.certificates.items() if c.quantization_error is not None}


def residual_at(place: str | os.PathLike[str], *, ask: bool = False) -> SavedResidual | None:
    """The residual that a directory, or the hub's repository of this id, holds; None where it holds something else.

    Args:
        place: directory or hub id.
        ask: ask the hub too, once for an id, and download the residual; else only what is in the cache is looked at.
    """
    path = Path(place)
    if not path.is_dir():
        found = None if path.exists() or looks_like_path(place) else _in_hub(os.fspath(place), ask)
        return published_residual(found) if found is not None else None
    manifest = read_manifest(path)
    if manifest is None:
        return published_residual(path)
    if manifest.get("layout") != RESIDUAL:
        return None
    certificates = {name: certificate_of(module) for name, module in manifest.get("modules", {}).items()}
    return SavedResidual(path, manifest.get("base"), certificates, manifest.get("config"), manifest.get("method"))


def published_residual(path: Path) -> SavedResidual | None:
    """The residual in a directory without our manifest: a model with its initial adapter beside its weights."""
    initial = initial_in(path)
    if initial is None or not (path / MODEL_CONFIG).is_file() or (path / CONFIG).is_file():
        return None
    adapter, model = read_json(initial / CONFIG), read_json(path / MODEL_CONFIG)
    named = adapter.get("base_model_name_or_path") or None
    base = None if named is not None and Path(named).absolute() == path.absolute() else named
    config = {ours: adapter[theirs] for theirs, ours in SETTINGS.items() if adapter.get(theirs) is not None}
    for name in {"target_modules", "exclude_modules"} & config.keys():
        if isinstance(config[name], list):
            config[name] = sorted(config[name])  # PEFT writes a set in the order of its hashes
        elif config[name] != "all-linear":
            del config[name]  # a regular expression of PEFT's
    # LoftQ's are rounded to a format even where they are stored in 16 bits
    quantized = model.get("quantization_config") is not None or initial.name == LOFTQ
    return SavedResidual(path, base, {}, {"method": "pissa", "quantization": None, **config}, "pissa", quantized)


def certificate_of(module: Mapping[str, Any]) -> Certificate:
    """A certificate from what a manifest says of a module."""
    known = {field.name for field in fields(Certificate)}
    return Certificate(**{"seconds": 0.0, **{key: value for key, value in module.items() if key in known}})


def find_residual(directory: Path, manifest: dict[str, Any], named: str | None) -> SavedResidual | None:
    """The residual that an adapter is for: the directory that the initial adapter lies in; where its manifest says
    (relative to itself, so that a run can be moved as a whole); else the base that its configuration names, where that
    is one."""
    if directory.name in INITIALS and (found := residual_at(directory.parent)) is not None:
        return found
    relative = manifest.get("residual")
    if relative is not None:
        found = residual_at(Path(os.path.normpath(directory / relative)))
        if found is not None:
            return found
    return residual_at(named) if named else None


def check_is_base(model: str | os.PathLike[str]) -> None:
    """Refuse a residual where a base is wanted.

    Raises:
        CheckpointError: naming the base that it was made of.
    """
    found = residual_at(model, ask=True)
    if found is not None:
        raise CheckpointError(
            f"{model} is a residual, not a base: the components that it lacks are in its {_beside(found)}/; give "
            f"{found.base or 'the base that it was made of'}, or train what is split already: pissa train {model}"
        )


def _beside(residual: SavedResidual) -> str:
    """The name of the directory of a residual's initial adapter."""
    initial = initial_in(residual.path)
    return initial.name if initial is not None else INITIAL


@cache
def _in_hub(model: str, ask: bool) -> Path | None:
    """The directory in the hub's cache of a repository that has an initial adapter; None of any other."""
    names = [f"{name}/{CONFIG}" for name in INITIALS]
    found = next((place for name in names if (place := in_cache(model, name)) is not None), None)
    if ask and (found is not None or any(is_in_hub(model, name) for name in names)):
        return adapter_directory(model)
    return found
