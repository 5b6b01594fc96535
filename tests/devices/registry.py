"""Properties that hold on every device: functions of the device, by name.

pytest checks them on the CPU and on a stand-in for a GPU (`stand_in.py`), and on a real one where PISSA_TEST_DEVICE
names it; `benchmarks/gpu/properties.py` checks the same functions where pytest is not installed.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

Property = Callable[[torch.device], None]
PROPERTIES: dict[str, Property] = {}


class Unavailable(Exception):
    """A property cannot be checked here; the message says why."""


def holds(check: Property) -> Property:
    """Enter a property under its function's name."""
    assert check.__name__ not in PROPERTIES, check.__name__
    PROPERTIES[check.__name__] = check
    return check
