"""The model card of a run: what it is, what it is for and how to load it."""

from __future__ import annotations

from typing import Any

from ..checkpoint.card import BESIDE, cautions, front_matter, loading, ranks_of
from ..export.files import LoraExport
from ..outside.text import in_code, in_markdown


def model_card(results: dict[str, Any], export: LoraExport | None) -> str:
    """A README.md with front matter that the hub reads.

    Args:
        results: what results.json holds.
        export: the LoRA for the base that lies beside the card; None for a model fine-tuned in full, and where the
            residual is quantised.
    """
    base = str(results["base"])
    quantized = results.get("quantization") is not None
    adapter = export is not None or quantized
    tags = ("pissa", "lora" if adapter else "full-fine-tuning", *(["quantized"] if quantized else []))
    front = front_matter(base, "peft" if adapter else "transformers", tags)
    losses = results["losses"]
    facts = [
        f"- base: {in_code(base)}, loaded in {results['dtype']}",
        f"- method: {results['method']}" + (f", rank {results['rank']}" if results["rank"] else ""),
        f"- learning rate {results['learning_rate']:g}, {len(losses)} steps, seed {results['seed']}",
        f"- training loss: {losses[0]:.4f} at the first step, {losses[-1]:.4f} at the last" if losses else "",
        f"- data: {in_markdown(str(results['data']))}",
        f"- prompt template: {results['template']}",
    ]
    if quantized:
        return "\n".join([*front, *_quantized_body(results, facts), ""])
    if export is None:
        body = ["# Fine-tuned model", "", *filter(None, facts), "", "An ordinary transformers model."]
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
        *filter(None, facts),
        "",
        loading(base),
        "",
        *cautions(export.config),
        "",
        "`state/` holds what continues the run; it is not needed to use the adapter.",
    ]
    return "\n".join([*front, *body, ""])


def _quantized_body(results: dict[str, Any], facts: list[str]) -> list[str]:
    base, how = results["base"], results["quantization"]
    return [
        "# Adapter for a quantised residual",
        "",
        f"Fine-tuned with pissa. This directory is a LoRA of rank {results['rank']} for the model in `residual/`, and "
        f"for no other: on {in_code(base)} itself it would compute something else.",
        "",
        *filter(None, facts),
        f"- residual: {how['format']}, method {how['method']}; residual and initial adapter together differ from the "
        f"base by {100 * results['mean_quantization_gap']:.2f} % of a weight's norm on average, at most "
        f"{100 * results['largest_quantization_gap']:.2f} %",
        "",
        BESIDE,
        "",
        f"`pissa export` makes an ordinary LoRA for {in_code(base)} of it, which is off by just that difference, "
        "or, with",
        "`--merged`, one 16-bit model that computes what was trained. `state/` holds what continues the run.",
    ]
