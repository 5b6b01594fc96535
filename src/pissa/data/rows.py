"""Data rows of every accepted shape as `Example`s.

    {instruction, input?, output}   {question, answer}   {prompt, completion}   {text}
    {messages: [{role, content}, ...]}   {conversations: [{from, value}, ...]}

A row of a question and an answer becomes one user and one assistant message. Keys that change what is learned are
used, or the row is refused by name: `system`, `history`, `tools` and `chat_template_kwargs` beside any shape;
`tool_calls`, reasoning and `weight` in a message (`messages.py`). Other keys are left alone, and one warning names
them. A row that cannot be used raises `RowError` with the reason; whoever reads the rows gathers the reasons and raises
one `DataError`.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import Any

from ..errors import DataError, listed
from ..outside.documents import parse
from ..outside.schema import short
from .conversation import REASONING, Example, Message, RowError
from .messages import LEARNED_KEYS, MEDIA, OTHER_LEARNED_KEYS, conversation, kind, text_of

SINGLE_TURN = (("instruction", "output"), ("question", "answer"), ("prompt", "completion"))
CONVERSATIONS = (("messages",), ("conversations",))
ROW_SHAPES = (
    "{instruction, input?, output}, {question, answer}, {prompt, completion}, {messages: [{role, content}, ...]}, "
    "{conversations: [{from, value}, ...]} or {text}"
)
SHOWN_OFFENDERS, SHOWN_UNREAD = 5, 8
PREFERENCE = ("chosen", "rejected", "rejected_response", "rejected_messages", "kto_tag")
INSTEAD = {
    **dict.fromkeys(("functions",), "which no chat template reads; write it as 'tools'"),
    **dict.fromkeys(("function_call",), "which no chat template reads; write it as 'tool_calls'"),
    **dict.fromkeys(("system_prompt", "system_message"), "which is not read; write it as 'system'"),
    **dict.fromkeys(("context", "passage", "choices", "options"), "which is not read; put it into the question"),
    **dict.fromkeys(REASONING, "which is read in a message alone; write the row as messages"),
    **dict.fromkeys(("input_ids", "labels", *OTHER_LEARNED_KEYS), "which is not read; take it out, or the row"),
}
"""Keys that would change what is learned -> what to do about them."""
WITH_TEXT = ("system", "history", "tools", "input", "chat_template_kwargs")
BESIDE = ("system", "history", "tools", "input", "chat_template_kwargs", *LEARNED_KEYS)
"""Keys that are read beside a shape's own."""
NOT_OPTIONS = (
    *("messages", "conversation", "tools", "chat_template", "add_generation_prompt", "continue_final_message"),
    *("tokenize", "padding", "truncation", "max_length", "return_tensors", "return_dict"),
    *("return_assistant_tokens_mask", "tokenizer_kwargs", "sanitize_control_tokens"),
)
"""Arguments of `apply_chat_template` that are training's own."""


def example_from_row(row: Any, where: str = "") -> Example:
    """One row of any accepted shape as an `Example`.

    Args:
        row: a mapping in one of the shapes above; keys whose value is None count as absent.
        where: the row's place, kept in the example.

    Raises:
        RowError: the row is not an object, of no known shape or of two, a field is not text, a response is empty, or a
            key would change what is learned and cannot be used.
    """
    if not isinstance(row, Mapping):
        raise RowError(f"is not an object but {kind(row)}")
    given, row = row, {key: value for key, value in row.items() if value is not None}
    _refuse_unused(row)
    shape = _shape(row, given)
    _check_shape_takes(row, shape)
    if shape == ("text",):
        text = text_of(row["text"], "'text'")
        if not text.strip():
            raise RowError("has an empty 'text'")
        return Example(where=where, text=text)
    if shape in CONVERSATIONS:
        messages = conversation(row[shape[0]], shape[0])
    elif isinstance(row[shape[0]], list | tuple):
        messages = _continued(row[shape[0]], row[shape[1]], shape)
    else:
        messages = _single_turn(row, shape)
    extra = text_of(row["input"], "'input'") if shape[0] == "instruction" and "input" in row else ""
    return Example(
        _with_system(row, messages), extra if extra.strip() else "", where, _tools(row), _template_options(row)
    )


