"""Random damage to a safetensors file; run as a program, it tries many of them in a process whose memory is bounded.

Usage: python headers.py COUNT SEED DIRECTORY

It prints one JSON object: how often a damaged file was accepted and refused, what the safetensors library said of it,
and the peak of the process's memory.
"""

from __future__ import annotations

import json
import random
import resource
import struct
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from safetensors import deserialize
from safetensors.torch import save

from pissa.checkpoint.source.reader import open_source
from pissa.errors import CheckpointError

HOSTILE: list[Any] = [
    -1, 0, 1, 2, 3, 7, 2**31, 2**40, 2**63 - 1, 2**63, 2**64, 2**70, 10**40, 1.0, 0.5, 1e300, True, False, None, "",
    "1", [], {}, [[]], [0], [1, 2, 3], "F32", "BF16", "F8_E4M3", "F4", "U64", "BOOL", "f32", "F128", {"F32": None},
]  # fmt: skip
TOKENS = [b"{", b"}", b"[", b"]", b",", b":", b'"', b"NaN", b"-0", b"1e2", b"Infinity", b"\\ud800", b"\x00", b"\xff"]
HEADROOM = 192 << 20


def valid_file() -> bytes:
    """A small safetensors file with several types and shapes."""
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "model.embed.weight": torch.randn(8, 4, generator=generator),
        "model.layers.0.weight": torch.randn(4, 4, generator=generator).bfloat16(),
        "model.layers.0.bias": torch.randn(4, generator=generator).half(),
        "scalar": torch.tensor(3),
        "nothing": torch.empty(0, 5),
    }
    return save(tensors, {"format": "pt"})


def joined(header: bytes, data: bytes, length: int | None = None) -> bytes:
    """A file from a header, whatever it is, and data; `length` in place of the header's own length."""
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def parts(file: bytes) -> tuple[bytes, bytes]:
    """Header and data of a whole file."""
    length = struct.unpack("<Q", file[:8])[0]
    return file[8 : 8 + length], file[8 + length :]


def damaged(file: bytes, rng: random.Random) -> bytes:
    """The file with one to three random changes, in its bytes or in what its header says."""
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        file = rng.choice((_edit_bytes, _edit_json, _edit_json, _edit_text, _edit_frame))(file, rng)
    return file


def _edit_bytes(file: bytes, rng: random.Random) -> bytes:
    """Flip, drop or add a byte of the length or the header."""
    end = min(len(file), 8 + max(1, len(parts(file)[0]))) if len(file) >= 8 else len(file)
    at = rng.randrange(max(1, end))
    how = rng.randrange(3)
    if how == 0 and file:
        return file[:at] + bytes([file[at] ^ (1 << rng.randrange(8))]) + file[at + 1 :]
    return file[:at] + file[at + 1 :] if how == 1 else file[:at] + bytes([rng.randrange(256)]) + file[at:]


def _edit_text(file: bytes, rng: random.Random) -> bytes:
    """Insert a token, or repeat or drop a piece of the header."""
    header, data = parts(file) if len(file) >= 8 else (b"", b"")
    at, to = sorted(rng.randrange(len(header) + 1) for _ in range(2))
    choices = (
        header[:at] + rng.choice(TOKENS) + header[at:],
        header[:to] + header[at:to] + header[to:],
        header[:at] + header[to:],
        header[:at] + b"[" * rng.choice((10, 2000, 100_000)) + header[at:],
        header + b" " * rng.randrange(9),
        header.replace(b"model.layers.0.bias", b"model.layers.0.weight"),
    )
    return joined(rng.choice(choices), data)


def _edit_frame(file: bytes, rng: random.Random) -> bytes:
    """Another length, or more or less data."""
    header, data = parts(file) if len(file) >= 8 else (b"", b"")
    how = rng.randrange(3)
    if how == 0:
        return joined(
            header, data, rng.choice((0, 1, 7, len(header) - 1, len(header) + 1, 2**31, 2**63, 2**64 - 1)) % 2**64
        )
    return joined(header, data[: rng.randrange(len(data) + 1)] if how == 1 else data + bytes(rng.randrange(1, 20)))


def _edit_json(file: bytes, rng: random.Random) -> bytes:
    """Put a hostile value in place of one in the header, or exchange two."""
    header, data = parts(file) if len(file) >= 8 else (b"", b"")
    try:
        document = json.loads(header)
        name = rng.choice(list(document))
        info = document[name]
        key = rng.choice([*info, "extra"])
        how = rng.randrange(6)
        if how == 0:
            document[name] = rng.choice(HOSTILE)
        elif how == 1:
            info[key] = rng.choice(HOSTILE)
        elif how == 2 and isinstance(info[key], list):
            info[key][rng.randrange(len(info[key]))] = rng.choice(HOSTILE)
        elif how == 3 and isinstance(info[key], list):
            info[key] = [number + rng.choice((-4, -1, 1, 4)) for number in info[key]]
        elif how == 4:
            other = rng.choice(list(document))
            document[name], document[other] = document[other], document[name]
        else:
            del info[key]
        return joined(json.dumps(document).encode(), data)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
        return _edit_bytes(file, rng)


def contents(file: bytes) -> dict[str, tuple[str, tuple[int, ...], bytes]] | None:
    """Name -> type, shape and bytes by the safetensors library; None where it refuses the file."""
    try:
        return {name: (t["dtype"], tuple(t["shape"]), bytes(t["data"])) for name, t in deserialize(file)}
    except Exception:
        return None


def read(directory: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]] | str:
    """The same by our reader, through `read` and through `chunks`; the message where it refuses."""
    try:
        with open_source(directory) as source:
            found = {}
            for name, entry in source.entries.items():
                data = b"".join(source.chunks(name, 7))
                if entry.dtype is not None:
                    tensor = source.read(name)
                    assert tensor.dtype == entry.dtype and tensor.is_contiguous()
                    assert tensor.reshape(-1).view(torch.uint8).numpy().tobytes() == data
                found[name] = (entry.kind, entry.shape, data)
            return found
    except CheckpointError as error:
        return str(error)


def main(count: int, seed: int, directory: Path) -> dict[str, Any]:
    """Try `count` damaged files."""
    rng, whole = random.Random(seed), valid_file()
    (directory / "config.json").write_text("{}")
    file = directory / "model.safetensors"
    file.write_bytes(whole)
    assert read(directory) == contents(whole)
    address_space = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (address_space + HEADROOM, address_space + HEADROOM))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    verdicts: Counter[str] = Counter()
    stricter: Counter[str] = Counter()
    for _ in range(count):
        content = damaged(whole, rng)
        file.write_bytes(content)
        ours, theirs = read(directory), contents(content)
        if isinstance(ours, dict):
            assert ours == theirs, (content, ours, theirs)
            verdicts["accepted"] += 1
            continue
        assert str(file) in ours or ours.startswith(str(directory)), ours
        assert "\n" not in ours and len(ours) < 1000 + len(str(file)), ours
        verdicts["refused"] += 1
        if theirs is not None:
            stricter[ours.replace(str(file), "").split(";")[0]] += 1
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return {**verdicts, "stricter": stricter, "grown_kib": grown}


if __name__ == "__main__":
    print(json.dumps(main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))))
