"""What is learned of a conversation under a chat template, and what a template may not leave out without a word."""

from __future__ import annotations

from typing import Any

import pytest

from pissa.data.chat_text import end_of_turn
from pissa.data.conversation import Example, Message
from pissa.data.encode import IGNORED, encode
from pissa.data.rows import example_from_row, examples_from_rows
from pissa.errors import ConfigError, DataError
from tiny import tiny_tokenizer

USER, ASSISTANT = {"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}
TWO = [USER, ASSISTANT, {"role": "user", "content": "3 + 3?"}, {"role": "assistant", "content": "6 "}]
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}
FULL = (
    "{% if tools %}[tools]{{ tools | tojson }}<end>{% endif %}{% for m in messages %}[{{ m.role }}]"
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ c | tojson }}{% endfor %}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
MARKED = (
    "{% for m in messages %}[{{ m.role }}]{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<end>"
    "{% endgeneration %}{% else %}{{ m.content }}<end>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
LAST_THINKS = (
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in messages %}[{{ m.role }}]"
    "{% if m.role == 'assistant' and loop.index0 > ns.last %}"
    "<think>{{ m.reasoning_content or '' }}</think>{% endif %}{{ m.content }}<end>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
OPENS_THINKING = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content.split('</think>')[-1] if m.role == 'assistant' else m.content }}"
    "<end>{% endfor %}{% if add_generation_prompt %}[assistant]<think>\n{% endif %}"
)


def seen_and_learned(row: dict[str, Any], template: str) -> tuple[str, list[str], str]:
    """The text of a row, its learned stretches, and what is said of it."""
    tokenizer = tiny_tokenizer(chat_template=template)
    encoded = encode([example_from_row(row)], tokenizer, template="chat", max_length=999)
    stretches, run = [], []
    for label in [*encoded.labels[0], IGNORED]:
        if label != IGNORED:
            run.append(label)
        elif run:
            stretches.append(tokenizer.decode(run))
            run = []
    return tokenizer.decode(encoded.input_ids[0]), stretches, encoded.summary


@pytest.mark.parametrize("template", [FULL, MARKED], ids=["compared", "marked"])
def test_every_assistant_turn_is_learned_with_its_end(template: str) -> None:
    assert seen_and_learned({"messages": TWO}, template)[1] == ["4<end>", "6 <end>"]


@pytest.mark.parametrize("template", [FULL, MARKED], ids=["compared", "marked"])
def test_a_turn_of_weight_0_is_seen_and_not_learned(template: str) -> None:
    for unlearned, left in ((1, ["6 <end>"]), (3, ["4<end>"])):
        turns = [{**turn, "weight": 0} if place == unlearned else turn for place, turn in enumerate(TWO)]
        text, learned, _ = seen_and_learned({"messages": turns}, template)
        assert learned == left and "[assistant]4<end>" in text


def test_tools_calls_and_reasoning_are_written_and_learned_where_the_assistant_says_them() -> None:
    turns = [USER, {"role": "assistant", "reasoning_content": "hm", "tool_calls": [CALL]},
             {"role": "tool", "content": "four"}, ASSISTANT]  # fmt: skip
    text, learned, _ = seen_and_learned({"messages": turns, "tools": [CALL]}, FULL)
    assert text.startswith('[tools][{"type": "function"') and "[tool]four<end>" in text
    assert learned[0].startswith("<think>hm</think>{") and learned[0].endswith("}<end>")
    assert learned[1] == "4<end>"


@pytest.mark.parametrize("arguments", [{"a": "ü"}, '{"a": "ü"}'], ids=["object", "text"])
@pytest.mark.parametrize("form", ["", " | tojson"], ids=["adds texts", "takes objects"])
def test_a_call_s_arguments_are_written_as_the_template_wants_them(arguments: Any, form: str) -> None:
    calls = "{% for c in m.tool_calls or [] %}{{ 'args=' + c.function.arguments" + form + " }}{% endfor %}<end>\n"
    template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}" + calls + "{% endfor %}"
    call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
    turns = [USER, {"role": "assistant", "content": "", "tool_calls": [call]}, USER, ASSISTANT]
    text, _, _ = seen_and_learned({"messages": turns}, template)
    assert 'args={"a": "ü"}<end>' in text


