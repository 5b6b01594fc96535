"""`pissa eval`: one model on one task; the same command goes on with an evaluation that stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..evaluation.options import EvaluationOptions
from .flags import with_settings
from .output import show
from .places import check_file, check_model, check_output, check_subject

INTERRUPTED = "with --out, the samples so far are kept and the same command goes on; without, it starts again"


@with_settings(EvaluationOptions)
def command(
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL_OR_RUN", help="A model, a run, an export, an adapter, or `pissa init`'s OUT."),
    ],
    task: Annotated[
        str, typer.Option(help="gsm8k, math, humaneval, mbpp, mt-bench, glue/NAME (sst2, mrpc, …) or perplexity.")
    ],
    data: Annotated[str, typer.Option(help="Local file with the problems; perplexity also takes .txt.")],
    settings: dict[str, Any],
    out: Annotated[
        Path | None, typer.Option(help="Directory for results.json and every sample; without it only the figure shows.")
    ] = None,
    base: Annotated[str | None, typer.Option(help="The base of an adapter that does not record it.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as one JSON document.")] = False,
) -> None:
    """Evaluate MODEL_OR_RUN on a task, with an interval around the figure.

    Nothing is downloaded for a task: --data is a file of yours. With --out, an evaluation that was stopped goes on when
    the same command is given again.
    """
    from ..evaluation.tasks.registry import check_task_name, find_task

    options = EvaluationOptions(**settings)
    check_task_name(task)
    check_file(data, "--data")
    for name in ("judge_prompts", "references"):
        if getattr(options, name) is not None:
            check_file(getattr(options, name), f"--{name.replace('_', '-')}")
    check_subject(model)
    if base is not None:
        check_model(base)
    if out is not None:
        check_output(out, "eval.json", "evaluation")
    found = find_task(task)
    found.check(options)
    found.load(Path(data), options.limit)
    from ..evaluation.run import evaluate
    from ..evaluation.summary import results_text

    results = evaluate(model, task, data, out, options, base=base)
    show(results, results_text(results, out), as_json=as_json)
