"""What training changed, as an ordinary LoRA or a merged model for the untouched base (paper, appendix C).

    ΔW = s·(B·A − B0·A0) = s · [B | −B0] · [A ; A0]

is a LoRA of rank 2r, exactly. Its optimal rank-R approximation needs no dense matrix: with thin QR factorisations
`[B | −B0] = Q_B R_B` and `[A ; A0]ᵀ = Q_A R_A`, the singular values of ΔW are those of the 2r × 2r core
`s·R_B·R_Aᵀ`, and the discarded ones are the error (Eckart and Young).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
from peft import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .checkpoint.card import lora_card, merged_card, write_card
from .checkpoint.factors import CONFIG, PREFIX, WEIGHTS
from .checkpoint.gguf_lora import check_gguf_target, write_gguf_lora
from .checkpoint.hub import first_line
from .checkpoint.manifest import MANIFEST, package_versions
from .checkpoint.merge import merge_saved
from .checkpoint.read import LOSSLESS, SavedAdapter, load, read_adapter
from .checkpoint.residual import unshared
from .checkpoint.write import check_free, output_directory, write_json
from .decompose.dora import rescaled
from .errors import CheckpointError, ConfigError, PissaError
from .live.adalora import layer_scale, lora_config
from .live.conversion import NESTING, nesting
from .live.layers import TRANSPOSED, Place, combine_each, place_of
from .live.offset import put_back_second_halves
from .live.quantized import quantized_layers
from .live.state import (
    INITIAL,
    MAGNITUDE,
    AdapterFactors,
    Layout,
    active_adapter_name,
    adapter_factors,
    adapter_layers,
    adapter_layouts,
    config_with_ranks,
    halves,
    has_initial_adapter,
    is_marked_offset,
    is_offset,
    marks,
    not_plain_lora,
    place_at,
    set_marks,
    without_marks,
    without_wrappers,
)
from .live.targets import pattern_keys
from .split import STORAGE_DTYPES, combine

TOKENS = ".token_adapter."
"""What PEFT puts into the names of an embedding some of whose rows are trained."""
FSDP_WRAPPER = "_fsdp_wrapped_module."
Format = Literal["peft", "gguf"]
FORMATS: tuple[Format, ...] = get_args(Format)


class LoraExport(dict[str, Tensor]):
    """A LoRA for the untouched base: PEFT's state dict (name -> tensor) with its configuration."""

    config: LoraConfig
    """PEFT's configuration that goes with the tensors."""
    base: str | None
    """Directory or hub id of the base it is for."""
    layout: str | None
    """"lossless" where the initial adapter can be read back out of it."""
    errors: dict[str, float]
    """Module name -> `‖ΔW − exported ΔW‖ / ‖ΔW‖` (Frobenius); all 0 for a lossless export."""
    sample: str | None
    """A few values of the base's weights, by which `load` tells another base of the same shapes."""
    method: str | None
    """Name of the method by which it was trained, where that is known."""
    rank: int
    """Rank of the adapter as it was trained."""
    residual: str | None
    """The directory of the residual, not quantised, that the model was trained on, where it was saved."""
    gaps: dict[str, float]
    """Module name -> `‖W − Q − s·B0·A0‖ / ‖W‖`, where the residual Q is quantised: the model was trained as
    `Q + s·B·A`, and on the base W this export is off from that by just this. Empty where it is not quantised."""


@dataclass(frozen=True)
class _LowRank:
    A: Tensor
    B: Tensor
    error: float = 0.0
    magnitude: Tensor | None = None
    E: Tensor | None = None


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
        base: with format "gguf", whose names need the base's config.json: its directory or hub id, where a saved run
            does not record it.
        state: of a live model whose parameters are shards: its whole state dict, from which the tensors are taken.

    Returns:
        The tensors, with configuration and per-module errors.

    Raises:
        ConfigError: rank below 1, tolerance outside [0, 1), or both given; a format that does not exist.
        PissaError: the adapter is no plain LoRA, or, in format "gguf", llama.cpp has no place for it.
        CheckpointError, OutputError: the directory cannot be read, or `out` not written.

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
    saved = _from_live(model_or_dir, state) if live else read_adapter(model_or_dir)
    saved = without_values(saved)
    lossless = rank is None and tolerance is None
    export = _lossless(saved) if lossless else _truncated(saved, rank, tolerance or 0.0)
    if format == "gguf" and out is not None:
        write_gguf_lora(export, export.config, _base_config(model_or_dir, base or export.base), out)
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
    export = _lossless(_from_live(model, state, adapter))
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
            return plain.config
        raise PissaError(f"{type(plain).__name__} is no transformers model, so llama.cpp has no model to add it to")
    if base is None:
        raise CheckpointError(
            f"{model_or_dir} does not record its base, whose config.json is needed; pass it with base"
        )
    try:
        return AutoConfig.from_pretrained(base)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"the config.json of the base {base} is needed and cannot be read ({first_line(error)}); pass its place "
            "with base"
        ) from error


