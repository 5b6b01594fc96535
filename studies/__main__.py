"""`python -m studies NAME`: a claim of the paper or the report, measured again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pissa.cli.exits import interruptible, run_app


def command(
    name: Annotated[str | None, typer.Argument(help="The study; see --list.")] = None,
    out: Annotated[Path, typer.Option(help="Where NAME.json and NAME.png go, and what is finished of them.")] = Path(
        "runs/studies"
    ),
    quick: Annotated[bool, typer.Option("--quick", help="A pass of seconds, which decides nothing.")] = False,
    full: Annotated[bool, typer.Option("--full", help="The whole grid.")] = False,
    seeds: Annotated[int | None, typer.Option(help="How many seeds. [3, some studies 5; quick 2, full 5]")] = None,
    model: Annotated[str | None, typer.Option(help="A directory or hub id instead of the study's own model.")] = None,
    allow_code_execution: Annotated[
        bool,
        typer.Option(
            "--allow-code-execution",
            help="Let code that the models wrote run here, confined or not (nlg: humaneval, mbpp).",
        ),
    ] = False,
    show_list: Annotated[bool, typer.Option("--list", help="Show all studies with their runtimes.")] = False,
    page: Annotated[Path | None, typer.Option(help="Write README.md of the results in this directory.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Run a claim's experiment: the numbers, a figure, and whether the claim holds here."""
    from pissa.errors import ConfigError

    if sum([name is not None, show_list, page is not None]) != 1:
        raise ConfigError("give one of: a study's NAME, --list, or --page DIR")
    if show_list:
        _list(as_json)
    elif page is not None:
        _page(page, as_json)
    else:
        assert name is not None
        _run(name, out, quick, full, seeds, model, allow_code_execution, as_json)


def _run(
    name: str,
    out: Path,
    quick: bool,
    full: bool,
    seeds: int | None,
    model: str | None,
    allow_code_execution: bool,
    as_json: bool,
) -> None:
    from pissa.cli.output import show
    from pissa.errors import ConfigError
    from pissa.training.bar import make_progress
    from pissa.training.run import quieten

    from .judge import listed
    from .page import verdict_on_page
    from .registry import find_study
    from .study import Settings, run_study

    if quick and full:
        raise ConfigError("--quick and --full exclude each other")
    study = find_study(name)
    quieten()
    with make_progress() as progress:
        scale = "quick" if quick else "full" if full else "default"
        chosen = study.seeds(scale, seeds)
        settings = Settings(out, scale, chosen, model, allow_code_execution=allow_code_execution, progress=progress)
        document = run_study(study, settings)
    parts = listed(document["results"].get("parts", {}))
    lines = [f"{verdict_on_page(document)}: {document['claim']}", document["figures"]]
    lines += [f"  {word.ljust(12)}  {part}: {difference}" for part, difference, word in parts]
    show(document, "\n".join([*lines, f"written to {out}: {name}.json, {name}.png"]), as_json=as_json)


def _list(as_json: bool) -> None:
    from pissa.cli.output import show

    from .registry import find_study, study_names

    studies = [find_study(name) for name in study_names()]
    width = max(len(study.name) for study in studies)
    lines = [f"{study.name.ljust(width)}  {study.minutes:3.0f} min  {study.claim}" for study in studies]
    lines.append("The first of the language studies also pretrains their small Llama: nine minutes, once.")
    listed = [{"name": study.name, "minutes": study.minutes, "claim": study.claim} for study in studies]
    show({"studies": listed}, "\n".join(lines), as_json=as_json)


def _page(directory: Path, as_json: bool) -> None:
    from pissa.cli.output import show

    from .page import write_page

    written = write_page(directory)
    show({"page": str(written)}, f"written: {written}", as_json=as_json)


def run(arguments: list[str] | None = None) -> None:
    """Run the command line of the studies and exit, with the same codes as `pissa`."""
    app = typer.Typer(
        name="studies",
        add_completion=False,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.command()(interruptible(command, "studies"))
    run_app(app, arguments, "studies")


if __name__ == "__main__":
    run()
