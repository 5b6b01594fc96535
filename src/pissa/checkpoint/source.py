"""A model on disk, tensor by tensor: nothing is loaded before it is asked for, and nothing is mapped.

Mapped pages count as resident memory, so tensors are read into memory of their own. Where every tensor lies is known,
and checked against the files, before the first is read.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError
from .files import CONFIG, WeightFiles, find_weights, open_plain, other_files, read_json
from .header import Entry, read_header

CHUNK = 1 << 24


class Source:
    """A model's weights and configuration, open for reading; a context manager.

    `open_source` makes one.
    """

    def __init__(self, path: Path, config: dict[str, Any], weights: WeightFiles, resources: ExitStack) -> None:
        self.path = path
        """Its directory."""
        self.config = config
        """What config.json holds, without `auto_map`."""
        self.others = other_files(path)
        """Tokenizer, generation settings, licence: what a copy should take along. Never code."""
        self._descriptors: dict[Path, int] = {}
        self._resources = resources
        self.entries = self._read_headers(weights)
        """Tensor name -> where it lies, file after file, in the order of the bytes."""

    def __enter__(self) -> Source:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the files; nothing can be read afterwards."""
        self._resources.close()

    def read(self, name: str) -> Tensor:
        """A tensor in fresh memory, on the CPU, contiguous.

        Raises:
            CheckpointError: the file ended early, the memory is not there, or torch has no such element type.
        """
        entry = self.entries[name]
        if entry.dtype is None:
            raise CheckpointError(f"{entry.file}: {name} is {entry.kind}, which torch does not have; it can be copied")
        packed = entry.kind == "F4"
        shape = (*entry.shape[:-1], entry.shape[-1] // 2) if packed and entry.shape else entry.shape
        try:
            memory = torch.empty(entry.nbytes, dtype=torch.uint8)
        except RuntimeError as error:
            raise CheckpointError(f"{entry.file}: no memory for {name}, {entry.nbytes:,} bytes") from error
        self._fill(name, entry, memoryview(memory.numpy()))
        return memory.view(entry.dtype).view(shape)

    def chunks(self, name: str, size: int = CHUNK) -> Iterator[bytes]:
        """A tensor's bytes as they would stand in a safetensors file, piece by piece.

        Raises:
            CheckpointError: the file ended early.
        """
        entry = self.entries[name]
        for start in range(0, entry.nbytes, size):
            buffer = bytearray(min(size, entry.nbytes - start))
            self._fill(name, entry, memoryview(buffer), start)
            yield bytes(buffer)

    def _fill(self, name: str, entry: Entry, view: memoryview, start: int = 0) -> None:
        done, position = 0, entry.offset + start
        while done < len(view):
            try:
                count = os.preadv(self._descriptors[entry.file], [view[done : done + (1 << 30)]], position + done)
            except OSError as error:
                raise CheckpointError(f"{entry.file}: {name} cannot be read: {error.strerror}") from error
            if count == 0:
                raise CheckpointError(f"{entry.file} ended in the middle of {name}; it was changed while it was read")
            done += count

    def _read_headers(self, weights: WeightFiles) -> dict[str, Entry]:
        entries: dict[str, Entry] = {}
        for file in weights.files:
            descriptor, size = open_plain(file)
            self._resources.callback(os.close, descriptor)
            self._descriptors[file] = descriptor
            found = read_header(descriptor, file, size)
            if weights.weight_map is not None:
                check_indexed(found, file, weights)
            entries |= found
        return entries


def open_source(model: str | os.PathLike[str]) -> Source:
    """Open a model on disk for reading tensor by tensor.

    Args:
        model: a directory, or a hub id.

    Raises:
        CheckpointError: it is missing, incomplete, damaged, or would need code of its own.
    """
    path = local_directory(model)
    with ExitStack() as resources:
        source = Source(path, read_config(path), find_weights(path), resources)
        source._resources = resources.pop_all()
    return source


def local_directory(model: str | os.PathLike[str]) -> Path:
    """A model's directory; a hub id is downloaded first, safetensors preferred."""
    path = Path(model)
    if path.is_dir():
        return path
    raise CheckpointError(f"{model} is no directory")


def read_config(directory: Path) -> dict[str, Any]:
    """What config.json holds."""
    if not os.path.lexists(directory / CONFIG):
        raise CheckpointError(f"{directory} has no config.json; a model directory holds config.json and its weights")
    return read_json(directory / CONFIG)


def check_indexed(found: dict[str, Entry], file: Path, weights: WeightFiles) -> None:
    """Refuse a shard that does not hold just the tensors that the index says it does."""
    assert weights.weight_map is not None and weights.index is not None
    named = {name for name, shard in weights.weight_map.items() if shard == file.name}
    absent, unnamed = sorted(named - found.keys()), sorted(found.keys() - named)
    if absent or unnamed:
        what, names = ("lacks", absent) if absent else ("holds, unnamed there,", unnamed)
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        raise CheckpointError(
            f"{file} is not the shard that {weights.index.name} describes: it {what} "
            f"{', '.join(repr(name[:200]) for name in names[:5])}{more}; download both again"
        )
