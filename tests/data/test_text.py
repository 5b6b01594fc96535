"""Windows of calibration text: as many and as long as asked for, or an error that says what is missing."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from pissa.data.text import calibration_batches
from pissa.data.text_files import texts_of
from pissa.errors import ConfigError, DataError
from tiny import BOS, tiny_tokenizer

TEXT = "Write a response that completes the request.\nHow many are left now?\n" * 40


def test_windows_have_the_asked_number_and_length() -> None:
    tokenizer = tiny_tokenizer()
    batches = calibration_batches([TEXT], tokenizer, 16, 6, batch_size=4)
    assert [tuple(batch["input_ids"].shape) for batch in batches] == [(4, 16), (2, 16)]
    assert batches[0]["input_ids"].dtype == torch.int64
    tokens = tokenizer(TEXT)["input_ids"]
    distance = len(tokens) // 6
    windows = torch.cat([batch["input_ids"] for batch in batches]).tolist()
    assert windows == [tokens[i * distance : i * distance + 16] for i in range(6)]


def test_each_window_has_the_tokenizers_special_tokens() -> None:
    tokenizer = tiny_tokenizer(add_bos=True)
    ids = calibration_batches([TEXT], tokenizer, 16, 3)[0]["input_ids"]
    begin = tokenizer.convert_tokens_to_ids(BOS)
    assert (ids[:, 0] == begin).all()
    assert not (ids[:, 1:] == begin).any()


@pytest.mark.parametrize("ending", [".txt", ".txt.gz", ".jsonl", ".jsonl.gz"])
def test_every_kind_of_file_gives_the_same_windows(ending: str, tmp_path: Path) -> None:
    lines = TEXT.splitlines(keepends=True)
    rows = [{"text": line.rstrip("\n")} for line in lines]
    content = "".join(json.dumps(row) + "\n" for row in rows) if "json" in ending else TEXT
    path = tmp_path / f"text{ending}"
    path.write_bytes(gzip.compress(content.encode()) if ending.endswith("gz") else content.encode())
    assert "".join(texts_of(path)) == TEXT
    tokenizer = tiny_tokenizer()
    found = calibration_batches(path, tokenizer, 16, 4)
    again = calibration_batches(path, tokenizer, 16, 4)
    assert torch.equal(found[0]["input_ids"], again[0]["input_ids"])


def test_rows_of_training_data_are_text_too(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [{"question": "a?", "answer": "b", "n": 3}, {"messages": [{"role": "user", "content": "c"}]}]
    path.write_text("".join(json.dumps(row) + "\n\n" for row in rows))
    assert list(texts_of(path)) == ["a?\nb\n", "c\n"]


@pytest.mark.parametrize("ending", [".jsonl", ".json", ".jsonl.gz"])
@pytest.mark.parametrize("held", [list, lambda rows: {"data": rows}])
def test_rows_are_text_however_a_file_holds_them(tmp_path: Path, ending: str, held: Any) -> None:
    content = b"\xef\xbb\xbf" + json.dumps(held([{"text": "a"}, {"text": "b"}]), indent=1).encode()
    path = tmp_path / f"rows{ending}"
    path.write_bytes(gzip.compress(content) if ending.endswith("gz") else content)
    assert list(texts_of(path)) == ["a\n", "b\n"]


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(b"\xef\xbb\xbfabc")
    assert "".join(texts_of(path)) == "abc"


def test_text_that_is_too_short_says_how_much_there_is() -> None:
    tokenizer = tiny_tokenizer()
    held = len(tokenizer(TEXT)["input_ids"])
    with pytest.raises(
        DataError, match=rf"holds {held} tokens, and 1000 windows of 32 need 32000; .* at most {held // 32}"
    ):
        calibration_batches([TEXT], tokenizer, 32, 1000)


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    broken = tmp_path / "broken.txt.gz"
    broken.write_bytes(gzip.compress(b"text " * 100)[:-9])
    no_json = tmp_path / "rows.jsonl"
    no_json.write_text('{"text": "a"}\nnot json\n')
    latin = tmp_path / "latin.txt"
    latin.write_bytes("é".encode("latin-1"))
    for path, reason in [
        (tmp_path / "none.txt", "no file"),
        (tmp_path / "data.csv", "neither"),
        (broken, "cannot be read"),
        (no_json, "rows.jsonl:2 is not JSON"),
        (latin, "UTF-8"),
    ]:
        with pytest.raises(DataError, match=reason):
            calibration_batches(path, tokenizer, 16, 4)


def test_windows_without_room_are_refused() -> None:
    with pytest.raises(ConfigError, match="leave no window"):
        calibration_batches([TEXT], tiny_tokenizer(add_bos=True), 1, 4)
    with pytest.raises(ConfigError, match="leave no window"):
        calibration_batches([TEXT], tiny_tokenizer(), 16, 0)
