"""What the fixture `quick` is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Quick = Callable[[str], dict[str, Any]]
