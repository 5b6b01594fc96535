"""Whatever writes a directory or a file, each of its files has the permissions that the user's new files have."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pissa import PissaConfig, Quantization, adapt, export_lora, export_merged, init_checkpoint, save_residual
from pissa.training.recipe import Recipe
from pissa.training.run import train
from tiny import tiny_llama, tiny_tokenizer, train_steps

ROWS = [{"instruction": f"Add {i} and {i}.", "output": f"{2 * i}"} for i in range(8)]


def adapted(**settings: Any) -> Any:
    model = adapt(tiny_llama(hidden=64), PissaConfig(4, **settings))
    train_steps(model, 1)
    return model


def run(base: Path, out: Path, **settings: Any) -> None:
    recipe = Recipe(rank=4, batch_size=4, max_steps=2, save_every=1, dtype="fp32", template="none", **settings)
    train(str(base), ROWS, out, recipe, quiet=True)


def quantised(out: Path) -> None:
    pytest.importorskip("bitsandbytes")
    adapted(quantization=Quantization("nf4")).save_pretrained(out)


def gguf_lora(out: Path) -> None:
    pytest.importorskip("gguf")
    export_lora(adapted(), out.with_suffix(".gguf"), format="gguf")


WRITERS: dict[str, Callable[[Path, Path], object]] = {
    "pissa train": lambda base, out: run(base, out),
    "pissa train --method full": lambda base, out: run(base, out, method="full"),
    "pissa train --export-rank": lambda base, out: run(base, out, export_rank=2),
    "pissa init": lambda base, out: init_checkpoint(base, out, PissaConfig(4)),
    "export_lora": lambda base, out: export_lora(adapted(), out),
    "export_lora, gguf": lambda base, out: gguf_lora(out),
    "export_merged of a model": lambda base, out: export_merged(adapted(), out),
    "save_pretrained": lambda base, out: adapted().save_pretrained(out),
    "save_pretrained, quantised": lambda base, out: quantised(out),
    "save_residual": lambda base, out: save_residual(adapted(), out),
}


@pytest.fixture
def umask() -> Iterator[int]:
    mask = 0o027
    before = os.umask(mask)
    yield mask
    os.umask(before)


@pytest.mark.parametrize("writer", WRITERS.values(), ids=WRITERS)
def test_every_file_has_the_permissions_of_the_umask(
    tmp_path: Path, umask: int, writer: Callable[[Path, Path], object]
) -> None:
    base, out = tmp_path / "base", tmp_path / "result"
    tiny_llama(hidden=64).save_pretrained(base)
    tiny_tokenizer().save_pretrained(base)
    writer(base, out)
    [result] = [path for path in tmp_path.iterdir() if path != base]
    found = [result, *result.rglob("*")]
    modes = {str(path.relative_to(tmp_path)): stat.S_IMODE(path.stat().st_mode) for path in found}
    usual = {str(path.relative_to(tmp_path)): (0o777 if path.is_dir() else 0o666) & ~umask for path in found}
    assert modes == usual
