"""Weights that cannot be read where they lie, written as safetensors into a directory of their own.

GGUF: transformers knows its names and formats; it holds the whole dequantised model for that. Pickles in the format of
torch before 1.6 say where a tensor's bytes are only to whoever loads them all; a shard is held at a time.
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from ...errors import MissingExtraError
from ..disk.write import explained
from .files import open_plain
from .no_foreign_code import through_transformers
from .pickled import load_weights


def convert_gguf(file: Path, directory: Path, *, dtype: torch.dtype | str = "auto") -> None:
    """Write the model in a GGUF file, dequantised, as config.json, safetensors and tokenizer.

    Args:
        file: the GGUF file.
        directory: where to; it exists.
        dtype: of the weights; "auto" for transformers' choice.

    Raises:
        CheckpointError: it is no GGUF file, or of an architecture that transformers does not read from one.
        MissingExtraError: the gguf package is not installed.
    """
    from transformers import GgufConfig

    if find_spec("gguf") is None:
        raise MissingExtraError(f"{file} is a GGUF file: pip install 'pissa[gguf]'")
    os.close(open_plain(file)[0])
    # without dequantize=True transformers marks the model as quantised, and saving and Trainer refuse it
    quantization: Any = GgufConfig(dequantize=True)
    what = f"{file.name} as a GGUF model"
    model = through_transformers(
        "AutoModelForCausalLM", file.parent, what, gguf_file=file.name, quantization_config=quantization, dtype=dtype
    )
    tokenizer = through_transformers("AutoTokenizer", file.parent, what, gguf_file=file.name)
    with explained(directory):
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)


def convert_pickle(file: Path, directory: Path) -> Path:
    """Write the tensors of a .bin file as a safetensors file; returns its path.

    Raises:
        CheckpointError: it is damaged, or loading it would run code.
    """
    descriptor, _ = open_plain(file)
    with open(descriptor, "rb") as stream:
        found = load_weights(stream, file)
    converted = directory / f"{file.name}.safetensors"
    with explained(directory):
        save_file({name: tensor.detach().clone().contiguous() for name, tensor in found.items()}, converted)
    return converted
