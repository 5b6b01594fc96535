"""pissa: fine-tune pretrained models through their principal components (PiSSA, arXiv 2404.02948).

The public names below are loaded when they are first used, so that `import pissa` needs torch alone.
"""

from __future__ import annotations

import logging
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .adapted.adapt import adapt as adapt
    from .adapted.load import load as load
    from .calibrate.moments import second_moments as second_moments
    from .checkpoint.residual import save_residual as save_residual
    from .checkpoint.stream.init import init_checkpoint as init_checkpoint
    from .checkpoint.stream.verify import verify as verify
    from .config import PissaConfig as PissaConfig
    from .config import Quantization as Quantization
    from .config import quantization_preset as quantization_preset
    from .decompose.certificate import Certificate as Certificate
    from .decompose.svd import truncated_svd as truncated_svd
    from .errors import PissaError as PissaError
    from .evaluation.options import EvaluationOptions as EvaluationOptions
    from .evaluation.run import evaluate as evaluate
    from .export.lora import export_lora as export_lora
    from .export.merged import export_merged as export_merged
    from .lab.comparison.plan import ComparisonPlan as ComparisonPlan
    from .lab.comparison.run import compare as compare
    from .lab.models import smollm2 as smollm2
    from .live.offset import freeze_second_halves as freeze_second_halves
    from .live.reference import reference as reference
    from .live.reference import restore as restore
    from .optimizers.spectral import SpectralProduct as SpectralProduct
    from .quantize.error import reduction_ratio as reduction_ratio
    from .split import Split as Split
    from .split import split_weight as split_weight
    from .training.recipe import Recipe as Recipe
    from .training.run import train as train

__version__ = "0.1.0"

# bitsandbytes, which transformers imports where it is installed, tells of a faster kernel at its import, and of a cast
# at every call of every 8-bit layer.
for _name in ("bitsandbytes.backends.cpu.ops", "bitsandbytes.autograd._functions"):
    logging.getLogger(_name).setLevel(logging.ERROR)

_HOMES = {
    "PissaConfig": "config",
    "Quantization": "config",
    "quantization_preset": "config",
    "PissaError": "errors",
    "second_moments": "calibrate.moments",
    "Certificate": "decompose.certificate",
    "truncated_svd": "decompose.svd",
    "Split": "split",
    "split_weight": "split",
    "reduction_ratio": "quantize.error",
    "reference": "live.reference",
    "restore": "live.reference",
    "init_checkpoint": "checkpoint.stream.init",
    "verify": "checkpoint.stream.verify",
    "save_residual": "checkpoint.residual",
    "export_lora": "export.lora",
    "export_merged": "export.merged",
    "adapt": "adapted.adapt",
    "load": "adapted.load",
    "Recipe": "training.recipe",
    "train": "training.run",
    "evaluate": "evaluation.run",
    "EvaluationOptions": "evaluation.options",
    "compare": "lab.comparison.run",
    "ComparisonPlan": "lab.comparison.plan",
    "freeze_second_halves": "live.offset",
    "SpectralProduct": "optimizers.spectral",
    "smollm2": "lab.models",
}
__all__ = [*_HOMES, "__version__"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f".{_HOMES[name]}", __name__), name)
    raise AttributeError(f"module 'pissa' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
