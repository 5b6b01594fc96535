"""What a directory says of the prompts that its model was trained on, to whoever finds it."""

from __future__ import annotations

from pathlib import Path

from ..data.prompts import TEMPLATES, Template
from ..outside.documents import Unreadable, parse_object, read_bounded
from .disk.write import write_json
from .manifest import MANIFEST


def recorded_template(path: Path) -> Template | None:
    """The prompt template of a run, asked of the run, of a checkpoint inside it, of an export of it or of anything
    else (None)."""
    for place in (path / "results.json", path.parent / "run.json", path / MANIFEST):
        try:
            record = parse_object(read_bounded(place))
        except Unreadable:
            continue
        settings = record.get("settings")
        found = record.get("template", settings.get("template") if isinstance(settings, dict) else None)
        if isinstance(found, str) and found in TEMPLATES:
            return found
    return None


def record_template(directory: Path, base: str | None, template: str | None) -> None:
    """Say beside a merged model what prompts it was trained on, where that is known."""
    if template is not None:
        write_json(directory / MANIFEST, {"layout": "merged", "base": base, "template": template})


def template_line(template: str | None) -> list[str]:
    """What a card says of it."""
    return [f"- prompt template: {template}"] if template is not None else []
