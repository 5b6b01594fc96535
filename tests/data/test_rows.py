"""Every accepted row shape becomes a conversation; every other row is refused with its reason."""

from __future__ import annotations

from typing import Any

import pytest

from pissa.data.rows import Message, RowError, example_from_row, examples_from_rows
from pissa.errors import DataError

PAIR = (Message("user", "q"), Message("assistant", "r"))
USER, ASSISTANT = {"role": "user", "content": "q"}, {"role": "assistant", "content": "r"}
SYSTEM = {"role": "system", "content": "s"}


@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "q", "output": "r"},
        {"instruction": "q", "input": "", "output": "r"},
        {"instruction": "q", "input": None, "output": "r", "id": 7, "tags": ["x"]},
        {"question": "q", "answer": "r"},
        {"prompt": "q", "completion": "r", "messages": None},
        {"messages": [USER, ASSISTANT], "prompt": "only a prompt"},
    ],
)
def test_shapes_give_the_same_conversation(row: dict[str, Any]) -> None:
    example = example_from_row(row, "file:1")
    assert (example.messages, example.input, example.where) == (PAIR, "", "file:1")


def test_input_and_earlier_turns_are_kept() -> None:
    assert example_from_row({"instruction": "q", "input": "i", "output": "r"}).input == "i"
    long = example_from_row({"messages": [SYSTEM, USER, ASSISTANT, USER, ASSISTANT]})
    assert [message.role for message in long.messages] == ["system", "user", "assistant", "user", "assistant"]


def test_text_is_kept_to_the_character() -> None:
    assert example_from_row({"prompt": " q\n", "completion": "\tr \r\n"}).response == "\tr \r\n"


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (["q", "r"], "not an object but a list"),
        ("text", "not an object but a string"),
        ({}, "no fields"),
        ({"text": "q"}, "unknown shape, its keys are 'text'"),
        ({"conversations": [{"from": "human", "value": "q"}]}, "unknown shape"),
        ({"instruction": "q", "response": "r"}, "unknown shape"),
        ({"question": "q", "answer": "r", "prompt": "q", "completion": "r"}, "two shapes at once"),
        ({"question": "q", "answer": ""}, "empty response in 'answer'"),
        ({"prompt": "q", "completion": " \n\t"}, "empty response in 'completion'"),
        ({"prompt": "q", "completion": None}, "null for 'completion'"),
        ({"prompt": 3, "completion": "r"}, "a number for 'prompt'"),
        ({"question": "q", "answer": 5}, "a number for 'answer'"),
        ({"question": "q", "answer": True}, "true or false for 'answer'"),
        ({"instruction": "q", "input": ["i"], "output": "r"}, "a list for 'input'"),
        ({"prompt": "q", "completion": b"r"}, "type bytes for 'completion'"),
        ({"messages": []}, "no messages"),
        ({"messages": "hi"}, "a string for 'messages'"),
        ({"messages": [None]}, "null for message 1"),
        ({"messages": [SYSTEM]}, "ends with a message of the role 'system'"),
        ({"messages": [SYSTEM, USER]}, "ends with a message of the role 'user'"),
        ({"messages": [ASSISTANT]}, "before the first user message"),
        ({"messages": [SYSTEM, ASSISTANT, USER, ASSISTANT]}, "before the first user message"),
        ({"messages": [USER, {"role": "assistant", "content": " "}]}, "empty response in message 2"),
        ({"messages": [USER, {"role": "tool", "content": "x"}, ASSISTANT]}, "the role 'tool' in message 2"),
        ({"messages": [{"role": ["user"], "content": "x"}, ASSISTANT]}, "in message 1; allowed: system, user"),
        ({"messages": [{"content": "x"}, ASSISTANT]}, "role 'None' in message 1"),
        (
            {"messages": [{"role": "user", "content": [{"text": "x"}]}, ASSISTANT]},
            "a list for the content of message 1",
        ),
        ({"messages": [{"role": "user"}, ASSISTANT]}, "null for the content of message 1"),
    ],
)
def test_unusable_rows_say_why(row: Any, reason: str) -> None:
    with pytest.raises(RowError) as caught:
        example_from_row(row)
    assert reason in str(caught.value)


def test_rows_in_memory_are_refused_together() -> None:
    rows = [{"prompt": "q", "completion": "r"}, {"prompt": "q", "completion": ""}, 7]
    with pytest.raises(
        DataError, match=r"2 of 3 rows of problems .*problems: row 2 has an empty.*problems: row 3 is not"
    ):
        examples_from_rows(rows, "problems")
    assert [example.where for example in examples_from_rows(rows[:1])] == ["the data: row 1"]
    with pytest.raises(DataError, match="holds no rows"):
        examples_from_rows([])
