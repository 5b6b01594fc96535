"""Inspections for people: lines with columns of equal width."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from typing import Any

TITLES = {"nuclear": "nuclear-norm error", "frobenius": "Frobenius error", "output": "held-out output error"}


def inspection_table(document: dict[str, Any]) -> str:
    """An inspection for people: a table for each norm and rank, a line for each method."""
    if "rank_pattern" in document:
        return plan_table(document)
    layers = document["layers"]
    count = layers if isinstance(layers, int) else len(layers)
    lines = [f"{document['model']}: {count} layers"]
    for norm, rank in dict.fromkeys((row["norm"], row["rank"]) for row in document["rows"]):
        rows = [row for row in document["rows"] if (row["norm"], row["rank"]) == (norm, rank)]
        title = (
            f"{TITLES[norm]} of {document['quantize']} reduced by"
            if "quantize" in document
            else "energy in the adapter"
        )
        lines += ["", f"{title} (%), rank {rank}", *aligned(rows)]
    if "moments_seconds" in document:
        text = document["calibration"]
        count = (text["windows"] + text["held_out_windows"]) * text["length"]
        lines += ["", f"second moments of {count} tokens: {document['moments_seconds']:.1f} s"]
    if not isinstance(layers, int):
        worst = max(layers, key=lambda layer: layer["captured_energy_loss"])
        loss = f"{worst['captured_energy_loss']:.1e} ({worst['bound']})"
        lines += ["", f"largest captured-energy loss {loss} at {worst['name']}"]
    return "\n".join(lines)


def plan_table(document: dict[str, Any]) -> str:
    """A rank plan for people: the ranks of each kind of layer, and what they capture."""
    kinds: dict[str, list[int]] = {}
    for layer in document["layers"]:
        kinds.setdefault(layer["kind"], []).append(layer["rank"])
    what = f"squared error of {document['quantize']}" if document["quantize"] else "energy"
    lines = [
        f"{document['model']}: {len(document['layers'])} layers, {document['parameters']} of {document['budget']} "
        "parameters",
        "",
        *table_of(
            [["kind", "least", "mean", "most"]]
            + [
                [kind, str(min(ranks)), f"{statistics.fmean(ranks):.1f}", str(max(ranks))]
                for kind, ranks in kinds.items()
            ]
        ),
        "",
        f"{what} in the adapters: {document['captured']:.2f} % (no plan has more than "
        f"{document['captured_bound']:.2f} %), at a uniform rank {document['uniform_captured']:.2f} %",
    ]
    return "\n".join(lines)


def aligned(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Rows as lines with columns of equal width."""
    kinds = list(dict.fromkeys(kind for row in rows for kind in row["by_kind"]))
    cells = [["method", *kinds, "mean", "seconds"]]
    for row in rows:
        numbers = [*(row["by_kind"][kind] for kind in kinds), row["mean"], row["seconds"]]
        cells.append([row["method"], *(f"{number:.1f}" for number in numbers)])
    yield from table_of(cells)


def table_of(cells: Sequence[Sequence[str]]) -> Iterator[str]:
    """Rows of text as lines; the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for first, *rest in cells:
        yield "  ".join([first.ljust(widths[0]), *(c.rjust(w) for c, w in zip(rest, widths[1:], strict=True))])
