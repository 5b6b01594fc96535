"""Any transformers model and its tokenizer, for looking at: with or without a language-modelling head."""

from __future__ import annotations

import os
from typing import Any

import torch

from ..checkpoint.source.load import check_model_directory, load_tokenizer
from ..checkpoint.source.no_foreign_code import through_transformers


def load_model(source: str | os.PathLike[str], *, dtype: torch.dtype | str = "auto") -> Any:
    """A model without its head, in evaluation mode and without gradients.

    Args:
        source: a directory or a hub id; decoders, encoders (all-MiniLM-L6-v2) and others alike.
        dtype: of the weights; "auto" for the checkpoint's own.

    Raises:
        CheckpointError: the directory is missing or incomplete, or transformers cannot load it.
    """
    check_model_directory(source)
    return through_transformers("AutoModel", source, "a model", dtype=dtype).eval().requires_grad_(False)


def load_any_tokenizer(source: str | os.PathLike[str]) -> Any:
    """The tokenizer that lies with a model, whatever special tokens it has.

    Raises:
        CheckpointError: there is none.
    """
    return load_tokenizer(source, must_end=False)
