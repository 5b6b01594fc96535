"""`train`: one run, from a model and data to a directory that is the result.

    RUN/                 the LoRA for the untouched base (method full: the model), with its card, tokenizer, pissa.json
    RUN/results.json     settings, losses by step, speed, versions, hardware
    RUN/state/           what continues the run: its settings, log.jsonl, checkpoint-N/ (each a LoRA for the base, too)

The same command continues a run that stopped, from its last checkpoint, to the same losses.
"""

from __future__ import annotations

import json
import logging
import os
import time
import warnings
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from transformers import TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

from ..checkpoint.manifest import MANIFEST, fingerprint, hardware, package_versions
from ..checkpoint.read import CONFIG, load, load_base, load_tokenizer
from ..checkpoint.write import output_files, write_json
from ..errors import ConfigError, MissingExtraError, OutputError
from ..export import LoraExport, export_lora, write_lora
from ..live.apply import adapt
from .card import model_card
from .data import read_examples
from .encode import Collator, Encoded, encode
from .progress import StepLog, StopAtStepEnd, make_progress, read_log
from .recipe import Recipe
from .rows import examples_from_rows
from .trainer import ResponseTrainer

STATE, SETTINGS, LOG, RESULTS = "state", "run.json", "log.jsonl", "results.json"


class Interrupted(KeyboardInterrupt):
    """The user stopped the run; the message says what was saved and how to continue."""


@dataclass(frozen=True)
class RunResult:
    """A finished run."""

    directory: Path
    """The run's directory."""
    results: dict[str, Any]
    """What results.json holds."""
    model: Any
    """The trained model, in evaluation mode; None where the run was finished before."""


def train(
    model: str,
    data: str | list[dict[str, Any]],
    out: str | os.PathLike[str],
    recipe: Recipe,
    *,
    label: str | None = None,
    progress: Progress | None = None,
    quiet: bool = False,
) -> RunResult:
    """Fine-tune a model; continue where an earlier run of the same settings stopped.

    Args:
        model: the base's directory or hub id.
        data: a file or hub id, see `read_examples`; or the rows themselves.
        out: the run's directory: new, empty, or that of the same run.
        recipe: all settings.
        label: the run's name on the bar.
        progress: a bar to use; None for one of its own.
        quiet: no bar at all.

    Raises:
        PissaError: the input or the settings are wrong, before anything is written.
        OutputError: `out` holds something else, or cannot be written.
        Interrupted: Ctrl-C or SIGTERM; what was done is saved.
    """
    out = Path(out)
    _quieten()
    settings = {"model": str(model), "data": data if isinstance(data, str) else _digest(data), **recipe.as_dict()}
    finished = _check_output(out, settings)
    if finished is not None:
        return RunResult(out, finished, None)

    set_seed(recipe.seed)
    tokenizer = load_tokenizer(model)
    encoded = _encoded(data, tokenizer, recipe)
    state = out / STATE
    checkpoint = get_last_checkpoint(str(state)) if state.is_dir() else None
    bar = progress or make_progress()
    with nullcontext() if (progress or quiet or not _is_main_process()) else bar:
        shown = None if quiet or not _is_main_process() else bar
        prepared = _prepare(model, recipe, checkpoint, shown, label or recipe.method)
        settings["base_fingerprint"] = prepared.fingerprint
        _check_same_base(state, settings)
        if _is_main_process():
            state.mkdir(parents=True, exist_ok=True)
            write_json(state / SETTINGS, settings)
        trainer, stop = _make_trainer(prepared.model, tokenizer, encoded, recipe, state, shown, label or recipe.method)
        try:
            trainer.train(resume_from_checkpoint=checkpoint)
        except KeyboardInterrupt:
            raise Interrupted(_what_is_saved(state)) from None
        finally:
            stop.release()
    if stop.requested and trainer.state.global_step < trainer.state.max_steps:
        raise Interrupted(_what_is_saved(state))
    trained = trainer.accelerator.unwrap_model(trainer.model).eval()
    results = _results(recipe, settings, encoded, prepared, read_log(state / LOG), str(model))
    if _is_main_process():
        _publish(out, trained, tokenizer, recipe, results, trainer.state.global_step)
    trainer.accelerator.wait_for_everyone()
    return RunResult(out, results, trained)


@dataclass(frozen=True)
class _Prepared:
    model: Any
    init_seconds: float
    fingerprint: str
    certificates: dict[str, Any]


