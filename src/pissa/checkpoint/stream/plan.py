"""What a checkpoint will become, known to the byte before a single weight is read.

A residual has its weight's shape and dtype, an adapter its rank's, and the parts of a quantised weight theirs. So the
plan names every tensor to be written, in which file and where, and who makes it: a *split* of one weight, or a *copy*.
Targets, ranks and configurations are found by the code that adapts live models, on a model without weights.
"""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ...config import PissaConfig, Quantization
from ...errors import CheckpointError, ConfigError
from ...live.factors import Layout
from ...live.marks import set_marks
from ...live.peft_config import peft_config
from ...live.quantized import bitsandbytes_config, quantized_layer, require_bitsandbytes
from ...live.state import INITIAL
from ...live.targets import Target, layouts_of, resolve_targets
from ...live.trial import check_by_peft
from ...quantize.formats import Packed
from ...quantize.int8 import PackedInt8
from ...quantize.nested import NESTED_BLOCK, NestedScales
from ...quantize.nf4 import PackedNF4
from ...split import STORAGE_DTYPES
from ..disk.header import KIND_OF, Entry
from ..disk.layout import INDEX, FileLayout, TensorKind, file_layout, kind_of, sharded
from ..factors import CONFIG, PREFIX, WEIGHTS
from ..manifest import read_manifest
from ..residual import RESIDUAL, stored, warn_of_uneven
from ..source.reader import CHUNK, Source
from ..source.skeleton import Names, build, checkpoint_names
from .fused import is_converted

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
READABLE = (*STORAGE_DTYPES, torch.float64)
WORKING, WORKING_QUANTIZED = 5, 30
"""Bytes for each of a weight's elements, beside the weight and its residual, that a split takes: as measured."""
COPY_MEMORY = 2 * CHUNK
SPLIT_COST = 100
"""Times that a byte of a split costs what a copied one does; only which job begins first depends on it."""


@dataclass(frozen=True)
class Job:
    """One tensor of the base, and what is made of it."""

    name: str
    """The module that is split, or the tensor that is copied, by its name in the base."""
    sources: tuple[str, ...]
    """The tensor's name in the base; of a parameter that is made from several, theirs."""
    outputs: dict[str, TensorKind]
    """What is written: tensor name -> kind."""
    dtype: torch.dtype | None
    """What the tensor is converted to first; None for a copy byte for byte."""
    target: Target | None = None
    """What is split, without its values; None for a copy."""
    layout: Layout | None = None
    """How PEFT stores its adapter; None for a copy."""
    config: PissaConfig | None = None
    """How it is split; None for a copy."""
    cost: int = 0
    """Relative."""
    memory: int = 0
    """Bytes that the job needs at once, roughly."""


@dataclass(frozen=True)
class StreamPlan:
    """Everything that will be written."""

    jobs: list[Job]
    """The costly ones first, or as the model runs."""
    files: list[FileLayout]
    """With the places of all tensors: the shards, and the initial adapter last."""
    documents: dict[str, str]
    """File name -> text: the index, the configurations."""
    model: PreTrainedModel
    """Without weights."""
    dtype: torch.dtype
    """Of the weights that are split."""

    @property
    def size(self) -> int:
        """Bytes of all weight files."""
        return sum(file.size for file in self.files)


