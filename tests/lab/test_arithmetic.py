"""The word problems are true, distinct, balanced, and the same everywhere."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from fractions import Fraction
from typing import Any

import pytest

from pissa.data.rows import examples_from_rows
from pissa.errors import ConfigError
from pissa.evaluation.tasks.gsm8k_answers import extract_answer
from pissa.lab.demo.arithmetic import draw_problems, make_problems
from pissa.lab.demo.problem_templates import TRAINED, UNSEEN

EQUATION = re.compile(r"(\d+) ([-+*/]) (\d+) = (\d+)")
COMPUTE = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
    "/": lambda a, b: Fraction(a, b),
}


@pytest.fixture(scope="module")
def problems() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    return make_problems(7, 2800, 1800)


def identity(row: dict[str, Any]) -> tuple[str, ...]:
    return (row["template"], *re.findall(r"\d+", row["instruction"]))


def test_every_step_is_true_and_the_last_one_is_the_answer(problems: Any) -> None:
    for row in [*problems[0], *problems[1]]:
        equations = EQUATION.findall(row["output"])
        assert 1 <= len(equations) <= 3
        for a, sign, b, result in equations:
            assert COMPUTE[sign](int(a), int(b)) == int(result) > 0
        assert extract_answer(row["output"]) == int(equations[-1][3])
        assert row["output"].endswith(f"The answer is: {equations[-1][3]}")


def test_solutions_use_only_numbers_of_the_question_and_earlier_results(problems: Any) -> None:
    for row in problems[0][:500] + problems[1][:500]:
        known = set(re.findall(r"\d+", row["instruction"]))
        used: set[str] = set()
        for a, _, b, result in EQUATION.findall(row["output"]):
            assert {a, b} <= known
            used |= {a, b}
            known.add(result)
        assert set(re.findall(r"\d+", row["instruction"])) <= used


def test_no_problem_occurs_twice(problems: Any) -> None:
    identities = [identity(row) for row in [*problems[0], *problems[1]]]
    assert len(set(identities)) == len(identities)


def test_some_held_out_templates_never_occur_in_training(problems: Any) -> None:
    train, held_out = problems
    trained = {row["template"] for row in train}
    assert len(trained) >= 12
    assert all(row["seen_template"] == (row["template"] in trained) for row in held_out)
    assert Counter(row["seen_template"] for row in held_out) == {True: 1400, False: 400}


def test_templates_occur_equally_often(problems: Any) -> None:
    train, held_out = problems
    assert set(Counter(row["template"] for row in train).values()) == {200}
    assert set(Counter(row["template"] for row in held_out).values()) == {100}
    few = Counter(row["template"] for row in make_problems(0, 31, 0)[0])
    assert set(few.values()) == {2, 3}


def test_all_operations_and_one_to_three_steps_occur(problems: Any) -> None:
    steps = Counter(len(EQUATION.findall(row["output"])) for row in problems[0])
    assert set(steps) == {1, 2, 3}
    assert {sign for row in problems[0] for _, sign, _, _ in EQUATION.findall(row["output"])} == set("+-*/")


def test_rows_are_short_plain_and_readable_as_examples(problems: Any) -> None:
    train, held_out = problems
    assert {frozenset(row) for row in train} == {frozenset({"instruction", "output", "template"})}
    assert {frozenset(row) for row in held_out} == {frozenset({"instruction", "output", "template", "seen_template"})}
    for row in [*train, *held_out]:
        assert not set("{}\n") & set(row["instruction"] + row["output"])
        # A digit is a token of its own in many vocabularies, a word is one or two.
        assert len(re.findall(r"\d|[a-z]+|[^\w\s]", row["instruction"], re.IGNORECASE)) <= 50
        assert len(re.findall(r"\d|[a-z]+|[^\w\s]", row["output"], re.IGNORECASE)) <= 60
    assert len(examples_from_rows([*train, *held_out])) == 4600


def test_names_of_templates_are_distinct() -> None:
    names = [template.name for template in (*TRAINED, *UNSEEN)]
    assert len(set(names)) == len(names)


def test_same_seed_gives_the_same_problems_on_every_python() -> None:
    text = json.dumps(make_problems(0, 100, 50), sort_keys=True)
    assert (
        hashlib.sha256(text.encode()).hexdigest() == "2aab69c5a08c66b30dae1759bb09e32644c437bff24dab9d9d8423a55453104d"
    )


def test_held_out_problems_do_not_depend_on_the_number_of_training_problems() -> None:
    assert make_problems(3, 10, 40)[1] == make_problems(3, 500, 40)[1]


def test_different_seeds_give_different_problems() -> None:
    first, second = ({row["instruction"] for row in make_problems(seed, 200, 0)[0]} for seed in (0, 1))
    assert len(first & second) < 5


@pytest.mark.parametrize(("train", "held_out"), [(-1, 5), (5, -1), (10**6, 0), (0, 10**6)])
def test_counts_that_cannot_be_met_are_refused(train: int, held_out: int) -> None:
    with pytest.raises(ConfigError, match="give"):
        make_problems(0, train, held_out)


def test_as_many_problems_as_promised_are_made() -> None:
    with pytest.raises(ConfigError) as caught:
        make_problems(0, 10**6, 0)
    most = int(re.findall(r"at most (\d+)", str(caught.value))[0])
    train, held_out = make_problems(0, most - 1000, 1000)
    assert len({identity(row) for row in [*train, *held_out]}) == most


def test_problems_of_some_kinds_alone() -> None:
    rows = draw_problems(UNSEEN, 400, seed=3)
    assert Counter(row["template"] for row in rows) == dict.fromkeys((template.name for template in UNSEEN), 100)
    assert len({identity(row) for row in rows}) == 400
    assert rows == draw_problems(UNSEEN, 400, seed=3) != draw_problems(UNSEEN, 400, seed=4)


@pytest.mark.parametrize("count", [-1, 10**6])
def test_more_problems_of_a_kind_than_there_are_are_refused(count: int) -> None:
    with pytest.raises(ConfigError, match="give 0 to"):
        draw_problems(UNSEEN, count, seed=0)