@pytest.mark.parametrize(
    ("more", "named"),
    [
        ({"tools": [CALL]}, "tools"),
        ({"messages": [USER, {**ASSISTANT, "tool_calls": [CALL]}]}, "tool_calls"),
        ({"messages": [USER, {**ASSISTANT, "reasoning_content": "hm"}]}, "reasoning_content"),
        ({"messages": [USER, {**ASSISTANT, "thinking": "hm"}]}, "thinking"),
    ],
)
def test_what_the_template_would_leave_out_is_refused_by_name(more: dict[str, Any], named: str) -> None:
    with pytest.raises(DataError, match=rf"row 1 has '{named}', which the tokenizer's chat template does not write"):
        seen_and_learned({"messages": [USER, ASSISTANT], **more}, MARKED)


def test_a_system_message_that_the_template_leaves_out_is_refused() -> None:
    template = "{% for m in messages if m.role != 'system' %}[{{ m.role }}]{{ m.content }}<end>{% endfor %}"
    with pytest.raises(DataError, match="role 'system', which the chat template leaves out"):
        seen_and_learned({"messages": [{"role": "system", "content": "Be brief."}, *TWO]}, template)


def test_the_last_turn_alone_is_learned_where_the_template_writes_earlier_ones_anew() -> None:
    turns = [USER, {**ASSISTANT, "reasoning_content": "two"}, TWO[2], {**TWO[3], "reasoning_content": "three"}]
    text, learned, summary = seen_and_learned({"messages": turns}, LAST_THINKS)
    assert text == "[user]2 + 2?<end>[assistant]4<end>[user]3 + 3?<end>[assistant]<think>three</think>6 <end>"
    assert learned == ["<think>three</think>6 <end>"]
    assert "in 1 rows the last turn alone is learned" in summary
    with pytest.raises(DataError, match="no turn that can be learned"):
        seen_and_learned({"messages": [*turns[:3], {**turns[3], "weight": 0}]}, LAST_THINKS)


def test_a_generation_prompt_that_opens_thinking_is_no_part_of_a_row_without_it_and_that_is_said() -> None:
    text, learned, summary = seen_and_learned({"messages": TWO}, OPENS_THINKING)
    assert text == "[user]2 + 2?<end>[assistant]4<end>[user]3 + 3?<end>[assistant]6 <end>"
    assert learned == ["4<end>", "6 <end>"]
    assert "without what the chat template's generation prompt puts before it" in summary


def test_marks_that_leave_the_end_of_a_turn_out_are_refused() -> None:
    template = MARKED.replace("<end>{% endgeneration %}", "{% endgeneration %}<end>")
    with pytest.raises(ConfigError, match=r"leave out '<end>'.*put it before"):
        seen_and_learned({"messages": TWO}, template)


def test_a_row_s_own_options_reach_the_template() -> None:
    template = FULL.replace("{% for m in", "{% if brief %}[brief]{% endif %}{% for m in", 1)
    row = {"messages": TWO, "chat_template_kwargs": {"brief": True}}
    assert seen_and_learned(row, template)[0].startswith("[brief][user]")


def test_template_that_refuses_a_row_is_quoted_with_its_place() -> None:
    template = "{% if messages | length > 2 %}{{ raise_exception('too long') }}{% endif %}" + FULL
    tokenizer = tiny_tokenizer(chat_template=template)
    rows = examples_from_rows([{"messages": TWO[:2]}, {"messages": TWO}], "talk")
    with pytest.raises(DataError, match=r"1 of 2 rows .*talk: row 2 is refused .*too long"):
        encode(rows, tokenizer, template="chat", max_length=99)


def test_the_end_of_a_turn_is_found_in_the_template() -> None:
    tokenizer = tiny_tokenizer()
    assert end_of_turn(tokenizer) == tokenizer.convert_tokens_to_ids("<end>")
    assert end_of_turn(tiny_tokenizer(chat_template=None)) is None
    assert end_of_turn(tiny_tokenizer(chat_template="{% for m in messages %}{{ m.content }}\n{% endfor %}")) is None


def test_input_goes_to_the_last_user_message() -> None:
    messages = (Message("user", "a"), Message("assistant", "b"), Message("user", "c"), Message("assistant", "d"))
    contents = [message.content for message in Example(messages, input="i").with_input()]
    assert contents == ["a", "b", "c\n\ni", "d"]


@pytest.mark.parametrize("key", ["name", "prefix", "channel"])
def test_what_else_a_message_says_is_written_or_noted(key: str) -> None:
    row = {"messages": [USER, {**ASSISTANT, key: "x"}]}
    writes_it = FULL.replace("{{ m.content }}", f"{{{{ m.{key} or '' }}}}{{{{ m.content }}}}")
    assert seen_and_learned(row, writes_it)[1] == ["x4<end>"]
    assert f"not written by the template: '{key}' of messages" in seen_and_learned(row, FULL)[2]
    assert "not written" not in seen_and_learned({"messages": TWO}, FULL)[2]
