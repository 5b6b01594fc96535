"""`pissa export`: a run as a LoRA of any rank for the base, or merged into it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..checkpoint.disk.write import check_free
from ..errors import ConfigError
from .output import show
from .places import check_adapter_name, check_choice, check_writable

FORMATS: dict[str, Any] = {"peft": "peft", "gguf-lora": "gguf"}


def command(
    run: Annotated[str, typer.Argument(help="A run, one of its checkpoints, or a PEFT adapter's directory.")],
    out: Annotated[Path, typer.Argument(help="Directory to write; new or empty.")],
    rank: Annotated[int | None, typer.Option(help="Optimal LoRA of at most this rank. [lossless]")] = None,
    tolerance: Annotated[
        float | None, typer.Option(help="Smallest ranks that keep each update's relative error below this.")
    ] = None,
    merged: Annotated[bool, typer.Option("--merged", help="Write the whole model with the adapter merged.")] = False,
    to: Annotated[
        str,
        typer.Option(help="peft: a directory; gguf-lora: one file OUT.gguf for llama.cpp. [peft]", show_default=False),
    ] = "peft",
    check: Annotated[
        str | None, typer.Option(help="vllm: refuse what vLLM would not load, and say which rank to allow there.")
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="With --merged or gguf-lora: the base, where the run does not record it.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Write what training changed as a LoRA that loads on the untouched base, or as a merged model."""
    if merged and (rank is not None or tolerance is not None):
        raise ConfigError("--merged writes the whole model; it takes neither --rank nor --tolerance")
    if rank is not None and tolerance is not None:
        raise ConfigError("--rank and --tolerance both say how small the LoRA is; give one of them")
    if rank is not None and rank < 1:
        raise ConfigError(f"--rank is {rank}; give at least 1, or leave it out for the lossless export")
    if tolerance is not None and not 0 <= tolerance < 1:
        raise ConfigError(f"--tolerance is {tolerance:g}; allowed: 0 up to, not including, 1")
    check_choice("--to", to, tuple(FORMATS))
    check_choice("--check", check, ("vllm",))
    if merged and (to != "peft" or check):
        raise ConfigError("--merged writes a model for transformers; it takes neither --to nor --check")
    if check and to != "peft":
        raise ConfigError("--check vllm is for PEFT directories, which vLLM loads; leave --to out")
    if base is not None and not merged and to == "peft":
        raise ConfigError(
            f"--base {base} without --merged: a LoRA is made without the base; leave --base out, or add --merged"
        )
    check_adapter_name(run)
    check_free(out)
    check_writable(out)
    from ..export import export_lora, export_merged, gap_figures
    from ..export.vllm import needed_rank

    if merged:
        export_merged(run, out, base=base)
        show({"out": str(out), "merged": True}, f"{out} is the merged model", as_json=as_json)
        return
    if check:
        _check_vllm(export_lora(run, rank=rank, tolerance=tolerance))
    export = export_lora(run, out, rank=rank, tolerance=tolerance, format=FORMATS[to], base=base)
    worst = max(export.errors.values(), default=0.0)
    document = {"out": str(out), "rank": export.config.r, "base": export.base, "errors": export.errors}
    how = "lossless" if worst == 0 else f"largest relative error of an update {worst:.2e}"
    if export.gaps:
        figures = gap_figures(export.gaps)
        document |= {"quantization_gaps": export.gaps, **figures}
        how += (
            "; trained on a quantised residual, from whose function it is off by the quantisation error of the start: "
            f"{100 * figures['mean_quantization_gap']:.2f} % of the weights on average, at most "
            f"{100 * figures['largest_quantization_gap']:.2f} %. --merged gives the trained function itself"
        )
    if check:
        document["vllm_max_lora_rank"] = needed_rank(export.config)
        how += f"; vLLM loads it with --max-lora-rank {needed_rank(export.config)}"
    show(document, f"{out} is a LoRA of rank {export.config.r} for {export.base} ({how})", as_json=as_json)


def _check_vllm(export: Any) -> None:
    """Refuse what vLLM would not load, before anything is written.

    Raises:
        ConfigError: with every reason and the way out.
    """
    from ..export.vllm import vllm_refusals

    refusals = vllm_refusals(export, export.config)
    if refusals:
        raise ConfigError(f"vLLM would not load this LoRA as it is meant: {'; '.join(refusals)}")
