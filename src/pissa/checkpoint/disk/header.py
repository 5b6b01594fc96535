"""The header of a safetensors file, read as if an enemy had written it.

A file is 8 bytes of length, a JSON header (tensor name -> dtype, shape, two data offsets) and the data, which the
tensors must fill without a gap, an overlap or a byte to spare. Everything the header says is held against the size of
the file before anything is allocated, so what it claims can cost no memory. It is stricter than the safetensors library
where JSON leaves two readings: a name that occurs twice, or a field that the format does not have.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import CheckpointError
from ...outside.documents import LARGEST, Unreadable, parse_object

if TYPE_CHECKING:
    import torch

DEEPEST_SHAPE = 64
"""Dimensions that a torch tensor can have."""
DAMAGED = "the file is damaged, or was not made by safetensors; download it again"

# Format's name -> bits of an element, and torch's name of it where it has one. F4 packs two into one of torch's.
KINDS: dict[str, tuple[int, str | None]] = {
    "BOOL": (8, "bool"),
    "F4": (4, "float4_e2m1fn_x2"),
    "F6_E2M3": (6, None),
    "F6_E3M2": (6, None),
    "U8": (8, "uint8"),
    "I8": (8, "int8"),
    "F8_E5M2": (8, "float8_e5m2"),
    "F8_E4M3": (8, "float8_e4m3fn"),
    "F8_E8M0": (8, "float8_e8m0fnu"),
    "F8_E4M3FNUZ": (8, "float8_e4m3fnuz"),
    "F8_E5M2FNUZ": (8, "float8_e5m2fnuz"),
    "I16": (16, "int16"),
    "U16": (16, "uint16"),
    "F16": (16, "float16"),
    "BF16": (16, "bfloat16"),
    "I32": (32, "int32"),
    "U32": (32, "uint32"),
    "F32": (32, "float32"),
    "C64": (64, "complex64"),
    "F64": (64, "float64"),
    "I64": (64, "int64"),
    "U64": (64, "uint64"),
}


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies and what it is."""

    kind: str
    """The format's name of the element type, as it stands in a header: "BF16"."""
    shape: tuple[int, ...]
    nbytes: int
    file: Path
    offset: int
    """Of its first byte, from the beginning of the file."""
    stride: tuple[int, ...] | None = None
    """In elements, of a tensor in a pickle that is not stored row by row; None for any other."""

    @property
    def dtype(self) -> torch.dtype | None:
        """torch's element type; None for the 6-bit kinds, which torch does not have."""
        import torch

        name = KINDS[self.kind][1]
        return None if name is None else getattr(torch, name)


def read_header(descriptor: int, file: Path, size: int) -> dict[str, Entry]:
    """The tensors of a safetensors file, by name, in the order in which they lie.

    Args:
        descriptor: of the open file.
        file: its name, for the entries and for messages.
        size: its size in bytes.

    Raises:
        CheckpointError: it is not a whole safetensors file, to the byte.
    """
    prefix = os.pread(descriptor, 8, 0)
    if len(prefix) < 8:
        raise CheckpointError(f"{file} has {size} bytes, too few for a safetensors file; download it again")
    length = int.from_bytes(prefix, "little")
    if length > size - 8:
        raise CheckpointError(
            f"{file} is truncated or no safetensors file: its header claims {length:,} bytes, the file has {size:,}; "
            "download it again"
        )
    if length > LARGEST:
        raise CheckpointError(f"{file}: its header is {length:,} bytes; at most {LARGEST:,} are read")
    text = os.pread(descriptor, length, 8)
    if len(text) < length:
        raise CheckpointError(f"{file} was shortened while it was read; download it again")
    if not text.startswith(b"{"):
        raise CheckpointError(f"{file}: its header does not begin with an object; {DAMAGED}")
    try:
        document = parse_object(text, integers_only=True)
    except Unreadable as reason:
        raise CheckpointError(f"{file} {reason}; {DAMAGED}") from reason
    _check_metadata(document.pop("__metadata__", {}), file)
    entries = {name: _entry(name, info, file, 8 + length) for name, info in document.items()}
    return _check_cover(entries, file, 8 + length, size)


def _entry(name: str, info: Any, file: Path, start: int) -> Entry:
    """One tensor's entry, checked as far as it can be alone."""
    what = f"{file}: tensor {name[:200]!r}"
    if not isinstance(info, dict) or info.keys() != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{what} is not described by dtype, shape and data_offsets; {DAMAGED}")
    kind, shape, offsets = info["dtype"], info["shape"], info["data_offsets"]
    if not isinstance(kind, str) or kind not in KINDS:
        raise CheckpointError(f"{what} is of type {str(kind)[:50]!r}; the format has {', '.join(KINDS)}")
    if not _are_sizes(shape) or len(shape) > DEEPEST_SHAPE or math.prod(side or 1 for side in shape) >= 1 << 63:
        raise CheckpointError(f"{what} has the shape {str(shape)[:80]}; {DAMAGED}")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(f"{what} has the offsets {str(offsets)[:80]}; {DAMAGED}")
    bits, nbytes = math.prod(shape) * KINDS[kind][0], offsets[1] - offsets[0]
    if bits != 8 * nbytes:
        raise CheckpointError(
            f"{what}, {kind} of shape {tuple(shape)}, needs {-(-bits // 8):,} bytes and is given {nbytes:,}; {DAMAGED}"
        )
    return Entry(kind, tuple(shape), nbytes, file, start + offsets[0])


def _check_cover(entries: dict[str, Entry], file: Path, start: int, size: int) -> dict[str, Entry]:
    """The entries in the order of their offsets.

    Raises:
        CheckpointError: they overlap, leave a gap, end beyond the file or before its end.
    """
    ordered = sorted(entries.items(), key=lambda item: (item[1].offset, item[1].nbytes))
    end = start
    for name, entry in ordered:
        if entry.offset != end:
            how = "overlaps the one before it" if entry.offset < end else "leaves a gap before it"
            raise CheckpointError(f"{file}: tensor {name[:200]!r} {how}, at byte {entry.offset:,}; {DAMAGED}")
        end += entry.nbytes
    if end != size:
        raise CheckpointError(
            f"{file} is not whole: its header describes {end:,} bytes, the file has {size:,}; download it again"
        )
    return dict(ordered)


def _check_metadata(metadata: Any, file: Path) -> None:
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{file}: __metadata__ is no object of texts; {DAMAGED}")


def _are_sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int for value in values)