def write_lora(export: LoraExport, directory: Path, *, final: Path | None = None) -> None:
    """Write an export's files (weights, configuration, manifest, card) into a directory that exists.

    Args:
        final: the name that the directory will have in the end, from which the residual is found where there is one.
    """
    save_file({key: tensor.contiguous() for key, tensor in export.items()}, directory / WEIGHTS, {"format": "pt"})
    manifest = {
        "layout": export.layout,
        "base": export.base,
        "base_sample": export.sample,
        "method": export.method,
        "largest_error": max(export.errors.values(), default=0.0),
        **gap_figures(export.gaps),
        "versions": package_versions(),
    }
    if export.residual is not None and final is not None:
        manifest["residual"] = os.path.relpath(export.residual, final.absolute())
    write_json(directory / MANIFEST, manifest)
    write_card(directory, lora_card(export.config, export.base, export.method, export.rank, export.errors, export.gaps))
    config = deepcopy(export.config)
    config.inference_mode = True
    config.save_pretrained(str(directory))
    assert (directory / CONFIG).is_file()


def gap_figures(gaps: Mapping[str, float]) -> dict[str, float]:
    """Largest and mean relative distance between the base and what a quantised model started from, for manifests."""
    if not gaps:
        return {}
    return {"largest_quantization_gap": max(gaps.values()), "mean_quantization_gap": sum(gaps.values()) / len(gaps)}


def export_merged(
    model_or_dir: PeftModel | str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    base: str | None = None,
) -> None:
    """Write the fine-tuned model as a plain transformers checkpoint, adapter merged, in the base's dtype.

    Args:
        model_or_dir: an adapted model (left as it is), or a saved run or adapter directory, whose base is read and
            merged weight by weight and never held; one with adapted experts is loaded whole.
        out: directory to write, new or empty.
        base: the base's directory or hub id, for a saved adapter that does not record it.

    Raises:
        PissaError: the model is not one of transformers, or its adapter is no plain LoRA.
        CheckpointError, OutputError: what is read is incomplete, or `out` cannot be written.
    """
    check_free(out)
    if not isinstance(model_or_dir, PeftModel) and merge_saved(model_or_dir, out, base):
        return
    model = model_or_dir if isinstance(model_or_dir, PeftModel) else load(model_or_dir, base)
    plain: Any = model.get_base_model()
    if not isinstance(plain, PreTrainedModel):
        raise PissaError(f"{type(plain).__name__} is no transformers model; export_lora works for any module")
    with output_directory(out) as partial:
        merged_config: Any = deepcopy(plain.config)
        state = _merged_state(model)
        if _ties_broken(plain, state):
            merged_config.tie_word_embeddings = False
        if not getattr(merged_config, "tie_word_embeddings", False):
            state = unshared(state)
        if hasattr(merged_config, "quantization_config"):
            del merged_config.quantization_config
        _save_plain(plain, merged_config, state, partial)
        record: Any = getattr(model, "pissa", None)
        if record is not None:
            write_card(partial, merged_card(record.base, record.method))


