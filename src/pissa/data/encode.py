"""Examples as token ids and labels: what the loss sees.

    input_ids = [bos]  prompt  response  eos
    labels    = -100 … -100    response  eos        (label[0] is always -100: nothing precedes it)

Only responses are learned (paper, section 5), and so is eos: padding is told apart by length, never by its id, so
that an eos that doubles as padding keeps its label. Every piece is tokenised on its own: no token spans the end of a
prompt, and the response begins with the tokens that a model generates after the prompt alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError, DataError
from .prompts import Piece, Template, check_template, pieces
from .rows import Example, RowError, unusable_rows

IGNORED = -100
# Texts handed to the tokenizer at once: it tokenises a batch in parallel, and memory stays bounded.
CHUNK = 1024


@dataclass(frozen=True)
class Encoded:
    """Tokenised examples; a map-style data set whose items are {"input_ids", "labels"}."""

    input_ids: list[list[int]]
    """Token ids of each row, at most `max_length` of them."""
    labels: list[list[int]]
    """As long as the row's `input_ids`: the token id where it is learned, -100 elsewhere."""
    truncated: int
    """Rows that were cut at `max_length` and kept; they end without eos."""
    dropped: int
    """Rows left out because no token of a response survived the cut."""
    max_length: int
    """Tokens that a row may have."""

    def __len__(self) -> int:
        return len(self.input_ids)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        return {"input_ids": self.input_ids[index], "labels": self.labels[index]}

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row, for batches grouped by length."""
        return [len(row) for row in self.input_ids]

    @property
    def summary(self) -> str:
        """One line for the user: rows, tokens, and what was cut or left out."""
        learned = sum(label != IGNORED for row in self.labels for label in row)
        line = f"{len(self)} rows, {sum(self.lengths)} tokens, {learned} of them learned"
        if self.truncated or self.dropped:
            line += (
                f"; at {self.max_length} tokens {self.truncated} rows were truncated, and {self.dropped} more were "
                "dropped because nothing of their response was left"
            )
        return line


def encode(examples: Sequence[Example], tokenizer: Any, *, template: Template, max_length: int) -> Encoded:
    """Tokenise examples under a prompt template, with labels on the responses alone.

    Args:
        examples: the conversations, as `read_examples` gives them.
        tokenizer: a transformers tokenizer with an eos token.
        template: "alpaca", "chat" (the tokenizer's own) or "none".
        max_length: tokens that a row may have, at least 2; what is longer is cut at the end and counted.

    Returns:
        The rows in order, without those that were dropped.

    Raises:
        ConfigError: a setting that cannot be right, or a tokenizer without eos or, for "chat", without a template.
        DataError: no examples, examples that do not fit the template, or none whose response survives the cut.
    """
    check_template(template, tokenizer)
    if max_length < 2:
        raise ConfigError(f"max_length is {max_length!r}; a row needs at least 2 tokens, one to see and one to learn")
    if tokenizer.eos_token_id is None:
        raise ConfigError("the tokenizer has no end-of-sequence token to learn; set tokenizer.eos_token")
    if not examples:
        raise DataError("there are no examples to encode")
    prefix = [] if template == "chat" else default_bos(tokenizer)
    rows = _labelled(_all_pieces(examples, tokenizer, template), tokenizer, prefix)
    return _cut(rows, max_length)


def default_bos(tokenizer: Any) -> list[int]:
    """The bos token as a list where the tokenizer puts it before a text by default, else an empty list."""
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and tokenizer("a")["input_ids"][:1] == [bos] else []


def token_ids(texts: Sequence[str], tokenizer: Any) -> list[list[int]]:
    """Token ids of each text, without special tokens around it."""
    if not texts:
        return []
    return tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]


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


def _all_pieces(examples: Sequence[Example], tokenizer: Any, template: Template) -> list[list[Piece]]:
    found: list[list[Piece]] = []
    offenders: list[str] = []
    for number, example in enumerate(examples, 1):
        try:
            found.append(pieces(example, tokenizer, template))
        except RowError as reason:
            offenders.append(f"{example.where or f'row {number}'} {reason}")
    if offenders:
        remedy = "Give rows that the template can hold, or another template"
        raise unusable_rows("the data", offenders, len(examples), remedy)
    return found


def _labelled(examples: list[list[Piece]], tokenizer: Any, prefix: list[int]) -> list[tuple[list[int], list[int]]]:
    """(input_ids, labels) of each example, uncut."""
    rows: list[tuple[list[int], list[int]]] = []
    for start in range(0, len(examples), CHUNK):
        chunk = examples[start : start + CHUNK]
        encoded = iter(token_ids([piece.text for row in chunk for piece in row], tokenizer))
        for row in chunk:
            ids, labels = list(prefix), [IGNORED] * len(prefix)
            for piece in row:
                tokens = next(encoded)
                ids += tokens
                labels += tokens if piece.learned else [IGNORED] * len(tokens)
            if ids[-1:] != [tokenizer.eos_token_id] or labels[-1] == IGNORED:
                ids.append(tokenizer.eos_token_id)
                labels.append(tokenizer.eos_token_id)
            labels[0] = IGNORED
            rows.append((ids, labels))
    return rows


def _cut(rows: list[tuple[list[int], list[int]]], max_length: int) -> Encoded:
    kept_ids: list[list[int]] = []
    kept_labels: list[list[int]] = []
    truncated = dropped = 0
    for ids, labels in rows:
        if all(label == IGNORED for label in labels[:max_length]):
            dropped += 1
            continue
        truncated += len(ids) > max_length
        kept_ids.append(ids[:max_length])
        kept_labels.append(labels[:max_length])
    if not kept_ids:
        raise DataError(
            f"no response begins within max_length = {max_length} tokens in any of the {dropped} rows; "
            f"raise max_length (the shortest row has {min(len(ids) for ids, _ in rows)} tokens)"
        )
    return Encoded(kept_ids, kept_labels, truncated, dropped, max_length)
