"""Which files of a model's directory hold its weights, and which may be opened at all.

A name in an index is a stranger's text and a file in a downloaded directory may be a link. Only plain files are read
that lie in the directory itself or, in a hub cache, where `snapshots/REVISION/` links to: the model's own `blobs/`.
"""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path
from typing import Any, Literal, NamedTuple

from ...errors import CheckpointError, listed
from ...outside.documents import LARGEST, Unreadable, parse_object

CONFIG = "config.json"
Form = Literal["safetensors", "pickle", "gguf"]
SERIES = re.compile(r"(.*-)\d+(-of-\d+\.\w+)")
COPIED_SUFFIXES = (".json", ".txt", ".model", ".tiktoken", ".jinja", ".spm")
COPIED_NAMES = ("LICENSE", "NOTICE", "USE_POLICY.md", "LICENSE.md", "LICENSE.txt", "COPYING")
NOT_COPIED = (CONFIG, "pissa.json", "adapter_config.json", "trainer_state.json")


class WeightFiles(NamedTuple):
    """The files that hold a model's weights."""

    form: Form
    files: tuple[Path, ...]
    weight_map: dict[str, str] | None = None
    """Tensor name -> file name, as the index has it; None where there is no index."""
    index: Path | None = None
    total_size: float | None = None
    """Bytes of all tensors, as the index claims."""


def find_weights(directory: Path) -> WeightFiles:
    """The weights that transformers would load from a directory: safetensors before pickles, single before sharded.

    Raises:
        CheckpointError: there are none, or the index is damaged, or names what is missing or not its to name.
    """
    if directory.suffix == ".gguf" and directory.is_file():
        return WeightFiles("gguf", (directory,))
    names: tuple[tuple[Form, str], ...] = (("safetensors", "model.safetensors"), ("pickle", "pytorch_model.bin"))
    for form, name in names:
        if os.path.lexists(directory / name):
            return WeightFiles(form, (directory / name,))
        index = directory / f"{name}.index.json"
        if os.path.lexists(index):
            return _sharded(form, index)
    gguf = sorted(directory.glob("*.gguf"))
    if len(gguf) == 1:
        return WeightFiles("gguf", (gguf[0],))
    if gguf:
        some = listed(file.name for file in gguf)
        raise CheckpointError(f"{directory} holds {len(gguf)} GGUF files ({some}); give the one that is meant")
    if not any(directory.iterdir()):
        raise CheckpointError(f"{directory} is empty; a model directory holds config.json and its weights")
    raise CheckpointError(
        f"{directory} has no weights: no model.safetensors, pytorch_model.bin, index of either, or *.gguf; download it "
        "again"
    )


def open_plain(file: Path) -> tuple[int, int]:
    """A descriptor and the size of a file, if it is a plain one that lies where its directory's files may.

    Raises:
        CheckpointError: it is missing, no plain file, leads out of the directory, or cannot be opened.
    """
    _check_place(file)
    try:
        mode = os.stat(file).st_mode
        if not stat.S_ISREG(mode):
            raise CheckpointError(f"{file} is {_kind(mode)} and not a file; download it again")
        # were it exchanged for a FIFO just now, opening would not wait
        descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise CheckpointError(f"{file} cannot be opened: {error.strerror}; download it again") from error
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode):
        os.close(descriptor)
        raise CheckpointError(f"{file} is {_kind(found.st_mode)} and not a file; download it again")
    return descriptor, found.st_size


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object from a file that may be a stranger's.

    Raises:
        CheckpointError: as `open_plain` and `parse_object`, or it is larger than any such file needs to be.
    """
    descriptor, size = open_plain(file)
    with os.fdopen(descriptor, "rb") as stream:
        if size > LARGEST:
            raise CheckpointError(f"{file} is {size:,} bytes of JSON; at most {LARGEST:,} are read")
        try:
            return parse_object(stream.read(LARGEST + 1))
        except Unreadable as reason:
            raise CheckpointError(f"{file} {reason}; download it again") from reason


def other_files(directory: Path) -> list[Path]:
    """What a copy of the model should take along: tokenizer, generation settings, licence; never weights or code.

    Raises:
        CheckpointError: one of them is no plain file of the directory.
    """
    chosen = [
        file
        for file in sorted(directory.iterdir())
        if (file.suffix in COPIED_SUFFIXES or file.name in COPIED_NAMES)
        and file.name not in NOT_COPIED
        and not file.name.endswith(".index.json")
    ]
    chosen += sorted((directory / "additional_chat_templates").glob("*.jinja"))
    for file in chosen:
        os.close(open_plain(file)[0])
    return chosen


def _sharded(form: Form, index: Path) -> WeightFiles:
    document = read_json(index)
    weight_map = document.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(f, str) for f in weight_map.values()):
        raise CheckpointError(f"{index} is not a shard index: it has no weight_map from names to files")
    files = sorted(set(weight_map.values()))
    suffix = ".safetensors" if form == "safetensors" else ".bin"
    foreign = [name for name in files if not _is_plain_name(name) or not name.endswith(suffix)]
    if foreign:
        raise CheckpointError(
            f"{index} names {listed(repr(name[:100]) for name in foreign)}; a shard is a {suffix} file beside its index"
        )
    missing = [name for name in files if not os.path.lexists(index.parent / name)]
    if missing:
        raise CheckpointError(
            f"{index.parent} lacks {len(missing)} shard(s) that {index.name} names: {listed(missing, 20)}; "
            "download it again"
        )
    _check_none_left_out(index, files)
    metadata = document.get("metadata", {})
    total = metadata.get("total_size") if isinstance(metadata, dict) else None
    if total is not None and not (type(total) in (int, float) and 0 <= total < 1 << 63):
        raise CheckpointError(f"{index}: total_size is {str(total)[:50]!r} and no number of bytes; download it again")
    return WeightFiles(form, tuple(index.parent / name for name in files), weight_map, index, total)


def _check_none_left_out(index: Path, files: list[str]) -> None:
    """Refuse an index that names some shards of a series (model-00001-of-00003 …) and not others that are there."""

    def series(name: str) -> tuple[str, ...] | None:
        found = SERIES.fullmatch(name)
        return found.groups() if found else None

    present = {file.name for file in index.parent.iterdir()}
    named = {series(name) for name in files} - {None}
    left_out = sorted(name for name in present - set(files) if series(name) in named)
    if left_out:
        raise CheckpointError(
            f"{index} does not name {listed(left_out, 20)}, which lies beside it; download both again"
        )


def _check_place(file: Path) -> None:
    """Refuse a link that leads out of the directory, unless into the same model's blobs in a hub cache."""
    try:
        directory, real = file.parent.resolve(strict=True), file.resolve(strict=True)
    except (OSError, RuntimeError) as error:  # a loop is a RuntimeError before Python 3.13
        raise CheckpointError(f"{file} is missing, or a link that leads nowhere; download it again") from error
    if real.is_relative_to(directory):
        return
    for snapshot in (directory, *directory.parents):
        model = snapshot.parent.parent
        if snapshot.parent.name == "snapshots" and model.name.startswith("models--"):
            if real.is_relative_to(model / "blobs"):
                return
            break
    raise CheckpointError(f"{file} is a link that leads out of its directory, to {real}; put the file itself there")


def _is_plain_name(name: str) -> bool:
    return bool(name) and name.isprintable() and not set(name) & {"/", "\\", "\0"} and name not in (".", "..")


def _kind(mode: int) -> str:
    kinds = {stat.S_IFDIR: "a directory", stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket"}
    return kinds.get(stat.S_IFMT(mode), "a device")
