"""`pissa train`: fine-tune a model; the same command continues a run that stopped."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from ..training.recipe import Recipe


def command(
    model: Annotated[str, typer.Argument(help="The base: a directory or a hub id.")],
    data: Annotated[str, typer.Option(help=".jsonl, .jsonl.gz, .json, .parquet or a hub id.")],
    out: Annotated[Path, typer.Option(help="The run's directory; it becomes a LoRA for the base.")],
    config: Annotated[Path | None, typer.Option(help="YAML file with any of the settings; flags win.")] = None,
    method: Annotated[
        str | None,
        typer.Option(
            help="pissa, random-pissa, cura, robust-pissa, lora, lora-kaiming, lora-gaussian, dora, adalora, "
            "pissa+dora, pissa+adalora, qlora, loftq, qpissa or full. [pissa]"
        ),
    ] = None,
    component: Annotated[
        str | None, typer.Option(help="Of pissa: principal, medium, minor, or scored by the data. [principal]")
    ] = None,
    scored_examples: Annotated[int | None, typer.Option(help="Examples that scored looks at. [64]")] = None,
    random_fraction: Annotated[
        float | None, typer.Option(help="Of random-pissa: share of the components that are drawn. [1]")
    ] = None,
    cur_core: Annotated[str | None, typer.Option(help="Of cura: optimal or intersection. [optimal]")] = None,
    cur_rcond: Annotated[float | None, typer.Option(help="Of cura: cut-off of its inverses. [rounding]")] = None,
    rank: Annotated[int | None, typer.Option(help="Components per adapter. [16]")] = None,
    alpha: Annotated[float | None, typer.Option(help="LoRA's numerator. [rank]")] = None,
    target_modules: Annotated[
        str | None,
        typer.Option(help='"all-linear", names or name endings separated by commas, or one regular expression.'),
    ] = None,
    exclude_modules: Annotated[
        str | None, typer.Option(help="Modules left alone: names separated by commas, or one regular expression.")
    ] = None,
    modules_to_save: Annotated[
        str | None, typer.Option(help="Modules trained in full beside the adapters: names separated by commas.")
    ] = None,
    trainable_token_indices: Annotated[
        str | None, typer.Option(help="Tokens whose embeddings are trained in full: ids separated by commas.")
    ] = None,
    rank_budget: Annotated[
        int | None,
        typer.Option(help="Parameters of all adapters, shared out to capture most; --rank is then the largest rank."),
    ] = None,
    use_rslora: Annotated[bool | None, typer.Option("--use-rslora", help="Scale by alpha / sqrt(rank).")] = None,
    quantize: Annotated[str | None, typer.Option(help="Frozen weights in few bits: nf4 or int8.")] = None,
    quantize_method: Annotated[
        str | None, typer.Option(help="qlora, loftq, qpissa, or a preset such as qpissa-5. [qpissa; lora: qlora]")
    ] = None,
    iterations: Annotated[int | None, typer.Option(help="Of qpissa and loftq. [10; loftq: 5]")] = None,
    calibration: Annotated[
        str | None,
        typer.Option(help=".txt or .jsonl, each also as .gz: text that the quantised residual is fitted to."),
    ] = None,
    calibration_windows: Annotated[int | None, typer.Option(help="Windows of calibration text. [80]")] = None,
    calibration_length: Annotated[int | None, typer.Option(help="Tokens per window. [256]")] = None,
    rounding: Annotated[str | None, typer.Option(help="nearest, or gptq, which needs --calibration. [nearest]")] = None,
    placement: Annotated[
        str | None,
        typer.Option(help="residual, or offset: leave the base as it is, for one in 4 or 8 bits. [residual]"),
    ] = None,
    orthogonality: Annotated[
        float | None, typer.Option(help="Of adalora: weight of its penalty on factors not orthonormal. [0.5]")
    ] = None,
    dropout: Annotated[float | None, typer.Option(help="Dropout on the adapter's input. [0]")] = None,
    allow_dropout: Annotated[
        bool | None, typer.Option("--allow-dropout", help="Accept that dropout changes the function under PiSSA.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Frozen weights: auto (bf16 where the hardware has it), fp32, bf16. [auto]")
    ] = None,
    learning_rate: Annotated[
        str | None,
        typer.Option("--learning-rate", "--lr", help="Peak learning rate, or auto: estimated on the data. [2e-5]"),
    ] = None,
    loraplus_ratio: Annotated[
        float | None, typer.Option(help="LoRA+: B's learning rate is this many times A's. [1]")
    ] = None,
    schedule: Annotated[str | None, typer.Option(help="cosine, linear or constant. [cosine]")] = None,
    warmup_ratio: Annotated[float | None, typer.Option(help="Share of steps for warm-up. [0.03]")] = None,
    weight_decay: Annotated[float | None, typer.Option(help="AdamW's weight decay. [0]")] = None,
    max_grad_norm: Annotated[float | None, typer.Option(help="Clip gradients to this norm; 0: no. [1]")] = None,
    epochs: Annotated[float | None, typer.Option(help="Passes over the data. [1]")] = None,
    max_steps: Annotated[int | None, typer.Option(help="Stop after this many optimizer steps.")] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Examples per optimizer step, over all processes. [128]")
    ] = None,
    micro_batch_size: Annotated[int | None, typer.Option(help="Examples per forward pass and process. [4]")] = None,
    data_split: Annotated[str | None, typer.Option(help="Split of data on the hub. [train]")] = None,
    data_subset: Annotated[str | None, typer.Option(help='Subset of data on the hub, such as "main".')] = None,
    max_length: Annotated[int | None, typer.Option(help="Tokens per example. [512]")] = None,
    template: Annotated[
        str | None,
        typer.Option(help="Prompt: auto, chat, alpaca or none. [auto: chat where there is one, else alpaca]"),
    ] = None,
    gradient_checkpointing: Annotated[
        bool | None, typer.Option("--gradient-checkpointing", help="Less memory, about a third more time.")
    ] = None,
    save_every: Annotated[int | None, typer.Option(help="Steps between checkpoints. [50]")] = None,
    export_rank: Annotated[
        int | None, typer.Option(help="Rank of the run's LoRA. [lossless: 2 x rank for PiSSA]")
    ] = None,
    log_to: Annotated[str | None, typer.Option(help="jsonl or tensorboard. [jsonl]")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the initial factors and the data's order. [0]")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as one JSON document.")] = False,
) -> None:
    """Fine-tune MODEL on DATA with PiSSA, LoRA or in full.

    OUT becomes an ordinary LoRA for the untouched base (with --quantize for OUT/residual, with --method full a model).
    A run that was stopped goes on
    when the same command is given again.
    """
    flags = {
        name: value
        for name, value in locals().items()
        if name not in ("model", "data", "out", "config", "as_json") and value is not None
    }
    from ..training.recipe import read_recipe, recipe_from
    from ..training.run import train
    from .output import show

    recipe = read_recipe(config, **flags) if config is not None else recipe_from(flags, "the command line")
    result = train(model, data, out, recipe)
    results = result.results
    losses = results["losses"]
    text = (
        f"{results['data']}\n"
        f"{results['method']}: loss {losses[0]:.4f} at the first step, {losses[-1]:.4f} at the last of {len(losses)}\n"
        f"{result.directory} is " + _what_it_is(recipe, results)
    )
    show({"directory": str(result.directory), **results}, text, as_json=as_json)


def _what_it_is(recipe: Recipe, results: dict[str, Any]) -> str:
    if not recipe.adapts:
        return "the fine-tuned model"
    if results["quantization"] is not None:
        gap, model = results["mean_quantization_gap"], results["settings"]["model"]
        place = "in it, residual/" if results["base"] == model else f"in {model}"
        return (
            f"an adapter for the quantised residual {place}; `pissa export` makes a LoRA for "
            f"{results['base']} (off by {100 * gap:.1f} % of its weights on average) or a merged model"
        )
    return f"a {'DoRA' if 'dora' in recipe.method else 'LoRA'} for {results['base']}; plain PEFT loads it"
