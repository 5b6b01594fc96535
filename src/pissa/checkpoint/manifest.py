"""`pissa.json`: what a directory of ours holds and how it came about. Its fields are checked here, for every reader."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

from ..outside.documents import read_document

MANIFEST = "pissa.json"
DAMAGED = "restore it from the run that wrote it"


def is_plain_path(name: str) -> bool:
    """Whether a name is that of a file below the directory, written in one way only: no `..`, no `//`, no root, no
    control characters, and no part that is longer than a file's name may be."""
    path = PurePosixPath(name)
    parts = path.parts
    return (
        bool(parts)
        and not path.is_absolute()
        and str(path) == name
        and name.isprintable()
        and "\\" not in name
        and all(part not in ("..", ".") and len(part.encode()) <= 255 for part in parts)
    )


Digest = Annotated[str, re.compile(r"[0-9a-f]{64}").fullmatch, "64 hexadecimal digits"]
Size = Annotated[int, lambda size: size >= 0, "a number of bytes"]
Count = Annotated[int, lambda count: count > 0, "a positive number"]
PlainPath = Annotated[str, is_plain_path, "the plain name of a file in the directory"]
Share = Annotated[float, lambda value: value >= 0, "a number that is not negative"]


@dataclass(frozen=True)
class TensorFileEntry:
    """What the manifest says of a safetensors file."""

    size: Size
    header: Digest
    tensors: dict[str, Digest]


@dataclass(frozen=True)
class PlainFileEntry:
    """What the manifest says of any other file."""

    size: Size
    sha256: Digest


@dataclass(frozen=True)
class BaseTensorEntry:
    """What the manifest says of a tensor of the base."""

    dtype: str
    shape: list[Size]
    sha256: Digest


@dataclass(frozen=True)
class ModuleEntry:
    """What the manifest says of a split: its certificate, and where `pissa init` put its parts."""

    algorithm: str
    passes: int
    captured_energy_loss: float
    bound: str
    seconds: float = 0.0
    rounding: Share = 0.0
    quantization_error: float | None = None
    quantization_reduction: float | None = None
    output_reduction: float | None = None
    iterations: int | None = None
    residual_norm: float | None = None
    mean_absolute_error: float | None = None
    kind: str = ""
    weight: str = ""
    dtype: Literal["float32", "float64", "bfloat16", "float16"] = "float32"
    tensors: list[str] = field(default_factory=list)
    factors: Annotated[list[str], lambda names: len(names) == 2, "two names"] = field(default_factory=list)
    rank: Count = 1
    scale: float = 1.0
    dilation: list[Count] = field(default_factory=list)


@dataclass(frozen=True)
class InitRun:
    """What `pissa init` was asked for, as far as it is read again; more is kept to tell one run from another."""

    dtype: Literal["fp32", "bf16", "fp16"] | None = None


@dataclass(frozen=True)
class Manifest:
    """What `pissa.json` holds; which fields there are depends on the layout."""

    layout: str | None = None
    base: str | None = None
    method: str | None = None
    config: dict[str, Any] | None = None
    versions: dict[str, str] = field(default_factory=dict)
    modules: dict[str, ModuleEntry] = field(default_factory=dict)
    copies: dict[str, str] = field(default_factory=dict)
    base_tensors: dict[str, BaseTensorEntry] = field(default_factory=dict)
    files: dict[PlainPath, TensorFileEntry | PlainFileEntry] = field(default_factory=dict)
    run: InitRun | None = None
    trained: PlainPath | None = None
    """Where, below the directory, the adapter as it was trained lies."""
    residual: str | None = None
    """The residual's directory, relative to this one."""
    base_sample: str | None = None
    polish: dict[str, float] | None = None
    """How far the quantised model's hidden states were from the base's before its start was polished, and after."""
    template: str | None = None
    """The prompt template of the run that an export was made of."""


def read_manifest(directory: Path) -> dict[str, Any] | None:
    """The directory's manifest; None where there is none.

    Raises:
        CheckpointError: it is no JSON object, or a field is not what it should be.
    """
    path = directory / MANIFEST
    return read_document(path, Manifest, remedy=DAMAGED) if path.is_file() else None
