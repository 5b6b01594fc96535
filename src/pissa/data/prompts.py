"""Prompt templates: what a model sees before the response that it is to learn, or to generate.

"auto":   "chat" where the tokenizer has a chat template, else "alpaca".
"chat":   the tokenizer's own chat template (`chat_text.py`).
"alpaca": the published Alpaca prompt, with or without an input; the response follows "### Response:" directly.
"none":   the prompt as it is; an Alpaca input follows its instruction after an empty line.

alpaca and none hold one exchange: one user message, one assistant message. Plain text has no prompt under any of them.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

from ..errors import ConfigError
from .conversation import REASONING, Example, RowError

Template = Literal["auto", "chat", "alpaca", "none"]
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


def resolve_template(template: str, tokenizer: Any) -> Template:
    """The template by its own name, "auto" resolved.

    Raises:
        ConfigError: the template is unknown, or is "chat" and the tokenizer has no chat template.
    """
    has_chat = bool(getattr(tokenizer, "chat_template", None))
    if template == "auto":
        return "chat" if has_chat else "alpaca"
    if template not in TEMPLATES:
        raise ConfigError(f"template is {template!r}; allowed: {', '.join(TEMPLATES)}")
    if template == "chat" and not has_chat:
        raise ConfigError("template is 'chat', but the tokenizer has no chat template; use alpaca or none")
    return template


def prompt_text(example: Example, tokenizer: Any, template: Template) -> str:
    """What stands before the last assistant message: the text after which a model is to generate its own.

    Args:
        example: the conversation.
        tokenizer: a transformers tokenizer; used by "auto" and "chat" alone.
        template: how a prompt is written.

    Raises:
        RowError: the example does not fit the template.
    """
    if template in ("auto", "chat") and resolve_template(template, tokenizer) == "chat":
        from .chat_text import render

        if example.text is not None:
            raise RowError("is plain text, which has no prompt")
        return render(example.with_input()[:-1], tokenizer, example, prompt=True)
    instruction = _only_instruction(example, template)
    if template == "none":
        return f"{instruction}\n\n{example.input}" if example.input else instruction
    if example.input:
        return ALPACA_WITH_INPUT.format(instruction=instruction, input=example.input)
    return ALPACA.format(instruction=instruction)


def _only_instruction(example: Example, template: Template) -> str:
    """The user's message of an example that holds nothing which only a chat template could write."""
    if example.text is not None:
        raise RowError("is plain text, which has no prompt")
    if [message.role for message in example.messages] != ["user", "assistant"]:
        raise RowError(
            f"is not one user and one assistant message, which is all that template '{template}' holds; "
            "'chat' holds more"
        )
    written = [key for key in ("tools", "template_options") if getattr(example, key)]
    for message in example.messages:
        written += [key for key in ("tool_calls", *REASONING) if message.extra.get(key)]
    if written:
        raise RowError(f"has {written[0]}, which template '{template}' does not hold; 'chat' holds more")
    return example.messages[0].content
