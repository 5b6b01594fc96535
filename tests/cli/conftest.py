"""What the tests of all commands share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tiny import tiny_llama, tiny_tokenizer


@pytest.fixture
def model(tmp_path: Path) -> str:
    """A tiny model's directory."""
    directory = tmp_path / "model"
    tiny_llama().save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return str(directory)
