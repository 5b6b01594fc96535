"""Talking to a model: a quick look at what it says before it is served.

The prompt is what training and evaluation make of it, in the run's own template; what writes is transformers'
`generate`, one reply at a time, each handed on word by word.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, NamedTuple

import torch
from transformers import TextStreamer

from ..data.chat_text import end_of_turn
from ..data.conversation import Example, Message, RowError
from ..data.encode import default_bos, token_ids
from ..data.prompts import Template, prompt_text, resolve_template
from ..errors import ConfigError, DataError
from ..live.record import record_of
from ..live.reference import reference
from .chat_options import BASE, ChatOptions
from .generate import decoding, generating
from .load import Subject, load_subject


class Reply(NamedTuple):
    """What a model said."""

    text: str
    """Without special tokens."""
    end: Literal["stop", "length", "interrupted"]
    """Whether the model ended it, or it was cut for its length, or by Ctrl-C."""
    tokens: int
    """Tokens of the reply, its end included."""


class Chat:
    """A conversation with one model."""

    def __init__(self, name: str, subject: Subject, options: ChatOptions, *, of_base: bool = False) -> None:
        """Begin one.

        Args:
            name: what the model is called.
            subject: the model.
            options: how to talk to it.
            of_base: talk to the base of the subject's adapter.

        Raises:
            ConfigError: the template does not fit the tokenizer or the options.
        """
        self.name = name
        self._model, self._tokenizer = subject.model, subject.tokenizer
        self._options, self._of_base = options, of_base
        self.template: Template = resolve_template(options.template or subject.template or "auto", subject.tokenizer)
        if options.system and self.template != "chat":
            raise ConfigError(f"template '{self.template}' holds no system message; leave --system out")
        self.remembers = options.history and self.template == "chat"
        self._messages: tuple[Message, ...] = ()
        self._replies = 0
        self.reset()

    def reset(self) -> None:
        """Forget all that was said."""
        system = self._options.system
        self._messages = (Message("system", system),) if system else ()
        self._replies = 0

    def reply(self, prompt: str, show: Callable[[str], None] = lambda text: None) -> Reply:
        """Say something and take the reply; it is remembered, unless the template holds one exchange.

        Args:
            prompt: what the user says.
            show: called with each piece of the reply as it comes.

        Raises:
            DataError: the template refuses the conversation, or the model holds no more of it.
        """
        said = (*self._messages, Message("user", prompt))
        ids = self._ids(said)
        room = self._room(len(ids))
        end = end_of_turn(self._tokenizer) if self.template == "chat" else None
        settings = decoding(self._model, self._tokenizer, room, end, **self._options.sampling)
        written = _Written(self._tokenizer, settings.eos_token_id or [], show)
        place = self._model.device
        around: AbstractContextManager[Any] = reference(self._model) if self._of_base else nullcontext()
        with around, generating(self._model, settings), torch.random.fork_rng([place] if place.type == "cuda" else []):
            torch.manual_seed(self._options.seed + self._replies)
            try:
                self._model.generate(
                    input_ids=torch.tensor([ids], device=place),
                    attention_mask=torch.ones(1, len(ids), dtype=torch.int64, device=place),
                    generation_config=settings,
                    streamer=written,
                )
                ended: Literal["stop", "length", "interrupted"] = "stop" if written.stopped else "length"
            except KeyboardInterrupt:
                written.end()
                ended = "interrupted"
        text = self._tokenizer.decode(written.ids, skip_special_tokens=True)
        self._replies += 1
        if self.remembers:
            self._messages = (*said, Message("assistant", text))
        return Reply(text, ended, len(written.ids) + written.stopped)

    def _ids(self, said: tuple[Message, ...]) -> list[int]:
        try:
            prompt = prompt_text(Example((*said, Message("assistant", ""))), self._tokenizer, self.template)
        except RowError as error:
            raise DataError(f"the conversation {error}") from error
        prefix = default_bos(self._tokenizer) if self.template != "chat" else []
        ids = prefix + token_ids([prompt], self._tokenizer)[0]
        if not ids:
            raise DataError("nothing to go on from: the prompt has no tokens")
        return ids

    def _room(self, taken: int) -> int:
        """How many tokens a reply to a conversation of so many may have."""
        held = getattr(self._model.config.get_text_config(), "max_position_embeddings", None)
        if not isinstance(held, int) or held < 1:
            return self._options.max_new_tokens
        if taken >= held:
            raise DataError(f"the conversation has {taken} tokens and the model holds {held}; /reset forgets it")
        return min(self._options.max_new_tokens, held - taken)


def open_chats(
    model: str | os.PathLike[str],
    options: ChatOptions,
    *,
    base: str | os.PathLike[str] | None = None,
    compare: str | None = None,
) -> list[Chat]:
    """A conversation with a model, and one beside it where there is something to compare with.

    Args:
        model: whatever `load_subject` takes.
        options: how to talk to both.
        base: of an adapter that does not record it.
        compare: "base" for the base of the adapter, or whatever `load_subject` takes.

    Raises:
        CheckpointError: there is no such model, or it is incomplete.
        ConfigError: the options do not fit, or a whole model is to be compared with its base.
    """
    subject = load_subject(model, base)
    chats = [Chat(str(model), subject, options)]
    if compare == BASE:
        if not hasattr(subject.model, "peft_config"):
            raise ConfigError(f"{model} is a whole model without an adapter; name the other model: --compare MODEL")
        record = record_of(subject.model)
        rounded = record is not None and record.quantized
        chats.append(
            Chat(BASE + (", as the quantised split has it" if rounded else ""), subject, options, of_base=True)
        )
    elif compare is not None:
        other = load_subject(compare)
        asked: Template | None = other.template or (chats[0].template if chats[0].template != "chat" else None)
        chats.append(Chat(compare, Subject(other.model, other.tokenizer, asked), options))
    return chats


class _Written(TextStreamer):
    """Hands a reply on as its words are whole, and keeps its tokens."""

    def __init__(self, tokenizer: Any, stops: list[int], show: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.ids: list[int] = []
        self.stopped = False
        self._stops, self._show = stops, show

    def put(self, value: Any) -> None:
        if not self.next_tokens_are_prompt:
            token = int(value)
            if token in self._stops:
                self.stopped = True
                return
            self.ids.append(token)
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if text:
            self._show(text)