def _prepare(source: str, recipe: Recipe, checkpoint: str | None, progress: Progress | None, label: str) -> _Prepared:
    """The model to train: adapted, or as the checkpoint left it."""
    base = load_base(source, dtype=_storage_dtype(recipe))
    mark = fingerprint(base)
    base.config.use_cache = False
    if recipe.gradient_checkpointing:
        base.gradient_checkpointing_enable({"use_reentrant": False})
    start = time.perf_counter()
    if not recipe.adapts:
        base.requires_grad_(True)
        return _Prepared(base, 0.0, mark, {})
    if checkpoint is not None:
        return _Prepared(load(checkpoint, base, is_trainable=True), 0.0, mark, {})
    task = progress.add_task(f"{label}: splitting", total=None, note="") if progress is not None else None

    def show(name: str, done: int, total: int) -> None:
        if progress is not None and task is not None:
            progress.update(task, completed=done, total=total, note=name)

    adapted: Any = adapt(base, recipe.pissa_config(), progress=show)
    seconds = time.perf_counter() - start
    if progress is not None and task is not None:
        progress.remove_task(task)
    return _Prepared(adapted, seconds, mark, adapted.pissa.certificates)


def _make_trainer(
    model: Any,
    tokenizer: Any,
    encoded: Encoded,
    recipe: Recipe,
    state: Path,
    progress: Progress | None,
    label: str,
) -> tuple[ResponseTrainer, StopAtStepEnd]:
    arguments = _arguments(recipe, state)
    log, stop = StepLog(state / LOG, progress=progress, label=label), StopAtStepEnd()
    trainer = ResponseTrainer(
        model=model,
        args=arguments,
        train_dataset=encoded,  # pyright: ignore[reportArgumentType] -- any map-style data set will do
        data_collator=Collator(tokenizer.pad_token_id),
        lengths=encoded.lengths,
        batch_size=recipe.batch_size,
        callbacks=[log, stop],
    )
    log.trainer = trainer
    for callback in [c for c in trainer.callback_handler.callbacks if type(c).__name__ == "PrinterCallback"]:
        trainer.remove_callback(type(callback))
    return trainer, stop


def _arguments(recipe: Recipe, state: Path) -> TrainingArguments:
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    per_step = recipe.micro_batch_size * processes
    if recipe.batch_size % per_step:
        raise ConfigError(
            f"batch_size {recipe.batch_size} is no multiple of micro_batch_size {recipe.micro_batch_size} times "
            f"{processes} processes; change either"
        )
    cuda = torch.cuda.is_available()
    if recipe.log_to == "tensorboard":
        try:
            import tensorboard as _tensorboard  # noqa: F401  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise MissingExtraError("log_to tensorboard needs that package: pip install tensorboard") from error
    return TrainingArguments(
        output_dir=str(state),
        per_device_train_batch_size=recipe.micro_batch_size,
        gradient_accumulation_steps=recipe.batch_size // per_step,
        learning_rate=recipe.learning_rate,
        lr_scheduler_type=recipe.schedule,
        warmup_steps=recipe.warmup_ratio,
        weight_decay=recipe.weight_decay,
        max_grad_norm=recipe.max_grad_norm,
        num_train_epochs=recipe.epochs,
        max_steps=recipe.max_steps or -1,
        optim="adamw_torch",
        bf16=not recipe.adapts and _wants_bf16(recipe),
        logging_strategy="steps",
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="steps",
        save_steps=recipe.save_every,
        report_to=["tensorboard"] if recipe.log_to == "tensorboard" else [],
        seed=recipe.seed,
        data_seed=recipe.seed,
        use_cpu=not cuda,
        ddp_backend=None if cuda or processes == 1 else "gloo",
        ddp_find_unused_parameters=False,
        dataloader_pin_memory=cuda,
        remove_unused_columns=False,
        disable_tqdm=True,
        log_level="error",
    )


def _publish(out: Path, model: Any, tokenizer: Any, recipe: Recipe, results: dict[str, Any], step: int) -> None:
    """Put the result into the run's directory: for adapters one LoRA for the untouched base, with its card."""
    if not recipe.adapts:
        with output_files(out, last="config.json") as partial:
            model.save_pretrained(partial)
            tokenizer.save_pretrained(partial)
            write_json(partial / RESULTS, results)
            (partial / "README.md").write_text(model_card(results, None), encoding="utf-8")
        return
    export: LoraExport = export_lora(model, rank=recipe.export_rank)
    with output_files(out, last=CONFIG) as partial:
        write_lora(export, partial)
        if recipe.export_rank is not None:
            manifest = json.loads((partial / MANIFEST).read_text(encoding="utf-8"))
            write_json(partial / MANIFEST, {**manifest, "trained": f"{STATE}/checkpoint-{step}"})
        tokenizer.save_pretrained(partial)
        write_json(partial / RESULTS, results)
        (partial / "README.md").write_text(model_card(results, export), encoding="utf-8")


