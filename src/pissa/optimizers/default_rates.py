"""The learning rate of each optimizer where none is given, by the name that settings use."""

SPECTRAL = "spectral"
RATES = {SPECTRAL: 0.05}
"""Optimizer -> its learning rate."""
RATE = 2e-5
"""That of any other: the paper's, for AdamW."""


def default_rate(optimizer: str) -> float:
    """The peak learning rate of an optimizer where none is given."""
    return RATES.get(optimizer, RATE)
