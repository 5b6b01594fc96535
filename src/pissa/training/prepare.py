"""The model that a run trains: adapted from the base, or as the run left it on the disk.

A quantised residual is split once, written to RUN/residual/ and read from there by whatever continues the run, so that
no second split could come out different.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor

from ..adapted.adapt import adapt
from ..adapted.load import load
from ..checkpoint.residual import residual_state
from ..checkpoint.saved_residual import SavedResidual, residual_at
from ..checkpoint.source.load import load_base
from ..export.files import gap_figures
from ..live.record import record_of
from ..provenance import fingerprint
from .bar import shown
from .directory import RunDirectory, read_record
from .engine import storage_dtype
from .polish import hidden_states, polish
from .ready import ready_split
from .recipe import Recipe
from .text_part import beside_text, for_text


@dataclass(frozen=True)
class Prepared:
    """A model ready to be trained."""

    model: Any
    """The adapted model, or the base itself for full fine-tuning."""
    fingerprints: dict[str, str]
    """Of the base, and of the residual where it is quantised."""
    split: dict[str, float | None] | None
    """What the split cost; None where it was made before and stands in the run's record."""
    unpolished: tuple[list[dict[str, Any]], list[Tensor]] | None = None
    """Where the start is still to be polished: the batches of that, and what the base puts out for them."""


def prepare(
    source: str,
    recipe: Recipe,
    directory: RunDirectory,
    device: torch.device,
    progress: Progress | None,
    label: str,
    batches: Callable[[], list[dict[str, Any]] | None] = lambda: None,
    polish_text: Callable[[], list[dict[str, Any]]] = list,
    check: Callable[[Any], None] | None = None,
) -> Prepared:
    """The model to train, as the last checkpoint left it where there is one.

    Args:
        source: the base's directory or hub id.
        recipe: method, rank, quantisation.
        directory: the run's; nothing is written.
        device: where it is trained. bitsandbytes' layers must be made there, others are moved by the trainer.
        progress: a bar for the split, or None.
        label: the run's name on the bar.
        batches: gives those of the data that components are scored by or a quantisation is fitted to; None for none.
        polish_text: gives those that the start is polished on, where the recipe asks for it.
        check: called with a base before anything is split; what it raises ends the run.
    """
    checkpoint = directory.last_checkpoint
    if (ready := ready_split(source)) is not None:
        return _prepared_before(ready, recipe, directory, device, check)
    if recipe.quantization is not None and (checkpoint is not None or residual_at(directory.residual) is not None):
        return _continued(recipe, directory, device)
    with shown(progress, f"{label}, loading {source}"):
        base = load_base(source, dtype=storage_dtype(recipe), **_attention(recipe))
    mark = {"base": fingerprint(base)}
    if check is not None and checkpoint is None:
        check(base)
    _checkpoint_activations(base, recipe)
    if not recipe.adapts:
        base.requires_grad_(True)
        return Prepared(base, mark, _figures(0.0, {}))
    if checkpoint is not None:
        return Prepared(load(checkpoint, base, is_trainable=True), mark, None)
    if recipe.quantization is not None and device.type != "cpu":
        base.to(device)
    unpolished = None
    if recipe.polish is not None:
        with shown(progress, f"{label}, what the full model puts out"):
            text = polish_text()
            unpolished = text, hidden_states(base, text)
    start = time.perf_counter()
    adapted = _adapted(base, recipe, progress, label, batches())
    seconds = time.perf_counter() - start
    if recipe.quantization is not None:
        mark["residual"] = fingerprint(residual_state(adapted.get_base_model()))
    record = record_of(adapted)
    assert record is not None
    return Prepared(adapted, mark, _figures(seconds, record.certificates), unpolished)


