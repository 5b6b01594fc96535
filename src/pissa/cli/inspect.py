"""`pissa inspect`: what a split would cost a model, before anything is changed."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from ..config import AdapterSettings
from ..lab.inspection.settings import InspectionSettings
from .flags import with_settings
from .output import show
from .places import check_model, check_outline, check_text, check_writable

INTERRUPTED = "nothing is kept: the same command starts again"


@with_settings(InspectionSettings)
def command(
    model: Annotated[str, typer.Argument(help="A directory or hub id of any transformers model.")],
    settings: dict[str, Any],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Show what splitting and quantising MODEL would cost, layer kind by layer kind."""
    asked = InspectionSettings(**settings)
    check_model(model)
    for text in (asked.calibration, asked.held_out):
        if text is not None:
            check_text(text)
    if asked.figures is not None:
        check_writable(asked.figures)
    adapters = AdapterSettings(max(asked.rank), target_modules=asked.target_modules, rank_budget=asked.rank_budget)
    check_outline(model, adapters)
    from ..lab.inspection.inspect import inspect
    from ..lab.inspection.tables import inspection_table
    from ..training.bar import make_progress

    with make_progress() as progress:
        document = inspect(model, asked, progress=progress)
    show(document, inspection_table(document), as_json=as_json)
