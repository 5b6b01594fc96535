"""`pissa inspect`: what a split would cost a model, before anything is changed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def command(
    model: Annotated[str, typer.Argument(help="A directory or hub id of any transformers model.")],
    rank: Annotated[str, typer.Option(help="Components per adapter; several, separated by commas, for curves.")] = "16",
    rank_budget: Annotated[
        int | None,
        typer.Option(
            help="Parameters of all adapters, to share out among the layers: shows and, with --figures, draws the "
            "plan; --rank is then the largest rank. With --quantize for that format's error."
        ),
    ] = None,
    quantize: Annotated[
        str | None, typer.Option(help="nf4, int8 or gptq. Without it: ranks and energies of the plain split.")
    ] = None,
    methods: Annotated[
        str | None,
        typer.Option(
            help="qlora, loftq-T, qpissa-T, ours-T (T iterations); with --calibration also NAME+aware and NAME+gptq. "
            "[qlora,loftq-1,loftq-5,qpissa-1,qpissa-5,ours-5,ours-10]"
        ),
    ] = None,
    calibration: Annotated[
        Path | None, typer.Option(help=".txt or .jsonl, each also as .gz: adds the held-out error of layer outputs.")
    ] = None,
    held_out: Annotated[Path | None, typer.Option(help="Text to measure on. [a fifth of the calibration]")] = None,
    windows: Annotated[int, typer.Option(help="Windows of calibration text.")] = 80,
    length: Annotated[int, typer.Option(help="Tokens per window.")] = 256,
    norm: Annotated[str | None, typer.Option(help="nuclear or frobenius. [both]")] = None,
    double_quant: Annotated[
        bool, typer.Option("--double-quant/--no-double-quant", help="NF4's scales in 8 bits themselves.")
    ] = True,
    block_size: Annotated[int, typer.Option(help="Values that share a scale: NF4's block, GPTQ's group.")] = 64,
    target_modules: Annotated[
        str, typer.Option(help='"all-linear", names separated by commas, or a regular expression.')
    ] = "all-linear",
    max_layers: Annotated[int | None, typer.Option(help="Only so many of the model's blocks, evenly spread.")] = None,
    figures: Annotated[
        Path | None, typer.Option(help="Directory for reduction.png and singular_values.png, or ranks.png.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Show what splitting and quantising MODEL would cost, layer kind by layer kind."""
    from ..config import quantization_preset
    from ..errors import ConfigError
    from ..lab.inspection.inspect import inspect
    from ..lab.inspection.tables import inspection_table
    from ..lab.inspection.variants import CALIBRATED, PUBLISHED, variants
    from ..training.progress import make_progress
    from .output import show

    if quantize is None and methods is not None:
        raise ConfigError("--methods are ways to quantise; say --quantize nf4, int8 or gptq")
    try:
        ranks = [int(part) for part in rank.split(",")]
    except ValueError as error:
        raise ConfigError(f"--rank is {rank!r}; give a whole number, or several separated by commas") from error
    names = methods.split(",") if methods else [*PUBLISHED]
    if calibration is not None and methods is None:
        names += CALIBRATED if quantize != "int8" else CALIBRATED[:1]
    chosen = []
    budgeted = None
    if quantize is not None and rank_budget is not None:
        if methods is not None:
            raise ConfigError("--rank-budget plans for a format, not for --methods; leave either out")
        budgeted = quantization_preset("ours-1", format=quantize, double_quant=double_quant, block_size=block_size)
    elif quantize is not None:
        settings = {"format": quantize, "double_quant": double_quant, "block_size": block_size}
        chosen = variants(names, calibrated=calibration is not None, **settings)
    targets: str | list[str] = target_modules
    if "," in target_modules or target_modules.replace("_", "").isalnum():
        targets = [name.strip() for name in target_modules.split(",")]
    with make_progress() as progress:
        document = inspect(
            model,
            ranks,
            chosen,
            calibration=calibration,
            held_out=held_out,
            length=length,
            windows=windows,
            norms=[norm] if norm else ["nuclear", "frobenius"],  # pyright: ignore[reportArgumentType]
            target_modules=targets,
            max_layers=max_layers,
            rank_budget=rank_budget,
            quantization=budgeted,
            figures=figures,
            progress=progress,
        )
    show(document, inspection_table(document), as_json=as_json)
