"""Files and hub ids become examples, or one clear line that says why not."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path
from typing import Any

import pytest

from pissa.data import read as data
from pissa.data.conversation import Message
from pissa.data.read import read_examples
from pissa.errors import DataError, MissingExtraError

ROW = {"instruction": "Add 2 and 3.", "output": "5"}


def write(path: Path, *rows: Any, newline: str = "\n") -> Path:
    path.write_bytes("".join(json.dumps(row, ensure_ascii=False) + newline for row in rows).encode())
    return path


def refusal(source: str | Path) -> str:
    with pytest.raises(DataError) as caught:
        read_examples(source)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz", ".json", ".json.gz", ".JSONL"])
def test_every_kind_of_json_file_gives_the_same_rows(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"rows{ending}"
    lines = write(tmp_path / "plain", ROW, ROW).read_bytes()
    path.write_bytes(gzip.compress(lines) if ending.endswith("gz") else lines)
    examples = read_examples(path)
    assert [example.response for example in examples] == ["5", "5"]
    assert [example.where for example in examples] == [f"{path}:1", f"{path}:2"]


@pytest.mark.parametrize("ending", [".jsonl", ".json", ".txt", ".jsonl.gz", ""])
@pytest.mark.parametrize(
    "document", [[ROW, ROW], {"data": [ROW, ROW]}, {"type": "x", "instances": [ROW, ROW]}], ids=["list", "data", "type"]
)
@pytest.mark.parametrize("indent", [None, 2])
def test_what_a_file_holds_decides_how_it_is_read(tmp_path: Path, document: Any, ending: str, indent: Any) -> None:
    path = tmp_path / f"rows{ending}"
    text = json.dumps(document, indent=indent).encode()
    path.write_bytes(gzip.compress(text) if ending.endswith("gz") else text)
    assert [example.where for example in read_examples(path)] == [f"{path}: row 1", f"{path}: row 2"]


def test_compressed_lines_are_read_under_any_name(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(gzip.compress(write(tmp_path / "plain", ROW, ROW).read_bytes()))
    assert [example.where for example in read_examples(path)] == [f"{path}:1", f"{path}:2"]


def test_json_list_is_read_as_rows(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text("\ufeff\n " + json.dumps([ROW, ROW], indent=2), encoding="utf-8")
    assert [example.where for example in read_examples(path)] == [f"{path}: row 1", f"{path}: row 2"]


def test_parquet_with_nested_messages(tmp_path: Path) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    # A table made of rows of two shapes: each row has null where the other has its fields.
    rows = [{"messages": messages, "prompt": None, "completion": None}, {"prompt": "a", "completion": "b"}]
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path)
    first, second = read_examples(path)
    assert first.messages == (Message("user", "Hi"), Message("assistant", "Ho"))
    assert (second.response, second.where) == ("b", f"{path}: row 2")


def test_bom_crlf_blank_lines_and_unicode_separators_break_no_row(tmp_path: Path) -> None:
    odd = {"prompt": "a\u2028b\u0085c\u000bd\x1ce", "completion": "x" * 1_000_000}
    path = tmp_path / "rows.jsonl"
    path.write_bytes(
        b"\xef\xbb\xbf"
        + write(tmp_path / "a", ROW, newline="\r\n\r\n  \r\n").read_bytes()
        + json.dumps(odd, ensure_ascii=False).encode()
    )
    first, second = read_examples(path)
    assert first.response == "5"
    assert second.messages[0].content == odd["prompt"]
    assert second.where == f"{path}:4"


def test_offenders_are_gathered_with_line_numbers_and_the_rest_is_counted(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(write(tmp_path / "a", ROW).read_bytes() + b"\n{oops}\n[1]\n" + b'{"a": 1}\n' * 7 + b"\xff\xfe\n")
    message = refusal(path)
    assert "10 of 11 rows" in message
    assert f"{path}:3 is not JSON" in message
    assert f"{path}:4 is not an object but a list" in message
    assert f"{path}:5 is of an unknown shape, its keys are 'a'" in message
    assert "and 5 more" in message
    assert "{question, answer}" in message


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"not json", "is not JSON"),
        (b"\xff\xfe{\x00}\x00", "is not UTF-8"),
        (b"9" * 5000, "is not JSON that can be read"),
        (b"[" * 100_000, "is not JSON that can be read"),
        (b"null", "is not an object but null"),
        (b"{}", "has no fields"),
        (b'{"prompt": "a", "completion": "\\ud800"}', "has half a surrogate pair in 'completion'"),
    ],
)
def test_lines_that_are_no_rows_are_named(tmp_path: Path, line: bytes, reason: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(line + b"\n")
    assert f"{path}:1 {reason}" in refusal(path)


@pytest.mark.parametrize("content", [b"", b"\n\n \r\n", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("ending", [".jsonl", ".json"])
def test_file_without_rows_is_refused(tmp_path: Path, content: bytes, ending: str) -> None:
    path = tmp_path / f"rows{ending}"
    path.write_bytes(content)
    assert "holds no rows" in refusal(path)


def test_empty_json_list_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text("[]")
    assert "holds no rows" in refusal(path)


def test_damaged_json_list_gives_its_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text('[\n{"prompt": "a",\n"completion" "b"}]')
    assert "line 3" in refusal(path)


@pytest.mark.parametrize(
    ("cut", "reason"), [(0, "holds no rows"), (5, "cannot be read"), (30, "cannot be read"), (-4, "cannot be read")]
)
def test_truncated_gzip_is_refused(tmp_path: Path, cut: int, reason: str) -> None:
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(write(tmp_path / "a", *[ROW] * 50).read_bytes())[:cut])
    assert reason in refusal(path)


@pytest.mark.parametrize(("name", "content"), [("rows.jsonl.gz", b'{"prompt"'), ("rows.parquet", b"PAR1")])
def test_file_that_is_not_what_its_name_says(tmp_path: Path, name: str, content: bytes) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    assert "cannot be read" in refusal(path)


def test_missing_unknown_and_folder_say_what_is_allowed(tmp_path: Path) -> None:
    table = tmp_path / "rows.csv"
    table.write_text("a,b\n")
    assert "there is no file" in refusal(tmp_path / "absent.jsonl")
    assert "there is no file" in refusal("absent.csv")
    assert "kind that is not read" in refusal(table)
    assert "is a folder" in refusal(tmp_path)
    for source in (tmp_path / "absent.jsonl", table, tmp_path):
        assert ".parquet" in refusal(source) and "hub" in refusal(source)


def test_hub_id_is_loaded_with_split_and_subset(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    asked = []

    def load_dataset(*args: Any, **kwargs: Any) -> list[dict[str, str]]:
        asked.append((args, kwargs))
        return [{"question": "1 + 1?", "answer": "#### 2"}]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    (example,) = read_examples("openai/gsm8k", split="test", subset="main")
    assert asked == [(("openai/gsm8k", "main"), {"split": "test"})]
    assert example.where == "openai/gsm8k (test): row 1"


@pytest.mark.parametrize("error", [ConnectionError("no network"), ValueError("Unknown split"), FileNotFoundError("x")])
def test_hub_failure_is_one_line(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    datasets = pytest.importorskip("datasets")

    def load_dataset(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert str(error) in refusal("some/data-v1.5")


@pytest.mark.parametrize("source", ["rows.parquet", "some/data"])
def test_missing_packages_name_the_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, source: str) -> None:
    def absent(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr(data, "import_module", absent)
    monkeypatch.chdir(tmp_path)
    Path("rows.parquet").touch()
    with pytest.raises(MissingExtraError, match=r"pip install 'pissa\[train\]'"):
        read_examples(source)


def test_gsm8k_is_read_whole(pissa_data: Path) -> None:
    examples = read_examples(pissa_data / "gsm8k" / "train.jsonl.gz")
    assert len(examples) == 7473
    assert all("#### " in example.response for example in examples)


def test_alpaca_list_is_read_with_its_inputs(pissa_data: Path) -> None:
    examples = read_examples(pissa_data / "alpaca" / "alpaca_en_demo.json.gz")
    assert {bool(example.input) for example in examples} == {True, False}


def test_what_is_no_plain_file_is_refused_before_anybody_waits_for_it(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "rows.jsonl")
    for source in (tmp_path / "rows.jsonl", Path(os.devnull)):
        with pytest.raises(DataError, match="is no plain file"):
            read_examples(source)


def test_a_row_that_says_a_thing_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"question": "q", "answer": "r", "answer": "s"}')
    with pytest.raises(DataError, match="the key 'answer' occurs twice"):
        read_examples(path)
