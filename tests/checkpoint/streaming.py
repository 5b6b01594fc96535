"""What tests of streamed checkpoints share: bases on disk, directories as bytes, and processes that die."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from pissa import PissaConfig, Quantization
from pissa.checkpoint.disk import journal, outputs
from pissa.checkpoint.stream import unfinished
from tiny import tiny_gpt2, tiny_llama, tiny_tokenizer

QUICK = {"iterations": 1, "momentum": 0.0}
CONFIG = PissaConfig(4)


def llama_on_disk(directory: Path, **options: Any) -> Path:
    """A tiny Llama with its tokenizer, in a directory."""
    return on_disk(tiny_llama(**options), directory)


def on_disk(model: PreTrainedModel, directory: Path, **options: Any) -> Path:
    """A model with its tokenizer, in a directory.

    Args:
        options: of `save_pretrained`, such as `max_shard_size`.
    """
    model.save_pretrained(directory, **options)
    tiny_tokenizer().save_pretrained(directory)
    return directory


def contents(directory: Path) -> dict[str, bytes]:
    """Every file below a directory, byte for byte."""
    return {
        path.relative_to(directory).as_posix(): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


BASES: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": tiny_llama,
    "llama-bf16": lambda: tiny_llama(dtype=torch.bfloat16),
    "llama-fp16": lambda: tiny_llama(dtype=torch.float16),
    "llama-tied": lambda: tiny_llama(tie=True),
    "gpt2": tiny_gpt2,
    "llama-nf4": lambda: tiny_llama(hidden=64, dtype=torch.bfloat16),
    "llama-int8": lambda: tiny_llama(hidden=64),
    "gpt2-nf4": lambda: tiny_gpt2(hidden=64),
    "llama-qlora": lambda: tiny_llama(hidden=64),
    "llama-gptq": lambda: tiny_llama(hidden=64),
    "llama-nvfp4": lambda: tiny_llama(hidden=64, dtype=torch.bfloat16),
}
CONFIGS: dict[str, PissaConfig] = {
    "llama-nf4": PissaConfig(4, quantization=Quantization(**QUICK)),
    "llama-int8": PissaConfig(4, quantization=Quantization("int8", **QUICK)),
    "llama-gptq": PissaConfig(4, quantization=Quantization("gptq", bits=3, **QUICK)),
    "llama-nvfp4": PissaConfig(4, quantization=Quantization("nvfp4", **QUICK)),
    "gpt2-nf4": PissaConfig(4, quantization=Quantization(double_quant=False, **QUICK)),
    "llama-qlora": PissaConfig(4, method="lora-kaiming", quantization=Quantization(method="qlora", **QUICK)),
}


def in_child(work: Callable[[], Any]) -> int | None:
    """Do something in a forked process; its exit code, negative for the signal that ended it."""
    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join(120)
    assert process.exitcode is not None, "the child did not end"
    return process.exitcode


def at_change(moment: int, work: Callable[[], Any], action: Callable[[], Any]) -> int:
    """Do the work, with an action just before the given change of a file; how many changes there were.

    A change is a piece of a tensor written, a flush, a line of a journal, or a file that gets its name. Every second
    line of a journal is torn in the middle by what happens at it.
    """
    changes = 0

    def hooked(owner: Any, name: str, *, tear: bool = False) -> None:
        original = getattr(owner, name)

        def change(*arguments: Any, **options: Any) -> Any:
            nonlocal changes
            changes += 1
            if changes == moment:
                if tear and moment % 2:
                    os.write(arguments[0]._descriptor, b'0123456789abcdef {"task":"model.lay')
                action()
            return original(*arguments, **options)

        setattr(owner, name, change)
        undo.append(lambda: setattr(owner, name, original))

    undo: list[Callable[[], None]] = []
    hooked(outputs.Outputs, "put")
    hooked(outputs.Outputs, "flush")
    hooked(journal.Journal, "append", tear=True)
    hooked(unfinished, "write_json")
    hooked(unfinished, "write_sealed")
    hooked(os, "replace")
    try:
        work()
    finally:
        for restore in undo:
            restore()
    return changes


def killed_at(moment: int, work: Callable[[], Any]) -> int | None:
    """Do the work in a process that is killed just before the given change; its exit code."""
    return in_child(lambda: at_change(moment, work, lambda: os.kill(os.getpid(), signal.SIGKILL)))


def note_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every finished task be in the journal before the next change of a file."""
    original = outputs.Commits.add

    def add(self: Any, record: dict[str, Any], size: int) -> None:
        original(self, record, size)
        if self._running is not None:
            self._running.result()

    monkeypatch.setattr(outputs, "COMMIT_BYTES", 1)
    monkeypatch.setattr(outputs.Commits, "add", add)
