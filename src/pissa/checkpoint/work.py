"""One task of a plan: a tensor of the base is read and split, or copied, and what it becomes is written.

The record of a task says everything that the manifest will: digests of what was read and written, and the certificate.
Neither time nor thread nor machine is in it, so that equal work leaves equal bytes.
"""

from __future__ import annotations

import hashlib
from contextlib import AbstractContextManager
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from ..decompose.certificate import worst
from ..errors import WeightError
from ..live.apply import weights_of
from ..split import Split, split_weight
from .factors import PREFIX
from .layout import raw_bytes
from .outputs import Outputs
from .plan import Task, packed_parts
from .source import Source

Record = dict[str, Any]


def do(task: Task, source: Source, outputs: Outputs, computing: AbstractContextManager[Any]) -> Record:
    """Carry a task out.

    Args:
        task: what to do.
        source: the base.
        outputs: where the result goes.
        computing: held while the processor is needed, so that others can read and write meanwhile.

    Returns:
        The task's name, the sha256 of the base's tensor and of each one written, and the certificate of a split.

    Raises:
        WeightError, CheckpointError: the weight cannot be split or read.
        OSError: it cannot be written.
    """
    return _copy(task, source, outputs) if task.target is None else _split(task, source, outputs, computing)


def _split(task: Task, source: Source, outputs: Outputs, computing: AbstractContextManager[Any]) -> Record:
    assert task.config is not None and task.target is not None
    stored = source.read(task.source)
    digest = hashlib.sha256(raw_bytes(stored)).hexdigest()
    weight = stored if task.dtype is None else stored.to(task.dtype)
    del stored
    with computing:
        weights = weights_of(task.target, task.target.kind.matrices(weight), task.config)
        splits = [split_weight(each.W, each.config, name=each.name) for each in weights]
        del weight, weights
        tensors = _tensors(task, splits)
    written = {name: outputs.write(name, tensor) for name, tensor in tensors.items()}
    certificate = asdict(worst([split.certificate for split in splits]))
    del certificate["seconds"]
    return {"task": task.name, "base": digest, "tensors": written, "certificate": certificate}


def _tensors(task: Task, splits: list[Split]) -> dict[str, Tensor]:
    """What the split of a weight, or of each of its experts', leaves on the disk, in the places that the plan has."""
    target, first = task.target, splits[0]
    assert target is not None
    tensors: dict[str, Tensor] = {}
    if first.packed is not None:
        tensors |= packed_parts(target.module, task.name, first.packed)
    else:
        residual = torch.stack([split.residual for split in splits]) if target.is_stack else first.residual
        tensors[target.weight_key] = target.kind.stored(residual, target.place.shape)
    if task.layout is not None:
        A, B = torch.stack([split.A for split in splits]), torch.stack([split.B for split in splits])
        factors = task.layout.tensors(A, B) if target.is_stack else task.layout.tensors(A[0], B[0])
        tensors |= {f"{PREFIX}{key}": tensor.contiguous() for key, tensor in factors.items()}
    assert tensors.keys() == task.outputs.keys()
    assert all(tuple(tensor.shape) == task.outputs[name].shape for name, tensor in tensors.items())
    return tensors


def _copy(task: Task, source: Source, outputs: Outputs) -> Record:
    """Piece by piece, so that no embedding is ever whole in memory."""
    ((name, _),) = task.outputs.items()
    stored = source.entries[task.source].dtype
    read, written = hashlib.sha256(), hashlib.sha256()
    done = 0
    for chunk in source.chunks(task.source):
        read.update(chunk)
        data: bytes | memoryview = chunk
        if task.dtype is not None:
            assert stored is not None
            data = converted(chunk, stored, task, name)
        written.update(data)
        outputs.put(name, done, data)
        done += len(data)
    return {"task": task.name, "base": read.hexdigest(), "tensors": {name: written.hexdigest()}}


def converted(chunk: bytes | memoryview, stored: torch.dtype, task: Task, name: str) -> memoryview:
    """A piece of a tensor in the task's dtype."""
    assert task.dtype is not None
    values = torch.frombuffer(bytearray(chunk), dtype=stored)
    result = values.to(task.dtype)
    if bool((result.isinf() & values.isfinite()).any()):
        raise WeightError(f"{name} does not fit into {task.dtype}; use a wider --dtype")
    return raw_bytes(result)
