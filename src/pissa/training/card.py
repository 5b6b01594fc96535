"""The model card of a run: what it is, what it is for and how to load it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from ..checkpoint.card import BESIDE, cautions, front_matter, loading, ranks_of
from ..export.files import LoraExport
from ..outside.text import in_code, in_markdown

MOST_ROWS = 20
"""Measurements of the validation loss that the card lists, all or only those at a quarter of the run."""


def model_card(results: dict[str, Any], export: LoraExport | None, curves: str | None = None) -> str:
    """A README.md with front matter that the hub reads.

    Args:
        results: what results.json holds.
        export: the LoRA for the base that lies beside the card; None for a model fine-tuned in full, and where the
            residual is quantised.
        curves: the picture of the run's curves, beside the card.
    """
    base = str(results["base"])
    quantized = results.get("quantization") is not None
    adapter = export is not None or quantized
    tags = ("pissa", "lora" if adapter else "full-fine-tuning", *(["quantized"] if quantized else []))
    front = front_matter(base, "peft" if adapter else "transformers", tags)
    facts = [
        f"- base: {in_code(base)}, loaded in {results['dtype']}",
        f"- method: {results['method']}" + (f", rank {results['rank']}" if results["rank"] else ""),
        f"- learning rate {results['learning_rate']:g}, {len(results['losses'])} steps, seed {results['seed']}",
        f"- {what_it_came_to(results)}",
        *(f"- {line}" for line in how_it_came_to_be(results)),
        f"- data: {in_markdown(str(results['data']))}",
        f"- prompt template: {results['template']}",
    ]
    figures = _figures(results, curves)
    if quantized:
        return "\n".join([*front, *_quantized_body(results, facts, figures), ""])
    if export is None:
        body = ["# Fine-tuned model", "", *facts, *figures, "", "An ordinary transformers model."]
        return "\n".join([*front, *body, ""])
    worst = max(export.errors.values(), default=0.0)
    kind = (
        "exactly what training changed"
        if worst == 0
        else f"the best approximation of its rank; largest relative error of a module's update: {worst:.2e}"
    )
    variant = "DoRA" if export.config.use_dora else "LoRA"
    body = [
        f"# {variant} for the untouched base",
        "",
        f"Fine-tuned with pissa. This directory is an ordinary {variant} of {ranks_of(export.config)} for "
        f"{in_code(base)}, {kind}.",
        "",
        *facts,
        *figures,
        "",
        loading(base),
        "",
        *cautions(export.config),
        "",
        "`state/` holds what continues the run; it is not needed to use the adapter.",
    ]
    return "\n".join([*front, *body, ""])


def _figures(results: dict[str, Any], curves: str | None) -> list[str]:
    """The picture of the curves, and some points of them in numbers."""
    losses, norms = results["losses"], results["grad_norms"]
    if not losses:
        return []
    validation = {each["step"]: each["loss"] for each in results.get("validation", [])}
    marked = sorted({1, len(losses), *(round(len(losses) * part / 4) or 1 for part in (1, 2, 3))})
    rows = [
        f"| {step} | {losses[step - 1]:.4f} | {norms[step - 1]:.2f} |"
        + (f" {validation[step]:.4f} |" if step in validation else " |" if validation else "")
        for step in sorted({*marked, *(validation if len(validation) <= MOST_ROWS else ())})
        if step
    ]
    head = "| step | training loss | gradient norm |" + (" validation loss |" if validation else "")
    picture = ["", f"![loss, gradient norm and learning rate by step]({curves})"] if curves is not None else []
    return [*picture, "", head, "|---" * head.count(" | ") + "|---|", *rows]


def what_it_came_to(results: dict[str, Any]) -> str:
    """The losses of a run in one line, like with like: on validation rows, or means over a tenth of the steps each."""
    losses, validation = results["losses"], results.get("validation") or []
    if not losses:
        return "no step was done"
    tenth = max(len(losses) // 10, 1)
    first, last = (math.fsum(part) / tenth for part in (losses[:tenth], losses[-tenth:]))
    training = (
        f"training loss {first:.4f} over the first {tenth} steps, {last:.4f} over the last {tenth}"
        if tenth > 1
        else f"training loss {first:.4f} at the first step, {last:.4f} at the last"
    )
    if not validation:
        return training
    best, step = results["best"], results["step"]
    start, end = validation[0], next(each for each in reversed(validation) if each["step"] <= step)
    said = f"validation loss {end['loss']:.4f} at step {end['step']}"
    if start["step"] != end["step"]:
        said += f", {start['loss']:.4f} at step {start['step']}"
    if best["step"] != end["step"]:
        said += f", lowest {best['loss']:.4f} at step {best['step']}"
    return f"{said}; {training}"


def how_it_came_to_be(results: dict[str, Any]) -> Iterator[str]:
    """What is out of the ordinary about a run's length and its result."""
    steps = len(results["losses"])
    if results.get("step", steps) != steps:
        yield f"the result is the model at step {results['step']} of {steps}, where the validation loss was lowest"
    if results.get("stopped_early"):
        yield f"stopped at step {steps}, since the validation loss had not become lower for a while"
    for each in results.get("continued", []):
        yield f"trained longer from step {each['step']} on; the schedule before was that of the shorter run"
    if "resumed_from" in results:
        yield f"continued from {in_code(results['resumed_from'])}"


def _quantized_body(results: dict[str, Any], facts: list[str], figures: list[str]) -> list[str]:
    base, how = results["base"], results["quantization"]
    return [
        "# Adapter for a quantised residual",
        "",
        f"Fine-tuned with pissa. This directory is a LoRA of rank {results['rank']} for the model in `residual/`, and "
        f"for no other: on {in_code(base)} itself it would compute something else.",
        "",
        *facts,
        f"- residual: {how['format']}, method {how['method']}; residual and initial adapter together differ from the "
        f"base by {100 * results['mean_quantization_gap']:.2f} % of a weight's norm on average, at most "
        f"{100 * results['largest_quantization_gap']:.2f} %",
        *figures,
        "",
        BESIDE,
        "",
        f"`pissa export` makes an ordinary LoRA for {in_code(base)} of it, which is off by just that difference, "
        "or, with",
        "`--merged`, one 16-bit model that computes what was trained. `state/` holds what continues the run.",
    ]
