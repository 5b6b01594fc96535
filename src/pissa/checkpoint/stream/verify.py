"""`verify`: a directory is what its `pissa.json` says, to the byte; and residual + adapter are the base.

Files are read piece by piece and weights one at a time, so that a checkpoint of any size is verified in little memory.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ...errors import CheckpointError
from ...live.layers import KINDS, Kind
from ...live.runtime import taps
from ...provenance import sha256
from ...split import residual_error
from ..disk.header import Entry, read_header
from ..disk.layout import raw_bytes
from ..factors import PREFIX
from ..manifest import MANIFEST
from ..residual import QUANT_STATE
from ..seal import DIGEST, is_intact, is_unsealed_name, plain_file
from ..source.reader import Source, open_source
from ..source.skeleton import build
from .dequantized import read_packed, read_state
from .work import read_weight

SLACK = 1e-3, 1e-6
"""How far a recomputed error may lie above the stated one, relative and absolute: fp32 sums differ between machines."""
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Verification:
    """A directory that is what it says."""

    path: Path
    files: int
    tensors: int
    size: int
    """Bytes of all files."""
    errors: dict[str, float]
    """Module -> `‖W − (residual + s·B·A)‖ / ‖W‖` against the base; empty where none was given."""


def verify(
    path: str | os.PathLike[str], base: str | os.PathLike[str] | None = None, *, progress: Progress | None = None
) -> Verification:
    """Check a directory of `init_checkpoint` or `save_residual` against its manifest, byte for byte.

    Args:
        path: the directory.
        base: the base's directory or hub id: its tensors are then held against the digests of what was split, and
            residual + adapter against its weights, within the error that the manifest states.
        progress: called with (what is being read, bytes read, bytes in all).

    Raises:
        CheckpointError: naming every file and tensor that is missing, changed, or should not be there.
    """
    path = Path(path)
    manifest = read_sealed(path)
    described: dict[str, Any] = manifest["files"]
    total = sum(file["size"] for file in described.values())
    problems = [f"{name} is not in {MANIFEST}: remove it" for name in _extra_files(path, described)]
    with ExitStack() as held:
        sealed = _Sealed(path, progress, total)
        held.callback(sealed.close)
        for name, file in described.items():
            problems += sealed.check(name, file)
        if problems:
            raise CheckpointError(_summary(path, problems))
        errors: dict[str, float] = {}
        if base is not None:
            errors, problems = _compare(manifest, sealed, held.enter_context(open_source(base)))
        if problems:
            raise CheckpointError(_summary(path, problems))
    return Verification(path, len(described) + 1, len(sealed.entries), total, errors)


def read_sealed(path: Path) -> dict[str, Any]:
    """A directory's manifest, once its own digest is right.

    Raises:
        CheckpointError: there is none, it was changed, or it does not describe files.
    """
    try:
        text = (path / MANIFEST).read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path / MANIFEST} was changed: it is no text any more; make {path} again") from error
    except OSError as error:
        raise CheckpointError(f"{path} has no {MANIFEST} that could be read; give what pissa init wrote") from error
    if not is_intact(text):
        if DIGEST not in text and text.lstrip().startswith("{"):
            raise CheckpointError(
                f"{path / MANIFEST} describes no files; only what pissa init and save_residual write can be verified"
            )
        raise CheckpointError(
            f"{path / MANIFEST} was changed: its digest does not fit it, so that nothing can be held against it; "
            f"make {path} again"
        )
    document: dict[str, Any] = json.loads(text)
    foreign = [name for name in document.get("files", [".."]) if Path(name).is_absolute() or ".." in Path(name).parts]
    if foreign:
        raise CheckpointError(f"{path / MANIFEST} names files outside its directory, or none; it is not one of ours")
    return document


class _Sealed(Source):
    """The files that a manifest describes; each is checked before its tensors can be read."""

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
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._resources.callback(os.close, descriptor)
        length = int.from_bytes(os.pread(descriptor, 8, 0), "little")
        header = os.pread(descriptor, 8 + length, 0) if 8 + length <= size else b""
        if sha256(header) != described["header"]:
            return [f"{name}: its header was changed, so that its tensors cannot be told apart"]
        self._descriptors[path] = descriptor
        entries = read_header(descriptor, path, size)
        self.entries |= entries
        wrong = []
        for tensor, entry in entries.items():
            if _digest(self, tensor) != described["tensors"][tensor]:
                wrong.append(f"{name}: {tensor} was changed")
            self._show(tensor, entry.nbytes)
        return wrong

    def residual(self, key: str, dtype: torch.dtype, kind: Kind) -> Tensor:
        """A weight's matrices (…, out, in); of a quantised one, what it dequantises to."""
        if f"{key}{QUANT_STATE}" in self.entries:
            return read_packed(self, key, read_state(self, key), dtype).dequantize()
        if f"{key.removesuffix('weight')}SCB" in self.entries:
            return read_packed(self, key, None, dtype).dequantize()
        return kind.matrices(self.read(key))

    def _show(self, what: str, size: int) -> None:
        self._done += size
        if self._progress is not None:
            self._progress(what, self._done, self._total)


