"""A Modelfile for Ollama: a GGUF with the prompt template that the run was trained with, and where its answers end.

Ollama writes prompts by a template of Go's, and the tokenizer's is one of Jinja's, a programming language. It is not
translated but observed: a few conversations are rendered, what stands before and after the messages of each role is
read off, and the result is held against further conversations. One that this does not reproduce is not written.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..data.chat_text import end_of_turn, render
from ..data.conversation import Example, Message, Role, RowError
from ..data.encode import default_bos
from ..data.prompts import ALPACA, Template, resolve_template
from ..outside.text import for_terminal

NAME = "Modelfile"
SYSTEM: Role = "system"
USER: Role = "user"
ASSISTANT: Role = "assistant"
CONTENTS = ("qzero", "qone", "qtwo", "qthree", "qfour", "qfive")
"""What is said where templates are observed: words that no template has."""
CONVERSATIONS = ("u", "su", "uau", "suau", "uauau", "suauau")
"""By the first letters of their roles; what a template makes of these it is taken to make of all."""
ALPACA_JINJA = (
    "{% for message in messages %}{% if message['role'] == 'user' %}{{ BEFORE + message['content'] + AFTER }}"
    "{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token }}{% endif %}{% endfor %}"
)


@dataclass(frozen=True)
class Turns:
    """A prompt template as what stands around the messages of each role."""

    alone: str
    """Before everything else, where the conversation has no system message."""
    around: Mapping[str, tuple[str, str]]
    """Role -> what stands before and after its content; without a role that the template refuses."""
    prompt: str
    """What the assistant's next turn begins with."""

    def render(self, messages: Sequence[tuple[str, str]]) -> str:
        """A conversation up to the assistant's next turn.

        Args:
            messages: role and content of each.
        """
        turns = (self.around[role][0] + content + self.around[role][1] for role, content in messages)
        return ("" if messages[0][0] == SYSTEM else self.alone) + "".join(turns) + self.prompt

    def go(self) -> str:
        """The same as a template of Go's."""
        branches, word = "", "if"
        for role, (before, after) in self.around.items():
            branches += f'{{{{ {word} eq .Role "{role}" }}}}{literal(before)}{{{{ .Content }}}}{literal(after)}'
            word = "else if"
        alone = f"{{{{ if not .System }}}}{literal(self.alone)}{{{{ end }}}}" if self.alone else ""
        return f"{alone}{{{{ range .Messages }}}}{branches}{{{{ end }}}}{{{{ end }}}}{literal(self.prompt)}"


def observed_turns(tokenizer: Any) -> Turns | None:
    """What stands around the messages of each role under a tokenizer's chat template.

    Args:
        tokenizer: a transformers tokenizer with a chat template.

    Returns:
        None for a template that writes a message otherwise depending on what stands around it, or characters that
        steer a terminal.
    """
    answer, asked = _rendered("uau", tokenizer), _rendered("u", tokenizer)
    open_end = _rendered("u", tokenizer, prompt=False)
    if answer is None or asked is None or open_end is None:
        return None
    first, second, third = CONTENTS[:3]
    before_first, after_user = _cut(open_end, first)
    prompt = _cut(asked, first)[1][len(after_user) :]
    after_assistant = _cut(_rendered("ua", tokenizer, prompt=False) or "", second)[1]
    before_assistant = _between(answer, first, second)[len(after_user) :]
    before_user = _between(answer, second, third)[len(after_assistant) :]
    around = {USER: (before_user, after_user), ASSISTANT: (before_assistant, after_assistant)}
    with_system = _rendered("su", tokenizer, prompt=False)
    if with_system is not None:
        between = _between(with_system, first, second)
        around = {SYSTEM: (_cut(with_system, first)[0], between.removesuffix(before_user)), **around}
    turns = Turns(before_first.removesuffix(before_user), around, prompt)
    shown = for_terminal(turns.go()) == turns.go()
    return turns if shown and _reproduces(turns, tokenizer) else None


def prompt_jinja(template: Template) -> str | None:
    """The prompts of alpaca and none as a chat template, for servers that go by the GGUF's; None for "chat"."""
    if template == "chat":
        return None
    before, after = ALPACA.split("{instruction}") if template == "alpaca" else ("", "")
    return ALPACA_JINJA.replace("BEFORE", _jinja(before)).replace("AFTER", _jinja(after))


