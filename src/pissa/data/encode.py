"""Examples as token ids and labels: what the loss sees.

    input_ids = [bos]  prompt  response  eos
    labels    = -100 … -100    response  eos        (label[0] is always -100: nothing precedes it)

The ids, and what is learned of them, are those of TRL's SFTTrainer (tests hold them against it): a text is tokenised
as one piece, so that its ids spell it and nothing else, and a response begins where the ids of prompt and response
part from those of the prompt alone; only what stands behind the last learned token of a conversation, which no loss
sees, is left away. Padding is told apart by length, never by its id, so that an eos that doubles as
padding keeps its label.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from ..errors import ConfigError, DataError, listed
from ..outside.schema import short
from .chat_tokens import ChatTemplate
from .conversation import Example, RowError
from .prompts import Template, prompt_text, resolve_template
from .rows import unusable_rows

IGNORED = -100
# Texts handed to the tokenizer at once: it tokenises a batch in parallel, and memory stays bounded.
CHUNK = 1024
Kept = Literal["start", "end"]


@dataclass(frozen=True)
class Encoded:
    """Tokenised examples; a map-style data set whose items are {"input_ids", "labels"}."""

    input_ids: list[list[int]]
    """Token ids of each row, at most `max_length` of them."""
    labels: list[list[int]]
    """As long as the row's `input_ids`: the token id where it is learned, -100 elsewhere."""
    cut: list[bool]
    """Whether a row was cut at `max_length`; then it ends without eos."""
    dropped: int
    """Rows left out because no token of a response survived the cut."""
    max_length: int
    """Tokens that a row may have."""
    longest: int
    """Tokens of the longest row before any was cut."""
    notes: tuple[str, ...] = ()
    """What else the user should know, one line each."""

    def __len__(self) -> int:
        return len(self.input_ids)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        return {"input_ids": self.input_ids[index], "labels": self.labels[index]}

    @property
    def truncated(self) -> int:
        """How many rows were cut and kept."""
        return sum(self.cut)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row, for batches grouped by length."""
        return [len(row) for row in self.input_ids]

    @property
    def learned(self) -> int:
        """Tokens that the loss runs over."""
        return sum(label != IGNORED for row in self.labels for label in row)

    @property
    def summary(self) -> str:
        """One line for the user: rows, tokens, and what was cut or left out."""
        line = f"{len(self)} rows, {sum(self.lengths)} tokens, {self.learned} of them learned"
        if self.truncated or self.dropped:
            line += (
                f"; at {self.max_length} tokens {self.truncated} rows were truncated, and {self.dropped} more were "
                "dropped because nothing of their response was left"
            )
        return "; ".join([line, *self.notes])


@dataclass(frozen=True)
class _Row:
    """One example, uncut."""

    ids: list[int]
    labels: list[int]
    note: str | None = None
    """What happened to it that the user should know; rows are counted by note."""


MERGED = "in {} rows the end of the prompt makes one token with the response's beginning and is learned with it"
ONLY_LAST = "in {} rows the last turn alone is learned, since the chat template writes earlier ones anew"
OTHER_PROMPT = (
    "in {} rows the response is written without what the chat template's generation prompt puts before it; a model "
    "that thinks first wants rows with reasoning_content"
)


def encode(
    examples: Sequence[Example], tokenizer: Any, *, template: Template, max_length: int, keep: Kept = "start"
) -> Encoded:
    """Tokenise examples under a prompt template, with labels on the responses alone.

    Args:
        examples: the conversations and texts, as `read_examples` gives them.
        tokenizer: a transformers tokenizer with an eos token.
        template: "auto", "chat" (the tokenizer's own), "alpaca" or "none"; of no concern to plain text.
        max_length: tokens that a row may have, at least 2; what is longer is cut and counted.
        keep: which side of a row that is cut remains.

    Returns:
        The rows in order, without those that were dropped.

    Raises:
        ConfigError: a setting that cannot be right, or a tokenizer without eos or, for "chat", without a template.
        DataError: no examples, examples that do not fit the template, or none whose response survives the cut.
    """
    template = resolve_template(template, tokenizer)
    if max_length < 2:
        raise ConfigError(f"max_length is {max_length!r}; a row needs at least 2 tokens, one to see and one to learn")
    if tokenizer.eos_token_id is None:
        raise ConfigError("the tokenizer has no end-of-sequence token to learn; set tokenizer.eos_token")
    if not examples:
        raise DataError("there are no examples to encode")
    found: list[_Row] = []
    offenders: list[str] = []
    chat = ChatTemplate(tokenizer) if template == "chat" else None
    for start in range(0, len(examples), CHUNK):
        chunk = examples[start : start + CHUNK]
        for number, row in enumerate(_rows(chunk, tokenizer, template, chat), start + 1):
            if isinstance(row, RowError):
                offenders.append(f"{examples[number - 1].where or f'row {number}'} {row}")
            else:
                found.append(row)
    _check_ends(found, tokenizer)
    if offenders:
        remedy = "Give rows that the template can hold, or another template"
        raise unusable_rows("the data", offenders, len(examples), remedy)
    encoded = _cut(found, max_length, keep)
    beside = {key for each in examples for m in each.messages for key, value in m.extra.items() if value}
    left_out = sorted(beside if chat is None else chat.left_out)
    note = f"not written by the template: {listed(map(short, left_out))} of messages"
    return replace(encoded, notes=(*encoded.notes, note)) if left_out else encoded


def _check_ends(rows: Sequence[_Row], tokenizer: Any) -> None:
    """Refuse rows of which not one ends in a learned end of sequence or other special token.

    Raises:
        ConfigError: naming what stands in its place.
    """
    ends = {tokenizer.eos_token_id, *tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    if rows and all(ends.isdisjoint(row.labels) for row in rows):
        last = tokenizer.convert_ids_to_tokens(rows[0].ids[-1])
        raise ConfigError(
            f"no row ends in a token that the tokenizer has for an end: its eos token {tokenizer.eos_token!r} comes "
            f"out as text that ends in {last!r}, so no model would learn to stop; mend eos_token in its files"
        )


def default_bos(tokenizer: Any) -> list[int]:
    """The bos token as a list where the tokenizer puts it before a text by default, else an empty list."""
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and tokenizer("a")["input_ids"][:1] == [bos] else []


def token_ids(texts: Sequence[str], tokenizer: Any, *, special: bool = False) -> list[list[int]]:
    """Token ids of each text, without special tokens around it unless they are asked for."""
    if not texts:
        return []
    return tokenizer(list(texts), add_special_tokens=special, return_attention_mask=False, verbose=False)["input_ids"]


@dataclass(frozen=True)
class Collator:
    """Pads encoded rows to a batch, on the right."""

    pad_id: int
    """Token id put into the padding; which one does not matter, attention and loss leave padding out."""
    multiple: int = 8
    """The batch's width is rounded up to a multiple of this."""

    def __call__(self, rows: Sequence[dict[str, list[int]]]) -> dict[str, Tensor]:
        """Rows {"input_ids", "labels"} -> "input_ids", "attention_mask" (1 on tokens) and "labels" (-100 on padding),
        each int64 of shape (rows, width)."""
        longest = max(len(row["input_ids"]) for row in rows)
        width = -(-longest // self.multiple) * self.multiple
        return {
            "input_ids": _padded([row["input_ids"] for row in rows], width, self.pad_id),
            "attention_mask": _padded([[1] * len(row["input_ids"]) for row in rows], width, 0),
            "labels": _padded([row["labels"] for row in rows], width, IGNORED),
        }


def _padded(rows: list[list[int]], width: int, value: int) -> Tensor:
    return torch.tensor([row + [value] * (width - len(row)) for row in rows], dtype=torch.int64)


def _rows(
    examples: Sequence[Example], tokenizer: Any, template: Template, chat: ChatTemplate | None
) -> Iterator[_Row | RowError]:
    """Each example tokenised, or why it cannot be."""
    texts: list[tuple[str, str] | RowError | None] = []
    for example in examples:
        try:
            texts.append(None if chat and example.text is None else _prompt_and_whole(example, tokenizer, template))
        except RowError as reason:
            texts.append(reason)
    plain = [text for text in texts if isinstance(text, tuple)]
    prompts = iter(token_ids([prompt for prompt, _ in plain], tokenizer, special=True))
    wholes = iter(token_ids([whole for _, whole in plain], tokenizer, special=True))
    for example, text in zip(examples, texts, strict=True):
        if isinstance(text, RowError):
            yield text
        elif text is not None:
            yield _continued(next(prompts), next(wholes), is_text=example.text is not None)
        else:
            assert chat is not None
            yield _conversed(chat, example)


def _prompt_and_whole(example: Example, tokenizer: Any, template: Template) -> tuple[str, str]:
    """The text that is not learned, and all text, with eos at its end; a plain text is learned from its beginning."""
    prompt = prompt_text(example, tokenizer, template) if example.text is None else ""
    response, eos = example.response, tokenizer.eos_token
    return prompt, prompt + (response if response.endswith(eos) else response + eos)


def _continued(prompt: list[int], whole: list[int], *, is_text: bool) -> _Row:
    shared = 0
    for token, other in zip(prompt, whole, strict=False):
        if token != other:
            break
        shared += 1
    start = 1 if is_text else max(shared, 1)
    merged = MERGED if not is_text and shared < len(prompt) else None
    return _Row(whole, [IGNORED] * start + whole[start:], merged)


def _conversed(chat: ChatTemplate, example: Example) -> _Row | RowError:
    try:
        tokens = chat.encode(example)
    except RowError as reason:
        return reason
    # no loss sees what follows the last learned token
    stop = len(tokens.learned) - tokens.learned[::-1].index(True)
    pairs = zip(tokens.input_ids[:stop], tokens.learned[:stop], strict=True)
    labels = [token if learned else IGNORED for token, learned in pairs]
    note = ONLY_LAST if tokens.only_last else OTHER_PROMPT if tokens.other_prompt else None
    return _Row(tokens.input_ids[:stop], [IGNORED, *labels[1:]], note)


def _cut(rows: list[_Row], max_length: int, keep: Kept) -> Encoded:
    part = slice(max_length) if keep == "start" else slice(-max_length, None)
    kept_ids: list[list[int]] = []
    kept_labels: list[list[int]] = []
    cut: list[bool] = []
    dropped = 0
    counts: dict[str, int] = {}
    for row in rows:
        ids, labels = row.ids[part], row.labels[part]
        if all(label == IGNORED for label in labels[1:]):
            dropped += 1
            continue
        cut.append(len(row.ids) > max_length)
        labels[0] = IGNORED
        kept_ids.append(ids)
        kept_labels.append(labels)
        if row.note is not None:
            counts[row.note] = counts.get(row.note, 0) + 1
    if not kept_ids:
        raise DataError(
            f"no response begins within max_length = {max_length} tokens in any of the {dropped} rows; "
            f"raise max_length (the shortest row has {min(len(row.ids) for row in rows)} tokens)"
        )
    longest = max(len(row.ids) for row in rows)
    notes = tuple(note.format(n) for note, n in counts.items())
    return Encoded(kept_ids, kept_labels, cut, dropped, max_length, longest, notes)
