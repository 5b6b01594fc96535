"""The layout of results, and the results that are published."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from studies.layout import laid_out, rounded
from studies.page import rows
from studies.registry import find_study
from studies.study import read_result

PUBLISHED = Path(__file__).parents[2] / "docs" / "studies"
RESULTS = sorted(PUBLISHED.glob("*.json"))
SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
DOCUMENTS = st.recursive(SCALARS, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=20)


@given(DOCUMENTS)
def test_the_text_says_what_the_document_is(document: object) -> None:
    assert json.loads(laid_out(document)) == document


def test_a_curve_is_one_line() -> None:
    text = laid_out({"verdict": "holds", "rows": [{"seed": 0, "losses": [1.0, 2.0]}, {"seed": 1}], "none": []})
    assert text.splitlines() == [
        "{",
        '  "verdict": "holds",',
        '  "rows": [',
        "    {",
        '      "seed": 0,',
        '      "losses": [1.0, 2.0]',
        "    },",
        '    {"seed": 1}',
        "  ],",
        '  "none": []',
        "}",
    ]


def test_curves_keep_six_digits_and_numbers_nine() -> None:
    document = {"loss": 1 / 3, "rate": 2e-4, "steps": 123456789012, "losses": [1 / 3, 2.5e-7, 3]}
    assert rounded(document) == {
        "loss": 0.333333333,
        "rate": 2e-4,
        "steps": 123456789012,
        "losses": [0.333333, 2.5e-7, 3],
    }


@pytest.mark.parametrize("path", RESULTS, ids=[path.stem for path in RESULTS])
def test_a_published_result_is_small_and_stands_on_the_page(path: Path) -> None:
    document = read_result(path)
    assert path.stat().st_size < 200_000
    assert document["settings"]["scale"] != "quick"
    [row] = rows([find_study(path.stem)], {path.stem: document})
    assert row in (PUBLISHED / "README.md").read_text(encoding="utf-8").splitlines()
    assert path.with_suffix(".png").is_file()
