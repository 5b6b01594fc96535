"""docs/studies/README.md: what was claimed, what we found, and where the numbers lie."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pissa.checkpoint.disk.write import explained
from pissa.errors import DataError

from .judge import count, listed, tally
from .registry import find_study, study_names
from .study import Study, read_result

PAGE = "README.md"
NOT_DECIDED = "not decided here"
PLURAL: dict[str, str] = {
    "holds": "hold",
    "holds in part": "hold in part",
    "does not hold here": "do not hold here",
    NOT_DECIDED: "not decided here",
}
HEAD = """# Studies: the claims, measured again

Every line is one `python -m studies NAME`: a claim with its source, our numbers on the model and grid that the JSON
names, and whether the claim held here. Below the table each study has its figure and the parts into which it takes
the claim. A part is a difference that the claim says is positive: shown where the whole 95 % interval is, undecided
where the interval holds zero. A claim all of whose parts are undecided is called not decided here: nothing was found
for it, and nothing against it (its JSON says "does not hold here", as of every claim of which nothing was shown).

Most language studies train a Llama of less than a million parameters, pretrained on generated word problems: these are
small models on a laptop's budget, and a claim that does not hold here may hold for 7 billion parameters, and the other
way round. That Llama's held-out loss falls from 0.113 nats a token to about 0.100: differences are to be read against
0.013. Where a study says that each method is at its own learning rate, the rate was searched for with another seed and
on other rows than those that are reported; odd-even takes the best of the rates that it reports.
`python -m studies --list` shows the runtimes, `--full` is the whole grid.

Beside them stand two comparisons of PiSSA and LoRA on GSM8K, made by `pissa compare` with SmolLM2-135M and five seeds:
[at one fixed learning rate](gsm8k-fixed/report.md), where PiSSA is clearly better, and [each at its
own](gsm8k-swept/report.md), where there is no detectable difference.
"""


def write_page(directory: Path) -> Path:
    """Write README.md of the results that lie in a directory, as `python -m studies --page DIR`.

    Args:
        directory: holds NAME.json and NAME.png of every study that was run.

    Returns:
        The page.

    Raises:
        DataError: there is no result, one cannot be read, or one is of a quick pass, which decides nothing.
    """
    studies = [find_study(name) for name in study_names()]
    found = {study.name: directory / f"{study.name}.json" for study in studies}
    documents = {name: read_result(path) for name, path in found.items() if path.is_file()}
    if not documents:
        raise DataError(f"{directory} holds no study's result; run one with --out {directory}")
    quick = [name for name, document in documents.items() if document["settings"]["scale"] == "quick"]
    if quick:
        raise DataError(f"{', '.join(quick)} in {directory}: a quick pass decides nothing; run without --quick")
    with explained(directory):
        partial = directory / f".{PAGE}.partial"
        partial.write_text(page(studies, documents), encoding="utf-8")
        partial.replace(directory / PAGE)
    return directory / PAGE


def page(studies: Sequence[Study], documents: dict[str, dict[str, Any]]) -> str:
    """The page's text: a count of the verdicts, a row for every study, and a section for each that was run."""
    lines = [HEAD, f"{len(documents)} of {len(studies)} claims measured: {summary(list(documents.values()))}.", ""]
    lines += ["| Claim | Study | Our figures | Verdict |", "| --- | --- | --- | --- |"]
    sections = [section(study, documents[study.name]) for study in studies if study.name in documents]
    return "\n".join([*lines, *rows(studies, documents), "", *sections])


def summary(documents: Sequence[dict[str, Any]]) -> str:
    """The verdicts, counted: `1 holds, 2 hold in part`."""
    found = [verdict_on_page(document) for document in documents]
    counts = [(found.count(verdict), verdict) for verdict in PLURAL]
    return ", ".join(f"{n} {verdict if n == 1 else PLURAL[verdict]}" for n, verdict in counts if n)


def verdict_on_page(document: Mapping[str, Any]) -> str:
    """A document's verdict; NOT_DECIDED in place of "does not hold here" where every part is undecided."""
    counts = count(document.get("results", {}).get("parts", {}))
    return NOT_DECIDED if counts.undecided and not counts.shown and not counts.against else document["verdict"]


def rows(studies: Sequence[Study], documents: dict[str, dict[str, Any]]) -> Iterator[str]:
    """One row of the table for each study; those that were not run say so."""
    for study in studies:
        document = documents.get(study.name)
        if document is None:
            yield f"| {cell(study.claim)} | {study.name} | `python -m studies {study.name}` | not run yet |"
            continue
        links = f"[{study.name}](#{study.name}), [JSON]({study.name}.json)"
        yield f"| {cell(document['claim'])} | {links} | {cell(document['figures'])} | {found(document)} |"


def found(document: Mapping[str, Any]) -> str:
    """The verdict, and in how many parts."""
    parts = document["results"].get("parts")
    return f"**{verdict_on_page(document)}**{f': {tally(parts)}' if parts else ''}"


def section(study: Study, document: Mapping[str, Any]) -> str:
    """A study's verdict, figure and parts."""
    name, settings = document["study"], document["settings"]
    count = len(settings["seeds"])
    over = study.intervals_over or f"{count} seed{'s' if count > 1 else ''}"
    how = [f"intervals over {over}", f"{document['seconds'] / 60:.0f} minutes"]
    how += [settings["model"]] if settings["model"] else []
    lines = [f"## {name}", f"{found(document)} ({', '.join(how)}).", f"{document['claim']}.", f"![{name}]({name}.png)"]
    lines = [each for line in lines for each in (line, "")]
    parts = document["results"].get("parts")
    if parts:
        lines += ["| Part | 95 % interval | |", "| --- | --- | --- |"]
        lines += [f"| {cell(part)} | {difference} | {word} |" for part, difference, word in listed(parts)]
        lines.append("")
    return "\n".join(lines)


def cell(text: str) -> str:
    """Text within a Markdown table."""
    return text.replace("|", "\\|")
