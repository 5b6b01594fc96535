"""Where numbers and files come from: versions of what computed them, the hardware, and digests of bytes and weights."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Iterable, Iterator
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("pissa", "torch", "transformers", "peft", "accelerate", "safetensors", "bitsandbytes")
PIECE = 1 << 24
"""Bytes of a file that are in memory at a time."""


def package_versions() -> dict[str, str]:
    """Versions of what decides the numbers, for manifests and results."""
    found = {package: _version(package) for package in PACKAGES}
    return {
        "python": platform.python_version(),
        **{package: number for package, number in found.items() if number is not None},
    }


@cache
def _version(package: str) -> str | None:
    """The version of an installed package; None where there is none. Reading it from disk takes some milliseconds."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def hardware() -> dict[str, Any]:
    """What the numbers were measured on."""
    import torch

    name = torch.cuda.get_device_name() if torch.cuda.is_available() else processor()
    return {
        "device": name,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
    }


def sha256(data: bytes | memoryview | Iterable[bytes | memoryview]) -> str:
    """The sha256 of some bytes, or of pieces that are read one after the other, in hexadecimal digits."""
    digest = hashlib.sha256()
    for piece in (data,) if isinstance(data, (bytes, memoryview)) else data:
        digest.update(piece)
    return digest.hexdigest()


def sha256_of_file(path: Path) -> str:
    """The sha256 of a file, which is read piece by piece."""
    return sha256(pieces(path))


def sha256_of_document(document: Any) -> str:
    """The sha256 of a value of JSON's own kinds; the order of an object's names does not matter."""
    return sha256(json.dumps(document, sort_keys=True).encode())


def pieces(path: Path) -> Iterator[bytes]:
    """A file's bytes, some at a time."""
    with path.open("rb") as stream:
        while piece := stream.read(PIECE):
            yield piece


def fingerprint(model: Any) -> str:
    """A short hash of a model's weights, or of a state dict: names, shapes, and a sample of each tensor's values.

    It tells another checkpoint, fine-tune or dtype from the one that a run began with; it is no proof of integrity.
    """
    import torch

    digest = hashlib.sha256()
    state = model if isinstance(model, dict) else model.state_dict()
    for name, tensor in sorted((name, value) for name, value in state.items() if isinstance(value, torch.Tensor)):
        flat = tensor.detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // 256)].float().cpu().contiguous()
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(sample.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def processor() -> str:
    """The CPU's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
