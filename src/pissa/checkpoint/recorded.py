"""What a run says of itself to whoever finds its directory."""

from __future__ import annotations

import json
from pathlib import Path

from ..data.prompts import TEMPLATES, Template


def recorded_template(path: Path) -> Template | None:
    """The prompt template of a run, asked of the run, of a checkpoint inside it or of anything else (None)."""
    for place in (path / "results.json", path.parent / "run.json"):
        try:
            record = json.loads(place.read_text(encoding="utf-8"))
            found = record.get("template", record["settings"]["template"])
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            continue
        if found in TEMPLATES:
            return found
    return None
