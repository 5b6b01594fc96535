"""What a run learns and what it is measured on: rows of files and the hub, tokenised, and how they are told apart."""

from __future__ import annotations

import json
from array import array
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..checkpoint.source.load import load_config, load_tokenizer
from ..data.conversation import Example
from ..data.encode import Collator, Encoded, encode
from ..data.known_tokens import check_known, known_to
from ..data.read import read_examples
from ..data.rows import examples_from_rows
from ..errors import ConfigError, DataError
from ..provenance import sha256
from .engine import micro_batch
from .recipe import Recipe
from .validation import split_off

Rows = Sequence[Mapping[str, Any] | Example]
"""Rows of any shape that `examples_from_rows` takes."""


def tokenised(model: str, data: str | Rows, recipe: Recipe) -> tuple[Any, Encoded, Encoded | None]:
    """A model's tokenizer, the rows to learn, and those to measure the validation loss on, if any.

    Args:
        model: a directory or a hub id.
        data: a file or hub id, or the rows themselves.
        recipe: template, lengths, what is kept apart.

    Raises:
        PissaError: there is no tokenizer, or the rows cannot be used with it, or hold tokens that the model lacks.
    """
    tokenizer = load_tokenizer(model)
    encoded, validation = training_rows(data, tokenizer, recipe)
    if not recipe.resize_embeddings:
        rows = [*encoded.input_ids, *(validation.input_ids if validation is not None else ())]
        check_known(rows, known_to(load_config(model)), tokenizer, model)
    return tokenizer, encoded, validation


def training_rows(data: str | Rows, tokenizer: Any, recipe: Recipe) -> tuple[Encoded, Encoded | None]:
    """The rows to learn, and those to measure the validation loss on, if any.

    Args:
        data: a file or hub id, or the rows themselves.
        tokenizer: the model's.
        recipe: template, lengths, what is kept apart.

    Raises:
        DataError: rows that cannot be used, or too many that would be cut.
        ConfigError: settings that do not fit the data.
    """
    on_hub = isinstance(data, str) and not Path(data).exists()
    if not on_hub and (recipe.data_split, recipe.data_subset) != (Recipe.data_split, Recipe.data_subset):
        given = data if isinstance(data, str) else "the list of rows"
        raise ConfigError(f"data_split and data_subset are for data on the hub; leave them out for {given}")
    if isinstance(data, str):
        examples = read_examples(data, split=recipe.data_split, subset=recipe.data_subset)
    else:
        examples = examples_from_rows(data)
    encoded = encode(examples, tokenizer, template=recipe.template, max_length=recipe.max_length)
    check_cut(encoded, recipe)
    if recipe.eval_fraction is not None:
        return split_off(encoded, recipe.eval_fraction, recipe.seed)
    if recipe.eval_data is None:
        return encoded, None
    examples = read_examples(recipe.eval_data, split=recipe.eval_split, subset=recipe.data_subset)
    validation = encode(examples, tokenizer, template=recipe.template, max_length=recipe.max_length)
    check_cut(validation, recipe)
    return encoded, validation


def check_cut(encoded: Encoded, recipe: Recipe) -> None:
    """Refuse data of which much would be lost.

    Raises:
        DataError: more rows were cut or dropped than the recipe allows.
    """
    count, lost = len(encoded) + encoded.dropped, encoded.truncated + encoded.dropped
    if lost > recipe.max_cut_share * count:
        raise DataError(
            f"of {count} rows {encoded.truncated} would be cut at max_length = {encoded.max_length} tokens, and "
            f"{encoded.dropped} dropped because nothing of their response is left: {lost / count:.0%}, and "
            f"max_cut_share allows {recipe.max_cut_share:.0%}; raise max_length (the longest row has "
            f"{encoded.longest} tokens), or max_cut_share"
        )


def scored_batches(encoded: Encoded, recipe: Recipe, pad_id: int) -> list[dict[str, Any]]:
    """The examples by which components are scored, evenly spread over the data."""
    count, size = min(recipe.scored_examples, len(encoded)), micro_batch(recipe)
    rows = [encoded[i * len(encoded) // count] for i in range(count)]
    return [dict(Collator(pad_id)(rows[i : i + size])) for i in range(0, count, size)]


def digest(rows: Rows) -> str:
    """What stands for rows in a run's settings."""
    given = [row.content() if isinstance(row, Example) else row for row in rows]
    return f"{len(given)} rows, sha256 {sha256(json.dumps(given, sort_keys=True).encode())[:16]}"


def fingerprint_of_rows(encoded: Encoded) -> str:
    """A short hash of token ids and labels."""
    rows = zip(encoded.input_ids, encoded.labels, strict=True)
    return sha256(array("q", [len(ids), *ids, *labels]).tobytes() for ids, labels in rows)[:16]