def _digest(source: Source, name: str) -> str:
    """sha256 of a tensor's bytes."""
    return sha256(source.chunks(name))


def _compare(manifest: Mapping[str, Any], sealed: _Sealed, base: Source) -> tuple[dict[str, float], list[str]]:
    """(module -> relative error, what is wrong) against the base."""
    if "base_tensors" not in manifest:
        raise CheckpointError(f"{MANIFEST} does not say what the base's tensors were; only what pissa init wrote does")
    problems = [*_foreign_tensors(manifest["base_tensors"], base)]
    if problems:
        return {}, problems
    for name, source in manifest["copies"].items():
        if _digest(sealed, name) != _copied(base, source, sealed.entries[name]):
            problems.append(f"{name} is not a copy of the base's {source}")
    errors = {}
    model = build(base)
    for module, described in manifest["modules"].items():
        error = _split_error(described, sealed, base, model)
        errors[module] = error
        if not error <= described["rounding"] * (1 + SLACK[0]) + SLACK[1]:
            problems.append(f"{module}: residual + adapter is off by {error:.3g} and not {described['rounding']:.3g}")
    return errors, problems


def _foreign_tensors(described: Mapping[str, Any], base: Source) -> Iterator[str]:
    for name, tensor in described.items():
        entry = base.entries.get(name)
        if entry is None:
            yield f"the base {base.path} has no {name}"
        elif [entry.kind, list(entry.shape)] != [tensor["dtype"], tensor["shape"]]:
            yield f"{name} of the base {base.path} is {entry.kind} {entry.shape}, which is not what was split"
        elif _digest(base, name) != tensor["sha256"]:
            yield f"{name} of the base {base.path} is not what was split"


def _copied(base: Source, name: str, entry: Entry) -> str:
    """sha256 of a base's tensor in the dtype of its copy."""
    stored, wanted = base.entries[name], entry.dtype
    if stored.kind == entry.kind or stored.dtype is None or wanted is None:
        return sha256(base.chunks(name))
    values = (torch.frombuffer(chunk, dtype=stored.dtype) for chunk in base.chunks(name))
    return sha256(raw_bytes(piece.to(wanted)) for piece in values)


def _split_error(described: Mapping[str, Any], sealed: _Sealed, base: Source, model: PreTrainedModel) -> float:
    """`‖W − (residual + s·B·A)‖ / ‖W‖`; of experts, the largest."""
    kind = next(kind for kind in KINDS if kind.title == described["kind"])
    dtype = getattr(torch, described["dtype"])
    weight = kind.matrices(read_weight(described["tensors"], dtype, model, base)[0])
    residual = sealed.residual(described["weight"], dtype, kind)
    if "factors" in described:
        A, B = (sealed.read(f"{PREFIX}{key}") for key in described["factors"])
        A = A[taps(tuple(described["dilation"]))] if "dilation" in described else A
        A, B = kind.unpack(A, B, described["rank"])
    else:
        A, B = torch.zeros(*weight.shape[:-2], 1, weight.shape[-1]), torch.zeros(*weight.shape[:-1], 1)
    every = [(weight, residual, A, B)] if weight.ndim == 2 else zip(weight, residual, A, B, strict=True)
    return max(residual_error(*each, described["scale"]) for each in every)


def _extra_files(path: Path, described: Mapping[str, Any]) -> list[str]:
    found = []
    for directory, folders, names in os.walk(path):
        folders[:] = [folder for folder in folders if not folder.startswith(".")]
        found += [(Path(directory) / name).relative_to(path).as_posix() for name in names]
        found += [
            (Path(directory) / folder).relative_to(path).as_posix()
            for folder in folders
            if (Path(directory) / folder).is_symlink()
        ]
    return sorted(name for name in found if name not in described and not is_unsealed_name(Path(name).name))


def _summary(path: Path, problems: list[str]) -> str:
    more = f"; and {len(problems) - 50} more" if len(problems) > 50 else ""
    return f"{path} is not what its {MANIFEST} says: {'; '.join(problems[:50])}{more}"
