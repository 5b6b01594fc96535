"""An `Example`: one row of data, whatever its shape was, as the messages of a conversation or as a plain text."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

Role = Literal["system", "developer", "user", "assistant", "tool"]
ROLES: tuple[Role, ...] = get_args(Role)
OPENING: tuple[Role, ...] = ("system", "developer")
"""Roles that may speak before the first user message."""
REASONING = ("reasoning_content", "thinking", "reasoning")
"""Names under which a message keeps what was thought before its content; transformers reads them as one."""


class RowError(ValueError):
    """Why one row cannot be used; it completes the sentence "FILE:LINE …"."""


@dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: Role
    """Who speaks."""
    content: str
    """What is said, without any template's markup."""
    learned: bool = True
    """Whether training learns it where the role is assistant; False for a turn whose weight is 0."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """What else the chat template may write: tool_calls, reasoning_content, name, tool_call_id …"""

    def as_dict(self, *, parts: bool = False, arguments_as_text: bool = False) -> dict[str, Any]:
        """The message as a chat template takes it.

        Args:
            parts: give the content as a list of one text, which templates of multimodal models ask for.
            arguments_as_text: give the arguments of calls as JSON in a string, which DeepSeek-V3's template asks for.
        """
        content = [{"type": "text", "text": self.content}] if parts else self.content
        calls = self.extra.get("tool_calls")
        texts = {"tool_calls": [_as_text(call) for call in calls]} if calls and arguments_as_text else {}
        return {"role": self.role, "content": content, **self.extra, **texts}


def _as_text(call: Mapping[str, Any]) -> dict[str, Any]:
    """A call of a function whose arguments are JSON in a string."""
    function = call["function"]
    text = json.dumps(function.get("arguments", {}), ensure_ascii=False)
    return {**call, "function": {**function, "arguments": text}}


@dataclass(frozen=True)
class Example:
    """A conversation that ends with an assistant's message, or a plain text to go on from nothing."""

    messages: tuple[Message, ...] = ()
    """In order; after system messages, if any, the user speaks first, and the assistant last. Empty for a text."""
    input: str = ""
    """Alpaca's second field: what the instruction, the last user message, is to be applied to. Empty for none."""
    where: str = ""
    """Where the row stands ("file:line"), for messages."""
    tools: tuple[Mapping[str, Any], ...] = ()
    """JSON schemas of the functions that the assistant may call; the chat template writes them."""
    template_options: Mapping[str, Any] = field(default_factory=dict)
    """The row's own arguments of the chat template, such as enable_thinking ("chat_template_kwargs")."""
    text: str | None = None
    """All of the row where it is plain text, of which every token is learned."""

    @property
    def response(self) -> str:
        """The last assistant message; of a plain text the text itself."""
        return self.messages[-1].content if self.text is None else self.text

    def with_input(self) -> tuple[Message, ...]:
        """The messages, with `input` after an empty line in the last user message."""
        if not self.input:
            return self.messages
        at = max(index for index, message in enumerate(self.messages) if message.role == "user")
        asked = self.messages[at]
        whole = Message("user", f"{asked.content}\n\n{self.input}", asked.learned, asked.extra)
        return (*self.messages[:at], whole, *self.messages[at + 1 :])

    def content(self) -> dict[str, Any]:
        """Everything but the row's place, as JSON holds it: equal for rows that say the same."""
        return {name: value for name, value in asdict(self).items() if name != "where"}
