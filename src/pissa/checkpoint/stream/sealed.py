"""The files of a sealed directory, each checked against what its manifest says before a tensor can be read from it."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...live.layers import Kind
from ...outside.documents import LARGEST
from ...provenance import sha256
from ...quantize.formats import Packed
from ..compressed_tensors import read_nvfp4
from ..disk.header import read_header
from ..residual import QUANT_STATE
from ..seal import plain_file
from ..source.gptq import read_gptq
from ..source.reader import Source
from .dequantized import read_packed, read_state

Progress = Callable[[str, int, int], None]


class Sealed(Source):
    """The files that a manifest describes, read piece by piece.

    Args:
        path: their directory.
        progress: called with (what is being read, bytes read, bytes in all).
        total: bytes of all files.
    """

    def __init__(self, path: Path, progress: Progress | None, total: int) -> None:
        super().__init__(path)
        self._progress, self._total, self._done = progress, total, 0

    def check(self, name: str, described: Mapping[str, Any]) -> list[str]:
        """What is wrong with one file."""
        path = self.path / name
        if not path.is_file():
            return [f"{name} is missing"]
        size = path.stat().st_size
        if size != described["size"]:
            return [f"{name} has {size:,} bytes and not {described['size']:,}"]
        if "tensors" not in described:
            self._show(name, size)
            return [] if plain_file(path)["sha256"] == described["sha256"] else [f"{name} was changed"]
        return self._check_tensors(path, name, size, described)

    def _check_tensors(self, path: Path, name: str, size: int, described: Mapping[str, Any]) -> list[str]:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._resources.callback(os.close, descriptor)
        length = int.from_bytes(os.pread(descriptor, 8, 0), "little")
        whole = length <= LARGEST and 8 + length <= size
        if not whole or sha256(os.pread(descriptor, 8 + length, 0)) != described["header"]:
            return [f"{name}: its header was changed, so that its tensors cannot be told apart"]
        self._descriptors[path] = descriptor
        entries = read_header(descriptor, path, size)
        twice = sorted(entries.keys() & self.entries.keys())
        wrong = [f"{name}: {tensor} is in another file too" for tensor in twice]
        wrong += [
            f"{name}: {tensor} is not described" for tensor in sorted(entries.keys() - described["tensors"].keys())
        ]
        wrong += [f"{name} has no {tensor}" for tensor in sorted(described["tensors"].keys() - entries.keys())]
        self.entries |= entries
        for tensor, entry in entries.items():
            if digest_of(self, tensor) != described["tensors"].get(tensor) and tensor in described["tensors"]:
                wrong.append(f"{name}: {tensor} was changed")
            self._show(tensor, entry.nbytes)
        return wrong

    def residual(self, key: str, dtype: torch.dtype, kind: Kind) -> tuple[Tensor, Packed | None]:
        """A weight's matrices (…, out, in), of a quantised one what it dequantises to; and that as it is packed."""
        packed: Packed | None = None
        if f"{key}{QUANT_STATE}" in self.entries:
            packed = read_packed(self, key, read_state(self, key), dtype)
        elif f"{key.removesuffix('weight')}SCB" in self.entries:
            packed = read_packed(self, key, None, dtype)
        elif f"{key.removesuffix('weight')}qweight" in self.entries:
            packed = read_gptq(self, key.removesuffix(".weight"), dtype)
        elif f"{key}_packed" in self.entries:
            packed = read_nvfp4(self, key.removesuffix(".weight"), dtype)
        return (kind.matrices(self.read(key)), None) if packed is None else (packed.dequantize(), packed)

    def _show(self, what: str, size: int) -> None:
        self._done += size
        if self._progress is not None:
            self._progress(what, self._done, self._total)


def digest_of(source: Source, name: str) -> str:
    """sha256 of a tensor's bytes."""
    return sha256(source.chunks(name))
