"""A model on disk, tensor by tensor: nothing is loaded before it is asked for, and nothing is mapped.

Mapped pages count as resident memory, so tensors are read into memory of their own. Where every tensor lies is known,
and checked against the files, before the first is read.
"""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from ...errors import CheckpointError, listed
from ..disk.header import Entry, read_header
from .files import CONFIG, WeightFiles, find_weights, open_plain, other_files
from .hub import local_directory
from .look import config_in
from .no_foreign_code import check_kernels

CHUNK = 1 << 24


class Source:
    """A model's weights and configuration, open for reading; a context manager. `open_source` makes one.

    Reading is safe from several threads.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        """The directory of configuration and weights: the model's own, of a GGUF model a temporary one."""
        self.config: dict[str, Any] = {}
        """What config.json holds, without `auto_map`."""
        self.entries: dict[str, Entry] = {}
        """Tensor name -> where it lies, file after file, in the order of the bytes."""
        self.others: list[Path] = []
        """Tokenizer, generation settings, licence: what a copy should take along. Never code."""
        self._descriptors: dict[Path, int] = {}
        self._resources = ExitStack()

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
        try:
            memory = torch.empty(entry.nbytes, dtype=torch.uint8)
        except RuntimeError as error:
            raise CheckpointError(f"{entry.file}: no memory for {name}, {entry.nbytes:,} bytes") from error
        self._fill(name, entry, memory.numpy().data)
        tensor = memory.view(entry.dtype)
        if entry.stride is not None:
            return tensor.as_strided(entry.shape, entry.stride).contiguous()
        # torch packs two F4 elements into one of its own
        return tensor.view(entry.shape if entry.kind != "F4" else (*entry.shape[:-1], entry.shape[-1] // 2))

    def chunks(self, name: str, size: int = CHUNK) -> Iterator[memoryview]:
        """A tensor's bytes as they stand in a safetensors file, piece by piece.

        Raises:
            CheckpointError: the file ended early.
        """
        entry = self.entries[name]
        if entry.stride is not None:
            yield self.read(name).view(-1).view(torch.uint8).numpy().data
            return
        for start in range(0, entry.nbytes, size):
            piece = memoryview(bytearray(min(size, entry.nbytes - start)))
            self._fill(name, entry, piece, start)
            yield piece

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

    def _open(self) -> None:
        weights = find_weights(self.path)
        if weights.form == "gguf":
            self.path = self._convert_gguf(weights.files[0])
            weights = find_weights(self.path)
        self.config, self.others = read_config(self.path), other_files(self.path)
        for file in weights.files:
            found = self._read_shard(file, weights)
            check_indexed(found, file, weights)
            self.entries |= found
        if not self.entries:
            raise CheckpointError(f"{self.path} has weight files that hold no tensor; download it again")
        check_total(self.entries, weights)

    def _read_shard(self, file: Path, weights: WeightFiles) -> dict[str, Entry]:
        descriptor, size = open_plain(file)
        self._resources.callback(os.close, descriptor)
        self._descriptors[file] = descriptor
        if weights.form == "safetensors":
            return read_header(descriptor, file, size)
        from .convert import convert_pickle
        from .pickled import pickle_entries

        found = pickle_entries(descriptor, file)
        if found is not None:
            return found
        converted = convert_pickle(file, self._temporary_directory())
        return self._read_shard(converted, weights._replace(form="safetensors"))

    def _convert_gguf(self, file: Path) -> Path:
        from .convert import convert_gguf

        directory = self._temporary_directory()
        convert_gguf(file, directory)
        return directory

    def _temporary_directory(self) -> Path:
        return Path(self._resources.enter_context(tempfile.TemporaryDirectory(prefix="pissa-source-")))


def open_source(model: str | os.PathLike[str]) -> Source:
    """Open a model on disk for reading tensor by tensor.

    Only what is not safetensors needs more than the tensors that are asked for: a GGUF file is dequantised by
    transformers in memory, and like a pickle in the format of torch before 1.6 written to a temporary directory.

    Args:
        model: a directory, a GGUF file or a hub id.

    Raises:
        CheckpointError: it is missing, incomplete, damaged, or would need code of its own.
        MissingExtraError: it is a GGUF file, and the gguf package is not installed.
    """
    given = Path(model)
    source = Source(given if given.suffix == ".gguf" and given.is_file() else local_directory(model))
    try:
        source._open()
    except BaseException:
        source.close()
        raise
    return source


def check_source(directory: str | os.PathLike[str]) -> None:
    """Refuse a local directory that `open_source` would refuse; pickles and GGUF as far as names and links tell.

    Raises:
        CheckpointError: as `open_source`.
    """
    path = local_directory(directory)
    weights = find_weights(path)
    if weights.form == "safetensors":
        open_source(path).close()
    elif weights.form == "pickle":
        read_config(path)
        for file in weights.files:
            os.close(open_plain(file)[0])


def read_config(directory: Path) -> dict[str, Any]:
    """What config.json holds, without `auto_map`: code that comes with a model is never run.

    Raises:
        CheckpointError: there is none, it is no JSON object, or the model needs code of its own.
    """
    file, config = directory / CONFIG, config_in(directory)
    check_kernels(config, str(file))
    if config.pop("auto_map", None) is not None:
        from transformers import CONFIG_MAPPING

        if config.get("model_type") not in CONFIG_MAPPING:
            raise CheckpointError(
                f"{file} asks for code that comes with the model (auto_map), which pissa never runs, and transformers "
                f"has no model type {str(config.get('model_type'))[:50]!r} of its own"
            )
        warnings.warn(f"{file}: the code that it names (auto_map) is not used; transformers' own is", stacklevel=3)
    return config


def check_indexed(found: dict[str, Entry], file: Path, weights: WeightFiles) -> None:
    """Refuse a shard that does not hold just the tensors that the index says it does."""
    if weights.weight_map is None or weights.index is None:
        return
    named = {name for name, shard in weights.weight_map.items() if shard == file.name}
    absent, unnamed = sorted(named - found.keys()), sorted(found.keys() - named)
    if absent or unnamed:
        what, names = ("lacks", absent) if absent else ("holds, unnamed there,", unnamed)
        raise CheckpointError(
            f"{file} is not the shard that {weights.index.name} describes: it {what} "
            f"{listed(repr(name[:200]) for name in names)}; download both again"
        )


def check_total(entries: dict[str, Entry], weights: WeightFiles) -> None:
    """Warn of an index whose total_size is another; many are, and nothing is read by it."""
    total = sum(entry.nbytes for entry in entries.values())
    if weights.total_size is not None and weights.total_size != total:
        warnings.warn(
            f"{weights.index}: total_size is {weights.total_size:,}, the tensors are {total:,} bytes; every tensor "
            "that it names is there, so the number is wrong and is not used",
            stacklevel=4,
        )