def make_plan(
    source: Source,
    config: PissaConfig,
    out: str | os.PathLike[str],
    dtype: str | None,
    *,
    as_it_runs: bool = False,
) -> StreamPlan:
    """StreamPlan what `init_checkpoint` does.

    Args:
        source: the base.
        config: how it is split.
        out: the directory that the result will have; its configuration names it.
        dtype: "fp32", "bf16" or "fp16" for all floating-point weights; None for what transformers would load them in.
        as_it_runs: whether weights are split in the model's order, not the costly ones first.

    Raises:
        CheckpointError: the base is none that can be split, or not whole.
        TargetError, ConfigError, WeightError: as `adapt`.
    """
    check_config(config)
    check_base(source)
    model = build(source)
    names = checkpoint_names(model, source)
    targets = resolve_targets(model, config, loaded=False)
    in_full = check_by_peft(model, peft_config(model, targets, config)).modules_to_save or []
    chosen = DTYPES[dtype] if dtype is not None else loading_dtype(source)
    sources = _sources(model, names, targets, source)
    layouts = layouts_of(targets)
    splits = [_split_job(t, sources[t.name], layouts[t.name], source, config, chosen, model) for t in targets]
    split_keys = {target.weight_key for target in targets}
    copies = copy_jobs(model, names, split_keys, source, chosen if dtype is not None else None)
    if dtype is None:
        _warn_of_rounding(source, splits, chosen)
    heads = [] if config.starts_at_zero else _jobs_of_heads(model, names, in_full, source, chosen)
    adapter = {k: kind for job in splits + heads for k, kind in job.outputs.items() if k.startswith(PREFIX)}
    weights = {k: kind for job in copies + splits for k, kind in job.outputs.items() if k not in adapter}
    shards, index = sharded(in_order(weights, model))
    documents = {} if index is None else {INDEX: json.dumps(index, indent=2)}
    documents |= _configurations(model, targets, config, in_full, chosen, _broken_ties(model, split_keys), out)
    files = shards
    if adapter:
        files = [*shards, file_layout(f"{INITIAL}/{WEIGHTS}", adapter)]
    jobs = sorted((copies if as_it_runs else splits + copies) + heads, key=lambda job: (-job.cost, job.name))
    jobs = splits + jobs if as_it_runs else jobs
    return StreamPlan(jobs, files, documents, model, chosen)


def check_config(config: PissaConfig) -> None:
    """Refuse what leaves nothing to write, or needs the model itself.

    Raises:
        ConfigError: with what to use instead.
    """
    if config.placement == "offset":
        raise ConfigError(
            'placement "offset" leaves the base as it is, so there is nothing to prepare: give --placement offset to '
            "pissa train"
        )
    if config.starts_at_zero and config.quantization is None:
        raise ConfigError(
            f"method {config.method!r} leaves the base as it is, so there is nothing to prepare: give it to pissa train"
        )
    if config.needs_gradient or config.use_dora or config.use_adalora:
        what = 'component "scored"' if config.needs_gradient else "DoRA" if config.use_dora else "AdaLoRA"
        raise ConfigError(f"{what} needs the model itself: give it to pissa train, which adapts in memory")
    if config.trainable_token_indices:
        raise ConfigError(
            "trainable_token_indices trains rows of an embedding, which is left as it is here: give it to pissa train"
        )
    if config.rank_budget is not None:
        raise ConfigError(
            "rank_budget looks at every weight before the first is split, which streaming does not: take the ranks of "
            "pissa inspect --rank-budget as rank_pattern"
        )
    if config.quantization is None:
        return
    if config.quantization.format not in ("nf4", "int8"):
        raise ConfigError(
            f"pissa init writes the formats nf4 and int8, not {config.quantization.format}: use one of these, or pissa "
            "train --quantize gptq"
        )
    require_bitsandbytes()


def check_base(source: Source) -> None:
    """Refuse a base that was split or quantised before.

    Raises:
        CheckpointError: it is quantised, or a residual already.
    """
    if (manifest := read_manifest(source.path)) is not None and manifest.get("layout") == RESIDUAL:
        raise CheckpointError(
            f"{source.path} is a residual already, of {manifest.get('base')}: pissa train takes it, or split that base"
        )
    if source.config.get("quantization_config"):
        method = source.config["quantization_config"]
        method = method.get("quant_method", "some method") if isinstance(method, dict) else method
        raise CheckpointError(
            f"{source.path} is quantised already ({str(method)[:50]}): give the base in 16 or 32 bits, or train an "
            "adapter beside it with pissa train --placement offset"
        )


