"""Models by their shapes: those whose initialisation was measured, and those whose is extrapolated to."""

from __future__ import annotations

from typing import Any, NamedTuple

RANK = 16
"""The rank of the initialisations that are measured whole."""


class Shape(NamedTuple):
    """A Llama-like model."""

    layers: int
    hidden: int
    intermediate: int
    small: int
    """Rows of the key and value projections."""
    vocabulary: int

    @property
    def matrices(self) -> list[tuple[int, int]]:
        """(out, in) of all that is split."""
        h, i, k = self.hidden, self.intermediate, self.small
        return self.layers * [(h, h), (h, h), (k, h), (k, h), (i, h), (i, h), (h, i)]

    @property
    def parameters(self) -> int:
        """All weights, with input and output embedding."""
        return sum(m * n for m, n in self.matrices) + 2 * self.vocabulary * self.hidden


MEASURED = (
    ("LLaMA-3-8B, 2 layers", Shape(2, 4096, 14336, 1024, 16384), 1140894408, 19.99, 1536237568),
    ("LLaMA-3-8B, 5 layers", Shape(5, 4096, 14336, 1024, 128256), 4282480409, 42.99, 2337574912),
    ("LLaMA-3-8B, 14 layers", Shape(14, 4096, 14336, 1024, 128256), 8208516432, 91.54, 2404548608),
    ("LLaMA-3-8B", Shape(32, 4096, 14336, 1024, 128256), 16060580703, 188.77, 1576562688),
)
"""Name, shape, bytes on disk, seconds, peak bytes; two threads, bf16, rank 16 (benchmarks/results/init.json)."""
MEASURED_THREADS = 2
PREDICTED = {
    "100M": Shape(12, 768, 2048, 768, 32000),
    "1B": Shape(22, 2048, 5632, 256, 32000),
    "7B": Shape(32, 4096, 11008, 4096, 32000),
    "13B": Shape(40, 5120, 13824, 5120, 32000),
    "34B": Shape(48, 8192, 22016, 1024, 32000),
    "70B": Shape(80, 8192, 28672, 1024, 32000),
}
SMALL = {
    "100M": PREDICTED["100M"],
    "1B, 6 layers": PREDICTED["1B"]._replace(layers=6),
    "13B, 1 layer": PREDICTED["13B"]._replace(layers=1, vocabulary=1024),
    "70B, 1 layer": PREDICTED["70B"]._replace(layers=1, vocabulary=1024),
}
TINY = Shape(2, 128, 256, 64, 256)


def largest(shape: Shape) -> int:
    """Entries of the largest matrix that is split."""
    return max(m * n for m, n in shape.matrices)


def published() -> list[dict[str, Any]]:
    """The rows of MEASURED in the shape of those measured here."""
    return [
        {
            "name": name,
            "shape": list(shape),
            "bytes": size,
            "seconds": seconds,
            "threads": MEASURED_THREADS,
            "peak_gib": peak / 2**30,
            "where": "two idle cores, wall clock",
        }
        for name, shape, size, seconds, peak in MEASURED
    ]
