"""Conversations as text, as the tokenizer's chat template writes them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from ..errors import ConfigError
from ..outside.templates import TemplateLimitError, TemplateRefusedError, apply_template
from .conversation import Example, Message, RowError


def render(
    messages: Sequence[Message], tokenizer: Any, example: Example, *, prompt: bool = False, template: str | None = None
) -> str:
    """Messages as a chat template writes them.

    Args:
        messages: of the example, or the first of them.
        tokenizer: whose template it is.
        example: whose tools and template options are given to it.
        prompt: whether the beginning of an assistant's turn follows.
        template: another one in the place of the tokenizer's own.

    Raises:
        RowError: the template refuses them.
    """
    try:
        return apply_template(
            tokenizer,
            template_messages(messages, tokenizer, template),
            tools=[*example.tools] or None,
            tokenize=False,
            add_generation_prompt=prompt,
            chat_template=template,
            **example.template_options,
        )
    except TemplateLimitError as error:
        raise endless(error) from error
    except TemplateRefusedError as error:
        raise RowError(f"is refused by the tokenizer's chat template ({error})") from error


def template_messages(messages: Sequence[Message], tokenizer: Any, template: str | None = None) -> list[dict[str, Any]]:
    """Messages as a chat template takes them.

    Args:
        messages: of a conversation.
        tokenizer: whose template it is.
        template: another one in the place of the tokenizer's own.
    """
    form = _form(tokenizer, template or str(getattr(tokenizer, "chat_template", None)), template is not None)
    return [message.as_dict(**form) for message in messages]


def endless(error: TemplateLimitError) -> ConfigError:
    """One row's time is enough: every other would take as long."""
    return ConfigError(
        f"the tokenizer's chat template is stopped: {error}; train with another template (--template alpaca or none), "
        "or correct chat_template.jinja"
    )


@lru_cache(maxsize=16)
def _form(tokenizer: Any, template: str, other: bool) -> dict[str, bool]:
    """How a template wants messages (`Message.as_dict`), which it does not say.

    Multimodal ones pass over the letters of a text; DeepSeek-V3's adds arguments to one, as if they were texts.

    Args:
        tokenizer: whose template it is.
        template: of the moment; it can be changed.
        other: whether it is not the tokenizer's own.
    """
    given = {"chat_template": template} if other else {}

    def writes(words: Sequence[str], messages: Sequence[Message], form: dict[str, bool]) -> bool:
        try:
            text = apply_template(tokenizer, [each.as_dict(**form) for each in messages], tokenize=False, **given)
        except TemplateLimitError as error:
            raise endless(error) from error
        except TemplateRefusedError:
            return False
        return all(word in text for word in words)

    says = [Message(role, f"{role} says xyz") for role in ("user", "assistant")]
    words = [message.content for message in says]
    parts = next((parts for parts in (False, True) if writes(words, says, {"parts": parts})), False)
    call = {"type": "function", "function": {"name": "f", "arguments": {"xyz": 1}}}
    calls = [says[0], Message("assistant", "", extra={"tool_calls": [call]})]
    forms = [{"parts": parts, "arguments_as_text": as_text} for as_text in (False, True)]
    return next((form for form in forms if writes(["xyz"], calls, form)), forms[0])


def end_of_turn(tokenizer: Any) -> int | None:
    """The token that ends an assistant's turn under the tokenizer's chat template; None where it has none.

    Args:
        tokenizer: a transformers tokenizer.
    """
    if not getattr(tokenizer, "chat_template", None):
        return None
    answer = "xyz"
    example = Example((Message("user", "a"), Message("assistant", answer), Message("user", "b")))
    try:
        text = render(example.messages, tokenizer, example)
    except RowError:
        return None
    after = text[text.rfind(answer) + len(answer) :] if answer in text else ""
    ids = tokenizer(after.lstrip(), add_special_tokens=False)["input_ids"]
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    return ids[0] if ids and ids[0] in special else None