def loading_dtype(source: Source) -> torch.dtype:
    """The dtype in which transformers loads a checkpoint: what config.json says, else that of its first weight.

    Raises:
        CheckpointError: it is none that a weight can be split in.
    """
    said = source.config.get("dtype") or source.config.get("torch_dtype")
    found = getattr(torch, str(said).removeprefix("torch."), None) if said is not None else None
    if found is None:
        floating = [e.dtype for e in source.entries.values() if e.dtype is not None and e.dtype.is_floating_point]
        found = floating[0] if floating else None
    if found not in STORAGE_DTYPES:
        raise CheckpointError(
            f"{source.path} is to be loaded as {said or found}; give --dtype {', '.join(DTYPES)} to split it in another"
        )
    return found


def packed_parts(module: nn.Module, name: str, packed: Packed) -> dict[str, Tensor]:
    """A quantised weight as a checkpoint of bitsandbytes holds it: tensor name -> tensor; no bias."""
    layer: Any = quantized_layer(module, packed)
    layer.bias = None
    state: dict[str, Any] = layer.state_dict(prefix=f"{name}.")
    return {key: stored(key, tensor.detach()) for key, tensor in state.items()}


def _split_job(
    target: Target,
    sources: tuple[str, ...],
    layout: Layout,
    source: Source,
    config: PissaConfig,
    dtype: torch.dtype,
    model: PreTrainedModel,
) -> Job:
    entries = [source.entries[name] for name in sources]
    for name, entry in zip(sources, entries, strict=True):
        if entry.dtype not in READABLE:
            raise CheckpointError(f"{source.path}: {name} is {entry.kind}; only F32, F16, BF16 and F64 can be split")
    dtype = job_dtype(model, target.name, dtype)
    *stack, out, columns = target.place.matrix_shape
    if config.quantization is None:
        outputs = {target.weight_key: TensorKind(KIND_OF[dtype], target.place.shape)}
    else:
        empty = _empty_packed((out, columns), config.quantization, dtype)
        outputs = {k: kind_of(tensor) for k, tensor in packed_parts(target.module, target.name, empty).items()}
    if not config.starts_at_zero:
        with torch.device("meta"):
            A, B = torch.empty(*stack, target.rank, columns), torch.empty(*stack, out, target.rank)
        outputs |= {f"{PREFIX}{key}": kind_of(tensor) for key, tensor in layout.tensors(A, B).items()}
    count, size = math.prod(stack), out * columns
    whole = sum(entry.nbytes for entry in entries) * (2 if len(entries) == 1 else 3)
    memory = size * (WORKING if config.quantization is None else WORKING_QUANTIZED) + whole
    cost = SPLIT_COST * count * size * dtype.itemsize
    own = config.for_module(target.rank, target.alpha)
    return Job(target.name, sources, outputs, dtype, target, layout, own, cost, memory)


def copy_jobs(
    model: PreTrainedModel,
    names: Names,
    split_keys: set[str],
    source: Source,
    dtype: torch.dtype | None,
) -> list[Job]:
    """Everything that is not split, under the model's own names where the model has it."""
    wanted: dict[str, str] = {}
    untied = any(is_tied(model, key) for key in split_keys)  # one setting ties all there is, and it has to go
    for key in model.state_dict():
        if key in split_keys:
            continue
        kept = model.all_tied_weights_keys.get(key, key)
        if untied and is_tied(model, key):
            wanted[key] = tensor_of(model, names, key) or ""
        elif key in names.plain:
            # a shared weight goes by the name that the model keeps
            wanted[key if kept in names.plain else kept] = names.plain[key]
    parts = [name for name, key in names.converted.items() if key not in split_keys]
    wanted |= {name: name for name in (*parts, *names.unknown)}
    jobs = []
    for key, name in wanted.items():
        entry = source.entries[name]
        to = _conversion(model, key, entry, dtype)
        kind = TensorKind(KIND_OF[to], entry.shape) if to is not None else TensorKind(entry.kind, entry.shape)
        jobs.append(Job(f"copy of {key}", (name,), {key: kind}, to, cost=entry.nbytes, memory=COPY_MEMORY))
    return jobs


