"""A safetensors header is believed only where it fits the file, to the byte; the safetensors library is the judge."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from headers import contents, joined, parts, read, valid_file
from safetensors import safe_open
from safetensors.torch import save

from pissa.checkpoint.disk.header import KINDS, Entry, read_header
from pissa.errors import CheckpointError
from pissa.outside.documents import LARGEST

# Where the library is more lenient, and why we are not.
STRICTER = {
    r"occurs twice": "the library takes the last of two equal names: another reader may take the first",
    r"is not described by dtype, shape and data_offsets": "fields that the format does not have, or a list",
    r"is of type": "serde's other spelling of an enumeration, {'F32': null}",
    r"is no size": "numbers in fields that the format does not have",
    r"__metadata__ is no object of texts": "null in its place",
    r"does not begin with an object": "the format's own rule; the library allows white space",
    r"has the shape \[1, 1, 1": "more dimensions than a torch tensor can have",
}


def header_of(content: bytes, tmp_path: Path) -> dict[str, Entry]:
    file = tmp_path / "model.safetensors"
    file.write_bytes(content)
    descriptor = os.open(file, os.O_RDONLY)
    try:
        return read_header(descriptor, file, len(content))
    finally:
        os.close(descriptor)


def with_header(change: Any) -> bytes:
    header, data = parts(valid_file())
    document = json.loads(header)
    change(document)
    return joined(json.dumps(document).encode(), data)


def set_field(name: str, field: str, value: Any) -> bytes:
    return with_header(lambda document: document[name].__setitem__(field, value))


def test_a_whole_file_is_read_as_the_library_reads_it(tmp_path: Path) -> None:
    entries = header_of(valid_file(), tmp_path)
    expected = contents(valid_file())
    assert expected is not None and entries.keys() == expected.keys()
    file = (tmp_path / "model.safetensors").read_bytes()
    for name, entry in entries.items():
        assert (entry.kind, entry.shape, file[entry.offset : entry.offset + entry.nbytes]) == expected[name]
    offsets = [entry.offset for entry in entries.values()]
    assert offsets == sorted(offsets)


@pytest.mark.parametrize("kind", KINDS)
def test_every_type_of_the_format_has_its_size_and_torch_type(tmp_path: Path, kind: str) -> None:
    bits, name = KINDS[kind]
    dtype = name and getattr(torch, name)
    info = {"dtype": kind, "shape": [2, 4], "data_offsets": [0, bits]}
    content = joined(json.dumps({"x": info}).encode(), bytes(bits))
    entries = header_of(content, tmp_path)
    assert entries["x"].nbytes == bits and entries["x"].dtype == dtype
    assert contents(content) is not None
    (tmp_path / "config.json").write_text("{}")
    assert read(tmp_path) == contents(content)
    if dtype is not None:
        with safe_open(tmp_path / "model.safetensors", "pt") as opened:
            theirs = opened.get_tensor("x")
        assert theirs.dtype == dtype
    header, data = json.dumps({"x": {**info, "data_offsets": [0, bits + 1]}}).encode(), bytes(bits + 1)
    with pytest.raises(CheckpointError, match=r"tensor 'x', .* needs"):
        header_of(joined(header, data), tmp_path)


REFUSED: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "has 0 bytes, too few"),
    "seven bytes": (b"\x01\x00\x00\x00\x00\x00\x00", "has 7 bytes, too few"),
    "no header": (bytes(8), "does not begin with an object"),
    "terabytes of header": (joined(b"{}", b"", 1 << 40), "claims 1,099,511,627,776 bytes"),
    "largest length": (joined(b"{}", b"", 2**64 - 1), "claims"),
    "a list": (joined(b"[]", b""), "does not begin with an object"),
    "a space first": (joined(b" {}", b""), "does not begin with an object"),
    "truncated": (valid_file()[:-1], "is not whole: its header describes"),
    "a byte to spare": (valid_file() + b"\0", "is not whole: its header describes"),
    "not UTF-8": (joined(b'{"\xff":1}', b""), "is not valid JSON: 'utf-8' codec"),
    "half a surrogate": (joined(b'{"\\ud800":{}}', b""), "is not valid JSON: .*surrogates"),
    "nested": (joined(b'{"x":' + b"[" * 200_000, b""), "is nested too deeply"),
    "huge integer": (joined(b'{"x":' + b"9" * 100_000 + b"}", b""), "is not valid JSON: 9{40} is no size"),
    "NaN": (joined(b'{"x":NaN}', b""), "NaN is no size"),
    "minus nothing": (joined(b'{"x":-0}', b""), "-0 is no size"),
    "name twice": (joined(b'{"x":1,"x":1}', b""), "the key 'x' occurs twice"),
    "field twice": (joined(b'{"x":{"dtype":"F32","dtype":"F32"}}', b""), "the key 'dtype' occurs twice"),
    "negative side": (set_field("scalar", "shape", [-1]), "-1 is no size"),
    "overflowing shape": (set_field("scalar", "shape", [2**32, 2**32]), r"has the shape \[4294967296, 4294967296\]"),
    "overflow times nothing": (set_field("nothing", "shape", [2**63, 2, 0]), "has the shape"),
    "terabytes of tensor": (set_field("scalar", "shape", [2**40]), "needs 8,796,093,022,208 bytes and is given 8"),
    "float": (set_field("scalar", "shape", [1.0]), "1.0 is no size"),
    "truth": (set_field("scalar", "shape", [True]), r"has the shape \[True\]"),
    "nested shape": (set_field("scalar", "shape", [[1]]), r"has the shape \[\[1\]\]"),
    "many dimensions": (set_field("scalar", "shape", [1] * 65), "has the shape"),
    "no list": (set_field("scalar", "shape", {}), "has the shape {}"),
    "other width": (set_field("scalar", "dtype", "F32"), r"I?F32 of shape \(\), needs 4 bytes and is given 8"),
    "unknown type": (set_field("scalar", "dtype", "F128"), "is of type 'F128'; the format has BOOL"),
    "no type": (set_field("scalar", "dtype", None), "is of type 'None'"),
    "a list for a type": (set_field("scalar", "dtype", ["F32"]), "is of type"),
    "half a byte": (with_header(lambda d: d["nothing"].update(dtype="F4", shape=[1])), "needs 1 bytes and is given 0"),
    "offsets backwards": (set_field("scalar", "data_offsets", [8, 0]), r"has the offsets \[8, 0\]"),
    "three offsets": (set_field("scalar", "data_offsets", [0, 8, 8]), "has the offsets"),
    "no offsets": (with_header(lambda d: d["scalar"].pop("data_offsets")), "is not described by"),
    "a field more": (set_field("scalar", "file", "/etc/passwd"), "is not described by"),
    "overlap": (set_field("model.embed.weight", "data_offsets", [0, 128]), "overlaps the one before it"),
    "gap": (with_header(lambda d: d.pop("model.layers.0.weight")), "leaves a gap before it, at byte"),
    "beyond the end": (with_header(lambda d: d["nothing"].update(data_offsets=[10**15, 10**15])), "leaves a gap"),
    "no object": (with_header(lambda d: d.update(scalar=1)), "is not described by"),
    "metadata": (with_header(lambda d: d.update(__metadata__={"a": 1})), "__metadata__ is no object of texts"),
}  # fmt: skip


@pytest.mark.parametrize(("content", "said"), REFUSED.values(), ids=REFUSED)
def test_a_header_that_cannot_be_right_is_refused_in_one_line(tmp_path: Path, content: bytes, said: str) -> None:
    with pytest.raises(CheckpointError, match=said) as caught:
        header_of(content, tmp_path)
    message = str(caught.value)
    assert message.startswith(str(tmp_path / "model.safetensors")) and "\n" not in message and len(message) < 1000
    lenient = any(re.search(pattern, message) for pattern in STRICTER)
    assert lenient or contents(content) is None


def test_a_header_is_parsed_only_up_to_a_size(tmp_path: Path) -> None:
    content = joined(b"{" + b" " * LARGEST + b"}", b"")
    with pytest.raises(CheckpointError, match="its header is 33,554,434 bytes; at most"):
        header_of(content, tmp_path)


def test_a_checkpoint_of_many_tensors_is_read(tmp_path: Path) -> None:
    names = [f"model.layers.{i // 99}.mlp.experts.{i % 99}.down_proj.weight" for i in range(5_000)]
    content = save({name: torch.tensor([i], dtype=torch.int32) for i, name in enumerate(names)})
    assert set(header_of(content, tmp_path)) == set(names)


def mutate(count: int, seed: int, directory: Path) -> dict[str, Any]:
    program = [sys.executable, str(Path(__file__).with_name("headers.py")), str(count), str(seed), str(directory)]
    outcome = subprocess.run(program, capture_output=True, text=True, check=False)
    assert outcome.returncode == 0, outcome.stderr[-3000:]
    return json.loads(outcome.stdout)


def check_mutations(result: dict[str, Any], count: int) -> None:
    assert result["accepted"] + result["refused"] == count
    assert result["accepted"] > count / 50 and result["refused"] > count / 2
    assert result["grown_kib"] < 64 << 10
    unexplained = [text for text in result["stricter"] if not any(re.search(pattern, text) for pattern in STRICTER)]
    assert not unexplained


def test_damaged_headers_are_refused_or_read_alike_in_bounded_memory(tmp_path: Path) -> None:
    check_mutations(mutate(2_000, 0, tmp_path), 2_000)


@pytest.mark.slow
def test_ten_thousand_damaged_headers_are_refused_or_read_alike_in_bounded_memory(tmp_path: Path) -> None:
    check_mutations(mutate(10_000, 1, tmp_path), 10_000)
