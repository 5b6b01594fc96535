"""`pissa init`: a model of any size as residual and initial adapter on disk; the same command continues."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import ConfigError
from ..training.packages import check_packages
from ..training.recipe import DATA, NONE, QUANTIZATION_OWN, Recipe, recipe_from
from .flags import with_settings
from .output import show
from .places import check_choice, check_model, check_outline, check_output, check_text

SPLIT = (
    "rank", "alpha", "method", "component", "random_fraction", "cur_core", "cur_rcond", "target_modules",
    "exclude_modules", "rank_pattern", "alpha_pattern", "use_rslora", "tolerance", "algorithm", "seed", "quantize",
    "quantize_method", "iterations", *QUANTIZATION_OWN, "calibration", "calibration_windows", "calibration_length",
    "rounding",
)  # fmt: skip
"""The settings of a recipe that a split has."""
UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
INTERRUPTED = "what was split so far is kept: the same command goes on from there"


@with_settings(Recipe, only=SPLIT)
def command(
    model: Annotated[str, typer.Argument(help="The base: a directory or a hub id.")],
    out: Annotated[Path, typer.Argument(help="Directory to write; new, empty, or that of the same run.")],
    settings: dict[str, Any],
    dtype: Annotated[
        str, typer.Option(help="In what the weights are stored: auto (as config.json says), fp32, bf16 or fp16.")
    ] = "auto",
    memory: Annotated[
        str | None,
        typer.Option(help="What the weights in work may take together, such as 8G. Left out, 4 times the largest one."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Split MODEL into a residual and an initial adapter in OUT, a few weights in memory at a time.

    OUT is loaded by transformers as it is, OUT/pissa_init by PEFT, and both by pissa train. A run that was stopped goes
    on when the same command is given again; several processes (torchrun) share the work.
    """
    recipe = recipe_from(settings, "the command line")
    if not recipe.adapts:
        raise ConfigError("method full has no adapter, so there is nothing to prepare")
    if recipe.calibration == DATA:
        raise ConfigError("calibration data means the rows of pissa train, and here are none: give a .txt or .jsonl")
    if recipe.calibration is None:
        if recipe.rounding == "gptq":
            raise ConfigError('rounding "gptq" needs text to see what the layers see; add --calibration FILE')
        recipe = replace(recipe, calibration=NONE if recipe.quantization is not None else None)
    config = recipe.pissa_config()
    check_packages(recipe, trains=False)
    text = config.quantization.calibration if config.quantization is not None else None
    check_choice("--dtype", dtype, ("auto", "fp32", "bf16", "fp16"))
    limit = _bytes(memory) if memory is not None else None
    check_model(model)
    if text is not None:
        check_text(text)
    if not (out / "pissa.json").is_file():  # which a finished one has
        check_output(out, ".pissa-init/run.json", "split")
    check_outline(model, recipe)
    from ..checkpoint.stream.init import init_checkpoint
    from ..checkpoint.stream.process import Step
    from ..training.fitting import batches_of
    from ..training.run import quieten
    from .bytes_bar import bytes_bar

    quieten()
    first = int(os.environ.get("RANK") or 0) == 0
    with bytes_bar("splitting") as bar:

        def report(step: Step) -> None:
            if first:
                bar.show(_note(step), step.size, step.all_size)

        result = init_checkpoint(
            model,
            out,
            config,
            dtype=None if dtype == "auto" else dtype,
            memory=limit,
            batches=None if text is None else batches_of(text, model, recipe),
            progress=report,
        )
    if first:
        document, text = _summary(model, out, result)
        show(document, text, as_json=as_json)


def _note(step: object) -> str:
    from ..checkpoint.stream.process import Step

    assert isinstance(step, Step)
    done, certificate = f"{step.tensors}/{step.all_tensors}", step.certificate
    if certificate is None:
        return f"{done} {step.module}"
    if certificate["quantization_error"] is not None:
        return f"{done} error {certificate['rounding']:.0e} {step.module}"
    return f"{done} loss {certificate['captured_energy_loss']:.0e} {step.module}"


def _summary(model: str, out: Path, result: object) -> tuple[dict[str, object], str]:
    from ..checkpoint.stream.init import InitResult

    assert isinstance(result, InitResult)
    modules = result.manifest["modules"].values()
    document: dict[str, object] = {
        "directory": str(out),
        "base": result.manifest["base"],
        "modules": len(modules),
        "tensors": len(result.manifest["base_tensors"]),
        "bytes": sum(file["size"] for file in result.manifest["files"].values()),
        "largest_captured_energy_loss": max(module["captured_energy_loss"] for module in modules),
        "largest_rounding_error": max(module["rounding"] for module in modules),
        "seconds": result.seconds,
        "continued_tensors": result.continued,
        "processes": result.processes,
        "threads": result.threads,
    }
    if result.seconds == 0:
        return document, f"{out} is finished already"
    what = f"{len(modules)} modules of {model} in {result.seconds:.0f} s"
    return document, (
        f"{out} holds {what}: the residual, and the initial adapter in pissa_init/; largest captured-energy loss "
        f"{document['largest_captured_energy_loss']:.1e}, largest error of residual + adapter "
        f"{document['largest_rounding_error']:.1e} of a weight's norm"
    )


def _bytes(text: str) -> int:
    """A size such as 8G or 8GB."""
    found = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([KMGT]?)(i?)B?\s*", text, re.IGNORECASE)
    if found is None:
        raise ConfigError(f"--memory is {text!r}; give a size such as 8G")
    unit = UNITS[found[2].upper()]
    if found[3]:
        unit = 2 ** (10 * " KMGT".index(found[2].upper() or " "))
    size = int(float(found[1]) * unit)
    if size < 1:
        raise ConfigError(f"--memory is {text!r}; give a size such as 8G, or leave it out")
    return size
