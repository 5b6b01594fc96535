"""`pissa eval`: one model on one task; the same command goes on with an evaluation that stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def command(
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL_OR_RUN", help="A model, a run, an export, an adapter, or `pissa init`'s OUT."),
    ],
    task: Annotated[
        str, typer.Option(help="gsm8k, math, humaneval, mbpp, mt-bench, glue/NAME (sst2, mrpc, …) or perplexity.")
    ],
    data: Annotated[str, typer.Option(help="Local file with the problems; perplexity also takes .txt.")],
    out: Annotated[
        Path | None, typer.Option(help="Directory for results.json and every sample; without it only the figure shows.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Only the first so many problems. [all]")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Problems at once. [16]")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="Tokens a continuation may have. [the task's own]")] = None,
    template: Annotated[
        str | None, typer.Option(help="Prompt: auto, chat, alpaca or none. [the run's, else the task's own]")
    ] = None,
    allow_code_execution: Annotated[
        bool | None,
        typer.Option("--allow-code-execution", help="Let code that the model wrote run here (humaneval, mbpp)."),
    ] = None,
    judge_url: Annotated[
        str | None,
        typer.Option(help="Of mt-bench: an endpoint with OpenAI's chat completions, such as https://HOST/v1."),
    ] = None,
    judge_model: Annotated[str | None, typer.Option(help="Of mt-bench: the judge, as the endpoint calls it.")] = None,
    judge_key_env: Annotated[
        str | None, typer.Option(help="Of mt-bench: environment variable that holds the endpoint's key.")
    ] = None,
    judge_prompts: Annotated[
        str | None, typer.Option(help="Of mt-bench: FastChat's judge_prompts.jsonl. [pissa's own instructions]")
    ] = None,
    references: Annotated[
        str | None, typer.Option(help="Of mt-bench: reference answers to math, reasoning and coding, as .jsonl.")
    ] = None,
    window: Annotated[int | None, typer.Option(help="Of perplexity: tokens seen at a time. [512]")] = None,
    base: Annotated[str | None, typer.Option(help="Of an adapter that does not record it.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as one JSON document.")] = False,
) -> None:
    """Evaluate MODEL_OR_RUN on a task, with an interval around the figure.

    Nothing is downloaded for a task: --data is a file of yours. With --out, an evaluation that was stopped goes on when
    the same command is given again.
    """
    given = {
        name: value
        for name, value in locals().items()
        if name not in ("model", "task", "data", "out", "base", "as_json") and value is not None
    }
    from ..evaluation.run import evaluate
    from ..evaluation.summary import results_text
    from ..evaluation.task import Options
    from .output import show

    results = evaluate(model, task, data, out, Options(**given), base=base)
    show(results, results_text(results, out), as_json=as_json)
