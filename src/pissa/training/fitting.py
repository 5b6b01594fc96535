"""The text that a quantised residual is fitted to: the training rows as the model is given them, or a file.

Rows are taken at even distances over the data, as many as hold the tokens that are asked for. What they cost is said
before they are used: the text goes through the model once, and every weight is then fitted a few times over.
"""

from __future__ import annotations

import statistics
from dataclasses import replace
from typing import Any

from ..checkpoint.source.load import load_tokenizer
from ..data.encode import Collator, Encoded
from ..data.text import calibration_batches
from .polish import HELD_OUT
from .recipe import DATA, NONE, Recipe

BATCH_TOKENS = 1024
"""Tokens that go through the model at a time, padding included."""


def fitting_batches(source: str, recipe: Recipe, encoded: Encoded, pad_id: int) -> list[dict[str, Any]] | None:
    """Keyword arguments of the model's forward, without labels; None where nothing is fitted to text.

    Args:
        source: the base, whose tokenizer reads a file.
        recipe: says what the text is, and how much of it is used.
        encoded: the training rows.
        pad_id: token id that rows are filled up with.

    Raises:
        DataError: the file cannot be read, or is too short.
    """
    quantization = recipe.quantization
    if quantization is None or quantization.calibration is None:
        return None
    if quantization.calibration != DATA:
        return batches_of(quantization.calibration, source, recipe)
    return row_batches(encoded, recipe.calibration_windows * recipe.calibration_length, pad_id)


def polish_batches(source: str, recipe: Recipe, encoded: Encoded, pad_id: int) -> list[dict[str, Any]]:
    """The same for a polish: text of as many batches as it has steps, where there is so much, and some to measure on.

    Raises:
        DataError: the file cannot be read, or is too short.
    """
    tokens = ((recipe.polish or 0) + HELD_OUT) * BATCH_TOKENS
    if recipe.calibration in (None, DATA, NONE):
        return row_batches(encoded, tokens, pad_id)
    assert recipe.calibration is not None
    return batches_of(
        recipe.calibration, source, replace(recipe, calibration_windows=tokens // recipe.calibration_length)
    )


def batches_of(file: str, source: str, recipe: Recipe) -> list[dict[str, Any]]:
    """Windows of a text file, for a base of which only the tokenizer is looked at."""
    length, size = recipe.calibration_length, max(1, BATCH_TOKENS // recipe.calibration_length)
    tokenizer = load_tokenizer(source, must_end=False)
    return calibration_batches(file, tokenizer, length, recipe.calibration_windows, batch_size=size)


def row_batches(encoded: Encoded, tokens: int, pad_id: int) -> list[dict[str, Any]]:
    """Rows of about so many tokens together, those of like length side by side."""
    count = min(len(encoded), max(1, round(tokens / statistics.fmean(encoded.lengths))))
    rows = sorted((encoded[i * len(encoded) // count] for i in range(count)), key=lambda row: len(row["input_ids"]))
    groups: list[list[dict[str, list[int]]]] = [[]]
    for row in rows:
        if groups[-1] and (len(groups[-1]) + 1) * len(row["input_ids"]) > BATCH_TOKENS:
            groups.append([])
        groups[-1].append(row)
    collate = Collator(pad_id)
    return [{k: t for k, t in collate(group).items() if k != "labels"} for group in groups]


def token_count(batches: list[dict[str, Any]]) -> int:
    """Tokens in batches, without padding."""
    return sum(int(b["attention_mask"].sum()) if "attention_mask" in b else b["input_ids"].numel() for b in batches)


def what_it_takes(recipe: Recipe, batches: list[dict[str, Any]] | None) -> str:
    """One line for the user, said before a model is quantised."""
    quantization = recipe.quantization
    assert quantization is not None
    if batches is None:
        return f"quantising to {quantization.format}, fitted to no text"
    text = "the training rows" if quantization.calibration == DATA else str(quantization.calibration)
    return (
        f"quantising to {quantization.format}, fitted to {token_count(batches):,} tokens of {text} (on two CPU cores "
        "about 40 seconds for each 100 M weights; calibration none leaves the text out)"
    )
