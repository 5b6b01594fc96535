"""Conversations as token ids under a chat template, with what is learned: the assistant's turns with their ends.

What is learned is found in one of two ways; in both the ids are those of the whole conversation, tokenised at once:

    marked    the template says it itself by {% generation %} marks: the tokenizer's own, or the one that TRL has for
              training of its family, which writes earlier turns as they were when they were learned
    compared  any other template: a turn is what `messages[:i + 1]` renders to beyond `messages[:i]` with the generation
              prompt, provided that it stands unchanged in the whole conversation; where the template writes earlier
              turns anew (reasoning that is taken out once it is answered), the last turn alone is learned
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, NamedTuple

from ..errors import ConfigError, extra
from ..outside.templates import TemplateLimitError, TemplateRefusedError, apply_template, within_limits
from .chat_text import endless, render, template_messages
from .conversation import OPENING, REASONING, Example, Message, RowError

Span = tuple[int, int]


class ChatTokens(NamedTuple):
    """One conversation, tokenised."""

    input_ids: list[int]
    learned: list[bool]
    """As long as `input_ids`."""
    only_last: bool
    """Whether earlier turns that could be learned are not, since the template writes them anew."""
    other_prompt: bool
    """Whether a turn is written without something that the generation prompt puts before it."""


class ChatTemplate:
    """A tokenizer's chat template, as training uses it."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._written: set[str] = set()
        self.left_out: set[str] = set()
        """Keys of messages that the template does not write."""

    @cached_property
    def marked(self) -> str | None:
        """The template whose marks say what is learned; None where there is no such template."""
        with extra("train", "template chat needs trl"):
            from trl.chat_template_utils import get_training_chat_template, has_generation_markers
        own = self.tokenizer.get_chat_template()
        if not self.tokenizer.is_fast:
            return None
        try:
            return within_limits(own, lambda: get_training_chat_template(self.tokenizer)) or own
        except TemplateLimitError as error:
            raise endless(error) from error
        except TemplateRefusedError:  # by TRL, which knows no marks for it, or it cannot be rendered: its rows say why
            return own if has_generation_markers(own) else None

    def encode(self, example: Example) -> ChatTokens:
        """Tokenise a conversation.

        Raises:
            RowError: the template refuses it, leaves something of it out, or its learned turns cannot be told apart.
            ConfigError: the template's marks leave the end of a turn out.
        """
        messages = example.with_input()
        self._check_written(messages, example)
        ids, learned, *told = self._marked(messages, example) if self.marked else self._compared(messages, example)
        if not any(learned):
            raise RowError("has no turn that can be learned: the chat template writes those with weight 1 anew")
        return ChatTokens(*self._ended(ids, learned), *told)

    def _marked(self, messages: Sequence[Message], example: Example) -> tuple[list[int], list[bool], bool, bool]:
        try:
            found = apply_template(
                self.tokenizer,
                template_messages(messages, self.tokenizer, self.marked),
                tools=[*example.tools] or None,
                chat_template=self.marked,
                tokenize=True,
                return_dict=True,
                return_assistant_tokens_mask=True,
                **example.template_options,
            )
        except TemplateLimitError as error:
            raise endless(error) from error
        except TemplateRefusedError as error:
            raise RowError(f"is refused by the chat template ({error})") from error
        learned = [bool(bit) for bit in found["assistant_masks"]]
        turns = [message for message in messages if message.role == "assistant"]
        if not all(turn.learned for turn in turns):
            runs = [*_runs(learned)]
            if len(runs) != len(turns):
                raise RowError("has turns of weight 0, which the chat template's marks do not tell apart")
            for (start, stop), turn in zip(runs, turns, strict=True):
                learned[start:stop] = [turn.learned] * (stop - start)
        return found["input_ids"], learned, False, False

    def _compared(self, messages: Sequence[Message], example: Example) -> tuple[list[int], list[bool], bool, bool]:
        whole = render(messages, self.tokenizer, example)
        spans: list[Span] = []
        only_last = other_prompt = False
        for index, message in enumerate(messages):
            if message.role != "assistant" or not message.learned:
                continue
            found = self._turn(messages, index, whole, example)
            if found is None:
                only_last = True
                continue
            spans.append(found[0])
            other_prompt |= found[1]
        encoded = self.tokenizer(whole, add_special_tokens=False, verbose=False)
        ids = encoded["input_ids"]
        learned = [False] * len(ids)
        for start, stop in self._token_spans(encoded, whole, spans):
            learned[start:stop] = [True] * (stop - start)
        return ids, learned, only_last, other_prompt

    def _turn(self, messages: Sequence[Message], index: int, whole: str, example: Example) -> tuple[Span, bool] | None:
        """Where a turn stands in the whole text, and whether the generation prompt says more than stands before it.

        None where the template writes the turn anew once others follow.
        """
        through = render(messages[: index + 1], self.tokenizer, example)
        if not whole.startswith(through):
            return None
        before = render(messages[:index], self.tokenizer, example, prompt=True)
        start = _shared(before, through)
        if start < len(before) and start < _shared(before, render(messages[:index], self.tokenizer, example)):
            if index + 1 < len(messages):
                return None
            raise RowError(
                "is changed by the chat template from turn to turn, so its last turn cannot be told from what comes "
                "before it; split it into rows of one turn, or use template 'alpaca'"
            )
        turn = _without_line_end(through[start:], messages[index].content)
        return (start, start + len(turn)), start < len(before)

    def _token_spans(self, encoded: Any, whole: str, spans: list[Span]) -> Iterator[Span]:
        """Spans of characters as spans of tokens, as transformers maps marks."""
        count = len(encoded["input_ids"])
        for start, stop in spans:
            if not self.tokenizer.is_fast:
                first, last = (
                    len(self.tokenizer(whole[:place], add_special_tokens=False)["input_ids"]) for place in (start, stop)
                )
                yield min(first, count), min(last, count)
                continue
            begin, end = encoded.char_to_token(start), encoded.char_to_token(stop - 1)
            if begin is not None:
                yield begin, end + 1 if end is not None else count

    def _ended(self, ids: list[int], learned: list[bool]) -> tuple[list[int], list[bool]]:
        """The ids such that the last learned turn ends in a special token: eos follows where the template has none.

        Raises:
            ConfigError: the template has an end, and its marks leave it out.
        """
        *_, (start, stop) = _runs(learned)
        end = stop
        while end > start and not self.tokenizer.decode([ids[end - 1]]).strip():
            end -= 1
        if end > start and ids[end - 1] in self._special:
            return ids, learned
        if stop < len(ids) and ids[stop] in self._special:
            raise ConfigError(
                f"the chat template's {{% generation %}} marks leave out {self.tokenizer.decode([ids[stop]])!r}, which "
                "ends an assistant's turn, so no model would learn to stop; put it before {% endgeneration %}"
            )
        return [*ids[:stop], self.tokenizer.eos_token_id], [*learned[:stop], True]

    @cached_property
    def _special(self) -> set[int]:
        return {*self.tokenizer.all_special_ids, *self.tokenizer.added_tokens_decoder}

    def _check_written(self, messages: Sequence[Message], example: Example) -> None:
        """Refuse a conversation of which the template would leave out something without a word.

        Raises:
            RowError: naming what it leaves out.
        """
        if example.tools and "tools" not in self._written:
            self._check_matters(messages, messages, example, replace(example, tools=()), "tools")
        for index, message in enumerate(messages):
            for name, keys in _said(message).items():
                if name not in self._written | self.left_out:
                    less = {key: value for key, value in message.extra.items() if key not in keys}
                    without = (*messages[:index], Message(message.role, message.content, message.learned, less))
                    self._check_matters(messages[: index + 1], without, example, example, name)
            if message.role in OPENING and message.role not in self._written and message.content.strip():
                if message.content.strip() not in self._render(messages, example):
                    raise RowError(f"has a message of the role '{message.role}', which the chat template leaves out")
                self._written.add(message.role)

    def _check_matters(
        self, messages: Sequence[Message], without: Sequence[Message], example: Example, bare: Example, name: str
    ) -> None:
        if self._render(messages, example) != self._render(without, bare):
            self._written.add(name)
        elif name not in ("tools", "tool_calls", *REASONING):
            self.left_out.add(name)
        else:
            raise RowError(
                f"has '{name}', which the tokenizer's chat template does not write; give the tokenizer a template that "
                "does, or put it into the content"
            )

    def _render(self, messages: Sequence[Message], example: Example) -> str:
        return render(messages, self.tokenizer, example, template=self.marked)


def _said(message: Message) -> dict[str, list[str]]:
    """What a message says beside its content: name -> its keys; what was thought may have several."""
    told = [key for key, value in message.extra.items() if value and key != "tool_call_id"]
    reasoning = [key for key in REASONING if key in told]
    return {**{key: [key] for key in told if key not in reasoning}, **({reasoning[0]: reasoning} if reasoning else {})}


def _runs(bits: Sequence[bool]) -> Iterator[Span]:
    """The stretches of True."""
    start = None
    for place, bit in enumerate([*bits, False]):
        if bit and start is None:
            start = place
        elif not bit and start is not None:
            yield start, place
            start = None


def _shared(text: str, other: str) -> int:
    """How many characters two texts have in common from their beginning."""
    pairs = zip(text, other, strict=False)
    return next((place for place, (a, b) in enumerate(pairs) if a != b), min(len(text), len(other)))


def _without_line_end(turn: str, content: str) -> str:
    """A turn up to its end-of-turn marker: white space after the marker belongs to the layout, not to the response."""
    stripped = turn.rstrip()
    return turn if content.strip() and stripped.endswith(content.rstrip()) else stripped
