"""`inspect`: load a model, measure what its split would cost, and draw it where figures are asked for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from rich.progress import Progress
from torch import nn

from ...checkpoint.saved_residual import check_is_base
from ...config import PissaConfig, Quantization
from ...errors import ConfigError
from ...provenance import hardware, package_versions
from ...training.run import quieten
from ..load import load_any_tokenizer, load_model
from .layers import kind_of, select_targets
from .measure import Measure, inspect_budget, inspect_quantized, inspect_split
from .spectra import spectra
from .text import read_calibration
from .variants import Variant

HALVINGS = 4
"""Ranks in a curve where one is given."""


def inspect(
    source: str,
    ranks: Sequence[int],
    variants: Sequence[Variant] = (),
    *,
    calibration: str | Path | None = None,
    held_out: str | Path | None = None,
    length: int = 256,
    windows: int = 80,
    norms: Sequence[Measure] = ("nuclear", "frobenius"),
    target_modules: str | Sequence[str] = "all-linear",
    max_layers: int | None = None,
    rank_budget: int | None = None,
    quantization: Quantization | None = None,
    figures: Path | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Load a model and measure its split; the whole of `pissa inspect`.

    Args:
        source: a directory or hub id of any transformers model.
        ranks: of the adapters.
        variants: quantised methods; none to inspect the plain split.
        calibration, held_out, length, windows: see `read_calibration`.
        norms, target_modules, max_layers, progress: see `inspect_quantized`.
        rank_budget: parameters to share out among the layers, in place of a split at one rank.
        quantization: with a budget, the format whose error is to be captured.
        figures: a directory for figures.

    Returns:
        What `inspect_quantized`, `inspect_split` or `inspect_budget` returns, with model, settings, versions and
        hardware.

    Raises:
        PissaError: the input is wrong.
    """
    wrong = [norm for norm in norms if norm not in get_args(Measure)[:2]]
    if wrong or not norms or not ranks or min(ranks) < 1:
        raise ConfigError(f"norms are {list(norms)}, ranks {list(ranks)}; allowed: nuclear, frobenius; ranks from 1 on")
    if rank_budget is not None and (variants or calibration is not None or len(ranks) > 1):
        raise ConfigError("rank_budget takes one rank, the largest; no methods, no calibration")
    if not variants and rank_budget is None and (calibration is not None or figures is not None or len(ranks) > 1):
        raise ConfigError("without --quantize, inspect shows the plain split at one rank: no calibration, no figures")
    if held_out is not None and calibration is None:
        raise ConfigError("held-out text is for methods with calibration; give --calibration FILE")
    quieten()
    check_is_base(source)
    model = load_model(source)
    head: dict[str, Any] = {"model": source, "parameters": sum(p.numel() for p in model.parameters())}
    common: dict[str, Any] = {"target_modules": target_modules, "max_layers": max_layers, "progress": progress}
    tail = {"versions": package_versions(), "hardware": hardware()}
    if rank_budget is not None:
        result = inspect_budget(model, ranks[0], rank_budget, quantization=quantization, **common)
        if figures is not None:
            from .figures import draw_plan

            result["figures"] = [str(draw_plan(result, figures))]
        return {**head, "quantize": quantization.format if quantization else None, **result, **tail}
    if not variants:
        return {**head, **inspect_split(model, ranks[0], **common), **tail}
    text = None
    if calibration is not None:
        longest = getattr(model.config, "max_position_embeddings", None) or length
        tokenizer = load_any_tokenizer(source)
        text = read_calibration(calibration, tokenizer, held_out=held_out, length=min(length, longest), windows=windows)
    quantization = variants[0].quantization
    head |= {"quantize": quantization.format, "double_quant": quantization.double_quant}
    head |= {"calibration": text.description if text is not None else None}
    result = inspect_quantized(model, variants, ranks, norms=norms, calibration=text, **common)
    if figures is not None:
        from .figures import draw_inspection

        curves = result["rows"] if len(ranks) > 1 else _curves(model, variants, ranks[0], target_modules, progress)
        targets = select_targets(model, PissaConfig(rank=max(ranks), target_modules=_chosen(target_modules)), 1)
        values = {kind_of(target.name): spectra(target, variants[-1], max(ranks)) for target in targets}
        result["figures"] = [str(path) for path in draw_inspection(curves, values, figures)]
    return {**head, **result, **tail}


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


def _chosen(target_modules: str | Sequence[str]) -> str | tuple[str, ...]:
    return target_modules if isinstance(target_modules, str) else tuple(target_modules)
