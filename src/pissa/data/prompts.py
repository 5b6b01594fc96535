"""Prompt templates: an example as text, in pieces that are learned (the responses) or not (all the rest).

"alpaca": the published Alpaca prompt, with or without an input; the response follows "### Response:" directly.
"chat":   the tokenizer's own chat template; every assistant turn is learned with its end-of-turn marker.
"none":   prompt and completion as they are; an Alpaca input follows its instruction after an empty line.

alpaca and none hold one exchange: one user message, one assistant message.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, get_args

from ..errors import ConfigError
from .rows import Example, Message, RowError

Template = Literal["alpaca", "chat", "none"]
TEMPLATES: tuple[Template, ...] = get_args(Template)

ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)
ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)


class Piece(NamedTuple):
    """A stretch of an example's text."""

    text: str
    learned: bool


def check_template(template: str, tokenizer: Any) -> None:
    """Refuse a template that does not exist, or that the tokenizer lacks.

    Raises:
        ConfigError: the template is unknown, or is "chat" and the tokenizer has no chat template.
    """
    if template not in TEMPLATES:
        raise ConfigError(f"template is {template!r}; allowed: {', '.join(TEMPLATES)}")
    if template == "chat" and not getattr(tokenizer, "chat_template", None):
        raise ConfigError("template is 'chat', but the tokenizer has no chat template; use alpaca or none")


def pieces(example: Example, tokenizer: Any, template: Template) -> list[Piece]:
    """An example as text to learn from; the texts joined are what the model sees, without bos and final eos.

    Args:
        example: the conversation.
        tokenizer: a transformers tokenizer; used by "chat" alone.
        template: how a prompt is written.

    Raises:
        RowError: the example does not fit the template.
    """
    if template == "chat":
        return _chat_pieces(_with_input(example), tokenizer)
    return [Piece(prompt_text(example, tokenizer, template), False), Piece(example.response, True)]


def prompt_text(example: Example, tokenizer: Any, template: Template) -> str:
    """What stands before the last assistant message: the text after which a model is to generate its own.

    Args:
        example: the conversation.
        tokenizer: a transformers tokenizer; used by "chat" alone.
        template: how a prompt is written.

    Raises:
        RowError: the example does not fit the template.
    """
    if template == "chat":
        return _render(_with_input(example)[:-1], tokenizer, prompt=True)
    if [message.role for message in example.messages] != ["user", "assistant"]:
        raise RowError(
            f"is not one user and one assistant message, which is all that template '{template}' holds; "
            "'chat' holds more"
        )
    instruction = example.messages[0].content
    if template == "none":
        return f"{instruction}\n\n{example.input}" if example.input else instruction
    if example.input:
        return ALPACA_WITH_INPUT.format(instruction=instruction, input=example.input)
    return ALPACA.format(instruction=instruction)


def _with_input(example: Example) -> tuple[Message, ...]:
    if not example.input:
        return example.messages
    first, *rest = example.messages
    return (Message(first.role, f"{first.content}\n\n{example.input}"), *rest)


def _chat_pieces(messages: tuple[Message, ...], tokenizer: Any) -> list[Piece]:
    """Cut the rendered conversation where each assistant turn begins and ends.

    A turn begins where the template's own generation prompt ends, so that what is learned is what is generated later.
    """
    whole = _render(messages, tokenizer)
    found: list[Piece] = []
    done = 0
    for index, message in enumerate(messages):
        if message.role != "assistant":
            continue
        before = _render(messages[:index], tokenizer, prompt=True)
        through = _render(messages[: index + 1], tokenizer)
        if len(before) < done or not (through.startswith(before) and whole.startswith(through)):
            raise RowError(
                "is changed by the chat template from turn to turn, so its assistant turns cannot be told apart; "
                "split it into rows of one turn, or use template 'alpaca'"
            )
        response = _without_line_end(through[len(before) :], message.content)
        found += [Piece(whole[done : len(before)], False), Piece(response, True)]
        done = len(before) + len(response)
    return found


def _without_line_end(turn: str, content: str) -> str:
    """A turn up to its end-of-turn marker: white space after the marker belongs to the layout, not to the response."""
    stripped = turn.rstrip()
    return turn if stripped.endswith(content.rstrip()) else stripped


def _render(messages: tuple[Message, ...], tokenizer: Any, *, prompt: bool = False) -> str:
    from jinja2.exceptions import TemplateError

    turns = [{"role": message.role, "content": message.content} for message in messages]
    try:
        return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=prompt)
    except TemplateError as error:
        raise RowError(f"is refused by the tokenizer's chat template ({' '.join(str(error).split())})") from error