def _jobs_of_heads(
    model: PreTrainedModel, names: Names, modules: Sequence[str], source: Source, dtype: torch.dtype
) -> list[Job]:
    """Copies of what is to be trained in full, for the initial adapter's file, where PEFT looks for it.

    Args:
        modules: endings of names, as PEFT takes `modules_to_save`.
    """
    owners = [name for name, _ in model.named_modules() if name and any(name.endswith(module) for module in modules)]
    jobs = []
    for key in model.state_dict():
        name = tensor_of(model, names, key)
        if name is None or not any(key.startswith(f"{owner}.") for owner in owners):
            continue
        entry = source.entries[name]
        to = _conversion(model, key, entry, dtype)
        kind = TensorKind(KIND_OF[to], entry.shape) if to is not None else TensorKind(entry.kind, entry.shape)
        title = f"copy of {key} for the adapter"
        jobs.append(Job(title, (name,), {f"{PREFIX}{key}": kind}, to, cost=entry.nbytes, memory=COPY_MEMORY))
    return jobs


def _tied(model: PreTrainedModel, key: str) -> set[str]:
    """All names of a parameter that has several; empty for one that has one."""
    ties: dict[str, str] = model.all_tied_weights_keys
    kept = ties.get(key, key)
    others = {other for other, target in ties.items() if target == kept}
    return {kept, *others} if others else set()


def tensor_of(model: PreTrainedModel, names: Names, key: str) -> str | None:
    """The checkpoint's tensor for a parameter, under whichever of its names; None where it has no plain one."""
    return next((names.plain[k] for k in (key, *sorted(_tied(model, key))) if k in names.plain), None)


def _conversion(model: PreTrainedModel, key: str, entry: Entry, dtype: torch.dtype | None) -> torch.dtype | None:
    if dtype is None or entry.dtype not in READABLE:
        return None
    wanted = job_dtype(model, key.removesuffix(".weight"), dtype)
    return None if entry.dtype == wanted else wanted


def is_tied(model: PreTrainedModel, key: str) -> bool:
    """Whether a parameter has several names."""
    return bool(_tied(model, key))


def job_dtype(model: PreTrainedModel, name: str, dtype: torch.dtype) -> torch.dtype:
    """What transformers loads a module in when it is asked for `dtype`: some are always kept in full precision."""
    kept = {*(model._keep_in_fp32_modules_strict or ())} if dtype != torch.float32 else set()
    kept |= {*(model._keep_in_fp32_modules or ())} if dtype == torch.float16 else set()
    return torch.float32 if any(f".{key}." in f".{name}." for key in kept) else dtype


def _sources(model: PreTrainedModel, names: Names, targets: list[Target], source: Source) -> dict[str, tuple[str, ...]]:
    """Target -> the tensors that hold its weight: one, or those of each expert.

    What is written under the parameter's own name is loaded as it is; where transformers would rearrange that once
    more, no tensor is given.

    Raises:
        CheckpointError: naming every target that has none of its own.
    """
    found: dict[str, tuple[str, ...]] = {}
    for target in targets:
        plain = tensor_of(model, names, target.weight_key)
        made = () if is_converted(model, target.weight_key) else names.fused.get(target.weight_key, ())
        found[target.name] = (plain,) if plain is not None else made
    missing = [name for name, tensors in found.items() if not tensors]
    if missing:
        raise CheckpointError(
            f"{source.path} holds no tensor for {', '.join(missing[:20])}{' …' if len(missing) > 20 else ''}: "
            "transformers makes it from others while it loads; name the modules in exclude_modules, or use pissa train"
        )
    return found


