"""One job of a plan: a tensor of the base is read and split, or copied, and what it becomes is written.

The record of a job says everything that the manifest will: digests of what was read and written, and the certificate.
Neither time nor thread nor machine is in it, so that equal work leaves equal bytes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ...decompose.certificate import worst
from ...errors import WeightError
from ...live.splits import weights_of
from ...provenance import sha256
from ...split import Split, split_weight
from ..disk.layout import raw_bytes
from ..disk.outputs import Outputs
from ..factors import PREFIX
from ..source.reader import Source
from .fused import fused
from .jobs import Job, packed_parts

Record = dict[str, Any]


def do(
    job: Job,
    model: PreTrainedModel,
    source: Source,
    outputs: Outputs,
    computing: AbstractContextManager[Any],
    moment: Tensor | None = None,
) -> Record:
    """Carry a job out.

    Args:
        job: what to do.
        model: the base without its weights.
        source: the base.
        outputs: where the result goes.
        computing: held while the processor is needed, so that others can read and write meanwhile.
        moment: (in, in) second moment of the layer's input, that a quantisation is fitted to.

    Returns:
        The job's name, the sha256 of each tensor of the base and of each one written, and the certificate of a split.

    Raises:
        WeightError, CheckpointError: the weight cannot be split or read.
        OSError: it cannot be written.
    """
    if job.target is None:
        return _copy(job, source, outputs)
    return _split(job, model, source, outputs, computing, moment)


def _split(
    job: Job,
    model: PreTrainedModel,
    source: Source,
    outputs: Outputs,
    computing: AbstractContextManager[Any],
    moment: Tensor | None,
) -> Record:
    assert job.config is not None and job.target is not None
    weight, digests = read_weight(job.sources, job.dtype, model, source)
    with computing:
        weights = weights_of(job.target, job.target.kind.matrices(weight), job.config, moment)
        del weight
        splits = [split_weight(each.W, each.config, moment=moment, name=each.name) for each in weights]
        del weights
        tensors = _tensors(job, splits)
    written = {name: outputs.write(name, tensor) for name, tensor in tensors.items()}
    certified = worst([split.certificate for split in splits])
    certificate = {key: value for key, value in asdict(certified).items() if key != "seconds"}
    return {"task": job.name, "base": digests, "tensors": written, "certificate": certificate}


def read_weight(
    names: Sequence[str], dtype: torch.dtype | None, model: PreTrainedModel, source: Source
) -> tuple[Tensor, dict[str, str]]:
    """A parameter in a dtype (None: its own), from one tensor or several, and the sha256 of each as it is stored."""
    digests, tensors = {}, {}
    for name in names:
        stored = source.read(name)
        digests[name] = sha256(raw_bytes(stored))
        tensors[name] = stored if dtype is None else stored.to(dtype)
    return fused(model, tensors), digests


def _tensors(job: Job, splits: Sequence[Split]) -> dict[str, Tensor]:
    """What a split leaves on the disk, in the places that the plan has for it."""
    assert job.target is not None and job.layout is not None and job.config is not None

    def joined(tensors: Sequence[Tensor]) -> Tensor:
        return torch.stack([*tensors]) if job.target is not None and job.target.is_stack else tensors[0]

    tensors: dict[str, Tensor] = {}
    if splits[0].packed is not None:
        tensors |= packed_parts(job.target.module, job.name, splits[0].packed)
    else:
        residual = joined([split.residual for split in splits])
        tensors[job.target.weight_key] = job.target.kind.stored(residual, job.target.place.shape)
    if not job.config.starts_at_zero:
        factors = joined([split.A for split in splits]), joined([split.B for split in splits])
        tensors |= {f"{PREFIX}{key}": t.contiguous() for key, t in job.layout.tensors(*factors).items()}
    assert tensors.keys() == job.outputs.keys()
    assert all(tuple(tensor.shape) == job.outputs[name].shape for name, tensor in tensors.items())
    return tensors


def _copy(job: Job, source: Source, outputs: Outputs) -> Record:
    """Piece by piece, so that no embedding is ever whole in memory."""
    ((name, _),), (kept,) = job.outputs.items(), job.sources
    stored = source.entries[kept].dtype
    read, written = hashlib.sha256(), hashlib.sha256()
    done = 0
    for chunk in source.chunks(kept):
        read.update(chunk)
        data = chunk
        if job.dtype is not None:
            assert stored is not None
            data = converted(chunk, stored, job, name)
        written.update(data)
        outputs.put(name, done, data)
        done += len(data)
    return {"task": job.name, "base": {kept: read.hexdigest()}, "tensors": {name: written.hexdigest()}}


def converted(chunk: bytes | memoryview, stored: torch.dtype, job: Job, name: str) -> memoryview:
    """A piece of a tensor in the job's dtype."""
    assert job.dtype is not None
    values = torch.frombuffer(chunk, dtype=stored)
    result = values.to(job.dtype)
    if bool((result.isinf() & values.isfinite()).any()):
        raise WeightError(f"{name} does not fit into {job.dtype}; use a wider --dtype")
    return raw_bytes(result)
