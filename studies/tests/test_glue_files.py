"""GLUE's files."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from pissa.errors import DataError
from studies.glue_files import GLUE, GlueRow, read_glue


def test_files_are_read_as_glue_writes_them(tmp_path: Path) -> None:
    (tmp_path / "MRPC").mkdir()
    text = '\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\n1\t7\t8\tHe said " no .\tHe said no .\n'
    (tmp_path / "MRPC" / "train.tsv.gz").write_bytes(gzip.compress(text.encode()))
    assert read_glue(GLUE["MRPC"], tmp_path) == [GlueRow(('He said " no .', "He said no ."), 1.0)]


@pytest.mark.parametrize(
    ("task", "text", "said"),
    [
        ("SST-2", "sentence\tlabel\ngood\t2\n", "has label '2'; SST-2 has 0 to 1"),
        ("SST-2", "sentence\nfine\n", "has no rows with label"),
        ("SST-2", "sentence\tlabel\nfine\n", "dev.tsv:2 ends before"),
        ("STS-B", "sentence1\tsentence2\tscore\na\tb\t5.1\n", "STS-B has 0 to 5"),
    ],
)
def test_what_is_no_glue_file_is_refused(tmp_path: Path, task: str, text: str, said: str) -> None:
    (tmp_path / task).mkdir()
    (tmp_path / task / "dev.tsv").write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=said):
        read_glue(GLUE[task], tmp_path, "dev")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"train\.tsv\.gz cannot be read"):
        read_glue(GLUE["MRPC"], tmp_path)
