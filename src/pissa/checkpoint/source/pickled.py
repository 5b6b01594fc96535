"""Where the tensors of a `pytorch_model.bin` lie, without running its code and without loading them.

A .bin is a zip archive: a pickle that describes the tensors, and one uncompressed record for the bytes of each storage.
torch's own weights-only loader, which runs no code, reads the pickle into tensors that have no memory and notes where
in the file each storage lies. That is held against the archive's directory.
"""

from __future__ import annotations

import math
import os
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from ...errors import CheckpointError, listed
from ..disk.header import Entry
from ..disk.layout import KIND_OF

LARGEST_PICKLE = 1 << 25
LOCAL_HEADER = 30
"""Bytes of a zip record's own header, before its name."""
UNREADABLE = (
    ArithmeticError, AssertionError, AttributeError, EOFError, LookupError, MemoryError, NotImplementedError, OSError,
    RuntimeError, TypeError, ValueError, pickle.UnpicklingError, zipfile.BadZipFile,
)  # fmt: skip
"""What a damaged file makes torch's loader raise; RuntimeError includes RecursionError."""


def pickle_entries(descriptor: int, file: Path) -> dict[str, Entry] | None:
    """The tensors of a .bin file by name, in the pickle's order; None where it has the format of torch before 1.6.

    Raises:
        CheckpointError: it is damaged, is no dict of tensors, or loading it would run code.
    """
    with open(os.dup(descriptor), "rb") as stream:
        stream.seek(0)
        if stream.read(2) != b"PK":
            return None
        records = _records(stream, file)
        stream.seek(0)
        with FakeTensorMode():
            tensors = load_weights(stream, file)
        return {name: _entry(name, tensor, records, file) for name, tensor in tensors.items()}


def load_weights(stream: IO[bytes], file: Path) -> dict[str, Tensor]:
    """A .bin file's tensors through torch's weights-only loader.

    Raises:
        CheckpointError: as `pickle_entries`.
    """
    try:
        found: Any = torch.load(stream, map_location="cpu", weights_only=True)
    except UNREADABLE as error:
        text = " ".join(str(error).split())
        if "Unsupported" in text or "not an allowed global" in text or "TorchScript" in text or "blocked" in text:
            raise CheckpointError(
                f"{file} holds more than tensors, and loading it would run code, which pissa never does; take the "
                "model's safetensors files"
            ) from error
        raise CheckpointError(
            f"{file} cannot be read: {text[:200] or type(error).__name__}; download it again"
        ) from error
    if not isinstance(found, Mapping):
        raise CheckpointError(f"{file} holds a {type(found).__name__} instead of a dict of tensors")
    odd = [str(name) for name, tensor in found.items() if not isinstance(name, str) or not _is_plain(tensor)]
    if odd:
        raise CheckpointError(f"{file} holds what is no dense tensor: {listed(repr(name[:100]) for name in odd)}")
    return dict(found)


def _records(stream: IO[bytes], file: Path) -> dict[int, int]:
    """Offset -> size of the data of each record in the archive.

    Raises:
        CheckpointError: it is no archive, is compressed, or holds a pickle too large to be a description of tensors.
    """
    records: dict[int, int] = {}
    try:
        with zipfile.ZipFile(stream) as archive:
            for info in archive.infolist():
                if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
                    raise CheckpointError(f"{file} is a compressed archive, which torch.save does not write")
                if info.filename.endswith(".pkl") and info.file_size > LARGEST_PICKLE:
                    raise CheckpointError(
                        f"{file}: its pickle is {info.file_size:,} bytes without the tensors; too large"
                    )
                stream.seek(info.header_offset)
                header = stream.read(LOCAL_HEADER)
                lengths = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
                records[info.header_offset + LOCAL_HEADER + lengths] = info.file_size
            order = next((info for info in archive.infolist() if info.filename.endswith("/byteorder")), None)
            if order is not None and archive.read(order) != b"little":
                raise CheckpointError(f"{file} was written on a big-endian machine; convert it to safetensors there")
    except UNREADABLE as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{file} is no whole zip archive: {str(error)[:200]}; download it again") from error
    return records


def _entry(name: str, tensor: Tensor, records: Mapping[int, int], file: Path) -> Entry:
    storage: Any = tensor.untyped_storage()
    start = storage._checkpoint_offset
    size, width = tensor.numel() * tensor.element_size(), tensor.element_size()
    strides = None if tensor.is_contiguous() else tuple(tensor.stride())
    begin = start + tensor.storage_offset() * width
    if records.get(start) != storage.nbytes() or begin + size > start + storage.nbytes():
        raise CheckpointError(f"{file}: {name!r} does not fit its record of the archive; download it again")
    if strides is not None and not _is_dense(tensor.shape, strides):
        raise CheckpointError(f"{file}: {name!r} is a view that skips or repeats elements; convert it to safetensors")
    return Entry(KIND_OF[tensor.dtype], tuple(tensor.shape), size, file, begin, strides)


def _is_plain(tensor: Any) -> bool:
    return (
        isinstance(tensor, Tensor)
        and tensor.layout == torch.strided
        and tensor.dtype in KIND_OF
        and not (tensor.is_quantized or tensor.is_conj() or tensor.is_neg())
    )


def _is_dense(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Whether a tensor's elements fill its span of the storage, in whatever order of the dimensions."""
    expected = 1
    for stride, side in sorted((stride, side) for stride, side in zip(strides, shape, strict=True) if side != 1):
        if stride != expected:
            return False
        expected *= side
    return expected == math.prod(shape)