def polished(
    prepared: Prepared, steps: int, directory: RunDirectory, progress: Progress | None, label: str
) -> dict[str, float | None]:
    """Polish a start, or go on with that; the figures of the split as they are then."""
    assert prepared.unpolished is not None and prepared.split is not None
    task = progress.add_task(f"{label}, polish", total=steps, note="") if progress is not None else None

    def show(step: int, error: float) -> None:
        if progress is not None and task is not None:
            progress.update(task, completed=step, note=f"error of the hidden states {error:.4f}")

    try:
        made = polish(prepared.model, *prepared.unpolished, steps, state=directory.polish, progress=show)
    finally:
        if progress is not None and task is not None:
            progress.remove_task(task)
    if progress is not None:
        gain = f"{made.error_before:.4f} to {made.error_after:.4f}"
        progress.console.print(f"polish: error of the hidden states on text held out from {gain}", highlight=False)
    record = record_of(prepared.model)
    assert record is not None
    figures = _figures(prepared.split["init_seconds"] or 0.0, record.certificates)
    return {**figures, "hidden_error_before": made.error_before, "hidden_error_after": made.error_after}


def _prepared_before(
    ready: SavedResidual,
    recipe: Recipe,
    directory: RunDirectory,
    device: torch.device,
    check: Callable[[Any], None] | None,
) -> Prepared:
    """What `pissa init` made, with the last checkpoint's adapter or, before the first, the initial one."""
    place: dict[str, Any] = {} if device.type == "cpu" else {"device_map": {"": device}}
    # another dtype than the residual was rounded to would round it again
    residual = load_base(ready.path, **place, **_attention(recipe))
    marks = {"base": fingerprint(residual_state(residual))}
    last = directory.last_checkpoint
    if check is not None and last is None:
        check(residual)
    _checkpoint_activations(residual, recipe)
    adapted = load(last or ready.path, residual, is_trainable=True)
    return Prepared(adapted, marks, _figures(0.0, ready.certificates) if last is None else None)


def _continued(recipe: Recipe, directory: RunDirectory, device: torch.device) -> Prepared:
    """The saved residual, with the last checkpoint's adapter or, before the first, the initial one."""
    place: dict[str, Any] = {} if device.type == "cpu" else {"device_map": {"": device}}
    residual = load_base(directory.residual, dtype=storage_dtype(recipe), **place, **_attention(recipe))
    marks = {**read_record(directory)["fingerprints"], "residual": fingerprint(residual_state(residual))}
    marks.pop("data", None)
    _checkpoint_activations(residual, recipe)
    adapter: Path = directory.last_checkpoint or directory.residual
    return Prepared(load(adapter, residual, is_trainable=True), marks, None)


def _adapted(
    base: Any,
    recipe: Recipe,
    progress: Progress | None,
    label: str,
    batches: list[dict[str, Any]] | None,
) -> Any:
    task = progress.add_task(f"{label}, split", total=None, note="") if progress is not None else None

    def show(name: str, done: int, total: int) -> None:
        if progress is not None and task is not None:
            progress.update(task, completed=done, total=total, note=".".join(name.split(".")[-2:]))

    if progress is not None and for_text(base, recipe) is not recipe:
        left = ", ".join(beside_text(base))
        progress.console.print(f"{left}: left alone, since the data is text", markup=False, highlight=False)
    recipe = for_text(base, recipe)
    try:
        return adapt(base, recipe.pissa_config(), batches=batches, progress=show)
    finally:
        if progress is not None and task is not None:
            progress.remove_task(task)


def _attention(recipe: Recipe) -> dict[str, Any]:
    return {} if recipe.attention is None else {"attn_implementation": recipe.attention}


def _checkpoint_activations(base: Any, recipe: Recipe) -> None:
    if recipe.gradient_checkpointing:
        # transformers 5.23 renamed it and warns of the old name
        enable = getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable
        enable({"use_reentrant": False})


def _figures(seconds: float, certificates: dict[str, Any]) -> dict[str, float | None]:
    """What the split cost, for the results."""
    fitted = [c.output_reduction for c in certificates.values() if c.output_reduction is not None]
    gaps = {name: c.rounding for name, c in certificates.items() if c.quantization_error is not None}
    return {
        "init_seconds": seconds,
        "largest_captured_energy_loss": max((c.captured_energy_loss for c in certificates.values()), default=None),
        "largest_rounding_error": max((c.rounding for c in certificates.values()), default=None),
        **gap_figures(gaps),
        "mean_output_reduction": statistics.fmean(fitted) if fitted else None,
    }
