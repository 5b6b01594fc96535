"""What commands print: results on stdout, everything else on stderr."""

from __future__ import annotations

import json
import sys
from typing import Any

from ..outside.text import for_terminal, on_one_line


def show(document: dict[str, Any], text: str, *, as_json: bool) -> None:
    """Print a result: one JSON document, or the text for people."""
    print(json.dumps(document, indent=2) if as_json else for_terminal(text))


def complain(message: str, command: str = "pissa") -> None:
    """Print one line on stderr: what is wrong, or what an interruption left."""
    print(f"{command}: {on_one_line(message)}", file=sys.stderr)
