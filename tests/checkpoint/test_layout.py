"""Headers that are written before the data are those that the safetensors library writes after it."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file

from pissa.checkpoint.disk.layout import KIND_OF, METADATA, TensorKind, file_layout, kind_of, raw_bytes, sharded

NAMES = ("a", "b.weight", 'quote"d', "back\\slash", "ünï", "\u2028", "\x01", "zz/z")


def written(layout, tensors: dict[str, torch.Tensor], directory: Path) -> bytes:
    layout.allocate(directory)
    with (directory / layout.name).open("r+b") as stream:
        for name, tensor in tensors.items():
            stream.seek(layout.offsets[name])
            stream.write(raw_bytes(tensor))
    return (directory / layout.name).read_bytes()


def test_a_file_laid_out_first_is_the_one_that_safetensors_writes(tmp_path: Path) -> None:
    kinds = [kind for kind in KIND_OF if "float4" not in str(kind)]
    tensors = {
        f"{name}{number}": torch.arange(6).view(2, 3).to(kind) for name in NAMES for number, kind in enumerate(kinds)
    }
    tensors |= {"scalar": torch.tensor(3.0), "empty": torch.empty(0, 4)}
    save_file(tensors, tmp_path / "theirs.safetensors", METADATA)
    layout = file_layout("ours.safetensors", {name: kind_of(tensor) for name, tensor in tensors.items()})
    assert written(layout, tensors, tmp_path) == (tmp_path / "theirs.safetensors").read_bytes()


def test_an_allocated_file_has_its_size_and_costs_no_room(tmp_path: Path) -> None:
    layout = file_layout("deep/file.safetensors", {"w": TensorKind("F32", (1 << 14, 1 << 14))})
    layout.allocate(tmp_path)
    status = (tmp_path / layout.name).stat()
    assert status.st_size == layout.size == len(layout.header) + (1 << 30)
    assert status.st_blocks * 512 < 1 << 20


def test_shards_hold_every_tensor_once() -> None:
    tensors = {f"layers.{number}.w": TensorKind("F32", (1 << 14, 1 << 13)) for number in range(25)}  # 512 MiB each
    files, index = sharded(tensors)
    assert [file.name for file in files] == [f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)]
    assert index is not None
    assert index["weight_map"] == {name: file.name for file in files for name in file.offsets}
    assert index["metadata"] == {"total_size": 25 << 29}
    assert sharded({"w": TensorKind("F32", (2, 2))})[1] is None