def optimal_low_rank(factors: AdapterFactors) -> tuple[Tensor, Tensor, Tensor]:
    """The SVD of ΔW from two thin QRs and a 2r × 2r core, in fp64.

    Returns:
        U (…, out, k), S (…, k) descending, Vh (…, k, in), k = min(2r, out, in). What rounding in fp64 alone
        could have made of a smaller singular value is 0.
    """
    A, B = (tensor.double() for tensor in _concatenated(factors))
    Q_B, R_B = torch.linalg.qr(B)
    Q_A, R_A = torch.linalg.qr(A.mT)
    U, S, Vh = torch.linalg.svd(factors.scale * (R_B @ R_A.mT), full_matrices=False)
    size = torch.linalg.matrix_norm(R_B) * torch.linalg.matrix_norm(R_A)
    noise = torch.finfo(S.dtype).eps * max(A.shape[-2:] + B.shape[-2:]) * factors.scale * size[..., None]
    return Q_B @ U, torch.where(noise < S, S, 0.0), Vh @ Q_A.mT


def _concatenated(factors: AdapterFactors) -> tuple[Tensor, Tensor]:
    """[A ; A0] (…, 2r, in) and [B | −B0] (…, out, 2r); A and B alone for a LoRA baseline."""
    if factors.A0 is None or factors.B0 is None:
        return factors.A.clone(), factors.B.clone()
    return torch.cat([factors.A, factors.A0], dim=-2), torch.cat([factors.B, -factors.B0], dim=-1)


def _joined(E: Tensor | None, E0: Tensor | None) -> Tensor | None:
    """[E ; E0] (2r,), or E alone."""
    return torch.cat([E, E0]) if E is not None and E0 is not None else E


def _lossless(saved: SavedAdapter) -> LoraExport:
    doubled = any(factors.A0 is not None for factors in saved.factors.values())
    config = config_with_ranks(saved.config, 2.0) if doubled else deepcopy(saved.config)
    parts = {
        name: _LowRank(*_concatenated(f), magnitude=f.magnitude, E=_joined(f.E, f.E0))
        for name, f in saved.factors.items()
    }
    return _as_export(saved, parts, config, LOSSLESS if doubled else None)


def _truncated(saved: SavedAdapter, rank: int | None, tolerance: float) -> LoraExport:
    parts = {name: _truncate(factors, rank, tolerance) for name, factors in saved.factors.items()}
    ranks = {_pattern_name(saved.config, name): part.A.shape[-2] for name, part in parts.items()}
    config = deepcopy(saved.config)
    config.use_rslora = False
    config.r = max(ranks.values())
    config.lora_alpha = config.r  # scale 1: s is inside the factors
    keys = pattern_keys(ranks)
    config.rank_pattern = {keys[name]: r for name, r in ranks.items() if r != config.r}
    config.alpha_pattern = dict(config.rank_pattern)
    return _as_export(saved, parts, config, None)


def _truncate(factors: AdapterFactors, rank: int | None, tolerance: float) -> _LowRank:
    U, S, Vh = optimal_low_rank(factors)
    # tails[k] is the norm of what is lost when k components are kept
    tails = torch.cat([S.square().flip(-1).cumsum(-1).flip(-1), S.new_zeros(*S.shape[:-1], 1)], dim=-1).sqrt()
    needed = (tails > tolerance * tails[..., :1]).sum(-1).max()  # of experts, the one that needs most
    kept = max(1, min(rank, S.shape[-1]) if rank is not None else int(needed))
    root = S[..., :kept].sqrt()
    total, lost = torch.linalg.vector_norm(tails[..., 0]), torch.linalg.vector_norm(tails[..., kept])
    error = float(lost / total) if total > 0 else 0.0
    A, B = (root[..., None] * Vh[..., :kept, :]).float(), (U[..., :kept] * root[..., None, :]).float()
    return _LowRank(A, B, error, factors.magnitude)


def _pattern_name(config: LoraConfig, name: str) -> str:
    """What PEFT matches patterns with for what goes by this name."""
    bare = f"{name}.weight"
    return bare if bare in (config.target_parameters or ()) else name


