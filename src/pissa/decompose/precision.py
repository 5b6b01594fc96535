"""fp32 arithmetic that is fp32, whatever the process allows elsewhere."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

AUTOCAST_DEVICES = ("cpu", "cuda", "mps", "xpu")

# Any: torch's annotations know neither attribute of the oneDNN backend
_backends: Any = torch.backends
_lock = threading.Lock()
_inside = 0
_before = ("ieee", "ieee")


@contextmanager
def full_precision() -> Iterator[None]:
    """Keep fp32 products in fp32: without TF32 or bf16 inside them, and outside autocast.

    The matmul precision is one of the whole process: the first thread that enters sets it, and the last one that
    leaves puts it back. Autocast is one of a thread, so that each thread enters for itself.
    """
    global _inside, _before
    with _lock:
        if _inside == 0:
            _before = _precision()
            _set_precision(("ieee", "ieee"))
        _inside += 1
    try:
        with ExitStack() as stack:
            for device in AUTOCAST_DEVICES:
                if torch.is_autocast_enabled(device):
                    stack.enter_context(torch.autocast(device, enabled=False))
            yield
    finally:
        with _lock:
            _inside -= 1
            if _inside == 0:
                _set_precision(_before)


def _precision() -> tuple[str, str]:
    """By backend: torch's one setting for all refuses to be read where a backend's own was set."""
    return _backends.cuda.matmul.fp32_precision, _backends.mkldnn.matmul.fp32_precision


def _set_precision(wanted: tuple[str, str]) -> None:
    if _precision() != wanted:
        _backends.cuda.matmul.fp32_precision, _backends.mkldnn.matmul.fp32_precision = wanted
