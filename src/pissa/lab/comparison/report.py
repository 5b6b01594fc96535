"""The report of a comparison: one HTML page that needs nothing else, and the same as Markdown with pictures beside it.

The words are made once (`page.py`), the two templates only lay them out. A comparison that was stopped gives a report
of what has finished, which says what has not.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...checkpoint.disk.write import output_files
from ...colours import DARK, LIGHT
from ...errors import extra
from ...outside.text import on_one_line
from .drawing import png, svg
from .page import Page, page_of

HTML, MARKDOWN = "report.html", "report.md"


def write_report(results: Mapping[str, Any], directory: str | os.PathLike[str]) -> Path:
    """Write report.html, report.md and its pictures.

    Args:
        results: what `pissa compare` wrote in results.json, finished or not.
        directory: where they go; made where it does not exist, an older report is replaced.

    Returns:
        The HTML page.

    Raises:
        DataError: these are not the results of a comparison.
        MissingExtraError: matplotlib, jinja2 or scipy is not installed.
        OutputError: the directory cannot be written.
    """
    page = page_of(results)
    html, markdown = as_html(page), as_markdown(page)
    with output_files(directory, last=HTML) as partial:
        for figures in page.figures.values():
            for figure in figures:
                (partial / f"{figure.name}.png").write_bytes(png(figure, page.looks))
        (partial / MARKDOWN).write_text(markdown, encoding="utf-8")
        (partial / HTML).write_text(html, encoding="utf-8")
    return Path(directory) / HTML


def as_html(page: Page) -> str:
    """The page as one HTML document that loads nothing."""
    template = _environment(autoescape=True).get_template("report.html.j2")
    return template.render(page=page, svg=svg, colours=list(zip(LIGHT, DARK, strict=True)))


def as_markdown(page: Page) -> str:
    """The page as Markdown; the figures are PNG files beside it."""
    environment = _environment(autoescape=False)
    environment.filters.update(md=_escaped, fence=_fenced)
    text = environment.get_template("report.md.j2").render(page=page)
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def _environment(*, autoescape: bool) -> Any:
    with extra("report", "a report needs matplotlib and jinja2"):
        from jinja2 import Environment, FileSystemLoader, StrictUndefined
    loader = FileSystemLoader(Path(__file__).with_name("templates"))
    return Environment(
        loader=loader, autoescape=autoescape, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )


def _escaped(text: str) -> str:
    """Text that Markdown, and the HTML in it, take as it stands; on one line."""
    return re.sub(r"([\\`*_{}\[\]<>|#~&$])", r"\\\1", on_one_line(str(text)))


def _fenced(text: str) -> str:
    """A code block whose fence is longer than any in the text."""
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence}\n{text}\n{fence}"
