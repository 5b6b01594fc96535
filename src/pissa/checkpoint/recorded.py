"""What a run says of itself to whoever finds its directory."""

from __future__ import annotations

from pathlib import Path

from ..data.prompts import TEMPLATES, Template
from ..outside.documents import Unreadable, parse_object, read_bounded


def recorded_template(path: Path) -> Template | None:
    """The prompt template of a run, asked of the run, of a checkpoint inside it or of anything else (None)."""
    for place in (path / "results.json", path.parent / "run.json"):
        try:
            record = parse_object(read_bounded(place))
        except Unreadable:
            continue
        settings = record.get("settings")
        found = record.get("template", settings.get("template") if isinstance(settings, dict) else None)
        if isinstance(found, str) and found in TEMPLATES:
            return found
    return None
