"""`pissa verify`: whether a directory is what its manifest says, to the byte."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..checkpoint.manifest import MANIFEST
from ..errors import CheckpointError
from .output import show
from .places import check_model

INTERRUPTED = "nothing was changed: the same command starts again"


def command(
    directory: Annotated[Path, typer.Argument(help="What pissa init wrote.")],
    base: Annotated[
        str | None, typer.Option(help="The base, a directory or hub id: residual + adapter are held against it.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Check every byte of DIRECTORY against its pissa.json, and residual + adapter against the base."""
    if not directory.is_dir():
        raise CheckpointError(f"{directory} is not a directory; give what pissa init wrote")
    if not (directory / MANIFEST).is_file():
        raise CheckpointError(f"{directory} has no {MANIFEST}; give what pissa init wrote")
    if base is not None:
        check_model(base)
    from ..checkpoint.stream.verify import verify
    from ..training.run import quieten
    from .bytes_bar import bytes_bar

    quieten()

    with bytes_bar("verifying") as bar:
        found = verify(directory, base, progress=lambda what, done, total: bar.show(what, done, total))
    worst = max(found.errors.values(), default=None)
    document = {
        "directory": str(directory),
        "files": found.files,
        "tensors": found.tensors,
        "bytes": found.size,
        "base": base,
        "largest_error": worst,
        "errors": found.errors,
    }
    text = (
        f"{directory} is what its pissa.json says: {found.files} files, {found.tensors} tensors, {found.size:,} bytes"
    )
    if worst is not None:
        text += f"; residual + adapter are {base} within {worst:.2e} of each weight's norm, as stated"
    show(document, text, as_json=as_json)
