"""What a prompt template shows a model before the response."""

from __future__ import annotations

from typing import Any

import pytest

from pissa.data.conversation import Example, Message, RowError
from pissa.data.prompts import prompt_text, resolve_template
from pissa.errors import ConfigError
from tiny import tiny_tokenizer

ONE = Example((Message("user", "Add {2} and 3."), Message("assistant", "5")))
WITH_INPUT = Example(ONE.messages, input="Use words.")
TWO = Example(
    (
        Message("system", "Be brief."),
        Message("user", "2 + 2?"),
        Message("assistant", "4"),
        Message("user", "3 + 3?"),
        Message("assistant", "6 "),
    )
)
CALL = {"type": "function", "function": {"name": "add", "arguments": {}}}


def test_alpaca_prompt_is_the_published_text() -> None:
    assert prompt_text(ONE, None, "alpaca") == (
        "Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd {2} and 3.\n\n### Response:"
    )


def test_alpaca_prompt_with_input_is_the_published_text() -> None:
    assert prompt_text(WITH_INPUT, None, "alpaca") == (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd {2} and 3.\n\n### Input:\nUse words.\n\n### Response:"
    )


def test_none_adds_nothing() -> None:
    assert prompt_text(ONE, None, "none") == "Add {2} and 3."
    assert prompt_text(WITH_INPUT, None, "none") == "Add {2} and 3.\n\nUse words."


def test_chat_prompt_is_the_conversation_before_the_response() -> None:
    assert prompt_text(TWO, tiny_tokenizer(), "chat") == (
        "[system]\nBe brief.<end>\n[user]\n2 + 2?<end>\n[assistant]\n4<end>\n[user]\n3 + 3?<end>\n[assistant]\n"
    )
    assert prompt_text(WITH_INPUT, tiny_tokenizer(), "auto") == (
        "[user]\nAdd {2} and 3.\n\nUse words.<end>\n[assistant]\n"
    )


def test_chat_template_that_refuses_a_role_is_quoted() -> None:
    tokenizer = tiny_tokenizer(chat_template="{{ raise_exception('System role not supported') }}")
    with pytest.raises(RowError, match="System role not supported"):
        prompt_text(TWO, tokenizer, "chat")


@pytest.mark.parametrize("template", ["alpaca", "none"])
@pytest.mark.parametrize(
    ("example", "named"),
    [
        (TWO, "not one user and one assistant message"),
        (Example(ONE.messages, tools=(CALL,)), "tools"),
        (Example(ONE.messages, template_options={"enable_thinking": False}), "template_options"),
        (Example((ONE.messages[0], Message("assistant", "5", extra={"tool_calls": [CALL]}))), "tool_calls"),
        (Example((ONE.messages[0], Message("assistant", "5", extra={"reasoning": "hm"}))), "reasoning"),
    ],
)
def test_what_a_single_turn_template_cannot_hold_is_refused(template: Any, example: Example, named: str) -> None:
    with pytest.raises(RowError, match=f"{named}.*'chat' holds more"):
        prompt_text(example, None, template)


def test_plain_text_has_no_prompt() -> None:
    for template in ("chat", "alpaca", "none"):
        with pytest.raises(RowError, match="no prompt"):
            prompt_text(Example(text="words"), tiny_tokenizer(), template)


def test_templates_that_cannot_be_used_are_refused() -> None:
    with pytest.raises(ConfigError, match="allowed: auto, chat, alpaca, none"):
        resolve_template("vicuna", None)
    with pytest.raises(ConfigError, match="no chat template"):
        resolve_template("chat", tiny_tokenizer(chat_template=None))
