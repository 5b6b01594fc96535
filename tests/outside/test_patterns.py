"""An expression whose bound is low matches quickly, and the ones that never end have a high bound."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pissa.outside.patterns import MOST, work, wrong_patterns

NAME = "model.layers.31.self_attn.q_proj"


@pytest.mark.parametrize(
    "expression",
    [
        "(a+)+b", "(a*)*b", "(a|aa)+b", "(a|a)*b", "((ab)*)*c", "(.*a){20}", "a?" * 40 + "a" * 40, "(x+x+)+y",
        "(?:a+)+$", "(a+)\\1+(a+)+b", "a*" * 12 + "b", "(?=(a+)+b)a", "(?i:(a+)+)b",
    ],
)  # fmt: skip
def test_what_never_ends_is_told(expression: str) -> None:
    assert work(expression, 60) > MOST
    assert "could take for ever" in wrong_patterns([expression], 60)[0]


@pytest.mark.parametrize(
    "expression",
    [
        r".*\.(q|k|v|o|gate|up|down)_proj", r"model\.layers\.\d+\.mlp\..*", r"^model\.layers\.0\.mlp\.up_proj$",
        r".*(self_attn|mlp).*(q|k|v|o)_proj", "q_proj", r"(.*\.)?q_proj",
        r"model\.layers\.(0|1|2)\.(?:mlp|self_attn)\..+",
        "|".join(rf"model\.layers\.{i}\.mlp" for i in range(500)),
    ],
)  # fmt: skip
def test_what_people_write_passes(expression: str) -> None:
    assert wrong_patterns([expression], 100) == []


@pytest.mark.parametrize("expression", ["(", "[a", "*", "a{99999999999999999999}", "(" * 5000, "a" * (1 << 20) + "a"])
def test_what_is_no_expression_is_said(expression: str) -> None:
    assert "cannot be used" in wrong_patterns([expression], 60)[0] and "\n" not in wrong_patterns([expression], 60)[0]


pieces = st.recursive(
    st.sampled_from(["a", "b", ".", "[ab]", "\\w"]),
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from(["*", "+", "?", "{2}", "{0,3}", "*?"])).map(lambda p: f"(?:{p[0]}){p[1]}"),
        st.tuples(inner, inner).map("".join),
        st.tuples(inner, inner).map(lambda p: f"(?:{p[0]}|{p[1]})"),
    ),
    max_leaves=8,
)

MATCH = "import re,sys; [re.fullmatch(e, t) for e in sys.argv[1:] for t in ('a'*60, 'ab'*30, 'a'*59+'c')]"


@settings(max_examples=15, deadline=None)
@given(st.lists(pieces, min_size=20, max_size=20))
def test_whatever_has_a_low_bound_ends(expressions: list[str]) -> None:
    cheap = [expression for expression in expressions if work(expression, 60) <= 10_000]
    subprocess.run([sys.executable, "-c", MATCH, *cheap], timeout=120, check=True)


@given(pieces)
def test_the_bound_is_at_least_one_way(expression: str) -> None:
    re.compile(expression)
    assert work(expression, len(NAME)) >= 1
