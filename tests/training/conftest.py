"""A tiny model on disk, shared by the tests of training."""

from __future__ import annotations

from pathlib import Path

import pytest

from tiny import tiny_llama, tiny_tokenizer


@pytest.fixture(scope="session")
def base_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory that holds a tiny Llama (fp32) and its tokenizer; nobody writes into it."""
    directory = tmp_path_factory.mktemp("base")
    tiny_llama().save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory
