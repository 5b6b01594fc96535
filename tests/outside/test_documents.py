"""JSON from outside: whatever it is, it is read within bounds or refused with a reason on one line."""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pissa.errors import CheckpointError, OutputError
from pissa.outside.documents import DEEPEST, LARGEST, Unreadable, parse, parse_object, read_document
from pissa.outside.schema import wrong_fields


@dataclass(frozen=True)
class Inner:
    size: Annotated[int, lambda value: value >= 0, "a number of bytes"]


@dataclass(frozen=True)
class Outer:
    name: str
    kind: Literal["a", "b"]
    share: float
    inner: Inner
    several: list[Inner] = field(default_factory=list)
    by_name: dict[str, int] = field(default_factory=dict)
    maybe: str | None = None
    either: Inner | str = ""


GOOD: dict[str, Any] = {"name": "x", "kind": "a", "share": 0.5, "inner": {"size": 3}}

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=12,
)


@given(values)
def test_what_is_json_is_read_as_it_is(value: Any) -> None:
    assert parse(json.dumps(value).encode()) == value


@given(st.binary(max_size=60))
def test_any_bytes_are_a_value_or_a_reason(text: bytes) -> None:
    try:
        parse(text)
    except Unreadable as reason:
        assert "\n" not in str(reason)


@pytest.mark.parametrize(
    "text",
    [
        b"", b"\xff", b'{"a": 1, "a": 2}', b'"\\ud800"', b'{"\\uD800": 1}', b'[["\\udfff"]]', b"[" * 100_000,
        b'{"a":' * 100_000, b"9" * 100_000, b"{'a': 1}",
        b"[" * (DEEPEST + 1) + b"]" * (DEEPEST + 1), b" " * (LARGEST + 1),
    ],
)  # fmt: skip
def test_what_is_refused(text: bytes) -> None:
    with pytest.raises(Unreadable) as reason:
        parse(text)
    assert "\n" not in str(reason.value) and len(str(reason.value)) < 400


def test_depth_is_bounded_and_not_met_by_what_is_allowed() -> None:
    assert parse(b"[" * DEEPEST + b"]" * DEEPEST)


@pytest.mark.parametrize("text", [b"null", b"[]", b"3", b'"x"'])
def test_what_is_no_object_is_said(text: bytes) -> None:
    with pytest.raises(Unreadable, match="instead of an object"):
        parse_object(text)


def test_a_good_document_has_nothing_wrong_and_may_have_more() -> None:
    assert list(wrong_fields(GOOD, Outer)) == []
    more = {**GOOD, "several": [{"size": 0}], "by_name": {"a": 1}, "maybe": "y", "either": {"size": 1}, "new": [[]]}
    assert list(wrong_fields(more, Outer)) == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"name": 3}, "name is 3 and not text"),
        ({"kind": "c"}, "kind is 'c' and not 'a' or 'b'"),
        ({"share": True}, "share is True and not a number"),
        ({"share": math.nan}, "share is nan and not a number"),
        ({"share": 10**400}, "share is a number of more than 64 bits and not a number"),
        ({"inner": []}, "inner is a list of 0 and not an object"),
        ({"inner": {}}, "inner.size is missing"),
        ({"inner": {"size": -1}}, "inner.size is -1 and not a number of bytes"),
        ({"inner": {"size": 1.0}}, "inner.size is 1.0 and not a whole number"),
        ({"several": [{"size": 1}, 3]}, "several[1] is 3 and not an object"),
        ({"by_name": {"a": None}}, "by_name.a is None and not a whole number"),
        ({"maybe": 3}, "maybe is 3 and not text or null"),
        ({"either": {"size": "x"}}, "either.size is 'x' and not a whole number"),
    ],
)
def test_what_is_wrong_is_named(change: dict[str, Any], said: str) -> None:
    assert list(wrong_fields({**GOOD, **change}, Outer)) == [said]


@settings(max_examples=200)
@given(st.sampled_from(["name", "kind", "share", "inner", "several", "by_name", "maybe", "either"]), values)
def test_any_field_of_any_kind_is_checked_without_an_error(name: str, value: Any) -> None:
    for phrase in wrong_fields({**GOOD, name: value}, Outer):
        assert phrase.isprintable()
    assert list(wrong_fields({key: held for key, held in GOOD.items() if key != "inner"}, Outer)) == [
        "inner is missing"
    ]


def test_a_file_that_cannot_be_used_is_one_line_of_the_kind_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    with pytest.raises(OutputError, match=r"x\.json is missing or cannot be opened .*; do this"):
        read_document(path, Outer, error=OutputError, remedy="do this")
    path.write_text("{}")
    with pytest.raises(CheckpointError, match=r"name is missing; kind is missing; share is missing; inner is missing"):
        read_document(path, Outer)
    path.write_text(json.dumps(GOOD))
    assert read_document(path, Outer) == GOOD


@pytest.mark.parametrize("what", ["a directory", "a FIFO", "a file with holes", "a link to nowhere", "a loop of links"])
def test_what_is_no_plain_file_is_refused_at_once(tmp_path: Path, what: str) -> None:
    path = tmp_path / "x.json"
    if what == "a directory":
        path.mkdir()
    elif what == "a FIFO":
        os.mkfifo(path)
    elif what == "a file with holes":
        with path.open("wb") as file:
            file.truncate(40 << 30)
    else:
        path.symlink_to(path if what == "a loop of links" else tmp_path / "nowhere")
    with pytest.raises(CheckpointError) as caught:
        read_document(path, Outer)
    assert "\n" not in str(caught.value)
