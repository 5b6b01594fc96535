"""The part of a multimodal model that text goes through; what is beside it is left alone unless it is asked for.

Vision towers and projectors are linear layers too, and "all-linear" would split them, although no gradient of a text
reaches them.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

from ..config.kinds import ALL_LINEAR
from .recipe import Recipe


def beside_text(base: Any) -> list[str]:
    """The largest modules that text does not go through, by name; none for a model of text alone.

    Args:
        base: a model of transformers.
    """
    if base.config.get_text_config() is base.config:
        return []
    within = {name: module for name, module in base.named_modules() if name}
    decoder, head = base.get_decoder(), base.get_output_embeddings()
    path = next((name for name, module in within.items() if module is decoder), None)
    if path is None:
        return []
    around = {".".join(path.split(".")[:depth]) for depth in range(len(path.split(".")) + 1)}
    beside = [name for name in within if name.rpartition(".")[0] in around - {path} and name not in around]
    return [name for name in beside if within[name] is not head]


def for_text(base: Any, recipe: Recipe) -> Recipe:
    """The recipe such that "all-linear" means the part that text goes through; an explicit choice stays."""
    beside = beside_text(base)
    if not beside or recipe.target_modules != ALL_LINEAR or recipe.exclude_modules:
        return recipe
    return replace(recipe, exclude_modules=rf"({'|'.join(map(re.escape, beside))})(\..*)?")