def _as_export(
    saved: SavedAdapter, parts: Mapping[str, _LowRank], config: LoraConfig, layout: str | None
) -> LoraExport:
    export = LoraExport()
    for name, part in parts.items():
        layout_of = saved.layouts[name]
        for key, tensor in layout_of.tensors(part.A, part.B, part.E).items():
            export[f"{PREFIX}{key}"] = tensor
        if part.magnitude is not None:
            export[f"{PREFIX}{layout_of.magnitude_key}"] = part.magnitude.clone()
    export.update(saved.others)
    parameters = nesting(config)
    config = without_marks(config)
    if layout == LOSSLESS and is_marked_offset(saved.config):
        set_marks(config, placement="offset")
    if parameters:
        set_marks(config, **{NESTING: parameters})
    config.base_model_name_or_path = saved.base
    config.lora_dropout = 0.0
    export.gaps = {name: gap for name, gap in saved.gaps.items() if name in parts}
    export.config, export.base, export.layout, export.sample = config, saved.base, layout, saved.sample
    export.method, export.rank, export.residual = saved.method, _highest_rank(saved.config), None
    export.errors = {name: part.error for name, part in parts.items()}
    return export


def _highest_rank(config: LoraConfig) -> int:
    own = config.init_r if isinstance(config, AdaLoraConfig) else config.r
    return max([own, *(config.rank_pattern or {}).values()])


def _from_live(model: PeftModel, whole: Mapping[str, Tensor] | None = None, adapter: str | None = None) -> SavedAdapter:
    adapter = _exportable(model, adapter)
    config = model.peft_config[adapter]
    assert isinstance(config, LoraConfig)
    layouts = adapter_layouts(model)
    if whole is None:
        put_back_second_halves(model)
        factors = adapter_factors(model, adapter)
    else:
        layouts = {name.replace(FSDP_WRAPPER, ""): _unwrapped(layout) for name, layout in layouts.items()}
        factors = _whole_factors(model, layouts, adapter, whole)
        if is_marked_offset(config):
            factors = {name: halves(f) for name, f in factors.items()}
    given = dict(whole) if whole is not None else None
    state = get_peft_model_state_dict(model, given, adapter_name=adapter, save_embedding_layers=False)
    others = {key: value.detach().clone() for key, value in state.items() if ".lora_" not in key}
    if is_marked_offset(config):
        config = config_with_ranks(config, 0.5)
    record: Any = getattr(model, "pissa", None)
    base = record.base if record is not None and record.residual else config.base_model_name_or_path
    gaps = {n: c.rounding for n, c in record.certificates.items()} if record is not None and record.quantized else {}
    method = record.method if record is not None else None
    sample = marks(config).get("base")
    return SavedAdapter(factors, layouts, config, base, others, gaps=gaps, sample=sample, method=method)


def _unwrapped(layout: Layout) -> Layout:
    return replace(layout, path=layout.path.replace(FSDP_WRAPPER, ""))


def _whole_factors(
    model: PeftModel, layouts: Mapping[str, Layout], adapter: str, state: Mapping[str, Tensor]
) -> dict[str, AdapterFactors]:
    """The factors out of a gathered state dict; of the model, whose parameters are shards, no tensor is looked at.

    Raises:
        PissaError: the state dict lacks some of them.
    """
    missing: list[str] = []

    def tensor(key: str) -> Tensor:
        found = state.get(f"{PREFIX}{key}")
        missing.extend([key] if found is None else [])
        return torch.zeros(0, 0) if found is None else found.detach().cpu().float()

    def pair(layout: Layout, of: str, rank: int) -> tuple[Tensor, Tensor]:
        A, B = (tensor(key) for key in layout.keys(of))
        return (A, B) if missing else layout.kind.unpack(A, B, rank)

    factors = {}
    for wrapped, layer in adapter_layers(model).items():
        name = wrapped.replace(FSDP_WRAPPER, "")
        layout, runtime = layouts[name], cast("Any", layer)
        if adapter not in runtime.r:
            continue
        initial = (None, None)
        if has_initial_adapter(model) and not is_offset(model, adapter):
            initial = pair(layout, INITIAL, runtime.r[INITIAL])
        magnitude = None
        if adapter in getattr(layer, MAGNITUDE):
            magnitude = tensor(f"{layout.magnitude_key}.{adapter}.weight")
        scale = layer_scale(layer, adapter)
        factors[name] = AdapterFactors(*pair(layout, adapter, runtime.r[adapter]), scale, *initial, magnitude)
    if missing:
        raise PissaError(
            f"the state dict lacks {', '.join(missing[:5])}{' and others' if len(missing) > 5 else ''}: gather the "
            'whole model, frozen parameters included (with ZeRO-3 Trainer leaves them out: use placement "offset")'
        )
    return factors


