"""Whatever a name is, it comes out as text: on a terminal, in Markdown and in Python."""

from __future__ import annotations

import ast
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pissa.outside.text import for_terminal, in_code, in_markdown, in_python, on_one_line

NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=30) | st.text(
    st.sampled_from("`\"'\\<>*_[]()#|\n\r\t\x1b\x07\x9b\u202e\u2028\u200b{}$!~&-a "), max_size=20
)


@given(st.text(st.characters(categories=["L", "N", "P", "S"])))
def test_ordinary_text_is_left_alone(text: str) -> None:
    assert for_terminal(text) == text


@given(NAMES)
def test_nothing_that_steers_a_terminal_gets_there(text: str) -> None:
    assert all(unicodedata.category(letter)[0] != "C" for letter in for_terminal(text) if letter not in "\n\t")
    assert on_one_line(text).isprintable() or "\u3000" in text or any(unicodedata.category(x) == "Zs" for x in text)
    assert len(on_one_line(text).splitlines()) <= 1


@given(NAMES)
def test_a_literal_is_the_text(text: str) -> None:
    assert ast.literal_eval(in_python(text)) == text and len(in_python(text).splitlines()) == 1


@given(NAMES)
def test_inline_code_is_closed_where_it_ends_and_nowhere_else(text: str) -> None:
    code = in_code(text)
    fence = code[: len(code) - len(code.lstrip("`"))]
    assert code.endswith(fence) and "\n" not in code
    inside = code[len(fence) : len(code) - len(fence)]
    assert fence not in inside


@pytest.mark.parametrize(
    "text",
    ["<script>", "# heading", "[a](b)", "![x](y)", "a|b", "`x`", "**b**", "_i_", "a\n\n# b", "&lt;", "$x$", "~~s~~"],
)
def test_markup_is_escaped(text: str) -> None:
    found = in_markdown(text)
    assert "\n" not in found
    for place, letter in enumerate(found):
        if letter in "`*_[]<>#|!~&$":
            assert found[place - 1] == "\\", found


def test_half_a_surrogate_pair_is_spelled_out() -> None:
    assert for_terminal("a\ud800b") == "a\\ud800b" and in_python("\ud800") == '"\\ud800"'
