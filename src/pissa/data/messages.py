"""The messages of a conversation as rows have them: OpenAI's {role, content} and ShareGPT's {from, value}.

A message's other keys go to the chat template. `weight`: 0 (OpenAI), `loss`: false (ms-swift) or `train`: false
(axolotl) on an assistant's turn mean that it is seen and not learned.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..outside.documents import parse
from .conversation import OPENING, REASONING, ROLES, Message, RowError

SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "observation": "tool"}
FUNCTION_CALL = "function_call"
LEARNED_KEYS = ("weight", "loss", "train", "training")
OTHER_LEARNED_KEYS = (
    *("mask", "masked", "loss_mask", "loss_scale", "loss_weight", "train_detail", "trainable", "train_on_turn"),
    *("learn", "ignore"),
)
"""What other tools call it, each in another way round: such a key is refused."""
MEDIA = ("image", "images", "video", "videos", "audio", "audios")
Turn = Mapping[str, Any]


def conversation(messages: Any, key: str) -> tuple[Message, ...]:
    """The messages of a row.

    Args:
        messages: a list of {role, content} or {from, value}.
        key: the row's key that holds it, for messages.

    Raises:
        RowError: it is no conversation that ends with an assistant's message to learn.
    """
    if not isinstance(messages, list | tuple):
        raise RowError(f"has {kind(messages)} for '{key}', where a list belongs")
    turns = tuple(_message(message, f"message {number}") for number, message in enumerate(messages, 1))
    if not turns:
        raise RowError("has no messages")
    if turns[-1].role != "assistant":
        raise RowError(f"ends with a message of the role '{turns[-1].role}', so there is no response to learn")
    if next(turn.role for turn in turns if turn.role not in OPENING) != "user":
        raise RowError("has an assistant's message before the first user message")
    if not any(turn.learned for turn in turns if turn.role == "assistant"):
        raise RowError("has weight 0 on every assistant turn, so there is nothing to learn")
    return turns


def _message(message: Any, name: str) -> Message:
    if not isinstance(message, Mapping):
        raise RowError(f"has {kind(message)} for {name}, where an object with role and content belongs")
    turn: dict[str, Any] = {key: value for key, value in message.items() if value is not None}
    if "role" not in turn and "from" in turn:
        turn = _from_sharegpt(turn, name)
    role, content = turn.pop("role", None), turn.pop("content", None)
    if role not in ROLES:
        raise RowError(f"has the role {str(role)[:40]!r} in {name}; allowed: {', '.join(ROLES)}")
    if "function_call" in turn:
        raise RowError(f"has 'function_call' in {name}, which no chat template reads; write it as 'tool_calls'")
    if media := [key for key in MEDIA if turn.get(key)]:
        raise RowError(f"has {media[0]!r} in {name}: only text is trained; take the row out")
    learned = _learned(turn, name)
    if "tool_calls" in turn:
        turn["tool_calls"] = _tool_calls(turn["tool_calls"], name)
        if not turn["tool_calls"]:
            del turn["tool_calls"]
    says_more = role == "assistant" and any(turn.get(key) for key in ("tool_calls", *REASONING))
    if content is None and says_more:
        content = ""
    content = _joined(content, name)
    if role == "assistant" and not content.strip() and not says_more:
        raise RowError(f"has an empty response in {name}")
    return Message(role, content, learned, turn)


def _from_sharegpt(turn: Turn, name: str) -> dict[str, Any]:
    speaker, value = turn["from"], turn.get("value")
    rest = {key: held for key, held in turn.items() if key not in ("from", "value")}
    if speaker == FUNCTION_CALL:
        return {**rest, "role": "assistant", "tool_calls": _calls_in(value, name)}
    return {**rest, "role": SHAREGPT_ROLES.get(str(speaker), speaker), "content": value}


def _calls_in(value: Any, name: str) -> list[Any]:
    """ShareGPT's call of functions: JSON of one {name, arguments} or a list of them."""
    try:
        calls = parse(value.encode()) if isinstance(value, str) else value
    except ValueError as error:
        raise RowError(f"has a function_call in {name} that is no JSON ({error})") from error
    return list(calls) if isinstance(calls, list | tuple) else [calls]


def _tool_calls(calls: Any, name: str) -> list[dict[str, Any]]:
    """Calls as templates take them: {"type": "function", "function": {"name", "arguments"}}, the arguments an object.

    OpenAI's API has the arguments as a string of JSON, which a template would quote a second time.
    """
    if not isinstance(calls, list | tuple) or not all(isinstance(call, Mapping) for call in calls):
        raise RowError(f"has 'tool_calls' in {name} that is no list of objects")
    found = []
    for call in calls:
        given = call.get("function", call)
        function = {**given} if isinstance(given, Mapping) else {}
        if not isinstance(function.get("name"), str):
            raise RowError(f"has a tool call without the name of a function in {name}")
        if isinstance(function.get("arguments"), str):
            try:
                function["arguments"] = parse(function["arguments"].encode()) if function["arguments"].strip() else {}
            except ValueError as error:
                raise RowError(f"has a tool call in {name} whose arguments are no JSON ({error})") from error
        around = {key: value for key, value in call.items() if value is not None} if "function" in call else {}
        found.append({"type": "function", **around, "function": function})
    return found


def _learned(turn: dict[str, Any], name: str) -> bool:
    """Whether a turn is learned; the keys that say so are taken out of it."""
    if other := [key for key in OTHER_LEARNED_KEYS if key in turn]:
        raise RowError(f"has {other[0]!r} in {name}; say weight 0 (seen and not learned) or 1 (learned) instead")
    learned = True
    for key in LEARNED_KEYS:
        if key not in turn:
            continue
        value = turn.pop(key)
        if not isinstance(value, int | float) or value not in (0, 1):
            raise RowError(f"has {value!r} for {key!r} in {name}; allowed: 0 (not learned) and 1 (learned)")
        learned &= bool(value)
    return learned


def _joined(content: Any, name: str) -> str:
    """A message's text; parts of text, one after the other."""
    if not isinstance(content, list | tuple):
        return text_of(content, f"the content of {name}")
    parts = []
    for part in content:
        part_kind = part.get("type", "text") if isinstance(part, Mapping) else None
        if part_kind != "text":
            raise RowError(f"has a part of the type {str(part_kind)[:40]!r} in {name}; only text is trained")
        if own := [key for key in (*LEARNED_KEYS, *OTHER_LEARNED_KEYS) if key in part]:
            raise RowError(f"has {own[0]!r} in a part of {name}, which is learned as a whole or not at all")
        parts.append(text_of(part.get("text"), f"a part of {name}"))
    return "".join(parts)


def text_of(value: Any, name: str) -> str:
    """The value, which is text.

    Raises:
        RowError: it is not, or holds half a character.
    """
    if not isinstance(value, str):
        raise RowError(f"has {kind(value)} for {name}, where text belongs")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise RowError(f"has half a surrogate pair in {name}, which is no character") from None
    return value


def kind(value: Any) -> str:
    """What a value is, in JSON's words."""
    kinds = {type(None): "null", bool: "true or false", int: "a number", float: "a number", str: "a string"}
    if isinstance(value, Mapping):
        return "an object"
    if isinstance(value, list | tuple):
        return "a list"
    return kinds.get(type(value), f"a value of type {type(value).__name__}")
