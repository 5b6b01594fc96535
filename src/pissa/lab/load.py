"""Any transformers model and its tokenizer, for looking at: with or without a language-modelling head."""

from __future__ import annotations

import os
from typing import Any

import torch
from safetensors import SafetensorError

from ..checkpoint.source.hub import first_line
from ..checkpoint.source.load import check_model_directory
from ..errors import CheckpointError


def load_model(source: str | os.PathLike[str], *, dtype: torch.dtype | str = "auto") -> Any:
    """A model without its head, in evaluation mode and without gradients.

    Args:
        source: a directory or a hub id; decoders, encoders (all-MiniLM-L6-v2) and others alike.
        dtype: of the weights; "auto" for the checkpoint's own.

    Raises:
        CheckpointError: the directory is missing or incomplete, or transformers cannot load it.
    """
    from transformers import AutoModel

    check_model_directory(source)
    try:
        return AutoModel.from_pretrained(source, dtype=dtype).eval().requires_grad_(False)
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"cannot load a model from {source}: {first_line(error)}") from error


def load_any_tokenizer(source: str | os.PathLike[str]) -> Any:
    """The tokenizer that lies with a model, whatever special tokens it has.

    Raises:
        CheckpointError: there is none.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"cannot load a tokenizer from {source}: {first_line(error)}") from error
