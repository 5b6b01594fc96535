"""Answers of MATH: what is read, what is the same, and where lm-eval's own comparison says otherwise."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pissa.evaluation.tasks.math_answers import final_answer, same_expression
from pissa.evaluation.tasks.registry import find_task

STATED = {
    r"So $x = \boxed{5}$.": "5",
    r"\boxed{1} and then \boxed{2}": "2",
    r"\boxed{\frac{1}{2}}": r"\frac{1}{2}",
    r"\boxed{\frac{\sqrt{3}}{2^{10}}} is it": r"\frac{\sqrt{3}}{2^{10}}",
    r"\fbox{7}": "7",
    r"\boxed 7": "7",
    r"\boxed{\{1, 2\}}": r"\{1, 2\}",
    r"\boxed{5": None,
    "nothing here": None,
    "": None,
    "The answer is: 5.": "5",
    r"The answer is: $\frac{1}{2}$.": r"$\frac{1}{2}$",
    "The answer is 5": "5",
    r"\boxed{4}. No. The answer is: 5": "5",
    r"The answer is: 4. No, \boxed{5}": "5",
    r"The answer is: \boxed{5}.": "5",
    "The answer is:": None,
    r"\boxed{" + "9" * 1000 + "}": None,
}
SAME = [
    ("5", "5"), ("5", "5.0"), ("5", "+5"), ("5", "$5$"), ("5", r"\(5\)"), ("5", " 5. "), ("-5", "−5"), ("007", "7"),
    ("0.5", r"\frac{1}{2}"), ("0.5", r"\frac12"), ("0.5", r"\dfrac{1}{2}"), ("0.5", r"\tfrac12"), (".5", "1/2"),
    (r"-\frac{1}{2}", r"\frac{-1}{2}"), (r"\frac{1}{-2}", "-0.5"), (r"\frac{2}{4}", r"\frac{1}{2}"), ("6/3", "2"),
    (r"1\frac{1}{2}", r"\frac{3}{2}"), ("1 1/2", "1.5"), (r"-2\frac{1}{2}", "-2.5"),
    ("1,000", "1000"), ("1{,}000", "1000"), (r"1,\!000", "1000"), ("10,000,000", "10000000"), ("1,234.5", "1234.5"),
    (r"\$5", "5"), (r"5\%", "5"), ("5%", "5"), (r"90^\circ", "90"), (r"90^{\circ}", "90"), ("90°", "90"),
    (r"5\text{ cm}", "5"), (r"5\text{ cm}^2", "5"), (r"5\mbox{ inches}", "5"), (r"5 \mathrm{ m}^{3}", "5"),
    ("5 cm", "5"),
    (r"\frac{1}{2}\text{ hour}", "0.5"), (r"\sqrt{2}\text{ units}", r"\sqrt2"), (r"\text{5}", "5"),
    ("x=5", "5"), ("x = 5", "x=5"), (r"x \in [1,2)", "[1,2)"),
    ("(1,2)", "(1, 2)"), (r"\left(1,2\right)", "(1,2)"), (r"(\frac12, 0.5)", r"(0.5,\frac{1}{2})"),
    ("[1,2)", "[ 1, 2 )"),
    (r"(-\infty,2]", r"\left(-\infty, 2\right]"), (r"\{1,2\}", r"\{2,1\}"), ("1,2", "2, 1"), ("1,-2,3", "3,1,-2"),
    (r"\lbrace 1, 2\rbrace", r"\{1,2\}"), (r"\left\{\frac12, 3\right\}", r"\{3, 0.5\}"),
    (r"(1,2),(3,4)", r"(3,4),(1,2)"),
    (r"\text{even}", "even"), (r"\text{Even}", r"\text{even}"), (r"\text{(A)}", "A"), ("(B)", "B"),
    (r"\mathrm{(C)}", "(C)"),
    (r"\text{June 20}", r"\text{June  20}"),
    ("x^2+1", "x^{2} + 1"), (r"\sqrt2", r"\sqrt{2}"), (r"2\sqrt{3}", r"2 \sqrt 3"), (r"\pi r^2", r"\pi r^{2}"),
    (r"\frac{\sqrt3}{2}", r"\dfrac{\sqrt{3}}{2}"), (r"a_{1}", "a_1"), (r"3\,x", "3x"),
    (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}"),
]  # fmt: skip
DIFFERENT = [
    ("5", "6"), ("5", "-5"), ("0.33", r"\frac{1}{3}"), ("", "5"), ("5", "50"), (r"\frac{1}{2}", r"\frac{2}{1}"),
    (r"\frac{1}{0}", r"\frac{2}{0}"), ("(1,2)", "(2,1)"), ("(1,2)", "[1,2]"), ("(1,2)", "(1,2]"), ("(1,2)", r"\{1,2\}"),
    ("(1,234)", "1234"), ("1,2", "1,2,2"), (r"\{1,1,2\}", r"\{1,2,2\}"), ("1,2", "12"), ("1 2", "12"),
    ("x+1", "1+x"), ("x^2", "x^3"), ("x", "X"), ("ab", "AB"), ("2x", "x"), (r"2\pi", "2"), (r"\sqrt{2}", "2"),
    (r"\text{even}", r"\text{odd}"), ("A", "B"), (r"5\pi\text{ cm}", "5"), ("y=x+1", "y=x+2"),
    (r"5\text{ cm}", r"6\text{ cm}"),
    ("10^5", "10^6"), (r"x^{12}", "x^12"), (r"\log 2", r"\log 3"), ("2^{10}", "2^1 0"),
]  # fmt: skip
# What hendrycks_math's is_equiv alone holds for the same: it takes all spaces away.
THEIRS_ALONE = {frozenset({"1 2", "12"})}


@pytest.mark.parametrize("text", STATED, ids=lambda text: text[:30] or "empty")
def test_the_last_stated_answer_is_read(text: str) -> None:
    assert final_answer(text) == STATED[text]


@pytest.mark.parametrize(("a", "b"), SAME)
def test_the_same_answer_in_another_form_is_the_same(a: str, b: str) -> None:
    assert same_expression(a, b) and same_expression(b, a)


@pytest.mark.parametrize(("a", "b"), DIFFERENT)
def test_other_answers_differ(a: str, b: str) -> None:
    assert not same_expression(a, b) and not same_expression(b, a)


def test_a_missing_answer_equals_nothing() -> None:
    assert not same_expression(None, None) and not same_expression("5", None) and not same_expression(None, "5")


@given(st.text(alphabet=r"\{}()[],.0123456789abx^_frac $%text-+/=", max_size=60))
def test_no_text_breaks_the_comparison(text: str) -> None:
    assert same_expression(text, text)
    final_answer(r"\boxed{" + text + "} The answer is: " + text)


def test_what_lm_eval_holds_for_the_same_is_the_same_to_us() -> None:
    """Ours accepts what hendrycks_math's does, over every pair above and over plain ones; where ours accepts more, the
    values are equal and only theirs compares spellings."""
    utils = pytest.importorskip("lm_eval.tasks.hendrycks_math.utils")
    answers = list(dict.fromkeys(answer for pair in SAME + DIFFERENT for answer in pair if answer))
    more = {(a, b) for a in answers for b in answers if utils.is_equiv(a, b) and not same_expression(a, b)}
    assert {frozenset(pair) for pair in more} == THEIRS_ALONE
    assert 20 < sum(utils.is_equiv(*pair) for pair in SAME) < len(SAME)


def test_rows_of_math_are_read(tmp_path: Path) -> None:
    path = tmp_path / "math.jsonl"
    rows = [
        {"problem": "1 + 1?", "level": "Level 1", "type": "Algebra", "solution": r"It is $\boxed{2}$."},
        {"question": "Half?", "answer": "The answer is: 1/2"},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = find_task("math")
    problems = task.load(path)
    posed = [task.pose(problem, None, "alpaca") for problem in problems]  # type: ignore[attr-defined]
    assert [p.facts["expected"] for p in posed] == ["2", "1/2"]
    assert "1 + 1?" in posed[0].prompt
    judged = task.judge(problems[1], posed[1], r"So we get $\boxed{0.5}$")  # type: ignore[attr-defined]
    assert judged == {"answer": "0.5", "correct": True}
    assert len(task.load(path, limit=1)) == 1
