"""Settings that go to TRL as they are: any field of SFTConfig and TrainingArguments that no setting of ours is for.

In YAML they stand under `training:`, on the command line they are given as `--set NAME=VALUE`.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..config.settings import nearest
from ..errors import ConfigError

OURS = {
    "output_dir": "--out",
    "per_device_train_batch_size": "micro_batch_size",
    "gradient_accumulation_steps": "batch_size",
    "learning_rate": "learning_rate",
    "lr_scheduler_type": "schedule",
    "warmup_steps": "warmup_ratio",
    "warmup_ratio": "warmup_ratio",
    "weight_decay": "weight_decay",
    "max_grad_norm": "max_grad_norm",
    "num_train_epochs": "epochs",
    "max_steps": "max_steps",
    "optim": "optimizer",
    "bf16": "dtype",
    "fp16": "dtype",
    "gradient_checkpointing": "gradient_checkpointing",
    "activation_checkpointing": "gradient_checkpointing",
    "save_steps": "save_every",
    "seed": "seed",
    "data_seed": "seed",
    "max_length": "max_length",
    "packing": "packing",
    "neftune_noise_alpha": "neftune",
    "report_to": "report_to",
    "use_liger_kernel": "liger",
    "eval_strategy": "eval_every",
    "eval_steps": "eval_every",
    "load_best_model_at_end": "keep_best",
    "resume_from_checkpoint": "resume_from",
}
"""SFTConfig's name -> the setting of ours that says the same."""
FIXED = {
    "save_strategy": "a checkpoint is written every save_every steps",
    "save_only_model": "a checkpoint holds what continues the run",
    "save_total_limit": "the last checkpoints are kept",
    "metric_for_best_model": "the best step is that of the lowest validation loss",
    "greater_is_better": "the best step is that of the lowest validation loss",
    "prediction_loss_only": "the validation loss is what is measured",
    "restore_callback_states_from_checkpoint": "a run continues exactly",
    "ignore_data_skip": "a run continues exactly",
    "logging_steps": "every step is logged",
    "logging_strategy": "every step is logged",
    "logging_nan_inf_filter": "a step that diverged ends the run",
    "remove_unused_columns": "rows hold nothing that is not used",
    "dataset_kwargs": "rows are tokenised before the trainer sees them",
    "dataset_text_field": "rows are tokenised before the trainer sees them",
    "completion_only_loss": "responses are learned, and texts in full",
    "assistant_only_loss": "responses are learned, and texts in full",
    "chat_template_path": "the tokenizer's chat template is used; put another one into the model's directory",
    "eos_token": "set it in the tokenizer's own files",
    "pad_token": "set it in the tokenizer's own files",
    "model_init_kwargs": "the model is loaded before the trainer sees it, with the setting attention",
    "trust_remote_code": "no code that comes with a model is run",
    "disable_tqdm": "the run has a bar of its own",
    "push_to_hub": "what is published is the run's directory; upload it with `hf upload`",
    "do_train": "a run trains",
    "do_eval": "a run trains",
    "do_predict": "a run trains",
}
"""SFTConfig's name -> why it cannot be set."""
DECLARING = (
    ("trl", "trainer/sft_config.py", "SFTConfig"),
    ("trl", "trainer/base_config.py", "_BaseConfig"),
    ("transformers", "training_args.py", "TrainingArguments"),
)
"""SFTConfig and what it derives from: package, file and class."""
OPTIMIZERS = ("transformers", "training_args.py", "OptimizerNames")
PLAIN = {"bool": bool, "int": int, "float": (int, float), "str": str, "dict": dict, "list": list}
"""Types of a field that a value is held against."""


def check_passed_on(settings: Mapping[str, Any]) -> None:
    """Hold settings against the fields of SFTConfig.

    Raises:
        ConfigError: naming every setting that SFTConfig does not have, that one of ours is for, that is fixed, or whose
            value is of another type.
    """
    known = declared_fields() if settings else {}
    wrong = []
    for name, value in settings.items():
        if name in OURS:
            wrong.append(f"{name} has a setting of its own, {OURS[name]}")
        elif name in FIXED:
            wrong.append(f"{name} cannot be set: {FIXED[name]}")
        elif known and name not in known:
            near = nearest(name, known.keys() - {*OURS, *FIXED})
            wrong.append(f"{name} is no field of SFTConfig" + (f"; did you mean {near}?" if near else ""))
        elif known and not _is_of(known[name], value):
            wrong.append(f"{name} is {value!r}; SFTConfig takes {known[name]}")
    if wrong:
        raise ConfigError(f"training: {'; '.join(wrong)}")


@cache
def declared_fields() -> dict[str, str]:
    """SFTConfig's fields with their types, as its text and those of what it derives from declare them: importing them
    takes seconds. Empty where TRL or its text is not there."""
    found = [declaration for place in DECLARING for declaration in _declarations(*place)]
    return {
        node.target.id: ast.unparse(node.annotation)
        for node in reversed(found)
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and "init=False" not in _value(node)
    }


@cache
def optimizer_names() -> tuple[str, ...]:
    """What transformers calls its optimizers, as its text declares them; empty where that is not there."""
    named = (node.value for node in _declarations(*OPTIMIZERS) if isinstance(node, ast.Assign))
    return tuple(str(value.value) for value in named if isinstance(value, ast.Constant))


def _declarations(package: str, file: str, owner: str) -> Iterator[ast.stmt]:
    """The statements of a class, from its file."""
    found = find_spec(package)
    path = Path(found.origin).parent / file if found is not None and found.origin is not None else None
    if path is None or not path.is_file():
        return
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef) and node.name == owner:
            yield from node.body


def _value(node: ast.AnnAssign) -> str:
    return ast.unparse(node.value) if node.value is not None else ""


def _is_of(annotation: str, value: Any) -> bool:
    """Whether a value is of a field's type; True where that has parts of a library's own."""
    parts = [part.partition("[")[0].strip() for part in annotation.split("|")]
    if any(part not in PLAIN and part != "None" for part in parts) or (value is None and "None" in parts):
        return True
    if isinstance(value, bool) and "bool" not in parts:
        return False
    return any(part in PLAIN and isinstance(value, PLAIN[part]) for part in parts)


def named_values(given: Any) -> Any:
    """Settings of NAME=VALUE, or of a list of such texts, each value as YAML reads it; those of a mapping with numbers
    that YAML takes for text; anything else as it is."""
    if isinstance(given, Mapping):
        return {name: _number(value) for name, value in given.items()}
    texts = [given] if isinstance(given, str) else given
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) and "=" in text for text in texts):
        return given
    import yaml

    found: dict[str, Any] = {}
    for text in texts:
        name, _, value = text.partition("=")
        try:
            found[name.strip().replace("-", "_")] = _number(yaml.safe_load(value))
        except yaml.YAMLError:
            return given
    return found


def _number(value: Any) -> Any:
    """What YAML takes for text although it is a number, such as 1e-8."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value
