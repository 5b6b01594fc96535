"""What a run leaves: its results, and the published directory."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from ..checkpoint.disk.write import output_files, write_json
from ..checkpoint.manifest import MANIFEST
from ..checkpoint.residual import write_trained
from ..data.encode import Encoded
from ..errors import TrainingError
from ..export.files import LoraExport, write_lora
from ..export.lora import export_lora
from ..live.offset import trained_values
from ..provenance import hardware, package_versions
from .card import model_card
from .curves import NAME as CURVES
from .curves import draw_curves
from .directory import RunDirectory, last_file
from .engine import autocasts, process_count, storage_dtype
from .progress import read_log
from .ready import ready_split
from .recipe import Recipe
from .validation import ValidationRecord

if TYPE_CHECKING:
    from .trainer import RunTrainer


def results_of(
    recipe: Recipe,
    encoded: Encoded,
    template: str,
    *,
    settings: dict[str, Any],
    fingerprints: dict[str, str],
    split: dict[str, float | None],
    model: Any,
    log: list[dict[str, float]],
    advice: dict[str, Any] | None,
) -> dict[str, Any]:
    """What a finished run's results.json holds: its settings, what it learned from, its losses and its cost."""
    rates = sorted(record["tokens_per_second"] for record in log)
    ready = ready_split(settings["model"])
    quantization = asdict(recipe.quantization) if recipe.quantization is not None else None
    dtype = str(storage_dtype(recipe)) + (" (computing in torch.bfloat16)" if autocasts(recipe) else "")
    return {
        "base": (ready.base if ready is not None else None) or settings["model"],
        "method": recipe.method,
        "rank": recipe.rank if recipe.adapts else None,
        "learning_rate": recipe.learning_rate if advice is None else advice["learning_rate"],
        "advice": advice,
        "seed": recipe.seed,
        "dtype": dtype,
        "losses": [record["loss"] for record in log],
        "grad_norms": [record["grad_norm"] for record in log],
        "tokens_per_second": rates[len(rates) // 2] if rates else 0.0,
        **split,
        "trainable_parameters": sum(trained_values(p) for p in model.parameters() if p.requires_grad),
        "quantization": quantization if ready is None or ready.config is None else ready.config["quantization"],
        "data": encoded.summary,
        "template": template,
        "settings": settings,
        "fingerprints": fingerprints,
        "processes": process_count(),
        "versions": package_versions(),
        "hardware": hardware(),
    }


def validated(directory: RunDirectory, validation: Encoded, trainer: RunTrainer, step: int) -> dict[str, Any]:
    """What the results say of the validation loss."""
    log = read_log(directory.validation, ValidationRecord)
    best = min(log, key=lambda record: record["loss"], default=None)
    return {
        "validation": log,
        "validation_data": validation.summary,
        "best": best,
        "step": step,
        "stopped_early": trainer.stopped_early,
    }


def check_finite(directory: RunDirectory, results: dict[str, Any]) -> None:
    """Refuse to publish what JSON cannot say, such as the log of a run that diverged under an earlier version."""
    try:
        json.dumps(results, allow_nan=False)
    except ValueError as error:
        raise TrainingError(
            f"the results of {directory.path} hold numbers that are not finite, see {directory.log}; nothing is "
            f"published. Lower the learning rate ({results['learning_rate']:g}) and name another directory"
        ) from error


def publish(
    directory: RunDirectory,
    model: Any,
    whole: dict[str, Any] | None,
    tokenizer: Any,
    recipe: Recipe,
    results: dict[str, Any],
    step: int,
) -> None:
    """Put the result into the run's directory, with its card: for adapters one LoRA for the untouched base, or, where
    the residual is quantised, for that."""
    quantized = recipe.quantization is not None
    export: LoraExport | None = None
    if recipe.adapts and not quantized:
        export = export_lora(model, rank=recipe.export_rank, state=whole)
    with output_files(directory.path, last=last_file(recipe.method)) as partial:
        if quantized:
            write_trained(model, partial, final=directory.path)
        elif export is not None:
            write_lora(export, partial)
        else:
            model.save_pretrained(partial, state_dict=whole)
        if recipe.export_rank is not None:
            manifest = json.loads((partial / MANIFEST).read_text(encoding="utf-8"))
            trained = f"{directory.state.name}/checkpoint-{step}"
            write_json(partial / MANIFEST, {**manifest, "trained": trained})
        tokenizer.save_pretrained(partial)
        write_json(partial / directory.results.name, results)
        drawn = draw_curves(read_log(directory.log), results.get("validation", []), partial / CURVES)
        (partial / "README.md").write_text(model_card(results, export, CURVES if drawn else None), encoding="utf-8")
