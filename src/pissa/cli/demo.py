"""`pissa demo`: PiSSA and LoRA side by side on a real model, in minutes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .output import show
from .places import check_model, check_output, check_rows

INTERRUPTED = "finished runs are saved, and steps up to the last checkpoint: the same command goes on from there"


def command(
    out: Annotated[
        Path | None, typer.Option(help="Where results.json, curves.png and report.md go. [runs/demo, runs/demo-quick]")
    ] = None,
    model: Annotated[str | None, typer.Option(help="A directory or hub id. [SmolLM2-135M-Instruct]")] = None,
    data: Annotated[str | None, typer.Option(help="Your data. [generated word problems]")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A reduced pass of at most two minutes.")] = False,
    seed: Annotated[
        int, typer.Option(min=0, max=2**32 - 1, help="Seed of the data, its order and the initial factors.")
    ] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as one JSON document.")] = False,
) -> None:
    """Fine-tune a real language model with PiSSA and with LoRA, side by side, and show the difference."""
    out = out or Path("runs/demo-quick" if quick else "runs/demo")
    if model is not None:
        check_model(model)
    if data is not None:
        check_rows(data)
    check_output(out, "demo.json", "demo")
    from ..lab.demo.demo import run_demo
    from ..lab.demo.report import demo_summary

    results = run_demo(out, model=model, data=data, quick=quick, seed=seed)
    text = f"{demo_summary(results)}\n{out}/report.md has the rest, curves.png the curves, results.json everything"
    show(results, text, as_json=as_json)
