"""`pissa compare`: methods against each other on your data; the same command continues a comparison that stopped."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import ConfigError

REBUILD_TAKES = ("out", "rebuild", "report", "as_json")


def command(
    context: typer.Context,
    out: Annotated[Path, typer.Option(help="The comparison's directory.")],
    model: Annotated[str | None, typer.Option(help="The base: a directory or a hub id.")] = None,
    data: Annotated[str | None, typer.Option(help="To learn from: a file or a hub id, see pissa train.")] = None,
    test: Annotated[str | None, typer.Option(help="Rows to report on. [held out of the data]")] = None,
    validation: Annotated[str | None, typer.Option(help="Rows to choose rates by. [held out of the data]")] = None,
    methods: Annotated[str, typer.Option(help="Separated by commas; see pissa train --method.")] = "lora,pissa",
    lrs: Annotated[
        str, typer.Option(help="auto searches each method's own; several are a grid for all; one is fixed.")
    ] = "auto",
    steps: Annotated[int, typer.Option(help="Of every reported run.")] = 100,
    seeds: Annotated[int, typer.Option(help="Reported runs per method.")] = 5,
    search_runs: Annotated[
        int | None, typer.Option(help="Runs in the search's first rung, for each method. [6]")
    ] = None,
    budget: Annotated[int | None, typer.Option(help="In place of that: steps of the search, for each method.")] = None,
    rungs: Annotated[int, typer.Option(help="Of the search; half the runs, twice the steps in each.")] = 2,
    null: Annotated[bool, typer.Option(help="Also compare LoRA with itself under other seeds.")] = True,
    forgetting: Annotated[str | None, typer.Option(help="Text whose perplexity is measured before and after.")] = None,
    validation_rows: Annotated[int, typer.Option(help="At most.")] = 100,
    test_rows: Annotated[int, typer.Option(help="At most.")] = 200,
    evaluation: Annotated[
        str | None, typer.Option("--eval", help="Task of pissa eval to solve. [test problems, by their answers]")
    ] = None,
    evaluation_data: Annotated[
        str | None, typer.Option("--eval-data", help="File with the task's problems. [the test problems]")
    ] = None,
    allow_code_execution: Annotated[
        bool,
        typer.Option("--allow-code-execution", help="Let code that the models wrote run here (humaneval, mbpp)."),
    ] = False,
    accuracy_problems: Annotated[
        int | None, typer.Option(help="Problems solved by generating. [all where answers are marked]")
    ] = None,
    new_tokens: Annotated[int, typer.Option(help="Of a generated solution.")] = 256,
    curve_points: Annotated[int, typer.Option(help="Measurements of test loss while a run trains.")] = 4,
    curve_problems: Annotated[int, typer.Option(help="Test problems for each of them.")] = 32,
    curve_accuracy: Annotated[bool, typer.Option("--curve-accuracy", help="Solve them too, each time.")] = False,
    config: Annotated[Path | None, typer.Option(help="YAML file with settings of pissa train; flags win.")] = None,
    rank: Annotated[int | None, typer.Option(help="Components per adapter. [16]")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Examples per step. [128]")] = None,
    micro_batch_size: Annotated[int | None, typer.Option(help="Examples per forward pass. [4]")] = None,
    max_length: Annotated[int | None, typer.Option(help="Tokens per example. [512]")] = None,
    template: Annotated[
        str | None,
        typer.Option(help="Prompt: auto, chat, alpaca or none. [auto: chat where there is one, else alpaca]"),
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="Frozen weights: auto, fp32, bf16. [auto]")] = None,
    seed: Annotated[int, typer.Option(help="Of the held-out rows, and the first of the runs.")] = 0,
    keep_runs: Annotated[bool, typer.Option("--keep-runs", help="Keep all weights and checkpoints.")] = False,
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
    from ..lab.comparison.plan import Plan, read_rates, search_runs_within
    from ..lab.comparison.run import compare
    from ..lab.comparison.run import rebuild as rebuild_results
    from ..training.recipe import read_recipe, recipe_from
    from .output import show

    if rebuild:
        _refuse_unused(context)
        results = rebuild_results(out, report=report)
    else:
        if model is None or data is None:
            raise ConfigError("compare needs --model and --data (only --rebuild does without)")
        given = {
            "rank": rank, "batch_size": batch_size, "micro_batch_size": micro_batch_size, "max_length": max_length,
            "template": template, "dtype": dtype,
        }  # fmt: skip
        flags: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        recipe = read_recipe(config, **flags) if config is not None else recipe_from(flags, "the command line")
        if budget is not None:
            if search_runs is not None:
                raise ConfigError("--budget and --search-runs say the same; give one of them")
            search_runs = search_runs_within(budget, steps, rungs)
        rates = read_rates(lrs)
        if rates is not None and search_runs is not None:
            raise ConfigError("--budget and --search-runs are of --lrs auto; with given rates leave them out")
        plan = Plan(
            methods=tuple(name.strip() for name in methods.split(",") if name.strip()),
            recipe=recipe,
            steps=steps,
            seeds=seeds,
            rates=rates,
            search_runs=Plan.search_runs if search_runs is None else search_runs,
            rungs=rungs,
            null=null,
            validation_rows=validation_rows,
            test_rows=test_rows,
            evaluation=evaluation,
            evaluation_data=evaluation_data,
            allow_code_execution=allow_code_execution,
            accuracy_problems=accuracy_problems,
            new_tokens=new_tokens,
            curve_points=curve_points,
            curve_problems=curve_problems,
            curve_accuracy=curve_accuracy,
            forgetting=forgetting,
            seed=seed,
            keep_runs=keep_runs,
        )
        called = shlex.join(["pissa", *sys.argv[1:]])
        results = compare(model, data, out, plan, validation=validation, test=test, command=called, report=report)
    show(results, _text(results, out / ("report.html" if report else "results.json")), as_json=as_json)


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
        negated = context.params[str(option.name)] is False and option.secondary_opts
        given.append((option.secondary_opts if negated else option.opts)[0])
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