def unusable_rows(source: str, offenders: list[str], total: int, remedy: str) -> DataError:
    """One error for all rows that cannot be used: how many, the first few with place and reason, what to do."""
    shown = listed(offenders, SHOWN_OFFENDERS, "; ")
    return DataError(f"{len(offenders)} of {total} rows of {source} cannot be used: {shown}. {remedy}")


def examples_from_rows(rows: Iterable[Any], source: str = "the data") -> list[Example]:
    """Rows in memory as examples.

    Args:
        rows: mappings in the shapes above; an `Example` among them is taken as it is.
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
    unread: dict[str, int] = {}
    for where, row in rows:
        try:
            if isinstance(row, RowError):
                raise row
            examples.append(row if isinstance(row, Example) else example_from_row(row, where))
            for key in _unread(row):
                unread[key] = unread.get(key, 0) + 1
        except RowError as reason:
            offenders.append(f"{where} {reason}")
    if offenders:
        total = len(offenders) + len(examples)
        raise unusable_rows(source, offenders, total, f"A row is one of {ROW_SHAPES}, with text in every field")
    if not examples:
        raise DataError(f"{source} holds no rows; give at least one of {ROW_SHAPES}")
    if unread:
        named = listed((f"{short(key)} (in {count})" for key, count in unread.items()), SHOWN_UNREAD)
        warnings.warn(
            f"not read in the rows of {source}: {named}; what the model is to see or learn of them belongs into "
            "the fields of the row's shape",
            stacklevel=3,
        )
    return examples


def _unread(row: Any) -> list[str]:
    """The keys of a usable row that say something, and that nothing reads."""
    if isinstance(row, Example):
        return []
    given = {key: value for key, value in row.items() if value is not None}
    read = {*_shape(given, given), *BESIDE, *(("text",) if "text" in given else ())}
    return [key for key, value in given.items() if key not in read and value not in ("", [], {})]


def _refuse_unused(row: Mapping[str, Any]) -> None:
    """Refuse keys that say that something else is to be learned than what would be.

    Raises:
        RowError: naming the key.
    """
    if media := [key for key in MEDIA if row.get(key)]:
        raise RowError(f"has {media[0]!r}: only text is trained; take the row out")
    if any(key in row for key in PREFERENCE):
        raise RowError(
            "is preference data (chosen, rejected or kto_tag), and one response is learned; use TRL's DPOTrainer or "
            "KTOTrainer on a model that `pissa.adapt` made, or leave only the response that is to be learned"
        )
    if isinstance(row.get("label"), bool):
        raise RowError("has a 'label' that says whether its answer is wanted; take it out, or the row")
    for key in LEARNED_KEYS:
        if row.get(key, 1) not in (1, "1"):
            raise RowError(f"has {row[key]!r} for {key!r}: all rows weigh the same; take it out, or the row")
    for key, instead in INSTEAD.items():
        if row.get(key):
            raise RowError(f"has {key!r}, {instead}")


def _check_shape_takes(row: Mapping[str, Any], shape: tuple[str, ...]) -> None:
    """Refuse keys that rows of other shapes have, and this one does not.

    Raises:
        RowError: naming the key.
    """
    refused = WITH_TEXT if shape == ("text",) else ("history",) if shape in CONVERSATIONS else ()
    if "instruction" not in shape:
        refused = (*refused, "input")
    if found := [key for key in refused if row.get(key)]:
        raise RowError(f"has {found[0]!r} beside '{shape[0]}', where it is not read; put it into that, or take it out")


def _shape(row: Mapping[str, Any], given: Mapping[str, Any]) -> tuple[str, ...]:
    """The keys of the one shape that the row has; plain text only where there is no other.

    Args:
        row: without what is null.
        given: with it.
    """
    shapes = [shape for shape in (*SINGLE_TURN, *CONVERSATIONS) if all(key in row for key in shape)]
    if not shapes and "text" in row:
        return ("text",)
    if len(shapes) > 1:
        raise RowError(f"has two shapes at once, {shapes[0][0]!r} and {shapes[1][0]!r}: keep one")
    if not shapes:
        for shape in SINGLE_TURN:
            empty = [key for key in shape if key in given and key not in row]
            if len(empty) == 1 and all(key in given for key in shape):
                raise RowError(f"has null for '{empty[0]}', where text belongs")
        keys = [repr(key)[:40] for key in row]
        found = ", ".join(keys[:6]) + (", ..." if len(keys) > 6 else "")
        raise RowError(f"is of an unknown shape, its keys are {found}" if keys else "has no fields")
    return shapes[0]


def _single_turn(row: Mapping[str, Any], shape: tuple[str, ...]) -> tuple[Message, ...]:
    prompt, response = (text_of(row[key], f"'{key}'") for key in shape)
    if not response.strip():
        raise RowError(f"has an empty response in '{shape[1]}'")
    return (*_history(row), Message("user", prompt), Message("assistant", response))


def _history(row: Mapping[str, Any]) -> tuple[Message, ...]:
    """Earlier exchanges of an Alpaca row: [question, answer] pairs."""
    pairs: Any = row.get("history") or ()
    if not isinstance(pairs, list | tuple) or not all(isinstance(p, list | tuple) and len(p) == 2 for p in pairs):
        raise RowError("has a 'history' that is no list of [question, answer] pairs")
    turns: list[Message] = []
    for number, (asked, answered) in enumerate(pairs, 1):
        turns.append(Message("user", text_of(asked, f"question {number} of 'history'")))
        turns.append(Message("assistant", text_of(answered, f"answer {number} of 'history'")))
    return tuple(turns)


def _continued(prompt: Any, completion: Any, shape: tuple[str, ...]) -> tuple[Message, ...]:
    """TRL's conversational prompt and completion: only the completion is learned."""
    if isinstance(completion, str):
        completion = [{"role": "assistant", "content": completion}]
    if not isinstance(prompt, list | tuple) or not isinstance(completion, list | tuple):
        raise RowError(f"has {kind(completion)} for '{shape[1]}', where a list of messages belongs")
    turns = conversation([*prompt, *completion], "prompt and completion")
    return tuple(
        Message(
            turn.role, turn.content, turn.learned and (turn.role != "assistant" or number >= len(prompt)), turn.extra
        )
        for number, turn in enumerate(turns)
    )


