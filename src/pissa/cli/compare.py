"""`pissa compare`: methods against each other on your data; the same command continues a comparison that stopped."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from ..config.settings import settings_of
from ..errors import ConfigError
from ..lab.comparison.plan import ComparisonPlan, read_rates, search_runs_within
from ..training.recipe import Recipe, read_recipe, recipe_from
from .flags import with_settings
from .output import show
from .places import check_file, check_model, check_outline, check_output, check_rows, check_text

RECORD = "compare.json"
"""What only a comparison's directory has."""
CALLED = {"evaluation": "--eval", "evaluation_data": "--eval-data"}
"""Flags that are not called like their fields."""
PLANNED = tuple(name for name in settings_of(ComparisonPlan) if name not in ("recipe", "rates"))
SHARED = ("rank", "batch_size", "micro_batch_size", "max_length", "template", "dtype")
"""Settings of a run that all of a comparison's runs share; any other is given in a YAML file."""
REBUILD_TAKES = ("out", "rebuild", "report", "as_json")
INTERRUPTED = "all finished runs are saved: the same command goes on from there"


@with_settings(ComparisonPlan, only=PLANNED, names=CALLED, into="planned")
@with_settings(Recipe, only=SHARED)
def command(
    context: typer.Context,
    out: Annotated[Path, typer.Option(help="The comparison's directory.")],
    settings: dict[str, Any],
    planned: dict[str, Any],
    model: Annotated[str | None, typer.Option(help="The base: a directory or a hub id.")] = None,
    data: Annotated[str | None, typer.Option(help="To learn from: a file or a hub id, see pissa train.")] = None,
    test: Annotated[str | None, typer.Option(help="Rows to report on. Left out, held out of the data.")] = None,
    validation: Annotated[
        str | None, typer.Option(help="Rows to choose rates by. Left out, held out of the data.")
    ] = None,
    lrs: Annotated[
        str, typer.Option(help="auto searches each method's own; several are a grid for all; one is fixed.")
    ] = "auto",
    budget: Annotated[
        int | None, typer.Option(min=1, help="How many steps each method's search may have, in place of --search-runs.")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file with settings of pissa train; flags win.")] = None,
    rebuild: Annotated[
        bool, typer.Option("--rebuild", help="Only write results.json and the report again, from what lies in OUT.")
    ] = False,
    report: Annotated[bool, typer.Option(help="Write report.html and report.md.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as one JSON document.")] = False,
) -> None:
    """Compare methods, each at its own learning rate and over several seeds, on held-out rows.

    Every method's search has the same budget; rates are chosen on validation rows and reported on test rows. A
    comparison that was stopped goes on when the same command is given again.
    """
    if rebuild:
        _refuse_unused(context)
        if not (out / RECORD).is_file():
            raise ConfigError(f"{out} holds no comparison ({RECORD}); give the --out of one")
        from ..lab.comparison.run import rebuild as rebuild_results

        results = rebuild_results(out, report=report)
    else:
        if model is None or data is None:
            raise ConfigError("compare needs --model and --data (only --rebuild does without)")
        recipe = read_recipe(config, **settings) if config is not None else recipe_from(settings, "the command line")
        plan = _plan(planned, recipe, lrs, budget)
        check_model(model)
        for source in (data, test, validation):
            if source is not None:
                check_rows(source)
        if plan.forgetting is not None:
            check_text(plan.forgetting)
        if plan.evaluation_data is not None:
            check_file(plan.evaluation_data, CALLED["evaluation_data"])
        check_output(out, RECORD, "comparison")
        if set(plan.methods) != {"full"}:
            check_outline(model, recipe)
        from ..lab.comparison.run import compare

        called = shlex.join(["pissa", *sys.argv[1:]])
        results = compare(model, data, out, plan, validation=validation, test=test, command=called, report=report)
    show(results, _text(results, out / ("report.html" if report else "results.json")), as_json=as_json)


def _plan(planned: dict[str, Any], recipe: Recipe, lrs: str, budget: int | None) -> ComparisonPlan:
    """The plan that the flags describe.

    Raises:
        ConfigError: flags that contradict each other, or a plan that cannot be.
    """
    if budget is not None and "search_runs" in planned:
        raise ConfigError("--budget and --search-runs say the same; give one of them")
    rates = read_rates(lrs)
    if rates is not None and (budget is not None or "search_runs" in planned):
        raise ConfigError("--budget and --search-runs are of --lrs auto; with given rates leave them out")
    if budget is not None:
        usual = {name: planned.get(name, getattr(ComparisonPlan, name)) for name in ("steps", "rungs")}
        planned = {**planned, "search_runs": search_runs_within(budget, **usual)}
    return ComparisonPlan(**planned, recipe=recipe, rates=rates)


def _refuse_unused(context: typer.Context) -> None:
    """Refuse flags that --rebuild would ignore: what was compared is recorded.

    Raises:
        ConfigError: naming them.
    """
    given = []
    for option in context.command.params:
        source = context.get_parameter_source(str(option.name))
        if option.name in REBUILD_TAKES or source is None or source.name != "COMMANDLINE":
            continue
        value = context.params[str(option.name)]
        negated = value is False and option.secondary_opts
        name = (option.secondary_opts if negated else option.opts)[0]
        given.append(f"--no-{name.removeprefix('--')}" if value == "false" else name)
    if given:
        raise ConfigError(
            f"--rebuild measures nothing and takes only --out, --report and --json; leave out {', '.join(given)}"
        )


def _text(results: dict[str, Any], place: Path) -> str:
    """The mean of each method's runs, for people, and where there is more."""
    lines = []
    for name, method in results["methods"].items():
        losses = [run["test_loss"] for run in method["runs"] if run["status"] == "done"]
        if not losses:
            lines.append(f"{name}: no finished run")
            continue
        edge = ", on the edge of what was tried" if method["on_edge"] else ""
        mean = sum(losses) / len(losses)
        spread = f" ({min(losses):.4f} to {max(losses):.4f})" if len(losses) > 1 else ""
        lines.append(
            f"{name}: test loss {mean:.4f}{spread} over {len(losses)} runs at lr {method['learning_rate']:g}{edge}"
        )
    return "\n".join([*lines, f"{place} has everything"])
