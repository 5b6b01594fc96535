"""The packages that a recipe's settings need, looked for without importing anything."""

from __future__ import annotations

from importlib.util import find_spec

from ..errors import MissingExtraError
from .recipe import Recipe

FLASH = {
    "flash_attention_2": ("flash_attn", "flash-attn"),
    "flash_attention_3": ("flash_attn_interface", "flash-attn-3"),
    "flash_attention_4": ("flash_attn", "flash-attn-4"),
}
"""Attention -> the module that it needs, and its package."""

BITSANDBYTES = ("nf4", "int8")
"""Formats whose layers are bitsandbytes'."""


def check_packages(recipe: Recipe, *, trains: bool = True) -> None:
    """Refuse settings whose packages are not there, which transformers would say much later.

    Args:
        recipe: of a run, or of a split.
        trains: whether it is a run.

    Raises:
        MissingExtraError: naming what to install.
    """
    wanted = [("training", "trl", "'pissa[train]'")] if trains else []
    if recipe.quantization is not None and recipe.quantization.format in BITSANDBYTES:
        wanted.append((f"quantize {recipe.quantization.format}", "bitsandbytes", "'pissa[quant]'"))
    wanted += [(f"report_to {name}", name, name) for name in recipe.report_to]
    if recipe.liger:
        wanted.append(("liger", "liger_kernel", "liger-kernel"))
    if recipe.attention in FLASH:
        wanted.append((f"attention {recipe.attention}", *FLASH[recipe.attention]))
    missing = [(what, package) for what, module, package in wanted if find_spec(module) is None]
    if missing:
        raise MissingExtraError("; ".join(f"{what} needs a package: pip install {name}" for what, name in missing))
