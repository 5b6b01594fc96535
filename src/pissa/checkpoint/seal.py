"""`pissa.json` as a seal: every byte of every file beside it is described, and so is every byte of itself.

A file of tensors is described by its size, the sha256 of its header, and the sha256 of each tensor; together that is
every byte, and each was known when it was written, so that nothing is read a second time. Any other file has its size
and sha256. The manifest's own digest is that of its text with the digest left out.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..provenance import sha256, sha256_of_file
from .disk.header import read_header
from .disk.layout import FileLayout
from .disk.write import TEMPORARY_PREFIX, flush
from .manifest import MANIFEST

DIGEST = "sha256"
BLANK = "0" * 64
CHUNK = 1 << 24


def sealed(document: Mapping[str, Any]) -> str:
    """A manifest's text, with its own digest as the last field."""
    digest = sha256(_text({**document, DIGEST: BLANK}).encode())
    return _text({**document, DIGEST: digest})


def is_intact(text: str) -> bool:
    """Whether a manifest's text is, to the byte, what was sealed."""
    try:
        document = json.loads(text)
        return isinstance(document, dict) and sealed({k: v for k, v in document.items() if k != DIGEST}) == text
    except (ValueError, RecursionError):
        return False


def tensor_file(file: FileLayout, digests: Mapping[str, str]) -> dict[str, Any]:
    """What the manifest says of a file of tensors.

    Args:
        digests: tensor -> sha256, for at least its tensors.
    """
    return {
        "size": file.size,
        "header": sha256(file.header),
        "tensors": {name: digests[name] for name in file.offsets},
    }


def plain_file(path: Path) -> dict[str, Any]:
    """What the manifest says of any other file."""
    return {"size": path.stat().st_size, "sha256": sha256_of_file(path)}


def described(directory: Path) -> dict[str, Any]:
    """What the manifest says of every file below a directory."""
    files = {path.relative_to(directory).as_posix(): path for path in sorted(directory.rglob("*")) if path.is_file()}
    return {n: _read_tensors(p) if p.suffix == ".safetensors" else plain_file(p) for n, p in files.items()}


def _read_tensors(path: Path) -> dict[str, Any]:
    with path.open("rb") as stream:
        size = path.stat().st_size
        entries = read_header(stream.fileno(), path, size)
        header = stream.read(min((entry.offset for entry in entries.values()), default=size))
        digests = {}
        for name, entry in entries.items():
            digests[name] = sha256(
                os.pread(stream.fileno(), min(CHUNK, entry.nbytes - start), entry.offset + start)
                for start in range(0, entry.nbytes, CHUNK)
            )
    return {"size": size, "header": sha256(header), "tensors": digests}


def write_sealed(path: Path, document: Mapping[str, Any]) -> None:
    """Write a manifest under a temporary name first: where this file is, it is whole."""
    partial = path.with_name(f"{TEMPORARY_PREFIX}{path.name}")
    partial.write_text(sealed(document), encoding="utf-8")
    flush(partial)
    partial.replace(path)
    flush(path.parent)


def is_unsealed_name(name: str) -> bool:
    """Whether a file, by its name from the directory on, is none of the seal's business: the directory's own manifest,
    and hidden files such as .gitattributes. A manifest further below is a file like any other."""
    return name == MANIFEST or name.rpartition("/")[2].startswith(".")


def _text(document: Mapping[str, Any]) -> str:
    return json.dumps(document, indent=1, ensure_ascii=True, allow_nan=False) + "\n"
