"""What goes with a model besides its weights: tokenizer and chat template, generation settings, licence. Never code.

A merged model has those of its base; where a tokenizer lies with the adapter, as a run's does, that one instead: it is
what the adapter was trained with.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path

from .source.files import open_plain, other_files
from .source.hub import adapter_directory, local_directory

TOKENIZER = re.compile(
    r"(tokenizer[\w.-]*|special_tokens_map|added_tokens|vocab|merges|chat_template)\.(json|txt|jinja|model|tiktoken)"
    r"|.*\.(model|tiktoken|spm)|additional_chat_templates/.*"
)
"""Names of the files that make up a tokenizer, chat templates included."""
SETTINGS_OF_TOKENIZER = ("tokenizer.json", "tokenizer_config.json")


def copy_companions(base: Path, others: Iterable[Path], adapter: str | os.PathLike[str], out: Path) -> None:
    """Put beside a merged model what belongs to it.

    Args:
        base: the directory that `others` lie in.
        others: the base's files besides its weights and config.json, as `other_files` lists them.
        adapter: the run's or adapter's directory or hub id; its tokenizer, where it has one, takes the place of the
            base's.
        out: the merged model's directory.
    """
    own = tokenizer_files(adapter_directory(adapter))
    for file in others:
        if not (own and is_tokenizer_file(file, base)):
            _copy(file, out / file.relative_to(base))
    for name, file in own.items():
        _copy(file, out / name)


def base_files(base: str | os.PathLike[str]) -> tuple[Path, list[Path]]:
    """A base's directory, and its files besides weights and config.json; none of a GGUF file."""
    if Path(base).is_file():
        return Path(base).parent, []
    directory = local_directory(base)
    return directory, other_files(directory)


def tokenizer_files(directory: Path) -> dict[str, Path]:
    """Relative name -> file of the tokenizer in a directory; empty where there is none."""
    if not any((directory / name).is_file() for name in SETTINGS_OF_TOKENIZER):
        return {}
    found = [file for file in other_files(directory) if is_tokenizer_file(file, directory)]
    return {file.relative_to(directory).as_posix(): file for file in found}


def is_tokenizer_file(file: Path, directory: Path) -> bool:
    """Whether a file of a model's directory is its tokenizer's."""
    return TOKENIZER.fullmatch(file.relative_to(directory).as_posix()) is not None


def _copy(file: Path, target: Path) -> None:
    target.parent.mkdir(exist_ok=True)
    with open(open_plain(file)[0], "rb") as stream, target.open("wb") as copy:
        shutil.copyfileobj(stream, copy)
