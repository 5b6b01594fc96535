"""Calibration text as batches of tokens.

The text is read until it suffices, and windows of equal length are taken at even distances over all that was read. Each
window gets the special tokens that the tokenizer puts around a text ([CLS] and [SEP], or a beginning-of-sequence
token), so that the model sees what it is used to. No window is padded.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError, DataError
from .text_files import texts_of

SURPLUS = 8
"""Times as much text as is needed is read, so that the windows come from more than its beginning."""


def calibration_batches(
    source: str | Path | Iterable[str], tokenizer: Any, length: int, count: int, *, batch_size: int = 4
) -> list[dict[str, Tensor]]:
    """Windows of a text, ready for `model(**batch)`.

    Args:
        source: a .txt file (also as .gz), rows as `read.py` reads them, or texts. A row gives its "text" or,
            without one, all the strings in it.
        tokenizer: a transformers tokenizer.
        length: tokens per window, special tokens included.
        count: windows in all.
        batch_size: windows per batch; the last batch may hold fewer.

    Returns:
        Batches of `input_ids` (windows, length) int64.

    Raises:
        DataError: no such file, a damaged one, or text shorter than `count` windows.
        ConfigError: a length or count that leaves nothing.
    """
    before, after = surroundings(tokenizer)
    content = length - len(before) - len(after)
    if content < 1 or count < 1 or batch_size < 1:
        raise ConfigError(
            f"length {length}, count {count} and batch_size {batch_size} leave no window; a window needs at least "
            f"{1 + len(before) + len(after)} tokens, and there must be one"
        )
    tokens: list[int] = []
    for text in texts_of(source):
        tokens += tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if len(tokens) >= SURPLUS * content * count:
            break
    if len(tokens) < content * count:
        named = source if isinstance(source, str | Path) else "the calibration text"
        raise DataError(
            f"{named} holds {len(tokens)} tokens, and {count} windows of {content} need {content * count}; give more "
            f"text, or at most {len(tokens) // content} windows"
        )
    distance = len(tokens) // count
    windows = [before + tokens[i * distance : i * distance + content] + after for i in range(count)]
    return [{"input_ids": torch.tensor(windows[i : i + batch_size])} for i in range(0, count, batch_size)]


def surroundings(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The special tokens that a tokenizer puts before and after a text."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    for i in range(len(full) - len(bare) + 1):
        if full[i : i + len(bare)] == bare:
            return full[:i], full[i + len(bare) :]
    return [], []
