"""A checkpoint in few bits as if it were one in 16 or 32: each packed weight is dequantised when it is read.

Codes and scales lie as several tensors under the weight's name (bitsandbytes, with a JSON description in 4 bits) or the
layer's (GPTQ); here they are one entry, of the shape and dtype that they dequantise to.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ...errors import CheckpointError
from ...live.gptq import PARTS
from ...outside.documents import Unreadable, parse_object
from ...quantize.gptq import PackedGPTQ
from ...quantize.int8 import PackedInt8
from ...quantize.nested import NESTED_BLOCK, NestedScales
from ...quantize.nf4 import PackedNF4
from ..disk.header import Entry
from ..disk.layout import KIND_OF
from ..residual import QUANT_STATE
from ..source.gptq import gptq_layers, read_gptq
from ..source.reader import CHUNK, Source

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


class Dequantized(Source):
    """A source whose packed weights are read dequantised; closing it is the other source's business."""

    def __init__(self, source: Source, model: nn.Module, dtype: torch.dtype) -> None:
        """
        Args:
            source: the checkpoint.
            model: its model, which says which layers store their weights transposed.
            dtype: of INT8 and GPTQ weights once they are dequantised; NF4 ones say it themselves.

        Raises:
            CheckpointError: a packed weight lacks a part, or is of another format than NF4, INT8 and GPTQ's.
        """
        super().__init__(source.path)
        self.config = {key: value for key, value in source.config.items() if key != "quantization_config"}
        self.others, self._source, self._dtype = source.others, source, dtype
        self._states = {
            name.removesuffix(QUANT_STATE): self._state(name) for name in source.entries if name.endswith(QUANT_STATE)
        }
        self._layers = {f"{name}.weight": name for name in gptq_layers(source)}
        self.packed = {*self._states, *_eight_bit(source), *self._layers}
        """Names of the packed weights."""
        transposed = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, Conv1D)}
        self._transposed = self.packed & transposed
        for name, entry in source.entries.items():
            if name in self.packed:
                self.entries[name] = self._entry(name)
            elif not self._is_part(name):
                self.entries[name] = entry
        self.entries |= {weight: self._entry(weight) for weight in self._layers}

    def read(self, name: str) -> Tensor:
        """As `Source.read`; of a packed weight, what it dequantises to, as its layer stores it."""
        if name not in self.packed:
            return self._source.read(name)
        matrix = self._packed(name).dequantize()
        return matrix.T.contiguous() if name in self._transposed else matrix

    def chunks(self, name: str, size: int = CHUNK) -> Iterator[memoryview]:
        """As `Source.chunks`."""
        if name not in self.packed:
            yield from self._source.chunks(name, size)
            return
        yield self.read(name).view(-1).view(torch.uint8).numpy().data

    def _is_part(self, name: str) -> bool:
        """Whether a tensor is scales, table or description of a packed weight."""
        owner, dot, _ = name.partition(".weight.")
        module, _, kind = name.rpartition(".")
        four_bit = bool(dot) and f"{owner}.weight" in self._states
        eight_bit = kind in ("SCB", "weight_format") and f"{module}.weight" in self.packed
        return four_bit or eight_bit or (kind in PARTS and f"{module}.weight" in self._layers)

    def _packed(self, name: str) -> PackedNF4 | PackedInt8 | PackedGPTQ:
        if name in self._layers:
            return read_gptq(self._source, self._layers[name], self._dtype)
        return read_packed(self._source, name, self._states.get(name), self._dtype)

    def _entry(self, name: str) -> Entry:
        if name in self._layers:
            stored = self._source.entries[f"{self._layers[name]}.qweight"]
            shape: tuple[int, ...] = self._packed(name).shape
        else:
            stored = self._source.entries[name]
            shape = tuple(self._states[name]["shape"]) if name in self._states else stored.shape
        dtype = DTYPES[self._states[name]["dtype"]] if name in self._states else self._dtype
        shape = shape[::-1] if name in self._transposed else shape
        return Entry(KIND_OF[dtype], shape, shape[0] * shape[1] * dtype.itemsize, stored.file, stored.offset)

    def _state(self, name: str) -> dict[str, Any]:
        """The description of a 4-bit weight, once its parts are found to fit it."""
        entries, weight = self._source.entries, name.removesuffix(QUANT_STATE)
        try:
            state = read_state(self._source, weight)
            (out, columns), block = state["shape"], state["blocksize"]
            sound = min(out, columns, block) > 0
            blocks = -(-out * columns // block)
            parts = {weight: ("U8", -(-out * columns // 2)), f"{weight}.absmax": ("F32", blocks)}
            if "nested_offset" in state:
                parts[f"{weight}.absmax"] = ("U8", blocks)
                parts[f"{weight}.nested_absmax"] = ("F32", -(-blocks // NESTED_BLOCK))
            sizes = {part: (entries[part].kind, _count(entries[part])) for part in parts}
            sound = (
                sound
                and state["quant_type"] == "nf4"
                and state["dtype"] in DTYPES
                and sizes == parts
                and block % 2 == 0
            )
            sound = sound and state.get("nested_blocksize", NESTED_BLOCK) == NESTED_BLOCK
            float(state.get("nested_offset", 0))
        except (ArithmeticError, LookupError, TypeError, ValueError, RecursionError):
            sound, state = False, {}
        if not sound:
            raise CheckpointError(
                f"{entries[name].file}: {weight} is no whole weight of bitsandbytes in NF4; download it again, or give "
                "the base in 16 bits"
            )
        return state


def read_packed(
    source: Source, name: str, state: Mapping[str, Any] | None, dtype: torch.dtype
) -> PackedNF4 | PackedInt8:
    """A packed weight, out of its parts.

    Args:
        source: where they lie.
        name: the weight's.
        state: the description of a 4-bit weight; None for one in 8 bits.
        dtype: that one in 8 bits dequantises to; 4-bit ones say it themselves.
    """
    if state is None:
        return PackedInt8(source.read(name), source.read(f"{name.removesuffix('weight')}SCB"), dtype)
    scales: Tensor | NestedScales = source.read(f"{name}.absmax")
    if "nested_offset" in state:
        offset = torch.tensor(state["nested_offset"], dtype=torch.float32)
        scales = NestedScales(scales, source.read(f"{name}.nested_absmax"), offset)
    out, columns = state["shape"]
    return PackedNF4(source.read(name), scales, (out, columns), DTYPES[state["dtype"]], state["blocksize"])


LARGEST_STATE = 1 << 16
"""Bytes of the description of a 4-bit weight: it has some two hundred."""


def read_state(source: Source, name: str) -> dict[str, Any]:
    """The description of a 4-bit weight as it stands in the checkpoint."""
    entry = source.entries[f"{name}{QUANT_STATE}"]
    if entry.nbytes > LARGEST_STATE:
        raise CheckpointError(f"{entry.file}: the description of {name} has {entry.nbytes:,} bytes; download it again")
    try:
        return parse_object(bytes(source.read(f"{name}{QUANT_STATE}").view(torch.uint8).numpy()))
    except Unreadable as error:
        raise CheckpointError(f"{entry.file}: the description of {name} {error}; download it again") from error


def _eight_bit(source: Source) -> Iterator[str]:
    """Names of the INT8 weights.

    Raises:
        CheckpointError: one without scales for its rows.
    """
    for name, scales in source.entries.items():
        weight = f"{name.removesuffix('SCB')}weight"
        if not name.endswith(".SCB") or weight not in source.entries:
            continue
        entry = source.entries[weight]
        if entry.kind != "I8" or len(entry.shape) != 2 or (scales.kind, scales.shape) != ("F32", entry.shape[:1]):
            raise CheckpointError(
                f"{entry.file}: {weight} is no whole weight of bitsandbytes in INT8; download it again"
            )
        yield weight


def _count(entry: Entry) -> int:
    return torch.Size(entry.shape).numel()