def stop_texts(tokenizer: Any, template: Template, ends: Sequence[int] = ()) -> list[str]:
    """The tokens that end an answer, as text.

    Args:
        tokenizer: a transformers tokenizer.
        template: with "chat", the end of an assistant's turn is one of them.
        ends: further ones, by their ids: those of the model's generation settings.
    """
    ids = [tokenizer.eos_token_id, end_of_turn(tokenizer) if template == "chat" else None, *ends]
    return list(dict.fromkeys(tokenizer.convert_ids_to_tokens(end) for end in ids if end is not None))


def modelfile(weights: str, tokenizer: Any, template: Template, ends: Sequence[int] = ()) -> tuple[str, bool]:
    """The text of a Modelfile.

    Args:
        weights: name of the GGUF file beside it.
        tokenizer: that of the run.
        template: that of the run: "chat", "alpaca" or "none"; "auto" is resolved.
        ends: ids of the tokens that end an answer by the model's generation settings.

    Returns:
        The text, and whether it has the template: one that cannot be told by its turns is left to the GGUF's own.
    """
    template = resolve_template(template, tokenizer)
    lines = [f"# Made with pissa; prompt template: {template}.", f"FROM ./{weights}"]
    text = _go(tokenizer, template)
    if text is None:
        lines.append("# Its chat template cannot be written in Ollama's language: Ollama goes by the one in the GGUF.")
    else:
        lines.append(f'TEMPLATE """{text}"""')
    lines += [_stop(stop) for stop in stop_texts(tokenizer, template, ends)]
    return "\n".join([*lines, ""]), text is not None


def write_modelfile(directory: Path, weights: str, tokenizer: Any, template: Template, ends: Sequence[int]) -> bool:
    """Write a Modelfile; returns whether it has the template."""
    text, complete = modelfile(weights, tokenizer, template, ends)
    (directory / NAME).write_text(text, encoding="utf-8")
    return complete


def literal(text: str) -> str:
    """Text as a template of Go's puts it out, in a Modelfile between three quotation marks."""
    return re.sub(r'[{"]+', lambda run: f"{{{{ {json.dumps(run[0])} }}}}", text)


def _go(tokenizer: Any, template: Template) -> str | None:
    if template != "chat":
        before, after = ALPACA.split("{instruction}") if template == "alpaca" else ("", "")
        return f"{literal(before)}{{{{ .Prompt }}}}{literal(after)}"
    turns = observed_turns(tokenizer)
    if turns is None:
        return None
    bos = tokenizer.bos_token if default_bos(tokenizer) else ""  # which Ollama adds as well
    around = {role: (before, after) for role, (before, after) in turns.around.items()}
    if SYSTEM in around:
        around[SYSTEM] = (around[SYSTEM][0].removeprefix(bos), around[SYSTEM][1])
    return Turns(turns.alone.removeprefix(bos), around, turns.prompt).go()


def _reproduces(turns: Turns, tokenizer: Any) -> bool:
    """Whether every conversation comes out as the tokenizer's template writes it."""
    for roles in CONVERSATIONS:
        messages = _messages(roles)
        if any(role not in turns.around for role, _ in messages):
            continue
        if _rendered(roles, tokenizer) != turns.render(messages):
            return False
    return True


def _messages(roles: str) -> list[tuple[Role, str]]:
    """Role and content of each message of a conversation."""
    names: dict[str, Role] = {"s": SYSTEM, "u": USER, "a": ASSISTANT}
    return [(names[letter], CONTENTS[place]) for place, letter in enumerate(roles)]


def _rendered(roles: str, tokenizer: Any, *, prompt: bool = True) -> str | None:
    """A conversation as the tokenizer's template writes it; None where it refuses it, or leaves a message out."""
    messages = tuple(Message(role, content) for role, content in _messages(roles))
    try:
        text = render(messages, tokenizer, Example(messages), prompt=prompt)
    except RowError:
        return None
    return text if all(message.content in text for message in messages) else None


def _cut(text: str, content: str) -> tuple[str, str]:
    """What stands before and after a message."""
    before, _, after = text.rpartition(content)
    return before, after


def _between(text: str, first: str, second: str) -> str:
    return _cut(_cut(text, second)[0], first)[1]


def _jinja(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n") + "'"


def _stop(text: str) -> str:
    """The line for a token that ends an answer; what would end the line itself is a comment."""
    if not text.isprintable() or '"""' in text:
        return f"# Not written here: answers end at {text!a} too."
    return "PARAMETER stop " + (f'"{text}"' if '"' not in text else f'"""{text}"""')
