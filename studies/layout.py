"""A result's JSON as a person can read it and a repository can hold it.

What has no list or mapping within stands on one line, so a curve is a line and not a page. Numbers of a list, which are
curves, keep six digits, all others nine: as many as fp32 has.
"""

from __future__ import annotations

import json
from typing import Any

LISTED, ALONE = 6, 9
"""Significant digits of a number in a list, and of any other."""


def rounded(value: Any, digits: int = ALONE) -> Any:
    """The same in JSON's own kinds, with shorter numbers."""
    if isinstance(value, float):
        return float(f"{value:.{digits}g}")
    if isinstance(value, dict):
        return {name: rounded(entry) for name, entry in value.items()}
    if isinstance(value, list):
        return [rounded(entry, LISTED) for entry in value]
    return value


def laid_out(value: Any, margin: str = "") -> str:
    """JSON text; innermost lists and mappings take one line each."""
    members = list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []
    if not any(isinstance(member, dict | list) for member in members):
        return json.dumps(value, allow_nan=False)
    inner = margin + "  "
    names = [f"{json.dumps(name)}: " for name in value] if isinstance(value, dict) else [""] * len(members)
    lines = [f"{inner}{name}{laid_out(member, inner)}" for name, member in zip(names, members, strict=True)]
    opening, closing = "{}" if isinstance(value, dict) else "[]"
    return "\n".join([opening, ",\n".join(lines), f"{margin}{closing}"])
