"""Data rows of every accepted shape, as one thing: an `Example`, the messages of a conversation.

    {instruction, input?, output}   {question, answer}   {prompt, completion}   {messages: [{role, content}, ...]}

A single-turn row becomes one user and one assistant message; other keys are left alone. A row that cannot be used
raises `RowError` with the reason; whoever reads the rows gathers the reasons and raises one `DataError`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from ..errors import DataError

Role = Literal["system", "user", "assistant"]
ROLES: tuple[Role, ...] = get_args(Role)

SINGLE_TURN = (("instruction", "output"), ("question", "answer"), ("prompt", "completion"))
ROW_SHAPES = (
    "{instruction, input?, output}, {question, answer}, {prompt, completion} or {messages: [{role, content}, ...]}"
)
SHOWN_OFFENDERS = 5


class RowError(ValueError):
    """Why one row cannot be used; it completes the sentence "FILE:LINE …"."""


@dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: Role
    """Who speaks: "system", "user" or "assistant"."""
    content: str
    """What is said, without any template's markup."""


@dataclass(frozen=True)
class Example:
    """A conversation that ends with an assistant's message; every assistant message in it can be learned."""

    messages: tuple[Message, ...]
    """In order; after system messages, if any, the user speaks first, and the assistant last."""
    input: str = ""
    """Alpaca's second field: what the instruction, the user message, is to be applied to. Empty where there is none."""
    where: str = ""
    """Where the row stands ("file:line"), for messages."""

    @property
    def response(self) -> str:
        """The last assistant message."""
        return self.messages[-1].content


def example_from_row(row: Any, where: str = "") -> Example:
    """One row of any accepted shape as an `Example`.

    Args:
        row: a mapping in one of the shapes above; keys whose value is None count as absent.
        where: the row's place, kept in the example.

    Raises:
        RowError: the row is not an object, of no known shape or of two, a field is not text, or a response is empty.
    """
    if not isinstance(row, Mapping):
        raise RowError(f"is not an object but {_kind(row)}")
    shape = _shape(row)
    if shape == ("messages",):
        return Example(_conversation(row["messages"]), where=where)
    prompt, response = (_text(row[key], f"'{key}'") for key in shape)
    if not response.strip():
        raise RowError(f"has an empty response in '{shape[1]}'")
    extra = row.get("input") if shape[0] == "instruction" else None
    second = _text(extra, "'input'") if extra is not None else ""
    return Example((Message("user", prompt), Message("assistant", response)), second if second.strip() else "", where)


def row_of(example: Example) -> dict[str, Any]:
    """An example as a row that `example_from_row` reads as the same one."""
    if example.input:
        return {"instruction": example.messages[0].content, "input": example.input, "output": example.response}
    return {"messages": [{"role": message.role, "content": message.content} for message in example.messages]}


def unusable_rows(source: str, offenders: list[str], total: int, remedy: str) -> DataError:
    """One error for all rows that cannot be used: how many, the first few with place and reason, what to do."""
    shown = "; ".join(offenders[:SHOWN_OFFENDERS])
    rest = len(offenders) - SHOWN_OFFENDERS
    more = f"; and {rest} more" if rest > 0 else ""
    return DataError(f"{len(offenders)} of {total} rows of {source} cannot be used: {shown}{more}. {remedy}")


def examples_from_rows(rows: Iterable[Any], source: str = "the data") -> list[Example]:
    """Rows in memory as examples.

    Args:
        rows: mappings in the shapes above.
        source: what to call the rows in messages.

    Returns:
        One example per row, in order; row 1 is the first.

    Raises:
        DataError: there are no rows, or some cannot be used; the first few are named.
    """
    return collect(((f"{source}: row {number}", row) for number, row in enumerate(rows, 1)), source)


def collect(rows: Iterable[tuple[str, Any]], source: str) -> list[Example]:
    """Examples of (where, row) pairs; a row may be a `RowError` that its reader met.

    Raises:
        DataError: no rows, or rows that cannot be used.
    """
    examples: list[Example] = []
    offenders: list[str] = []
    for where, row in rows:
        try:
            if isinstance(row, RowError):
                raise row
            examples.append(example_from_row(row, where))
        except RowError as reason:
            offenders.append(f"{where} {reason}")
    if offenders:
        total = len(offenders) + len(examples)
        raise unusable_rows(source, offenders, total, f"A row is one of {ROW_SHAPES}, with text in every field")
    if not examples:
        raise DataError(f"{source} holds no rows; give at least one of {ROW_SHAPES}")
    return examples


def _shape(row: Mapping[str, Any]) -> tuple[str, ...]:
    """The keys of the one shape that the row has."""
    shapes = [
        shape
        for shape in (*SINGLE_TURN, ("messages",))
        if all(key in row for key in shape) and any(row[key] is not None for key in shape)
    ]
    if len(shapes) > 1:
        raise RowError(f"has two shapes at once, {shapes[0][0]!r} and {shapes[1][0]!r}: keep one")
    if not shapes:
        keys = [repr(key)[:40] for key, value in row.items() if value is not None]
        found = ", ".join(keys[:6]) + (", ..." if len(keys) > 6 else "")
        raise RowError(f"is of an unknown shape, its keys are {found}" if keys else "has no fields")
    return shapes[0]


def _conversation(messages: Any) -> tuple[Message, ...]:
    if not isinstance(messages, (list, tuple)):
        raise RowError(f"has {_kind(messages)} for 'messages', where a list belongs")
    turns = tuple(_message(message, f"message {number}") for number, message in enumerate(messages, 1))
    if not turns:
        raise RowError("has no messages")
    if turns[-1].role != "assistant":
        raise RowError(f"ends with a message of the role '{turns[-1].role}', so there is no response to learn")
    if next(turn.role for turn in turns if turn.role != "system") != "user":
        raise RowError("has an assistant's message before the first user message")
    return turns


def _message(message: Any, name: str) -> Message:
    if not isinstance(message, Mapping):
        raise RowError(f"has {_kind(message)} for {name}, where an object with role and content belongs")
    role = message.get("role")
    if role not in ROLES:
        raise RowError(f"has the role {str(role)[:40]!r} in {name}; allowed: {', '.join(ROLES)}")
    content = _text(message.get("content"), f"the content of {name}")
    if role == "assistant" and not content.strip():
        raise RowError(f"has an empty response in {name}")
    return Message(role, content)


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise RowError(f"has {_kind(value)} for {name}, where text belongs")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise RowError(f"has half a surrogate pair in {name}, which is no character") from None
    return value


def _kind(value: Any) -> str:
    """What a value is, in JSON's words."""
    kinds = {type(None): "null", bool: "true or false", int: "a number", float: "a number", str: "a string"}
    if isinstance(value, Mapping):
        return "an object"
    if isinstance(value, (list, tuple)):
        return "a list"
    return kinds.get(type(value), f"a value of type {type(value).__name__}")
