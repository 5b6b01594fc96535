"""How much of the error of 4 bits does each method take away, by kind of layer, rank, iterations and format?

    reduction = (1 − ‖W − (Q + B·A)‖_* / ‖W − format(W)‖_*) · 100 %                (the paper's equation of section 5.3)

QLoRA's is 0 by definition. LoftQ and QPiSSA are measured as published, with T iterations, beside this library's own
fit. In INT8 and in GPTQ's 4-bit integers QPiSSA is compared with the plain format, as in table 9; GPTQ here means its
format with plain rounding (`pissa inspect --calibration` measures its rounding fitted to text, and
`benchmarks/perplexity.py` the paper's perplexities). Intervals are over layers: nothing here is drawn at random. A
kind of layer is compared at the paper's share of the width, over as many layers as there are blocks in the grid.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from pissa.lab.inspection.layers import kind_of
from pissa.lab.inspection.measure import measure_weight
from pissa.lab.inspection.variants import variant
from pissa.lab.models import NAME as SMOLLM2

from .figures import look_of, new_figure
from .interval import Interval, mean_interval, paired_difference
from .judge import standing, verdict_of
from .study import Outcome, Settings, Study, model_name
from .weights import loaded, models, spread

NAME = "quantisation"
NF4_METHODS = ("loftq-1", "qpissa-1", "loftq-5", "qpissa-5", "ours-5")
OTHER_FORMATS = ("int8", "gptq")
OTHER_METHODS = ("qpissa-1", "qpissa-5")
ITERATIONS = (1, 5)
PRE_ROUNDED = " (whose weights had been rounded to 4 bits before)"
"""It comes as a GGUF file in Q4_1, so its errors are not those of a model in 16 bits."""


def run(settings: Settings) -> Outcome:
    """Split every layer in every way and measure what is left."""
    ranks = settings.pick(quick=[1, 4], default=[1, 4, 16, 64, 128], full=[1, 2, 4, 8, 16, 32, 64, 128])
    found, remark = models(settings)
    sources = {model_name(source): source for source in found}
    keys = [
        {"source": name, "layer": layer, "format": form, "rank": rank}
        for name, source in sources.items()
        for layer in spread(source, settings.pick(quick=1, default=4, full=None))
        for form in ("nf4", *OTHER_FORMATS)
        for rank in layer_ranks(source, layer, ranks if form == "nf4" else [])
    ]
    rows = settings.grid(
        NAME, keys, lambda source, layer, format, rank: reductions(sources[source], layer, format, rank)
    )
    widths = {name: max(rank for _, rank in loaded(source).values()) for name, source in sources.items()}
    comparisons = [compared(rows, name, rank, count) for name, rank in ranks_of(rows) for count in ITERATIONS]
    formats = [other_format(rows, name, form, rank) for name, rank in widths.items() for form in OTHER_FORMATS]
    table = [by_kind(rows, name, rank, method) for name, rank in widths.items() for method in NF4_METHODS]
    parts = {name: parts_of(rows, name, rank) for name, rank in widths.items()}
    named = {f"{name}: {part}": found for name in parts for part, found in parts[name].items()}
    listed = {name: part.as_dict() for name, part in named.items()}
    results = {"rows": rows, "comparisons": comparisons, "formats": formats, "table": table, "paper_rank": widths}
    figures = "; ".join(figures_of(results, name, parts[name]) for name in widths)
    return Outcome({**results, "parts": listed}, verdict_of(named), figures + remark)


def layer_ranks(source: str, layer: str, ranks: Sequence[int]) -> list[int]:
    """The ranks that a layer has room for, with that of the paper's share of the width."""
    W, own = loaded(source)[layer]
    return sorted({rank for rank in [*ranks, own] if rank < min(W.shape)})


def reductions(source: str, layer: str, form: str, rank: int) -> dict[str, Any]:
    """One layer at one rank: each method's reduction in percent, and the plain format's error."""
    W, _ = loaded(source)[layer]
    names = NF4_METHODS if form == "nf4" else OTHER_METHODS
    methods = [variant(name, format=form, double_quant=False) for name in names]
    found = list(measure_weight(layer, W, methods, [rank], ["nuclear"], None, None, 0))
    return {
        "kind": kind_of(layer),
        "plain_error": found[0].plain["nuclear"],
        "reduction": {m.variant: m.reduction("nuclear") for m in found},
    }


def ranks_of(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, int]]:
    """(model, rank) of all NF4 rows."""
    return sorted({(row["source"], row["rank"]) for row in rows if row["format"] == "nf4"})


def chosen(
    rows: Sequence[Mapping[str, Any]], source: str, form: str, rank: int, kind: str | None = None
) -> list[dict[str, float]]:
    """The reductions of a model's layers, all of them or one kind's."""
    wanted = (source, form, rank)
    found = (row for row in rows if (row["source"], row["format"], row["rank"]) == wanted)
    return [row["reduction"] for row in found if kind in (None, row["kind"])]


def compared(rows: Sequence[Mapping[str, Any]], source: str, rank: int, iterations: int) -> dict[str, Any]:
    """QPiSSA and LoftQ with as many iterations, and our own fit, over layers, in NF4."""
    found = chosen(rows, source, "nf4", rank)
    names = {"qpissa": f"qpissa-{iterations}", "loftq": f"loftq-{iterations}", "ours-5": "ours-5"}
    means = {label: statistics.fmean(each[method] for each in found) for label, method in names.items()}
    return {"source": source, "rank": rank, "iterations": iterations, **means}


