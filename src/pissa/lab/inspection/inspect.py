"""`inspect`: load a model, measure what its split would cost, and draw it where figures are asked for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.progress import Progress
from torch import nn

from ...checkpoint.saved_residual import check_is_base
from ...config import PissaConfig
from ...provenance import hardware, package_versions
from ...stages import stage
from ...training.run import quieten
from ..load import load_any_tokenizer, load_model
from .budget import inspect_budget
from .layers import kind_of, select_targets
from .measure import inspect_quantized, inspect_split
from .settings import InspectionSettings
from .spectra import spectra
from .text import read_calibration
from .variants import Variant

HALVINGS = 4
"""Ranks in a curve where one is given."""


@stage("measuring what a split would cost")
def inspect(source: str, asked: InspectionSettings, *, progress: Progress | None = None) -> dict[str, Any]:
    """Load a model and measure its split; the whole of `pissa inspect`.

    Args:
        source: a directory or hub id of any transformers model.
        asked: what is measured.
        progress: a bar to use.

    Returns:
        What `inspect_quantized`, `inspect_split` or `inspect_budget` returns, with model, settings, versions and
        hardware.

    Raises:
        PissaError: the input is wrong.
    """
    quieten()
    check_is_base(source)
    model = load_model(source)
    head: dict[str, Any] = {"model": source, "parameters": sum(p.numel() for p in model.parameters())}
    common: dict[str, Any] = {"target_modules": asked.target_modules, "max_layers": asked.max_layers}
    common["progress"] = progress
    tail = {"versions": package_versions(), "hardware": hardware()}
    if asked.rank_budget is not None:
        result = inspect_budget(model, max(asked.rank), asked.rank_budget, quantization=asked.quantization, **common)
        if asked.figures is not None:
            from .figures import draw_plan

            result["figures"] = [str(draw_plan(result, Path(asked.figures)))]
        return {**head, "quantize": asked.quantize, **result, **tail}
    if asked.quantize is None:
        return {**head, **inspect_split(model, max(asked.rank), **common), **tail}
    text = None
    if asked.calibration is not None:
        longest = getattr(model.config, "max_position_embeddings", None) or asked.length
        tokenizer = load_any_tokenizer(source)
        length = min(asked.length, longest)
        text = read_calibration(
            asked.calibration, tokenizer, held_out=asked.held_out, length=length, windows=asked.windows
        )
    head |= {"quantize": asked.quantize, "double_quant": asked.double_quant}
    head |= {"calibration": text.description if text is not None else None}
    result = inspect_quantized(model, asked.variants, asked.rank, norms=asked.norms, calibration=text, **common)
    if asked.figures is not None:
        result["figures"] = _drawn(model, asked, result["rows"], progress)
    return {**head, **result, **tail}


def _drawn(
    model: nn.Module, asked: InspectionSettings, rows: list[dict[str, Any]], progress: Progress | None
) -> list[str]:
    """The figures' files."""
    from .figures import draw_inspection

    assert asked.figures is not None
    ranks, targets = asked.rank, asked.target_modules
    curves = rows if len(ranks) > 1 else _curves(model, asked.variants, max(ranks), targets, progress)
    layers = select_targets(model, PissaConfig(rank=max(ranks), target_modules=targets), 1)
    values = {kind_of(layer.name): spectra(layer, asked.variants[-1], max(ranks)) for layer in layers}
    return [str(path) for path in draw_inspection(curves, values, Path(asked.figures))]


def _curves(
    model: nn.Module,
    variants: Sequence[Variant],
    rank: int,
    target_modules: str | Sequence[str],
    progress: Progress | None,
) -> list[dict[str, Any]]:
    """Rows at the rank and its halves, of one block and of the methods that need no text."""
    halves = sorted({max(1, rank >> shift) for shift in range(HALVINGS)})
    unaware = [variant for variant in variants if not variant.aware]
    return inspect_quantized(
        model, unaware, halves, target_modules=target_modules, norms=["nuclear"], max_layers=1, progress=progress
    )["rows"]
