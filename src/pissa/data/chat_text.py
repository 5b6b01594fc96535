"""Conversations as text, as the tokenizer's chat template writes them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from ..errors import ConfigError
from ..outside.templates import TemplateLimitError, TemplateRefusedError, apply_template
from .conversation import Example, Message, RowError


def render(messages: Sequence[Message], tokenizer: Any, example: Example, *, prompt: bool = False) -> str:
    """Messages as the tokenizer's chat template writes them.

    Args:
        messages: of the example, or the first of them.
        tokenizer: whose template it is.
        example: whose tools and template options are given to it.
        prompt: whether the beginning of an assistant's turn follows.

    Raises:
        RowError: the template refuses them.
    """
    try:
        return apply_template(
            tokenizer,
            template_messages(messages, tokenizer),
            tools=[*example.tools] or None,
            tokenize=False,
            add_generation_prompt=prompt,
            **example.template_options,
        )
    except TemplateLimitError as error:
        raise endless(error) from error
    except TemplateRefusedError as error:
        raise RowError(f"is refused by the tokenizer's chat template ({error})") from error


def template_messages(messages: Sequence[Message], tokenizer: Any) -> list[dict[str, Any]]:
    """Messages as the tokenizer's chat template takes them.

    Args:
        messages: of a conversation.
        tokenizer: whose template it is.
    """
    parts = _wants_parts(tokenizer, str(getattr(tokenizer, "chat_template", None)))
    return [message.as_dict(parts=parts) for message in messages]


def endless(error: TemplateLimitError) -> ConfigError:
    """One row's time is enough: every other would take as long."""
    return ConfigError(
        f"the tokenizer's chat template is stopped: {error}; train with another template (--template alpaca or none), "
        "or correct chat_template.jinja"
    )


@lru_cache(maxsize=16)
def _wants_parts(tokenizer: Any, template: str) -> bool:
    """Whether a template writes a content only as a list of parts: multimodal ones pass over the letters of a text.

    Args:
        tokenizer: whose template it is.
        template: of the moment; it can be changed.
    """
    for parts in (False, True):
        probe = [Message(role, f"{role} says xyz").as_dict(parts=parts) for role in ("user", "assistant")]
        try:
            text = apply_template(tokenizer, probe, tokenize=False)
        except TemplateLimitError as error:
            raise endless(error) from error
        except TemplateRefusedError:
            continue
        if all(f"{role} says xyz" in text for role in ("user", "assistant")):
            return parts
    return False


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
