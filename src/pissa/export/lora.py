"""What training changed, as a LoRA for the base: lossless, or of a lower rank."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import replace
from typing import Any, Literal, get_args

from peft import AdaLoraConfig, LoraConfig, PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from ..checkpoint.disk.write import check_free, output_directory
from ..checkpoint.factors import PREFIX
from ..checkpoint.read import LOSSLESS, SavedAdapter, read_adapter
from ..checkpoint.source.load import load_config
from ..errors import CheckpointError, ConfigError, PissaError
from ..live.adalora import lora_config
from ..live.conversion import NESTING, nesting
from ..live.marks import ROWS, config_with_ranks, is_marked_offset, marks, set_marks, without_marks
from ..live.state import active_adapter_name
from ..live.targets import pattern_keys
from .files import LoraExport, write_lora
from .from_model import check_finite, from_live
from .gguf_lora import write_gguf_lora
from .llama_cpp import check_gguf_target
from .low_rank import LowRank, truncate

Format = Literal["peft", "gguf"]
FORMATS: tuple[Format, ...] = get_args(Format)


def export_lora(
    model_or_dir: PeftModel | str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    *,
    rank: int | None = None,
    tolerance: float | None = None,
    format: Format = "peft",
    base: str | os.PathLike[str] | None = None,
    state: Mapping[str, Tensor] | None = None,
) -> LoraExport:
    """Export an adapter as a LoRA that loads on the original base anywhere.

    Args:
        model_or_dir: an adapted model, or a saved run or adapter directory; the base is not needed.
        out: directory to write (new or empty), or, in format "gguf", a file *.gguf; None to get the tensors only.
        rank: None for the lossless export (rank 2r; r for the LoRA baselines); else the optimal LoRA of at most this
            rank per module.
        tolerance: in place of `rank`: per module, the smallest rank whose relative error is at most this.
        format: "peft", a directory that PEFT and vLLM load, or "gguf", one file that llama.cpp loads beside a GGUF of
            the base.
        base: directory or hub id. Of a residual that others made, where an adapter was trained on it and does not say
            so: the export is for the base that the residual was made of. With format "gguf", whose names need the
            base's config.json: that of the base, where a saved run does not record it.
        state: of a live model whose parameters are shards: its whole state dict, from which the tensors are taken.

    Returns:
        The tensors, with configuration and per-module errors.

    Raises:
        ConfigError: rank below 1, tolerance outside [0, 1), or both given; a format that does not exist.
        PissaError: the adapter is no plain LoRA, or, in format "gguf", llama.cpp has no place for it.
        CheckpointError, OutputError: the directory cannot be read, or `out` not written.

    Example:
        >>> from transformers import AutoModelForCausalLM
        >>> from pissa import PissaConfig, adapt, export_lora
        >>> model = adapt(AutoModelForCausalLM.from_pretrained("base"), PissaConfig(rank=8))
        >>> lora = export_lora(model, "lora")  # any PEFT loads lora/ on the base
        >>> lora.config.r, max(lora.errors.values())  # lossless: twice the rank
        (16, 0.0)

    Source: paper, appendix C; the truncation is the Eckart-Young optimum.
    """
    if rank is not None and tolerance is not None:
        raise ConfigError("give rank or tolerance, not both")
    if rank is not None and rank < 1:
        raise ConfigError(f"rank is {rank}; give at least 1, or leave it out for the lossless export")
    if tolerance is not None and not 0 <= tolerance < 1:
        raise ConfigError(f"tolerance is {tolerance}; allowed: 0 up to, not including, 1")
    if format not in FORMATS:
        raise ConfigError(f"format is {format!r}; allowed: {', '.join(FORMATS)}")
    if format == "gguf":
        check_gguf_target(out)
    if out is not None:
        check_free(out)
    live = isinstance(model_or_dir, PeftModel)
    saved = from_live(model_or_dir, state) if live else read_adapter(model_or_dir, base)
    saved = without_values(saved)
    if saved.residual is not None and saved.residual.quantized_by_others:
        warnings.warn(
            f"{saved.residual.path} is quantised and does not say how far it is, with its initial adapter, from "
            f"{saved.base}; this export for that base is off from what was trained by just that",
            stacklevel=2,
        )
    lossless = rank is None and tolerance is None
    export = _lossless(saved) if lossless else _truncated(saved, rank, tolerance or 0.0)
    if format == "gguf" and out is not None:
        settings = _base_config(model_or_dir, base or export.base)
        write_gguf_lora(export, export.config, settings, out, template=export.template)
    elif out is not None:
        with output_directory(out) as partial:
            write_lora(export, partial)
    return export


def export_state(
    model: PeftModel, *, state: Mapping[str, Tensor] | None = None, adapter: str | None = None
) -> LoraExport:
    """What continues a run: the lossless export, for AdaLoRA as one of rank 2r with its values apart.

    Args:
        model: an adapted model.
        state: see `export_lora`.
        adapter: the adapter's name; None for the active one.
    """
    adapter = adapter or active_adapter_name(model)
    export = _lossless(from_live(model, state, adapter))
    config: Any = model.peft_config[adapter]
    export.config.lora_dropout = config.lora_dropout  # for whoever trains on; in evaluation it does nothing
    return export


def without_values(saved: SavedAdapter) -> SavedAdapter:
    """An AdaLoRA adapter as a LoRA: the values are multiplied into B."""
    if not isinstance(saved.config, AdaLoraConfig):
        return saved
    factors = {name: f.folded() for name, f in saved.factors.items()}
    return replace(saved, factors=factors, config=lora_config(saved.config))


def _base_config(model_or_dir: Any, base: Any) -> Any:
    """transformers' configuration of the base, without its weights."""
    if isinstance(model_or_dir, PeftModel):
        plain: Any = model_or_dir.get_base_model()
        if isinstance(plain, PreTrainedModel):
            config, record = deepcopy(plain.config), getattr(model_or_dir, "pissa", None)
            if record is not None and record.undo.tie_word_embeddings is not None:  # as it was before `adapt` untied it
                config.tie_word_embeddings = record.undo.tie_word_embeddings
            return config
        raise PissaError(f"{type(plain).__name__} is no transformers model, so llama.cpp has no model to add it to")
    if base is None:
        raise CheckpointError(
            f"{model_or_dir} does not record its base, whose config.json is needed; pass it with base"
        )
    try:
        return load_config(base)
    except CheckpointError as error:
        raise CheckpointError(f"the config.json of the base is needed: {error}; pass its place with base") from error


