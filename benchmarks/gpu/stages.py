"""The stages in the order in which they run: what one would miss most comes first, should the pass be cut short."""

from __future__ import annotations

from dataclasses import dataclass

BUDGET = 460.0
"""Seconds for all stages; with the start of Python before them the pass stays within eight minutes."""


@dataclass(frozen=True)
class Stage:
    """One part of the pass."""

    name: str
    """Its key in the results."""
    title: str
    """What it measures, for the page."""
    module: str
    """Module with its `run(context)`."""
    limit: float
    """Seconds after which it is ended; what it had found by then is kept."""


STAGES = (
    Stage("function", "The function is kept: step 0, saving, loading, export", "benchmarks.gpu.function", 60),
    Stage("decompositions", "All linears of LLaMA-2-7B's shapes", "benchmarks.gpu.decompositions", 80),
    Stage("training", "Training steps of an 8B-shaped model in bf16", "benchmarks.gpu.training", 115),
    Stage("initialisation", "Whole initialisation of a 7B-shaped model", "benchmarks.gpu.initialisation", 75),
    Stage("properties", "Properties of tests/devices on the device", "benchmarks.gpu.properties", 65),
    Stage("quantised", "Training steps of the 8B-shaped model in NF4", "benchmarks.gpu.quantised", 65),
)
