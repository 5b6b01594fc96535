"""Safetensors files whose size and header are known before their tensors are.

A file is allocated whole, its final header first; then every tensor has its place, and whoever makes it writes it
there, in any order. The bytes are those that the safetensors library would write.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from torch import Tensor

from .header import KINDS

PATTERN = "model{suffix}.safetensors"
INDEX = "model.safetensors.index.json"
METADATA = {"format": "pt"}
ALIGNMENT = 8
KIND_OF = {getattr(torch, name): kind for kind, (_, name) in KINDS.items() if name is not None}
"""torch's element type -> the format's name of it."""


@dataclass(frozen=True)
class TensorKind:
    """What a tensor is, before its values are known."""

    kind: str
    """The format's name of the element type: "BF16"."""
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of its data."""
        return math.prod(self.shape) * KINDS[self.kind][0] // 8


def kind_of(tensor: Tensor) -> TensorKind:
    """A tensor's element type and shape."""
    return TensorKind(KIND_OF[tensor.dtype], tuple(tensor.shape))


@dataclass(frozen=True)
class FileLayout:
    """A safetensors file: its header's bytes, and where each tensor goes."""

    name: str
    """Relative to the directory."""
    header: bytes
    """Length, JSON and padding."""
    offsets: dict[str, int]
    """Tensor name -> its first byte, from the beginning of the file."""
    size: int

    def allocate(self, directory: Path) -> None:
        """Make the file with its header, as long as it will be; one that is there with the same header is kept."""
        path = directory / self.name
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            if os.fstat(descriptor).st_size != self.size:
                os.ftruncate(descriptor, self.size)
            os.pwrite(descriptor, self.header, 0)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def file_layout(name: str, tensors: Mapping[str, TensorKind]) -> FileLayout:
    """The layout that the safetensors library gives these tensors: widest elements first, then by name."""
    order = list(KINDS)
    document: dict[str, object] = {"__metadata__": METADATA}
    offsets: dict[str, int] = {}
    end = 0
    for key, tensor in sorted(tensors.items(), key=lambda item: (-order.index(item[1].kind), item[0])):
        offsets[key], begin = end, end
        end += tensor.nbytes
        document[key] = {"dtype": tensor.kind, "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(document, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    header = len(text).to_bytes(8, "little") + text
    return FileLayout(name, header, {key: len(header) + o for key, o in offsets.items()}, len(header) + end)


def sharded(tensors: Mapping[str, TensorKind]) -> tuple[list[FileLayout], dict[str, object] | None]:
    """The files of a model's tensors, 5 GB at most each, and the index where there are several.

    Args:
        tensors: name -> kind, in the model's order.
    """
    split = split_state_dict_into_shards_factory(
        dict(tensors), get_storage_size=lambda tensor: tensor.nbytes, filename_pattern=PATTERN
    )
    files = [file_layout(name, {key: tensors[key] for key in keys}) for name, keys in split.filename_to_tensors.items()]
    if not split.is_sharded:
        return files, None
    return files, {"metadata": split.metadata, "weight_map": split.tensor_to_filename}


def raw_bytes(tensor: Tensor) -> memoryview:
    """A CPU tensor's bytes as they stand in a file, without a copy where it is contiguous."""
    flat = tensor.detach().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")


def total_size(files: Iterable[FileLayout]) -> int:
    """Bytes of all these files."""
    return sum(file.size for file in files)
