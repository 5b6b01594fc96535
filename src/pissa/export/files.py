"""An export on disk: weights, configuration, manifest and card."""

from __future__ import annotations

import os
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path

from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor

from ..checkpoint.card import lora_card, write_card
from ..checkpoint.disk.write import write_json
from ..checkpoint.factors import CONFIG, WEIGHTS
from ..checkpoint.manifest import MANIFEST
from ..provenance import package_versions


class LoraExport(dict[str, Tensor]):
    """A LoRA for the untouched base: PEFT's state dict (name -> tensor) with its configuration."""

    config: LoraConfig
    """PEFT's configuration that goes with the tensors."""
    base: str | None
    """Directory or hub id of the base it is for."""
    layout: str | None
    """"lossless" where the initial adapter can be read back out of it."""
    errors: dict[str, float]
    """Module name -> `‖ΔW − exported ΔW‖ / ‖ΔW‖` (Frobenius); all 0 for a lossless export."""
    sample: str | None
    """A few values of the base's weights, by which `load` tells another base of the same shapes."""
    method: str | None
    """Name of the method by which it was trained, where that is known."""
    template: str | None
    """The prompt template with which it was trained, where that is known."""
    rank: int
    """Rank of the adapter as it was trained."""
    residual: str | None
    """The directory of the residual, not quantised, that the model was trained on, where it was saved."""
    gaps: dict[str, float]
    """Module name -> `‖W − Q − s·B0·A0‖ / ‖W‖`, where the residual Q is quantised: the model was trained as
    `Q + s·B·A`, and on the base W this export is off from that by just this. Empty where it is not quantised."""


def write_lora(export: LoraExport, directory: Path, *, final: Path | None = None) -> None:
    """Write an export's files (weights, configuration, manifest, card) into a directory that exists.

    Args:
        final: the name that the directory will have in the end, from which the residual is found where there is one.
    """
    save_file({key: tensor.contiguous() for key, tensor in export.items()}, directory / WEIGHTS, {"format": "pt"})
    manifest = {
        "layout": export.layout,
        "base": export.base,
        "base_sample": export.sample,
        "method": export.method,
        **({"template": export.template} if export.template is not None else {}),
        "largest_error": max(export.errors.values(), default=0.0),
        **gap_figures(export.gaps),
        "versions": package_versions(),
    }
    if export.residual is not None and final is not None:
        manifest["residual"] = os.path.relpath(export.residual, final.absolute())
    write_json(directory / MANIFEST, manifest)
    facts = (export.config, export.base, export.method, export.rank, export.errors, export.gaps, export.template)
    write_card(directory, lora_card(*facts))
    config = deepcopy(export.config)
    config.inference_mode = True
    for name, value in vars(config).items():
        if isinstance(value, set):  # PEFT would write it in the order of its hashes, another in every process
            setattr(config, name, sorted(value))
    config.save_pretrained(str(directory))
    assert (directory / CONFIG).is_file()


def gap_figures(gaps: Mapping[str, float]) -> dict[str, float]:
    """Largest and mean relative distance between the base and what a quantised model started from, for manifests."""
    if not gaps:
        return {}
    return {"largest_quantization_gap": max(gaps.values()), "mean_quantization_gap": sum(gaps.values()) / len(gaps)}