def _broken_ties(model: PreTrainedModel, split_keys: set[str]) -> bool:
    """Whether a target shares its weight, so that its residual needs one of its own."""
    shared = [key for key in split_keys if _tied(model, key)]
    if shared:
        warnings.warn(
            f"untied {', '.join(shared)}: the residual gets a weight of its own and the shared one stays as it was",
            stacklevel=4,
        )
    return bool(shared)


def _warn_of_rounding(source: Source, splits: list[Job], dtype: torch.dtype) -> None:
    """Say that weights are stored more finely than config.json lets them be loaded."""
    finer = [n for job in splits for n in job.sources if _bits(source.entries[n].dtype) > _bits(job.dtype)]
    if finer:
        warnings.warn(
            f"config.json has the model loaded in {dtype}, and {len(finer)} weights are stored in more than that: they "
            "are rounded first, as transformers would; give --dtype fp32 to split them as they are stored",
            stacklevel=4,
        )


def _bits(dtype: torch.dtype | None) -> int:
    return dtype.itemsize if dtype is not None else 0


def in_order(weights: dict[str, TensorKind], model: PreTrainedModel) -> dict[str, TensorKind]:
    """The tensors in the order of the model's modules, as a saved model has them."""
    order = {key: number for number, key in enumerate(model.state_dict())}

    def place(key: str) -> tuple[int, str]:
        whole = key.partition(".weight.")[0] + ".weight" if ".weight." in key else key
        whole = key.removesuffix("SCB") + "weight" if key.endswith(".SCB") else whole
        whole = key.removesuffix("weight_format") + "weight" if key.endswith(".weight_format") else whole
        return order.get(whole, len(order)), key

    return {key: weights[key] for key in sorted(weights, key=place)}


def _configurations(
    model: PreTrainedModel,
    targets: list[Target],
    config: PissaConfig,
    in_full: list[str],
    dtype: torch.dtype,
    untied: bool,
    out: str | os.PathLike[str],
) -> dict[str, str]:
    """File name -> text of the initial adapter's configuration and, last, of the model's."""
    documents = {}
    settings: Any = deepcopy(model.config)
    settings.dtype, settings.architectures = dtype, [type(model).__name__]
    if untied:
        settings.tie_word_embeddings = False
    lora = replace(peft_config(model, targets, config), lora_dropout=0.0, modules_to_save=in_full or None)
    if config.quantization is not None:
        empty = _empty_packed(targets[0].place.matrix_shape, config.quantization, dtype)
        settings.quantization_config = bitsandbytes_config(model, [t.name for t in targets], empty, dtype)
        set_marks(lora, residual=config.quantization.format)
        warn_of_uneven({t.name: t.place.matrix_shape[-2] for t in targets}, config.quantization.format)
    if not config.starts_at_zero:
        lora.base_model_name_or_path, lora.inference_mode = os.path.abspath(out), True
        fields = {key: sorted(value) if isinstance(value, set) else value for key, value in lora.to_dict().items()}
        documents[f"{INITIAL}/{CONFIG}"] = json.dumps(fields, indent=2, sort_keys=True)
    documents["config.json"] = settings.to_json_string()
    return documents


def _empty_packed(shape: tuple[int, ...], quantization: Quantization, dtype: torch.dtype) -> Packed:
    """A quantised matrix of this shape with no values: its memory is never touched, and so costs none."""
    out, columns = shape
    if quantization.format == "int8":
        return PackedInt8(torch.empty(shape, dtype=torch.int8), torch.empty(out), dtype)
    blocks = -(-out * columns // quantization.block_size)
    scales: Tensor | NestedScales = torch.empty(blocks)
    if quantization.double_quant:
        codes, absmax = torch.empty(blocks, dtype=torch.uint8), torch.empty(-(-blocks // NESTED_BLOCK))
        scales = NestedScales(codes, absmax, torch.zeros(()))
    packed = torch.empty((-(-out * columns // 2), 1), dtype=torch.uint8)
    return PackedNF4(packed, scales, (out, columns), dtype, quantization.block_size)