def _exportable(model: PeftModel, adapter: str | None = None) -> str:
    """The name of the adapter that an export takes, the active one by default.

    Raises:
        PissaError: it is no plain LoRA, or merged into the weights.
    """
    adapter = adapter or active_adapter_name(model)
    reason = not_plain_lora(model.peft_config[adapter], initial_known=has_initial_adapter(model))
    if reason:
        raise PissaError(f"adapter {adapter!r} {reason}")
    if any(layer.merged for layer in adapter_layers(model).values()):
        raise PissaError("the adapters are merged into the weights: call unmerge_adapter() first")
    return adapter


def _merged_state(model: PeftModel) -> dict[str, Tensor]:
    """The base model's state dict with every adapter added to its weight and PEFT's own names taken out."""
    adapter = _exportable(model)
    factors, layers = adapter_factors(model, adapter), adapter_layers(model)
    adapted = {place_at(layers[name]).key(name): name for name in factors}
    state: dict[str, Tensor] = {}
    plain = model.get_base_model()
    quantized = {without_wrappers(n): m for n, m in quantized_layers(plain).items()}
    for key, tensor in plain.state_dict().items():
        if ".lora_" in key or ".original_module." in key:
            continue
        if ".modules_to_save." in key:
            if f".modules_to_save.{adapter}." not in key:
                continue
            key = key.replace(f".modules_to_save.{adapter}.", ".")
        if TOKENS in key:
            key, _, own = key.partition(TOKENS)
            if not own.startswith("base_layer."):
                continue
            wrapper: Any = plain.get_submodule(key)
            key = f"{key}.{own.removeprefix('base_layer.')}"
            tensor = wrapper.token_adapter.get_merged_weights([adapter]).detach() if own.endswith("weight") else tensor
        key = without_wrappers(key)
        name, _, kind = key.rpartition(".")
        owner = key.partition(".weight.")[0] if ".weight." in key else name
        if owner in quantized and kind not in ("weight", "bias"):
            continue  # scales, which the dequantised weight has in it
        if key in adapted:
            place, f = place_at(layers[adapted[key]]), factors[adapted[key]]
            if tensor.dtype not in STORAGE_DTYPES and name not in quantized:
                raise PissaError(
                    f"cannot merge into {name}, which is stored as {tensor.dtype}: load the base unquantised"
                )
            f = f.folded()
            A, B = _concatenated(f) if is_offset(model, adapter) else (f.A, f.B)
            matrices = place.matrices()
            if f.magnitude is None:
                merged = combine_each(matrices, A, B, f.scale)
            else:
                merged = rescaled(combine(matrices.float(), A, B, f.scale), f.magnitude).to(matrices.dtype)
            tensor = _stored(place, merged)
        elif kind == "weight" and name in quantized:
            place = place_of(quantized[name])
            tensor = _stored(place, place.matrices())
        state[key] = tensor
    return state


def _stored(place: Place, matrices: Tensor) -> Tensor:
    """A weight as the merged model stores it: a layer of bitsandbytes as the one that it replaced."""
    replaced = getattr(place.module, "source_cls", None)
    kind = TRANSPOSED if isinstance(replaced, type) and issubclass(replaced, Conv1D) else place.kind
    return kind.stored(matrices, place.shape)


def _ties_broken(model: Any, state: dict[str, Tensor]) -> bool:
    """Whether weights that the base shares came out different."""
    ties: Mapping[str, str] = getattr(model, "all_tied_weights_keys", {})
    return any(not torch.equal(state[a], state[b]) for a, b in ties.items() if a in state and b in state)


def _save_plain(model: Any, config: Any, state: dict[str, Tensor], directory: Path) -> None:
    """Save through an empty twin of the base, so that the live model keeps its adapters."""
    with torch.device("meta"):
        twin = type(model)(config)
    twin.load_state_dict(state, strict=False, assign=True)
    twin.tie_weights()
    left = [name for name, parameter in twin.named_parameters() if parameter.is_meta]
    if left:
        raise PissaError(f"cannot merge: no weight for {', '.join(left[:20])}")
    if getattr(model, "generation_config", None) is not None:
        twin.generation_config = model.generation_config
    twin.save_pretrained(directory)
