"""The jobs of a stream: each tensor of the base, and what is made of it, a *split* or a *copy*.

A residual has its weight's shape and dtype, an adapter its rank's, and the parts of a quantised weight theirs; so a job
knows its outputs to the byte before a weight is read.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ...config import PissaConfig, Quantization
from ...errors import CheckpointError, listed
from ...live.factors import Layout
from ...live.quantized import quantized_layer
from ...live.targets import Target
from ...quantize.formats import Packed
from ...quantize.gptq import empty_gptq
from ...quantize.int8 import PackedInt8
from ...quantize.nested import NESTED_BLOCK, NestedScales
from ...quantize.nf4 import PackedNF4
from ...quantize.nvfp4 import PackedNVFP4
from ..compressed_tensors import empty_nvfp4, nvfp4_parts
from ..disk.header import Entry
from ..disk.layout import KIND_OF, TensorKind, kind_of
from ..factors import PREFIX
from ..residual import stored
from ..source.reader import CHUNK, Source
from ..source.skeleton import Names
from .dtypes import READABLE, conversion, job_dtype
from .fused import is_converted

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


def split_job(
    target: Target,
    sources: tuple[str, ...],
    layout: Layout,
    source: Source,
    config: PissaConfig,
    dtype: torch.dtype,
    model: PreTrainedModel,
) -> Job:
    """The job that splits one target.

    Args:
        sources: the base's tensors that hold its weight.
        dtype: of the weights that are split, as the plan has it.

    Raises:
        CheckpointError: a tensor is stored in a dtype that cannot be split.
    """
    entries = [source.entries[name] for name in sources]
    for name, entry in zip(sources, entries, strict=True):
        if entry.dtype not in READABLE:
            raise CheckpointError(f"{source.path}: {name} is {entry.kind}; only F32, F16, BF16 and F64 can be split")
    dtype = job_dtype(model, target.name, dtype)
    *stack, out, columns = target.place.matrix_shape
    if config.quantization is None:
        outputs = {target.weight_key: TensorKind(KIND_OF[dtype], target.place.shape)}
    else:
        empty = empty_packed((out, columns), config.quantization, dtype)
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
        jobs.append(_copy(f"copy of {key}", key, name, entry, conversion(model, key, entry, dtype)))
    return jobs


def jobs_of_heads(
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
        to = conversion(model, key, entry, dtype)
        jobs.append(_copy(f"copy of {key} for the adapter", f"{PREFIX}{key}", name, entry, to))
    return jobs


def _copy(title: str, output: str, name: str, entry: Entry, to: torch.dtype | None) -> Job:
    """The copy of the base's tensor `name` under the name `output`, converted to `to` first."""
    kind = TensorKind(KIND_OF[to] if to is not None else entry.kind, entry.shape)
    return Job(title, (name,), {output: kind}, to, cost=entry.nbytes, memory=COPY_MEMORY)


def sources_of(
    model: PreTrainedModel, names: Names, targets: list[Target], source: Source
) -> dict[str, tuple[str, ...]]:
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
            f"{source.path} holds no tensor for {listed(missing, 20)}: "
            "transformers makes it from others while it loads; name the modules in exclude_modules, or use pissa train"
        )
    return found


def _tied(model: PreTrainedModel, key: str) -> set[str]:
    """All names of a parameter that has several; empty for one that has one."""
    ties: dict[str, str] = model.all_tied_weights_keys
    kept = ties.get(key, key)
    others = {other for other, target in ties.items() if target == kept}
    return {kept, *others} if others else set()


def is_tied(model: PreTrainedModel, key: str) -> bool:
    """Whether a parameter has several names."""
    return bool(_tied(model, key))


def tensor_of(model: PreTrainedModel, names: Names, key: str) -> str | None:
    """The checkpoint's tensor for a parameter, under whichever of its names; None where it has no plain one."""
    return next((names.plain[k] for k in (key, *sorted(_tied(model, key))) if k in names.plain), None)


def packed_parts(module: nn.Module, name: str, packed: Packed) -> dict[str, Tensor]:
    """A quantised weight as checkpoints of its format hold it: tensor name -> tensor; no bias."""
    if isinstance(packed, PackedNVFP4):
        return nvfp4_parts(name, packed)
    layer: Any = quantized_layer(module, packed)
    layer.bias = None
    state: dict[str, Any] = layer.state_dict(prefix=f"{name}.")
    return {key: stored(key, tensor.detach()) for key, tensor in state.items()}


def empty_packed(shape: tuple[int, ...], quantization: Quantization, dtype: torch.dtype) -> Packed:
    """A quantised matrix of this shape with no values: its memory is never touched, and so costs none."""
    out, columns = shape
    if quantization.format == "int8":
        return PackedInt8(torch.empty(shape, dtype=torch.int8), torch.empty(out), dtype)
    if quantization.format == "gptq":
        return empty_gptq(out, columns, quantization.block_size, quantization.bits, dtype)
    if quantization.format == "nvfp4":
        return empty_nvfp4(out, columns, dtype)
    blocks = -(-out * columns // quantization.block_size)
    scales: Tensor | NestedScales = torch.empty(blocks)
    if quantization.double_quant:
        codes, absmax = torch.empty(blocks, dtype=torch.uint8), torch.empty(-(-blocks // NESTED_BLOCK))
        scales = NestedScales(codes, absmax, torch.zeros(()))
    packed = torch.empty((-(-out * columns // 2), 1), dtype=torch.uint8)
    return PackedNF4(packed, scales, (out, columns), dtype, quantization.block_size)
