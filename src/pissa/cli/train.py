"""`pissa train`: fine-tune a model; the same command continues a run that stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..config.settings import settings_of
from ..errors import ConfigError
from ..stages import stage
from ..training.packages import check_packages
from ..training.passed_on import named_values
from ..training.recipe import DATA, NONE, Recipe, read_yaml, recipe_from, with_flags
from .flags import with_settings
from .output import show
from .places import check_model, check_outline, check_output, check_rows, check_text

INTERRUPTED = "no step was done: the same command starts again, or continues from the last checkpoint"


@with_settings(Recipe, only=settings_of(Recipe).keys() - {"training"})
def command(
    settings: dict[str, Any],
    model: Annotated[str | None, typer.Argument(help="The base: a directory or a hub id.")] = None,
    data: Annotated[
        str | None, typer.Option(help="What to learn: .jsonl, .jsonl.gz, .json, .parquet or a hub id.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The run's directory; it becomes a LoRA for the base.")] = None,
    config: Annotated[
        Path | None, typer.Option(help="YAML file with any of the settings, also model, data and out; flags win.")
    ] = None,
    assigned: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="NAME=VALUE",
            help="Any other field of TRL's SFTConfig or transformers' TrainingArguments, such as adam_beta2=0.95; may "
            "be given several times. In YAML they stand under training.",
            rich_help_panel="Training",
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be learned and what it takes, and stop there.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as one JSON document.")] = False,
) -> None:
    """Fine-tune MODEL on DATA with PiSSA, LoRA or in full.

    OUT becomes an ordinary LoRA for the untouched base (with --quantize for OUT/residual, with --method full a model).
    A run that was stopped goes on when the same command is given again.
    """
    if assigned:
        named = named_values(assigned)
        if not isinstance(named, dict):
            raise ConfigError(f"--set is {', '.join(assigned)}; give NAME=VALUE, such as adam_beta2=0.95")
        settings = {**settings, "training": named}
    written = read_yaml(config) if config is not None else {}
    model, data, out = _places(written, {"model": model, "data": data, "out": out})
    recipe = recipe_from(with_flags(written, settings), config or "the command line")
    check_packages(recipe)
    check_model(model)
    check_rows(data)
    if recipe.calibration not in (None, DATA, NONE):
        check_text(recipe.calibration)
    if recipe.eval_data is not None:
        check_rows(recipe.eval_data)
    check_output(out, "state/run.json", "run")
    if recipe.adapts:
        check_outline(model, recipe)
    with stage("loading the libraries"):
        from ..training.card import how_it_came_to_be, what_it_came_to
        from ..training.run import rehearse, train

    if dry_run:
        found = rehearse(model, data, out, recipe)
        show(found.as_dict(), found.text, as_json=as_json)
        return
    result = train(model, data, out, recipe)
    results = result.results
    fitted = results.get("mean_output_reduction")
    lines = [
        results["data"],
        f"{results['method']}, {_steps(len(results['losses']))}: {what_it_came_to(results)}",
        *how_it_came_to_be(results),
        *([f"fitted to text: what layers put out is {fitted:.0f} % closer than in plain 4 bits"] if fitted else []),
        f"{result.directory} is {_what_it_is(recipe, results)}",
    ]
    show({"directory": str(result.directory), **results}, "\n".join(lines), as_json=as_json)


def _places(written: dict[str, Any], given: dict[str, Any]) -> tuple[str, str, Path]:
    """Model, data and out of the command line, else of the YAML file, from which they are taken.

    Raises:
        ConfigError: one is missing, or is no text.
    """
    in_file = {name: written.pop(name, None) for name in given}
    if given["data"] is not None and in_file["data"] is not None:
        # they are those of the data in the file
        for name in ("data_split", "data_subset"):
            written.pop(name, None)
    places = {name: in_file[name] if flag is None else flag for name, flag in given.items()}
    flags = {"model": "MODEL", "data": "--data", "out": "--out"}
    missing = [flag for name, flag in flags.items() if places[name] is None]
    if missing:
        raise ConfigError(f"{' and '.join(missing)} missing; say it on the command line or in the file of --config")
    wrong = [f"{name} is {place!r}" for name, place in places.items() if not isinstance(place, str | Path)]
    if wrong:
        raise ConfigError(f"{'; '.join(wrong)}; give a name")
    return places["model"], places["data"], Path(places["out"])


def _steps(count: int) -> str:
    return f"{count} step{'s' if count != 1 else ''}"


def _what_it_is(recipe: Recipe, results: dict[str, Any]) -> str:
    if not recipe.adapts:
        return "the fine-tuned model"
    if results["quantization"] is not None:
        gap, model = results["mean_quantization_gap"], results["settings"]["model"]
        place = "in it, residual/" if results["base"] == model else f"in {model}"
        return (
            f"an adapter for the quantised residual {place}; `pissa export` makes a LoRA for "
            f"{results['base']} (off by {100 * gap:.1f} % of its weights on average) or a merged model"
        )
    return f"a {'DoRA' if 'dora' in recipe.method else 'LoRA'} for {results['base']}; plain PEFT loads it"