def _with_system(row: Mapping[str, Any], messages: tuple[Message, ...]) -> tuple[Message, ...]:
    system = text_of(row["system"], "'system'") if "system" in row else ""
    if not system.strip():
        return messages
    if messages[0].role == "system":
        raise RowError("has 'system' beside a system message: keep one")
    return (Message("system", system), *messages)


def _tools(row: Mapping[str, Any]) -> tuple[Mapping[str, Any], ...]:
    tools = row.get("tools") or ()
    if isinstance(tools, str):
        try:
            tools = parse(tools.encode()) if tools.strip() else ()
        except ValueError as error:
            raise RowError(f"has 'tools' that is no JSON ({error})") from error
    if not isinstance(tools, list | tuple) or not all(isinstance(tool, Mapping) for tool in tools):
        raise RowError("has 'tools' that is no list of JSON schemas")
    return tuple(tools)


def _template_options(row: Mapping[str, Any]) -> Mapping[str, Any]:
    options = row.get("chat_template_kwargs") or {}
    if not isinstance(options, Mapping):
        raise RowError(f"has {kind(options)} for 'chat_template_kwargs', where an object belongs")
    if own := [key for key in NOT_OPTIONS if key in options]:
        raise RowError(f"has {own[0]!r} in 'chat_template_kwargs', which is training's own; take it out")
    return options
