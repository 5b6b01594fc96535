"""Adapters from disk.

An adapter directory comes in four layouts, and each says by itself which one it is:

    lossless   our runs and exports: one LoRA of rank 2r for the base, [B | −B0] and [A ; A0], a DoRA with magnitudes,
               a run's checkpoint of AdaLoRA with [E ; E0]; `pissa.json` says so, or, in placement "offset", the
               adapter's configuration
    on disk    the rank-r adapter for a residual that `save_residual` wrote; its configuration and `pissa.json` name it
    residual   the rank-r adapter, and `pissa_init/` beside it, as PEFT would save them; or beside the residual's
               weights, as others publish them, which the adapter's configuration names or the caller gives
    LoRA       any other PEFT LoRA

From the first and third the residual is `W − s·B0·A0`, computed by the function that split it: same bits, never an SVD.
A residual on disk is loaded as it is.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from peft import LoraConfig
from torch import Tensor, nn

from ..errors import CheckpointError, listed
from ..live.factors import AdapterFactors, Layout, halves
from ..live.layers import CONVOLUTION, Place, place_named
from ..live.marks import config_with_ranks, is_marked_offset, marks, not_plain_lora
from ..live.runtime import UNDILATED, holes, is_dilated, taps, with_holes
from .adapter_config import read_adapter_config
from .factors import CONFIG, read_factors
from .manifest import read_manifest
from .recorded import recorded_template
from .saved_residual import SavedResidual, find_residual, residual_at
from .source.hub import adapter_directory
from .source.look import no_adapter_in
from .source.names import initial_in

LOSSLESS = "lossless"


@dataclass(frozen=True)
class SavedAdapter:
    """An adapter as its directory holds it."""

    factors: dict[str, AdapterFactors]
    """Name of what is adapted -> trained and initial factors."""
    layouts: dict[str, Layout]
    """By the same names, how PEFT stores them."""
    config: LoraConfig
    """PEFT's configuration of the adapter as trained (rank r)."""
    base: str | None
    """The base's directory or hub id, where it is recorded."""
    others: dict[str, Tensor] = field(default_factory=dict)
    """Tensors of modules that were trained in full, under PEFT's names."""
    residual: SavedResidual | None = None
    """The residual on disk that the adapter is for; None where it is computed from the base."""
    gaps: dict[str, float] = field(default_factory=dict)
    """Module name -> relative distance of the base from residual + initial adapter, where the residual is quantised."""
    sample: str | None = None
    """A few values of the base's weights, see `live.identity`."""
    method: str | None = None
    """Name of the method by which it was trained, where it is recorded."""
    template: str | None = None
    """The prompt template with which it was trained, where it is recorded."""


def base_place(
    path: str | os.PathLike[str], saved: SavedAdapter, base: str | os.PathLike[str] | None
) -> tuple[str | os.PathLike[str], SavedResidual | None]:
    """Where the weights are that a saved adapter goes on, and what their directory says where they are the residual.

    Args:
        path: of the adapter, for messages.
        saved: the adapter.
        base: a directory or hub id; None for the recorded one, "" where it has none.

    Raises:
        CheckpointError: no base is recorded, or the adapter fits only a residual, which this is not.
    """
    if base is None:
        base = saved.residual.path if saved.residual is not None else saved.base
    if base is None:
        raise CheckpointError(f"{path} does not record its base; pass it: load(path, base=…)")
    residual = residual_at(base) if base and not is_marked_offset(saved.config) else None
    if marks(saved.config).get("residual") and residual is None:
        raise CheckpointError(
            f"{path} holds an adapter for a quantised residual, and {base or 'the model given'} is not that residual; "
            "save it with pissa.save_residual(model, …) and pass it: load(path, base=…)"
        )
    return base, residual


def read_adapter(path: str | os.PathLike[str], base: str | os.PathLike[str] | None = None) -> SavedAdapter:
    """Read an adapter directory of any layout, or a hub id's, without its base.

    Args:
        path: the directory or hub id.
        base: what the adapter was trained on, where its configuration names something else. It is only looked at where
            it is a residual, whose initial adapter says what training changed.

    Raises:
        CheckpointError: it is no PEFT LoRA, or incomplete, or of a kind that a plain LoRA cannot express.
    """
    named = adapter_directory(path)
    directory = _adapter_directory(named)
    config = _read_config(directory)
    factors, layouts, others = read_factors(directory, config)
    manifest = read_manifest(directory) or {}
    recorded = manifest.get("base") or config.base_model_name_or_path
    residual = None
    if not is_marked_offset(config):  # whose base is the base, were it a residual to others
        residual = residual_at(base) if base else None
        residual = residual or find_residual(directory, manifest, config.base_model_name_or_path)
    if residual is not None:
        recorded = residual.base
    beside = [initial_in(place) for place in (directory, *([residual.path] if residual is not None else []))]
    if manifest.get("layout") == LOSSLESS or is_marked_offset(config):
        config = config_with_ranks(config, 0.5)
        odd = [name for name, f in factors.items() if f.A.shape[-2] % 2]
        if odd:
            raise CheckpointError(f"{directory} is no lossless export: odd rank at {', '.join(odd)}")
        factors = {name: halves(f) for name, f in factors.items()}
    elif initial_directory := next((place for place in beside if place is not None), None):
        factors = _with_initial(directory, factors, initial_directory)
    reason = not_plain_lora(config, initial_known=any(f.A0 is not None for f in factors.values()))
    if reason:
        raise CheckpointError(f"the adapter in {directory} {reason}")
    gaps = residual.gaps if residual is not None else {}
    sample = manifest.get("base_sample") or marks(config).get("base")
    method = manifest.get("method") or (residual.method if residual is not None else None)
    template = recorded_template(named)
    return SavedAdapter(factors, layouts, config, recorded, others, residual, gaps, sample, method, template)