def other_format(rows: Sequence[Mapping[str, Any]], source: str, form: str, rank: int) -> dict[str, Any]:
    """QPiSSA's reduction in another format, over layers."""
    found = chosen(rows, source, form, rank)
    means = {name: statistics.fmean(each[name] for each in found) for name in OTHER_METHODS}
    return {"source": source, "format": form, "rank": rank, **means}


def by_kind(rows: Sequence[Mapping[str, Any]], source: str, rank: int, method: str) -> dict[str, Any]:
    """A line of table 8: the mean of each kind of layer, and of the kinds."""
    kinds: dict[str, list[float]] = {}
    for row in rows:
        if (row["source"], row["format"], row["rank"]) == (source, "nf4", rank):
            kinds.setdefault(row["kind"], []).append(row["reduction"][method])
    means = {kind: statistics.fmean(values) for kind, values in kinds.items()}
    average = statistics.fmean(means.values())
    return {"source": source, "rank": rank, "method": method, "by_kind": means, "average": average}


def parts_of(rows: Sequence[Mapping[str, Any]], source: str, own_rank: int) -> dict[str, Interval]:
    """What the claim says of a model, each part as a difference over its layers that should be positive.

    QPiSSA's reduction less LoftQ's at every rank, and at the model's own rank in every kind of layer; in the other
    formats QPiSSA's reduction itself. All with either number of iterations.
    """

    def lead(rank: int, count: int, kind: str | None = None) -> Interval:
        found = chosen(rows, source, "nf4", rank, kind)
        ours, theirs = ([each[f"{method}-{count}"] for each in found] for method in ("qpissa", "loftq"))
        return paired_difference(ours, theirs)

    ranks = [rank for name, rank in ranks_of(rows) if name == source]
    kinds = dict.fromkeys(row["kind"] for row in rows if row["source"] == source)
    return {
        **{f"rank {rank} (T={count})": lead(rank, count) for rank in ranks for count in ITERATIONS},
        **{f"{kind} (T={count})": lead(own_rank, count, kind) for kind in kinds for count in ITERATIONS},
        **{
            f"{form} (T={count})": mean_interval([e[f"qpissa-{count}"] for e in chosen(rows, source, form, own_rank)])
            for form in OTHER_FORMATS
            for count in ITERATIONS
        },
    }


def figures_of(results: Mapping[str, Any], source: str, parts: Mapping[str, Interval]) -> str:
    """A model's numbers at the paper's share of the width, then where QPiSSA does not lead."""
    rank = results["paper_rank"][source]
    lines = [e for e in results["comparisons"] if (e["source"], e["rank"]) == (source, rank)]
    numbers = ", ".join(f"T={e['iterations']} {e['qpissa']:.1f} against LoftQ's {e['loftq']:.1f} %" for e in lines)
    formats = [e for e in results["formats"] if e["source"] == source]
    others = ", ".join(f"{e['format']} {e['qpissa-1']:.1f} and {e['qpissa-5']:.1f}" for e in formats)
    name = source + (PRE_ROUNDED if source == SMOLLM2 else "")
    undecided, behind = (
        [part for part, found in parts.items() if standing(found) == wanted] for wanted in ("undecided", "the opposite")
    )
    return (
        f"{name} at rank {rank}, NF4: QPiSSA {numbers} (ours-5 {lines[0]['ours-5']:.1f}); T=1 and 5 in {others}; "
        f"undecided over layers: {', '.join(undecided) or 'nothing'}; behind: {', '.join(behind) or 'nowhere'}"
    )


def draw(results: Mapping[str, Any]) -> Any:
    """Reduction against rank for each model, and by kind of layer at the paper's share of the width."""
    sources = list(results["paper_rank"])
    figure, panels = new_figure(2, len(sources), width=6.0)
    for number, source in enumerate(sources):
        panel, bars = panels[number], panels[len(sources) + number]
        for method in NF4_METHODS:
            ranks = sorted({e["rank"] for e in results["comparisons"] if e["source"] == source})
            found = [chosen(results["rows"], source, "nf4", rank) for rank in ranks]
            means = [statistics.fmean(each[method] for each in layers) for layers in found]
            style = {"linestyle": "--" if method.endswith("-1") else "-", "marker": "o", "markersize": 3}
            panel.plot(ranks, means, label=method, color=look_of(method).colour, **style)
        panel.axhline(0, color=look_of("qlora").colour, label="qlora")
        panel.axvline(results["paper_rank"][source], color="#888888", linewidth=0.8, linestyle=":")
        panel.set(title=f"{source}, NF4 (dotted: width / 32)", xlabel="rank", ylabel="reduction of the error, %")
        panel.set_xscale("log", base=2)
        panel.legend(frameon=False, fontsize=8)
        lines = [line for line in results["table"] if line["source"] == source]
        kinds = list(lines[0]["by_kind"])
        for place, line in enumerate(lines):
            at = [i + 0.16 * (place - 2) for i in range(len(kinds))]
            light = 0.5 if line["method"].endswith("-1") else 1.0
            bars.bar(at, list(line["by_kind"].values()), 0.15, color=look_of(line["method"]).colour, alpha=light)
        bars.set_xticks(range(len(kinds)), [kind.replace("_proj", "").replace(".", "\n") for kind in kinds], fontsize=7)
        bars.set(title=f"{source}, rank {results['paper_rank'][source]}", ylabel="reduction of the error, %")
    return figure


STUDY = Study(
    NAME,
    "QPiSSA reduces the quantisation error more than LoftQ, in every kind of layer and at "
    "every rank and number of iterations, and in INT8 and GPTQ too (PiSSA, tables 4, 8, 9, figures 7a, 14)",
    run,
    draw,
    minutes=7,
    intervals_over="layers",
)