def _results(
    recipe: Recipe,
    settings: dict[str, Any],
    encoded: Encoded,
    prepared: _Prepared,
    log: list[dict[str, float]],
    base: str,
) -> dict[str, Any]:
    rates = sorted(record["tokens_per_second"] for record in log)
    losses = {name: c.captured_energy_loss for name, c in prepared.certificates.items()}
    rounding = {name: c.rounding for name, c in prepared.certificates.items()}
    return {
        "base": base,
        "method": recipe.method,
        "rank": recipe.rank if recipe.adapts else None,
        "learning_rate": recipe.learning_rate,
        "seed": recipe.seed,
        "dtype": str(next(p.dtype for p in prepared.model.parameters() if not p.requires_grad or not recipe.adapts)),
        "losses": [record["loss"] for record in log],
        "grad_norms": [record["grad_norm"] for record in log],
        "tokens_per_second": rates[len(rates) // 2] if rates else 0.0,
        "init_seconds": prepared.init_seconds,
        "largest_captured_energy_loss": max(losses.values(), default=None),
        "largest_rounding_error": max(rounding.values(), default=None),
        "trainable_parameters": sum(p.numel() for p in prepared.model.parameters() if p.requires_grad),
        "data": encoded.summary,
        "settings": settings,
        "versions": package_versions(),
        "hardware": hardware(),
    }


def _encoded(data: str | list[dict[str, Any]], tokenizer: Any, recipe: Recipe) -> Encoded:
    examples = read_examples(data) if isinstance(data, str) else examples_from_rows(data)
    return encode(examples, tokenizer, template=recipe.template, max_length=recipe.max_length)


def _check_output(out: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """The results of a run that is finished; None for one to start or continue.

    Raises:
        OutputError: the directory holds something that is not this run.
    """
    if not out.exists():
        return None
    if not out.is_dir():
        raise OutputError(f"{out} is a file; name a directory for the run")
    path = out / STATE / SETTINGS
    if not path.is_file():
        ours = [child for child in out.iterdir() if child.name != STATE]
        if ours or ((out / STATE).exists() and any((out / STATE).iterdir())):
            raise OutputError(f"{out} already holds something that is not a run; name a new directory, or remove it")
        return None
    before = json.loads(path.read_text(encoding="utf-8"))
    before.pop("base_fingerprint", None)
    _check_same_settings(out, json.loads(json.dumps(settings)), before)
    if (out / RESULTS).is_file():
        return json.loads((out / RESULTS).read_text(encoding="utf-8"))
    return None


def _check_same_settings(out: Path, now: dict[str, Any], before: dict[str, Any]) -> None:
    changed = [
        f"{k}: {before.get(k)!r} then, {now.get(k)!r} now" for k in {**before, **now} if before.get(k) != now.get(k)
    ]
    if changed:
        raise OutputError(
            f"{out} is another run ({'; '.join(changed)}); give the same settings to continue it, or another directory"
        )


def _check_same_base(state: Path, settings: dict[str, Any]) -> None:
    path = state / SETTINGS
    if path.is_file():
        before = json.loads(path.read_text(encoding="utf-8")).get("base_fingerprint")
        if before not in (None, settings["base_fingerprint"]):
            raise OutputError(
                f"the weights of {settings['model']} are not those that {state.parent} was started with; "
                "continue with that base, or start in another directory"
            )


def _what_is_saved(state: Path) -> str:
    last = get_last_checkpoint(str(state)) if state.is_dir() else None
    if last is None:
        return "interrupted before the first checkpoint: nothing is saved; the same command starts again"
    return f"interrupted; {last} is saved: the same command continues from there"


def _storage_dtype(recipe: Recipe) -> torch.dtype:
    return torch.bfloat16 if recipe.adapts and _wants_bf16(recipe) else torch.float32


def _wants_bf16(recipe: Recipe) -> bool:
    return recipe.dtype == "bf16" or (recipe.dtype == "auto" and bf16_in_hardware())


def bf16_in_hardware() -> bool:
    """Whether this machine multiplies bf16 natively: a CUDA GPU that does, or a CPU with AVX512-bf16 or AMX."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def _is_main_process() -> bool:
    return int(os.environ.get("RANK", "0")) == 0


def _digest(rows: list[dict[str, Any]]) -> str:
    import hashlib

    return f"{len(rows)} rows, sha256 {hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()[:16]}"


def _quieten() -> None:
    """Leave stderr to the bar and to what a user can act on."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