def _lossless(saved: SavedAdapter) -> LoraExport:
    doubled = any(factors.A0 is not None for factors in saved.factors.values())
    config = config_with_ranks(saved.config, 2.0) if doubled else deepcopy(saved.config)
    changes = {name: factors.change() for name, factors in saved.factors.items()}
    parts = {name: LowRank(f.A.clone(), f.B.clone(), magnitude=f.magnitude, E=f.E) for name, f in changes.items()}
    return _as_export(saved, parts, config, LOSSLESS if doubled else None)


def _truncated(saved: SavedAdapter, rank: int | None, tolerance: float) -> LoraExport:
    parts = {name: truncate(factors, rank, tolerance) for name, factors in saved.factors.items()}
    ranks = {_pattern_name(saved.config, name): part.A.shape[-2] for name, part in parts.items()}
    config = deepcopy(saved.config)
    config.use_rslora = False
    config.r = max(ranks.values())
    config.lora_alpha = config.r  # scale 1: s is inside the factors
    keys = pattern_keys(ranks)
    config.rank_pattern = {keys[name]: r for name, r in ranks.items() if r != config.r}
    config.alpha_pattern = dict(config.rank_pattern)
    return _as_export(saved, parts, config, None)


def _pattern_name(config: LoraConfig, name: str) -> str:
    """What PEFT matches patterns with for what goes by this name."""
    bare = f"{name}.weight"
    return bare if bare in (config.target_parameters or ()) else name


def _as_export(saved: SavedAdapter, parts: Mapping[str, LowRank], config: LoraConfig, layout: str | None) -> LoraExport:
    export = LoraExport()
    for name, part in parts.items():
        layout_of = saved.layouts[name]
        for key, tensor in layout_of.tensors(part.A, part.B, part.E).items():
            export[f"{PREFIX}{key}"] = tensor
        if part.magnitude is not None:
            export[f"{PREFIX}{layout_of.magnitude_key}"] = part.magnitude.clone()
    export.update(saved.others)
    check_finite({key.removeprefix(PREFIX): tensor for key, tensor in export.items()}, "the adapter")
    parameters, rows = nesting(config), marks(config).get(ROWS)
    config = without_marks(config)
    set_marks(config, **{ROWS: rows})
    if layout == LOSSLESS and is_marked_offset(saved.config):
        set_marks(config, placement="offset")
    if parameters:
        set_marks(config, **{NESTING: parameters})
    config.base_model_name_or_path = saved.base
    config.lora_dropout = 0.0
    export.gaps = {name: gap for name, gap in saved.gaps.items() if name in parts}
    export.config, export.base, export.layout, export.sample = config, saved.base, layout, saved.sample
    export.method, export.rank, export.residual = saved.method, _highest_rank(saved.config), None
    export.template = saved.template
    export.errors = {name: part.error for name, part in parts.items()}
    return export


def _highest_rank(config: LoraConfig) -> int:
    own = config.init_r if isinstance(config, AdaLoraConfig) else config.r
    return max([own, *(config.rank_pattern or {}).values()])
