"""What a prompt template shows a model, and which part of it is learned."""

from __future__ import annotations

import pytest

from pissa.data.prompts import Piece, check_template, pieces, prompt_text
from pissa.data.rows import Example, Message, RowError
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
    assert pieces(ONE, None, "none") == [Piece("Add {2} and 3.", False), Piece("5", True)]
    assert prompt_text(WITH_INPUT, None, "none") == "Add {2} and 3.\n\nUse words."


def test_chat_learns_every_assistant_turn_with_its_end() -> None:
    assert pieces(TWO, tiny_tokenizer(), "chat") == [
        Piece("[system]\nBe brief.<end>\n[user]\n2 + 2?<end>\n[assistant]\n", False),
        Piece("4<end>", True),
        Piece("\n[user]\n3 + 3?<end>\n[assistant]\n", False),
        Piece("6 <end>", True),
    ]


def test_chat_turn_without_marker_ends_with_its_line() -> None:
    template = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    found = pieces(TWO, tiny_tokenizer(chat_template=template), "chat")
    assert [piece.text for piece in found if piece.learned] == ["4\n", "6 \n"]


@pytest.mark.parametrize("example", [ONE, WITH_INPUT, TWO])
def test_chat_prompt_is_where_the_last_response_begins(example: Example) -> None:
    tokenizer = tiny_tokenizer()
    found = pieces(example, tokenizer, "chat")
    assert prompt_text(example, tokenizer, "chat") == "".join(piece.text for piece in found[:-1])


def test_chat_template_that_rewrites_earlier_turns_is_refused() -> None:
    template = (
        "{% for m in messages %}[{{ m['role'] }}]{% if loop.last and m['role'] == 'assistant' %}<think>{% endif %}"
        "{{ m['content'] }}<end>{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    tokenizer = tiny_tokenizer(chat_template=template)
    assert pieces(ONE, tokenizer, "chat")[-1] == Piece("<think>5<end>", True)
    with pytest.raises(RowError, match="rows of one turn"):
        pieces(TWO, tokenizer, "chat")


def test_chat_template_that_refuses_a_role_is_quoted() -> None:
    tokenizer = tiny_tokenizer(chat_template="{{ raise_exception('System role not supported') }}")
    with pytest.raises(RowError, match="System role not supported"):
        pieces(TWO, tokenizer, "chat")


@pytest.mark.parametrize("template", ["alpaca", "none"])
def test_several_turns_do_not_fit_single_turn_templates(template: str) -> None:
    with pytest.raises(RowError, match="'chat' holds more"):
        pieces(TWO, None, template)  # type: ignore[arg-type]


def test_templates_that_cannot_be_used_are_refused() -> None:
    with pytest.raises(ConfigError, match="allowed: alpaca, chat, none"):
        check_template("vicuna", None)
    with pytest.raises(ConfigError, match="no chat template"):
        check_template("chat", tiny_tokenizer(chat_template=None))
