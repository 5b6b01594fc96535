"""Whether a checkpoint can have the modules that a configuration names, and with the rank that it asks for: from the
headers of its files and from transformers' own text of its class, in a moment and without torch.

Only what is certainly wrong is refused here. A checkpoint's names are not always those of the live model (experts are
fused, prefixes change), so a name is wrong only if neither the checkpoint nor the text that builds the model has it.
The live model is held against the configuration again.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ...config import AdapterSettings
from ...config.kinds import ALL_LINEAR, PLAIN_NAME
from ...config.naming import matches, nothing_matches, rank_too_large
from ...errors import CheckpointError, ConfigError, TargetError
from ..disk.header import Entry, read_header
from .files import CONFIG, find_weights, open_plain, read_json
from .hub import in_cache
from .names import initial_in

FLOATING = ("F32", "BF16", "F16")
HEADS = "modeling_layers.py"
"""Where transformers declares the heads that many families share."""
UNPLAIN = re.compile(r"[\\(\[|]|\w[?*{]")
"""What makes more of a regular expression than words with anything between them."""
DECLARED = re.compile(r"self\.(\w+)\s*(?::[^=\n]+)?=\s*([\w.]*)")


def check_outline(model: str | os.PathLike[str], settings: AdapterSettings) -> None:
    """Refuse names that no module of the model can have, and a rank that one of its linear layers is too small for.

    Args:
        model: a directory, or a hub id, of which the cache is looked at.
        settings: of an adapter.

    Raises:
        TargetError: naming what matches nothing.
        ConfigError: naming what is too small.
        CheckpointError: a file is damaged.
    """
    directory = Path(model) if Path(model).is_dir() else in_cache(os.fspath(model), CONFIG)
    if directory is None or not (directory / CONFIG).is_file() or initial_in(directory) is not None:
        return  # where something is split already, its own settings count
    try:
        weights, config = find_weights(directory), read_json(directory / CONFIG)
    except CheckpointError:
        if Path(model).is_dir():
            raise
        return  # a download that is not whole yet
    source = _source(config)
    if weights.form != "safetensors" or source is None:
        return
    entries = {name: entry for file in weights.files for name, entry in _header(file).items()}
    linear = _linear(source)
    _check_names(settings, entries, source, linear)
    if "quantization_config" not in config:
        _check_rank(settings, entries, linear)


def _header(file: Path) -> dict[str, Entry]:
    descriptor, size = open_plain(file)
    try:
        return read_header(descriptor, file, size)
    finally:
        os.close(descriptor)


def _source(config: Mapping[str, Any]) -> str | None:
    """The text of transformers that builds a model; None where it is not found for every part of it."""
    found = find_spec("transformers")
    if found is None or found.origin is None:
        return None
    home = Path(found.origin).parent
    files = [home / HEADS]
    for kind in set(_model_types(config)):
        folders = [home / "models" / name.replace("-", "_") for name in (kind, kind.removesuffix("_text"))]
        texts = next((texts for folder in folders if (texts := sorted(folder.glob("modeling_*.py")))), [])
        if not texts or not re.fullmatch(r"[\w-]+", kind):
            return None
        files += texts
    return "\n".join(file.read_text(encoding="utf-8") for file in files) if len(files) > 1 else None


def _model_types(config: Any) -> Iterator[str]:
    """The kinds of model that a config.json names, its own and those of its parts."""
    for name, value in config.items():
        if name == "model_type" and isinstance(value, str):
            yield value
        elif isinstance(value, dict):
            yield from _model_types(value)


def _linear(source: str) -> set[str]:
    """The names under which a text declares linear layers and nothing else."""
    declared = DECLARED.findall(source)
    return {name for name, kind in declared if kind == "nn.Linear"} - {n for n, kind in declared if kind != "nn.Linear"}


def _check_names(settings: AdapterSettings, entries: Mapping[str, Entry], source: str, linear: set[str]) -> None:
    words = set(re.findall(r"\w+", source)) | {part for name in entries for part in name.split(".")}
    endings = sorted({name.split(".")[-2] for name in entries if "." in name} & linear)
    patterns = {"rank_pattern": settings.rank_pattern, "alpha_pattern": settings.alpha_pattern}
    for field in ("target_modules", "exclude_modules", *patterns):
        value = patterns.get(field) or getattr(settings, field)
        if isinstance(value, str):
            missing = [value] if value != ALL_LINEAR and _is_foreign(value, words) else []
        else:
            names = [name for name in value if PLAIN_NAME.fullmatch(name)]
            missing = [name for name in names if not all(part in words for part in name.split("."))]
        if missing:
            raise TargetError(nothing_matches(missing, endings, "" if field == "target_modules" else field))


def _is_foreign(expression: str, words: set[str]) -> bool:
    """Whether a regular expression, as far as it is plain, holds a word that is part of none of these."""
    if UNPLAIN.search(expression):
        return False
    return any(all(part not in word for word in words) for part in re.findall(r"\w+", expression))


def _check_rank(settings: AdapterSettings, entries: Mapping[str, Entry], linear: set[str]) -> None:
    """Refuse a rank for layers that have it from no pattern; mixtures of experts are left to the live model."""
    wanted, left = settings.target_modules, settings.exclude_modules
    named = not isinstance(wanted, str) and not isinstance(left, str)
    experts = any(".experts." in name for name in entries)
    if settings.rank_pattern or settings.rank_budget is not None or not (named or wanted == ALL_LINEAR) or experts:
        return
    low = []
    for name, entry in entries.items():
        module, _, parameter = name.rpartition(".")
        if parameter != "weight" or len(entry.shape) != 2 or entry.kind not in FLOATING or 0 in entry.shape:
            continue
        # "all-linear" leaves heads alone, which lie outside the blocks
        meant = matches(module, wanted) if named else bool(re.search(r"\.\d+\.", name))
        if meant and module.rpartition(".")[2] in linear and not matches(module, left):
            low += [(module, entry.shape, settings.rank)] if settings.rank > min(entry.shape) else []
    if low:
        raise ConfigError(rank_too_large(sorted(low, key=lambda each: min(each[1]))))
