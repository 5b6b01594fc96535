"""Names that PEFT rewrites on its way from a configuration to a model.

For mixtures of experts PEFT reads `target_modules` as names of transformers 4, where experts were modules: what ends in
`gate`, `gate_proj`, `up_proj`, `down_proj`, `w1`, `w2` or `w3` becomes the fused parameter, with another rank, and a
dense layer or shared expert of that name is lost. Names in `target_parameters` are left alone, so such layers are
adapted through these.
"""

from __future__ import annotations

from typing import Any

from peft import LoraConfig, PeftModel
from peft.tuners.lora.layer import ParamWrapper
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from torch import nn

from .marks import marks, set_marks
from .state import layers_by_path, module_path

NESTING = "parameters"
"""The mark that lists an adapter's bare parameters, of several in one module the innermost first."""


def is_rewritten(model: nn.Module, name: str) -> bool:
    """Whether PEFT would take the name of one of the model's modules for something else."""
    trial = LoraConfig(target_modules=[name])
    try:
        convert_peft_config_for_transformers(trial, model, None)
    except ValueError:  # some of what is fused, and not all
        return True
    return set(trial.target_modules or ()) != {name}


def settle_names(model: PeftModel) -> None:
    """Name the bare parameters in the adapters' configurations in full and in order: of several wrappers around one
    module it is their order that says which tensors are whose."""
    wrapped = [(path, layer) for path, layer in layers_by_path(model) if isinstance(layer, ParamWrapper)]
    names = [f"{module_path(path)}.{layer.parameter_name}" for path, layer in wrapped]
    for config in model.peft_config.values():
        settled: Any = config
        settled.target_parameters = names or None
        if names:
            set_marks(settled, **{NESTING: names})


def nesting(config: Any) -> list[str]:
    """The bare parameters that an adapter's configuration names, of several in one module the innermost first.

    Without our mark, the order is that in which transformers' mixtures of experts hold theirs: `down_proj` last.
    """
    names = list(getattr(config, "target_parameters", None) or ())
    marked: Any = marks(config).get(NESTING)
    if marked is not None and set(marked) == set(names):
        return list(marked)
    return sorted(names, key=lambda name: (name.rpartition(".")[2] == "down_proj", name))
