"""Every accepted row shape becomes a conversation; every other row is refused with its reason."""

from __future__ import annotations

import inspect
import json
import warnings
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from pissa.data.conversation import Message, RowError
from pissa.data.messages import LEARNED_KEYS, OTHER_LEARNED_KEYS
from pissa.data.rows import BESIDE, INSTEAD, NOT_OPTIONS, PREFERENCE, example_from_row, examples_from_rows
from pissa.errors import DataError
from pissa.outside.schema import short

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
        ({"texts": "q"}, "unknown shape, its keys are 'texts'"),
        ({"text": " "}, "empty 'text'"),
        ({"conversations": [{"from": "human", "value": "q"}]}, "ends with a message of the role 'user'"),
        ({"conversations": [{"from": ["x"], "value": "q"}]}, "in message 1; allowed: system"),
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, "preference data"),
        ({"messages": [USER, ASSISTANT], "images": ["x.png"]}, "has 'images': only text is trained"),
        ({"question": "q", "answer": "r", "weight": 0}, "has 0 for 'weight': all rows weigh the same"),
        ({"messages": [USER, ASSISTANT], "functions": [{"name": "f"}]}, "write it as 'tools'"),
        ({"messages": [USER, {"role": "assistant", "function_call": {"name": "f"}}]}, "write it as 'tool_calls'"),
        ({"messages": [USER, {**ASSISTANT, "weight": 0}]}, "weight 0 on every assistant turn"),
        ({"messages": [USER, {**ASSISTANT, "weight": 0.5}]}, "has 0.5 for 'weight' in message 2"),
        ({"messages": [SYSTEM, USER, ASSISTANT], "system": "t"}, "beside a system message"),
        ({"messages": [USER, ASSISTANT], "tools": "{oops"}, "'tools' that is no JSON"),
        ({"messages": [USER, ASSISTANT], "tools": {"name": "f"}}, "no list of JSON schemas"),
        ({"messages": [USER, {"role": "assistant", "tool_calls": [{"id": "1"}]}]}, "without the name of a function"),
        ({"instruction": "q", "output": "r", "history": ["a", "b"]}, "no list of [question, answer] pairs"),
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
        ({"messages": [USER, {"role": "critic", "content": "x"}, ASSISTANT]}, "the role 'critic' in message 2"),
        (
            {"messages": [{"role": ["user"], "content": "x"}, ASSISTANT]},
            "in message 1; allowed: system, developer, user",
        ),
        ({"messages": [{"content": "x"}, ASSISTANT]}, "role 'None' in message 1"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}, ASSISTANT]},
            "a part of the type 'image_url' in message 1",
        ),
        ({"messages": [{"role": "user"}, ASSISTANT]}, "null for the content of message 1"),
    ],
)
def test_unusable_rows_say_why(row: Any, reason: str) -> None:
    with pytest.raises(RowError) as caught:
        example_from_row(row)
    assert reason in str(caught.value)


SHAPES: dict[str, dict[str, Any]] = {
    "alpaca": {"instruction": "q", "output": "r"},
    "question": {"question": "q", "answer": "r"},
    "messages": {"messages": [USER, ASSISTANT]},
    "sharegpt": {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "r"}]},
    "text": {"text": "q r"},
}
SPEAKING = (*INSTEAD, *PREFERENCE, *LEARNED_KEYS, "image", "history", "input", "label")
"""Keys beside a row that speak of what is learned."""


@settings(deadline=None)
@given(
    shape=st.sampled_from([*SHAPES]),
    key=st.sampled_from(SPEAKING),
    value=st.sampled_from([False, 0.5, 2, "x", [["a", "b"]], {"a": 1}]),
)
def test_a_key_that_speaks_of_learning_is_used_or_named(shape: str, key: str, value: Any) -> None:
    plain = example_from_row(SHAPES[shape])
    try:
        found = example_from_row({**SHAPES[shape], key: value})
    except RowError as reason:
        assert f"'{key}'" in str(reason) or key in PREFERENCE
        return
    # what says nothing, and what is no answer to whether the row is wanted
    assert found != plain or not value or key == "label"


@settings(deadline=None)
@given(key=st.sampled_from([*LEARNED_KEYS, *OTHER_LEARNED_KEYS]), value=st.sampled_from([0, False, 0.5, 2, "no", [1]]))
def test_a_turn_is_learned_or_not_as_it_says_or_refused(key: str, value: Any) -> None:
    turns = [USER, {**ASSISTANT, key: value}, USER, ASSISTANT]
    try:
        found = example_from_row({"messages": turns}).messages
    except RowError as reason:
        assert f"'{key}' in message 2" in str(reason) and (value not in (0, 1) or key in OTHER_LEARNED_KEYS)
        return
    assert [turn.learned for turn in found if turn.role == "assistant"] == [False, True] and value == 0


@given(st.dictionaries(st.text(max_size=5).map("x_".__add__), st.integers() | st.text(max_size=3), max_size=3))
def test_what_says_nothing_of_learning_is_left_alone(more: dict[str, Any]) -> None:
    for row in SHAPES.values():
        assert example_from_row({**row, **more}) == example_from_row(row)


LOOK_UP = {"type": "function", "function": {"name": "look_up", "arguments": {"word": "x"}}}


