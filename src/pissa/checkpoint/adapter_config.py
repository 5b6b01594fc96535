"""`adapter_config.json`, read at one door: its fields, and the patterns in it, before PEFT or anybody sees them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft import AdaLoraConfig, LoraConfig

from ..errors import CheckpointError, listed
from ..outside.documents import read_document
from ..outside.patterns import wrong_patterns
from ..outside.text import on_one_line
from .disk.header import read_header
from .factors import CONFIG, WEIGHTS
from .manifest import Count
from .source.hub import first_line

LONGEST_NAME = 256
"""Characters of the longest name of a module, where the tensors do not say."""
REMEDY = "give an adapter that PEFT or pissa saved"


@dataclass(frozen=True)
class AdapterConfig:
    """The fields of a LoRA's configuration that decide what it computes."""

    peft_type: str | None = None
    r: Count = 8
    lora_alpha: float = 8
    rank_pattern: dict[str, Count] | None = None
    alpha_pattern: dict[str, float] | None = None
    target_modules: str | list[str] | None = None
    exclude_modules: str | list[str] | None = None
    target_parameters: list[str] | None = None
    modules_to_save: list[str] | None = None
    layers_pattern: str | list[str] | None = None
    layers_to_transform: int | list[int] | None = None
    use_rslora: bool = False
    use_dora: bool = False
    lora_bias: bool = False
    lora_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: str = "none"
    task_type: str | None = None
    base_model_name_or_path: str | None = None
    inference_mode: bool = True
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    megatron_config: dict[str, Any] | None = field(default=None)


def read_adapter_config(directory: Path) -> LoraConfig:
    """PEFT's configuration of the adapter in a directory, in which every field and pattern has been checked.

    Args:
        directory: that holds adapter_config.json, and usually the tensors.

    Raises:
        CheckpointError: it is no configuration of a LoRA or an AdaLoRA, or a pattern in it could take for ever to
            match.
    """
    path = directory / CONFIG
    document = read_document(path, AdapterConfig, remedy=REMEDY)
    kind = document.get("peft_type")
    if kind not in ("LORA", "ADALORA"):
        raise CheckpointError(
            f"{directory} holds a {on_one_line(str(kind)[:40])} adapter; pissa reads LoRA and AdaLoRA adapters"
        )
    wrong = wrong_patterns(patterns_in(document), _longest_name(directory))
    if wrong:
        raise CheckpointError(f"{path}: {listed(wrong, separator='; ')}; {REMEDY}, or name the modules instead")
    try:
        config: Any = (LoraConfig if kind == "LORA" else AdaLoraConfig).from_pretrained(str(directory))
        return config
    except Exception as error:  # PEFT checks in as many ways as it has settings
        raise CheckpointError(f"{path} is not a PEFT configuration: {first_line(error)}; {REMEDY}") from error


def patterns_in(settings: dict[str, Any]) -> Iterator[str]:
    """The regular expressions in an adapter's, or in our own, settings, as they are matched with names of modules."""
    for name in ("rank_pattern", "alpha_pattern"):
        # PEFT and pissa alike match a key with the end of a name
        yield from (rf"(.*\.)?({key})$" for key in settings.get(name) or ())
    for name in ("target_modules", "exclude_modules", "layers_pattern"):
        given = settings.get(name)
        if isinstance(given, str):
            yield given
        elif name == "layers_pattern":
            yield from given or ()


def _longest_name(directory: Path) -> int:
    path = directory / WEIGHTS
    if not path.is_file():
        return LONGEST_NAME
    descriptor = os.open(path, os.O_RDONLY)
    try:
        names = read_header(descriptor, path, os.fstat(descriptor).st_size)
    except CheckpointError:
        return LONGEST_NAME  # whoever reads the tensors says what is wrong with them
    finally:
        os.close(descriptor)
    return max([LONGEST_NAME // 2, *map(len, names)])
