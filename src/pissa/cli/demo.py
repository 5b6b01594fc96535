"""`pissa demo`: PiSSA and LoRA side by side on a real model, in minutes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .output import show
from .places import check_model_name, check_source, check_writable


def command(
    out: Annotated[
        Path | None, typer.Option(help="Where results.json, curves.png and report.md go. [runs/demo, runs/demo-quick]")
    ] = None,
    model: Annotated[str | None, typer.Option(help="A directory or hub id. [SmolLM2-135M-Instruct]")] = None,
    data: Annotated[str | None, typer.Option(help="Your data. [generated word problems]")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A reduced pass of at most two minutes.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of the data, its order and the initial factors.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as one JSON document.")] = False,
) -> None:
    """Fine-tune a real language model with PiSSA and with LoRA, side by side, and show the difference."""
    out = out or Path("runs/demo-quick" if quick else "runs/demo")
    if model is not None:
        check_model_name(model)
    if data is not None:
        check_source(data)
    check_writable(out)
    from ..lab.demo.demo import run_demo

    results = run_demo(out, model=model, data=data, quick=quick, seed=seed)
    text = (out / "report.md").read_text(encoding="utf-8")
    show(results, f"{text}\nwritten to {out}: results.json, curves.png, report.md", as_json=as_json)