def test_what_stands_beside_an_alpaca_row_becomes_turns() -> None:
    row = {"instruction": "q", "input": "i", "output": "r", "system": "s", "history": [["a", "b"]]}
    example = example_from_row(row)
    assert [(m.role, m.content) for m in example.with_input()] == [
        ("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "q\n\ni"), ("assistant", "r"),
    ]  # fmt: skip


def test_what_changes_a_turn_is_kept() -> None:
    turns = [
        USER,
        {"role": "assistant", "content": None, "reasoning_content": "hm", "tool_calls": [LOOK_UP]},
        {"role": "tool", "content": "found", "tool_call_id": "1"},
        {**ASSISTANT, "weight": 0},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {**ASSISTANT, "weight": 1, "name": None},
    ]
    example = example_from_row({"messages": turns, "tools": [LOOK_UP], "chat_template_kwargs": {"thinking": True}})
    called, found, unlearned, joined, last = example.messages[1:]
    assert called.content == "" and dict(called.extra) == {"reasoning_content": "hm", "tool_calls": [LOOK_UP]}
    assert (found.role, dict(found.extra)) == ("tool", {"tool_call_id": "1"})
    assert (unlearned.learned, last.learned, dict(last.extra)) == (False, True, {})
    assert joined.content == "ab"
    assert ([*example.tools], dict(example.template_options)) == ([LOOK_UP], {"thinking": True})


def test_arguments_of_a_call_are_an_object_as_templates_take_them() -> None:
    quoted = {"id": "1", "type": "function", "function": {"name": "look_up", "arguments": '{"word": "x"}'}}
    bare = {"name": "look_up", "arguments": {"word": "x"}}
    for call in (quoted, bare, LOOK_UP):
        example = example_from_row({"messages": [USER, {"role": "assistant", "tool_calls": [call]}]})
        assert example.messages[1].extra["tool_calls"][0]["function"] == LOOK_UP["function"]


def test_sharegpt_rows_are_conversations() -> None:
    said = [
        {"from": "human", "value": "q"},
        {"from": "function_call", "value": '{"name": "look_up", "arguments": {"word": "x"}}'},
        {"from": "observation", "value": "found"},
        {"from": "gpt", "value": "r"},
    ]
    example = example_from_row({"conversations": said, "system": "s", "tools": f"[{LOOK_UP}]".replace("'", '"')})
    assert [message.role for message in example.messages] == ["system", "user", "assistant", "tool", "assistant"]
    assert example.messages[2].extra["tool_calls"] == [LOOK_UP] and [*example.tools] == [LOOK_UP]


def test_of_a_prompt_of_messages_the_completion_alone_is_learned() -> None:
    example = example_from_row({"prompt": [USER, ASSISTANT, USER], "completion": [ASSISTANT]})
    assert [message.learned for message in example.messages if message.role == "assistant"] == [False, True]
    assert example == example_from_row({"prompt": [USER, ASSISTANT, USER], "completion": "r"})


@pytest.mark.parametrize(
    "row",
    [
        {"text": "some words"},
        {"instruction": "q", "input": "i", "output": "r"},
        {"instruction": "q", "input": "i", "output": "r", "history": [["a", "b"]]},
        {"messages": [USER, {**ASSISTANT, "weight": 0}, USER, {**ASSISTANT, "thinking": "hm"}], "tools": [LOOK_UP]},
        {"prompt": [USER], "completion": "r", "chat_template_kwargs": {"thinking": True}},
    ],
)
def test_an_example_is_taken_as_it_is_and_its_content_tells_it_from_others(row: dict[str, Any]) -> None:
    example = example_from_row(row, "somewhere")
    assert examples_from_rows([example])[0] is example
    assert example.content() == example_from_row(row, "elsewhere").content()
    text = json.dumps(example.content())
    for change in ({"text": "other"}, {"tools": ({"name": "f"},)}, {"template_options": {"thinking": False}}):
        assert json.dumps(replace(example, **change).content()) != text


def test_rows_in_memory_are_refused_together() -> None:
    rows = [{"prompt": "q", "completion": "r"}, {"prompt": "q", "completion": ""}, 7]
    with pytest.raises(
        DataError, match=r"2 of 3 rows of problems .*problems: row 2 has an empty.*problems: row 3 is not"
    ):
        examples_from_rows(rows, "problems")
    assert [example.where for example in examples_from_rows(rows[:1])] == ["the data: row 1"]
    with pytest.raises(DataError, match="holds no rows"):
        examples_from_rows([])


@settings(max_examples=60, deadline=None)
@given(st.sampled_from([*SHAPES.values()]), st.text(max_size=12), st.sampled_from(["x", 0, 1.5, [1], {"a": 1}, True]))
def test_any_other_key_is_read_refused_or_named_in_one_warning(row: dict[str, Any], key: str, value: Any) -> None:
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            (example,) = examples_from_rows([{key: value, **row}])
        except DataError as error:
            assert key in str(error) or ascii(key)[1:-1][:20] in str(error)
            return
    if example.content() == example_from_row(row).content() and key not in {*row, *BESIDE, "text"}:
        assert len(told) == 1 and f"{short(key)} (in 1)" in str(told[0].message)


def test_options_of_the_template_are_not_training_s_own() -> None:
    arguments = inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters
    own = set(arguments) - {"self", "kwargs", "documents"}
    assert own <= {*NOT_OPTIONS}
    for name in own:
        with pytest.raises(RowError, match=f"has '{name}' in 'chat_template_kwargs'"):
            example_from_row({"messages": [USER, ASSISTANT], "chat_template_kwargs": {name: True}})


@pytest.mark.parametrize("key", [*LEARNED_KEYS, *OTHER_LEARNED_KEYS])
def test_a_part_of_a_turn_is_not_left_unlearned(key: str) -> None:
    part = {"type": "text", "text": "r", key: 0}
    with pytest.raises(RowError, match=f"'{key}' in a part of message 2"):
        example_from_row({"messages": [USER, {"role": "assistant", "content": [part]}]})
