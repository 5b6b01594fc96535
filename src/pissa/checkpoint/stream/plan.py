"""What a checkpoint will become, known to the byte before a single weight is read.

The plan names every tensor to be written, in which file and where, and the job that makes it. Targets, ranks and
configurations are found by the code that adapts live models, on a model without weights.
"""

from __future__ import annotations

import json
import os
import warnings
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedModel

from ...config import PissaConfig
from ...live.marks import set_marks
from ...live.peft_config import peft_config
from ...live.quantized import description_of
from ...live.state import INITIAL
from ...live.targets import Target, layouts_of, resolve_targets
from ...live.trial import check_by_peft
from ...quantize.nvfp4 import PackedNVFP4
from ..compressed_tensors import PARTS as COMPRESSED
from ..compressed_tensors import nvfp4_description
from ..disk.layout import INDEX, FileLayout, TensorKind, file_layout, sharded
from ..factors import CONFIG, PREFIX, WEIGHTS
from ..residual import warn_of_uneven
from ..source.reader import Source
from ..source.skeleton import build, checkpoint_names
from .dtypes import DTYPES, loading_dtype
from .jobs import Job, copy_jobs, empty_packed, is_tied, jobs_of_heads, sources_of, split_job
from .splittable import check_base, check_config


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
    """Plan what `init_checkpoint` does.

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
    sources = sources_of(model, names, targets, source)
    layouts = layouts_of(targets)
    splits = [split_job(t, sources[t.name], layouts[t.name], source, config, chosen, model) for t in targets]
    split_keys = {target.weight_key for target in targets}
    copies = copy_jobs(model, names, split_keys, source, chosen if dtype is not None else None)
    if dtype is None:
        _warn_of_rounding(source, splits, chosen)
    heads = [] if config.starts_at_zero else jobs_of_heads(model, names, in_full, source, chosen)
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


def in_order(weights: dict[str, TensorKind], model: PreTrainedModel) -> dict[str, TensorKind]:
    """The tensors in the order of the model's modules, as a saved model has them."""
    order = {key: number for number, key in enumerate(model.state_dict())}

    def place(key: str) -> tuple[int, str]:
        whole = key.partition(".weight.")[0] + ".weight" if ".weight." in key else key
        for part in ("SCB", "weight_format", *COMPRESSED):
            whole = key.removesuffix(part) + "weight" if key.endswith(f".{part}") else whole
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
        empty = empty_packed(targets[0].place.matrix_shape, config.quantization, dtype)
        names = [t.name for t in targets]
        settings.quantization_config = (
            nvfp4_description(model, names)
            if isinstance(empty, PackedNVFP4)
            else description_of(model, names, empty, dtype, config.quantization.is_symmetric)
        )
        set_marks(lora, residual=config.quantization.format)
        warn_of_uneven({t.name: t.place.matrix_shape[-2] for t in targets}, config.quantization.format)
    if not config.starts_at_zero:
        lora.base_model_name_or_path, lora.inference_mode = os.path.abspath(out), True
        fields = {key: sorted(value) if isinstance(value, set) else value for key, value in lora.to_dict().items()}
        documents[f"{INITIAL}/{CONFIG}"] = json.dumps(fields, indent=2, sort_keys=True)
    documents["config.json"] = settings.to_json_string()
    return documents


def _broken_ties(model: PreTrainedModel, split_keys: set[str]) -> bool:
    """Whether a target shares its weight, so that its residual needs one of its own."""
    shared = [key for key in split_keys if is_tied(model, key)]
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