def _with_initial(
    directory: Path, factors: dict[str, AdapterFactors], initial_directory: Path
) -> dict[str, AdapterFactors]:
    """The factors together with those at step 0, which lie in a directory of their own."""
    initial, _, _ = read_factors(initial_directory, _read_config(initial_directory))
    if {n: (f.A.shape, f.B.shape) for n, f in initial.items()} != {
        n: (f.A.shape, f.B.shape) for n, f in factors.items()
    }:
        raise CheckpointError(
            f"{directory} and {initial_directory} differ in modules or ranks; they are not of one run"
        )
    return {name: replace(f, A0=initial[name].A, B0=initial[name].B, E0=initial[name].E) for name, f in factors.items()}


def _adapter_directory(path: Path) -> Path:
    """The directory that holds the adapter as trained: a run's own, or its last state where only that has it all."""
    manifest = read_manifest(path)
    trained = manifest.get("trained") if manifest else None
    if trained:
        path = path / trained
    elif residual_at(path) is not None:
        path = initial_in(path) or path  # the residual by itself: its adapter is the one at step 0
    if not (path / CONFIG).is_file():
        raise CheckpointError(no_adapter_in(path))
    return path


def _read_config(directory: Path) -> LoraConfig:
    config = read_adapter_config(directory)
    reason = not_plain_lora(config, initial_known=True)
    if reason:
        raise CheckpointError(f"the adapter in {directory} {reason}")
    _check_scales(directory, config)
    config.inference_mode = False
    return config


def _check_scales(directory: Path, config: LoraConfig) -> None:
    """Refuse an alpha or a rank with which nothing can be computed."""
    alphas = {"lora_alpha": config.lora_alpha, **(config.alpha_pattern or {})}
    wrong = [name for name, alpha in alphas.items() if not _is_number(alpha) or not math.isfinite(alpha)]
    ranks = {"r": config.r, **(config.rank_pattern or {})}
    wrong += [name for name, rank in ranks.items() if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1]
    if wrong:
        raise CheckpointError(
            f"{directory / CONFIG}: {listed(wrong, 20)}: an alpha is a finite number, a rank a whole one of at least 1"
        )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def fitted(
    path: str | os.PathLike[str], saved: SavedAdapter, model: nn.Module, places: Mapping[str, Place] | None = None
) -> dict[str, AdapterFactors]:
    """The factors in the shapes that the model's weights ask for.

    Args:
        path: of the adapter, for messages.
        saved: the adapter.
        model: without adapters; with them, where `places` says where its weights lie, by name.

    Raises:
        CheckpointError: what is adapted is missing in the model, or of another shape.
    """
    fitted: dict[str, AdapterFactors] = {}
    for name, factors in saved.factors.items():
        place = place_named(model, name) if places is None else places.get(name)
        if place is None:
            continue
        if place.kind is CONVOLUTION and is_dilated(place.module):
            if saved.layouts[name].shape == place.shape:
                raise CheckpointError(f"{path}: {name} {UNDILATED}")
            factors = _without_holes(factors, saved.layouts[name], place)
        stack = place.matrix_shape[:-2] == (1,) and factors.A.ndim == 2  # a single expert
        factors = _each(factors, lambda tensor: tensor[None]) if stack else factors
        if place.matrix_shape == (*factors.A.shape[:-2], factors.B.shape[-2], factors.A.shape[-1]):
            fitted[name] = factors
    wrong = [name for name in saved.factors if name not in fitted]
    if wrong:
        raise CheckpointError(f"{path} was made for another base: {listed(wrong, 20)} missing or of another shape")
    return fitted


def _each(factors: AdapterFactors, change: Callable[[Tensor], Tensor], sides: str = "AB") -> AdapterFactors:
    """The factors with A and A0, B and B0, or all of them changed."""
    tensors = {name: getattr(factors, name) for side in sides for name in (side, f"{side}0")}
    return replace(factors, **{name: change(t) for name, t in tensors.items() if t is not None})


def _without_holes(factors: AdapterFactors, layout: Layout, place: Place) -> AdapterFactors:
    """The factors of a dilated convolution, whose kernels are saved with holes, with their taps alone."""
    kernel, dilation = layout.shape[1:], holes(place.module)
    if with_holes(place.weight.new_zeros(1, *place.shape[1:]), dilation).shape[1:] != kernel:
        return factors
    return _each(factors, lambda A: A.reshape(-1, *kernel)[taps(dilation)].flatten(1), "A")
