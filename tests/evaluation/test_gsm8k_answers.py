"""The answer of a solution is the exact number after its last marker, or nothing."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pissa.data.read import read_examples
from pissa.evaluation.tasks.gsm8k_answers import extract_answer, same_answer

STATED = {
    # markers
    "The answer is: 18": 18,
    "the answer is: 18": 18,
    "THE ANSWER IS 18": 18,
    "So the answer is:18.": 18,
    "The answer is:\n18": 18,
    "Two and two.\n#### 4": 4,
    "####4": 4,
    "#### 4\n\nQuestion: what next? 5 6 7": 4,
    "She has 3 * 4 = 12 left.\n#### 12\n": 12,
    # the last marker counts
    "The answer is: 3. No. The answer is: 5": 5,
    "#### 3\nThe answer is: 5": 5,
    "The answer is: 5\n#### 3": 3,
    # signs
    "The answer is: -7": -7,
    "The answer is: +7": 7,
    "The answer is: −7": -7,
    "#### -0": 0,
    # thousands, decimals, exponents
    "#### 1,234": 1234,
    "#### 1,234,567.": 1234567,
    "The answer is: 12,345.50": Fraction(24691, 2),
    "The answer is: 0.1": Fraction(1, 10),
    "The answer is: .5": Fraction(1, 2),
    "The answer is: 5.": 5,
    "The answer is: 5.00": 5,
    "The answer is: 007": 7,
    "The answer is: 3.50.": Fraction(7, 2),
    "The answer is: 1.5e3": 1500,
    "The answer is: 2e-2": Fraction(1, 50),
    "The answer is: 12345678901234567890123": 12345678901234567890123,
    # fractions
    "The answer is: 3/4": Fraction(3, 4),
    "The answer is: -3/4": Fraction(-3, 4),
    "The answer is: 3 / 4 of the cake": Fraction(3, 4),
    "The answer is: 6/3": 2,
    "The answer is: 1 3/4 cups": Fraction(7, 4),
    "The answer is: -1 1/2": Fraction(-3, 2),
    r"The answer is: \frac{3}{4}": Fraction(3, 4),
    r"The answer is: $-\dfrac{3}{4}$.": Fraction(-3, 4),
    r"The answer is: $\boxed{\frac{1}{3}}$": Fraction(1, 3),
    # currency, percent, units, punctuation
    "The answer is: $18": 18,
    "The answer is: $ 18": 18,
    "The answer is: -$18": -18,
    "The answer is: $-18": -18,
    r"The answer is: \$18.50": Fraction(37, 2),
    "The answer is: €1,000": 1000,
    "The answer is: 20€": 20,
    "The answer is: 50%": 50,
    "The answer is: 50 percent": 50,
    r"The answer is: 50\%": 50,
    "The answer is: 12 apples.": 12,
    "The answer is: 12kg": 12,
    "The answer is: 3rd": 3,
    "The answer is: 60 km/h": 60,
    "The answer is: 5/hour": 5,
    "The answer is: 90°": 90,
    "The answer is: 5!": 5,
    "The answer is: 5, as shown": 5,
    "The answer is: 5-day week": 5,
    "The answer is: **42**": 42,
    "The answer is: $42$": 42,
    r"The answer is: \(42\)": 42,
    r"The answer is: \boxed{42}": 42,
    r"The answer is: $\boxed{42\text{ dollars}}$": 42,
    r"The answer is: \text{42}": 42,
    "The answer is: (42)": 42,
    "The answer is: 5.\n6. Check it.": 5,
    "#### 5\n6": 5,
}
NOT_STATED = [
    "",
    "18",
    "She has 18 left.",
    "Answer: 18",
    "answer is 18",
    "# 18",
    "### 18",
    "##### 18",
    "The answer is:",
    "The answer is: unknown",
    "The answer is: eighteen",
    "The answer is: about 18",
    "The answer is: x = 18",
    "The answer isn't 18",
    "The answer is: 5. In other words, the answer is: five",
    "#### 18\n#### done",
    "The answer is: 5 + 3",
    "The answer is: 5+3 = 8",
    "The answer is: 5 - 3",
    "The answer is: 5-6",
    "The answer is: 5–6",
    "The answer is: 5 to 6",
    "The answer is: 5 or 6",
    "The answer is: 5 and 6",
    "The answer is: 5, 6",
    "The answer is: 1,2,3",
    "The answer is: 12,34",
    "The answer is: 1,2345",
    "The answer is: 1.234.567",
    "The answer is: 5 6",
    "The answer is: 5:30",
    "The answer is: 3/4/5",
    "The answer is: 2 * 3",
    "The answer is: 2**3",
    "The answer is: 2 x 3",
    "The answer is: 2^10",
    "The answer is: 2^{10}",
    "The answer is: 5²",
    "The answer is: 2½",
    "The answer is: ½",
    "The answer is: 5π",
    r"The answer is: 5\pi",
    r"The answer is: 5\sqrt{2}",
    r"The answer is: 2 \cdot 3",
    "The answer is: 5/0",
    r"The answer is: \frac{1}{0}",
    "The answer is: 1e999999999",
    "The answer is: - 5",
    "The answer is: --5",
    "The answer is: ٥",
    "The answer is: " + "9" * 100_000,
    "#### " * 1000,
]


@pytest.mark.parametrize("text", STATED)
def test_stated_answer_is_read_exactly(text: str) -> None:
    assert extract_answer(text) == STATED[text]


@pytest.mark.parametrize("text", NOT_STATED, ids=lambda text: text[:40] or "empty")
def test_what_states_no_number_has_no_answer(text: str) -> None:
    assert extract_answer(text) is None


@given(
    st.integers(-(10**40), 10**40), st.sampled_from(["{}", "{:,}"]), st.sampled_from(["", ".", "%", " apples", "\n"])
)
def test_whole_numbers_come_back_as_written(number: int, form: str, after: str) -> None:
    assert extract_answer(f"So 1 + 1 = 2. The answer is: {form.format(number)}{after}") == number


@given(st.decimals(-(10**9), 10**9, places=4))
def test_decimals_come_back_exactly(number: object) -> None:
    assert extract_answer(f"#### {number}") == Fraction(str(number))


@given(st.text(max_size=300))
def test_no_text_breaks_the_reading(text: str) -> None:
    extract_answer("The answer is: " + text)
    extract_answer("#### 1" + text)


@pytest.mark.parametrize(
    ("a", "b"), [("#### 18", "The answer is: 18.0"), ("#### 0.5", "#### 1/2"), ("#### 1,000", "#### 1000")]
)
def test_equal_values_are_the_same_answer(a: str, b: str) -> None:
    assert same_answer(extract_answer(a), extract_answer(b))


def test_different_or_missing_answers_are_not_the_same() -> None:
    assert not same_answer(Fraction(1), Fraction(2))
    assert not same_answer(None, Fraction(1))
    assert not same_answer(Fraction(1), None)
    assert not same_answer(None, None)


def test_every_gsm8k_reference_states_a_whole_number(pissa_data: Path) -> None:
    for name in ("train", "test"):
        for example in read_examples(pissa_data / "gsm8k" / f"{name}.jsonl.gz"):
            answer = extract_answer(example.response)
            assert answer is not None
            assert answer == int(example.response.rpartition("#### ")[2].replace(",", ""))
