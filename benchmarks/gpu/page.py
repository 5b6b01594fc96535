"""The short table of a pass, and docs/gpu.md, both from the JSON alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .orchestrate import ROOT

RESULTS = ROOT / "benchmarks" / "results" / "gpu.json"
PAGE = ROOT / "docs" / "gpu.md"
NONE_YET = """There are no results yet: the pass has not been run on a GPU, and the CUDA paths have been neither run nor
timed."""
HEAD = """# On a GPU

`make gpu` is one prepared pass of at most eight minutes over one GPU: whether the function is kept there, properties of
the library, decompositions, whole initialisations and training steps, with rivals beside them. Each stage runs in a
process of its own with its own time limit; what fails, is skipped or takes too long is said. This page is written by
the same command, from `benchmarks/results/gpu.json`.

```sh
make gpu                                        # in .venv
make gpu GPU_PYTHON=python3 GPU_OUT=results     # with what an image holds, without make setup
python -m benchmarks.gpu --tiny --out tiny      # the same code on a CPU, in tiny
python -m benchmarks.gpu --page                 # this page again, from the results
```

"""


def page(document: dict[str, Any] | None) -> str:
    """docs/gpu.md: the last results, or that there are none."""
    return HEAD + (table(document) if document is not None else f"## Results\n\n{NONE_YET}\n")


def table(document: dict[str, Any]) -> str:
    """Markdown: where it was measured, how each stage ended, and each stage's figures."""
    lines = ["## Results", "", where(document), "", "| stage | status | seconds |", "|---|---|---|"]
    for stage in document["stages"].values():
        status = stage["status"] + (f": {stage['message']}" if stage["message"] else "")
        lines.append(f"| {stage['title']} | {cell(status)} | {stage['seconds']:.0f} of {stage['limit_seconds']:.0f} |")
    for name, stage in document["stages"].items():
        body = list(BODIES[name](stage["figures"])) if name in BODIES and stage["figures"] else []
        if body:
            lines += ["", f"### {stage['title']}", "", *body]
    return "\n".join(lines) + "\n"


def where(document: dict[str, Any]) -> str:
    """One sentence: device, versions, when."""
    hardware, versions = document["hardware"], document["versions"]
    gpu = hardware.get("gpu")
    device = (
        f"{gpu['name']}, {gpu['memory_gib']} GiB, driver {gpu['driver']}; {hardware['processor']}"
        if gpu
        else hardware["processor"]
    )
    named = ", ".join(f"{name} {versions[name]}" for name in ("torch", "transformers", "peft") if name in versions)
    missing = f" Not installed: {', '.join(document['missing'])}." if document["missing"] else ""
    when = f"{document['began'][:10]}, {document['seconds']:.0f} s"
    return f"{device}. {named}. Sizes: {document['sizes']}. {when}.{missing}"


def function_body(figures: dict[str, Any]) -> Iterator[str]:
    """Relative distances of logits by station."""
    yield "Relative distance of logits, ‖a − b‖ / ‖b‖."
    yield ""
    yield from rows(("weights, placement", "station", "distance", "bound", ""))
    for name, stations in figures.items():
        if why := not_measured(stations):
            yield row(name, why, "", "", "")
            continue
        for station, found in stations.items():
            if isinstance(found, dict):
                beyond = "" if found["ok"] else "**beyond**"
                yield row(name, station, number(found["distance"]), number(found["bound"]), beyond)


def decompositions_body(figures: dict[str, Any]) -> Iterator[str]:
    """Seconds and losses of all linears by method."""
    aim = figures["aim"]
    yield (
        f"All {figures['linears']} linears at rank {figures['rank']}, bf16 weights; aim: {aim['seconds']:g} s at "
        f"a loss of {aim['loss']:g}. Rivals are timed on some matrices of each shape and scaled. {own_rate(figures)}"
    )
    yield ""
    yield from rows(("method", "seconds", "largest certified loss", "largest true loss"))
    for name, method in figures.get("methods", {}).items():
        certified, true = method.get("largest_certified_loss"), method.get("largest_true_loss")
        yield row(name, number(method["seconds"]), number(certified), number(true))


def initialisation_body(figures: dict[str, Any]) -> Iterator[str]:
    """Seconds and extra memory of whole initialisations."""
    yield f"{figures['layers']} layers at rank {figures['rank']}; memory is what was needed beyond the model."
    yield ""
    yield from rows(("way", "layers timed", "seconds for them", "seconds for all layers", "extra GiB"))
    for name, found in entries(figures):
        if why := not_measured(found):
            yield row(name, why, "", "", "")
        else:
            keys = ("layers", "seconds", "seconds_all_layers", "extra_gib")
            yield row(name, *(number(found[key]) for key in keys))


def training_body(figures: dict[str, Any]) -> Iterator[str]:
    """Tokens a second, share of the device's rate and peak memory."""
    yield (
        f"{figures['parameters_in_products'] / 1e9:.3g} billion parameters in products, rank {figures['rank']}, "
        f"{figures['tokens']} tokens a step. {own_rate(figures)}"
    )
    yield ""
    yield from rows(("adapter", "tokens/s", "share of bf16 rate at 4N", "peak GiB"))
    for name, found in entries(figures):
        if why := not_measured(found):
            yield row(name, why, "", "")
        else:
            yield row(name, *(number(found[key]) for key in ("tokens_per_second", "share_of_bf16_rate", "peak_gib")))
    setups = {name: value for name, value in figures.items() if name.endswith("seconds to set up")}
    if setups:
        yield ""
        yield "To set up: " + ", ".join(
            f"{name.removesuffix(': seconds to set up')} {value:.3g} s" for name, value in setups.items()
        )


def properties_body(figures: dict[str, Any]) -> Iterator[str]:
    """How many properties hold, and which do not."""
    yield f"{figures['held']} of {figures['of']} hold."
    for kind in ("failed", "skipped"):
        for name, message in figures[kind].items():
            yield f"- {kind}: {name}: {cell(message)}"


BODIES = {
    "function": function_body,
    "decompositions": decompositions_body,
    "initialisation": initialisation_body,
    "training": training_body,
    "quantised": training_body,
    "properties": properties_body,
}


def own_rate(figures: dict[str, Any]) -> str:
    """A sentence."""
    return f"The device's own bf16 rate is {figures['bf16_flops'] / 1e12:.4g} TFLOP/s."


def entries(figures: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The figures that are measurements of their own."""
    return ((name, found) for name, found in figures.items() if isinstance(found, dict))


def not_measured(found: dict[str, Any]) -> str | None:
    """Why there are no figures, where there are none."""
    return next(
        (f"{kind.replace('_', ' ')}: {found[kind]}" for kind in ("skipped", "out_of_memory") if kind in found), None
    )


def rows(names: tuple[str, ...]) -> Iterator[str]:
    """The head of a table."""
    yield row(*names)
    yield "|" + "---|" * len(names)


def row(*cells: Any) -> str:
    """A line of a table."""
    return "| " + " | ".join(cell(str(each)) for each in cells) + " |"


def cell(text: str) -> str:
    """Text that stays in its cell."""
    return " ".join(text.replace("|", "\\|").split())


def number(value: Any) -> str:
    """Three digits; nothing for what is not known."""
    return "" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)
