"""`adapt`: a live model becomes a frozen residual with a trainable adapter.

Every target is split first, which changes nothing; only when all splits are there is the model wrapped by PEFT and its
weights replaced by residuals. The trainable adapter is called `default`. Its state at step 0 stays on the model as
the frozen, inactive adapter `pissa_init`: residual + `pissa_init` is the base, so the reference and the export are
always at hand, and nothing is ever decomposed again.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers.models.auto import modeling_auto
from transformers.pytorch_utils import Conv1D

from ..config import PissaConfig
from ..decompose.certificate import Certificate
from ..errors import PissaError
from ..split import combine, split_each
from .layers import set_weight_matrix, weight_matrix
from .state import INITIAL, TRAINABLE, adapter_layers, base_layer, set_factors
from .targets import Target, pattern_keys, peft_targets, resolve_targets

Progress = Callable[[str, int, int], None]


@dataclass
class AdaptationRecord:
    """What `adapt` did to a model; kept on it as `model.pissa`."""

    config: PissaConfig | None
    """What was asked for; None for a model that was loaded."""
    certificates: dict[str, Certificate]
    """Module name -> certificate of its split."""
    untied: dict[str, str] = field(default_factory=dict)
    """Target whose weight was shared -> the module that keeps the shared weight."""
    tie_word_embeddings: bool | None = None
    """The base configuration's value, where untying changed it."""
    trainable: frozenset[str] = frozenset()
    """The base's parameters that required a gradient."""


def adapt(model: nn.Module, config: PissaConfig, *, progress: Progress | None = None) -> PeftModel:
    """Turn a model into its residual with a trainable adapter that starts at the principal components.

    Args:
        model: a model without adapters, usually from transformers. It is changed: its target layers are wrapped and
            their weights replaced by residuals. `restore` undoes that.
        config: rank, method, targets.
        progress: called with (module name, how many are done, how many there are) after each split.

    Returns:
        A PeftModel: adapter "default" trainable and active, everything else frozen; the same function as the model
        given, up to the rounding stated in `model.pissa.certificates`.

    Raises:
        TargetError, ConfigError, WeightError: see `targets.resolve_targets`; the model is then unchanged.

    Source: paper, section 3.
    """
    targets = resolve_targets(model, config)
    factors: dict[str, tuple[Tensor, Tensor]] = {}
    certificates: dict[str, Certificate] = {}
    weights = [
        (weight_matrix(target.module), config.for_module(target.rank, target.alpha), f"{target.name}.weight")
        for target in targets
    ]
    for done, (target, split) in enumerate(zip(targets, split_each(weights), strict=True), start=1):
        factors[target.name] = split.A, split.B
        certificates[target.name] = split.certificate
        if progress is not None:
            progress(target.name, done, len(targets))

    adapted = attach(model, peft_config(model, targets, config), factors, subtract=not config.starts_at_zero)
    record: Any = adapted.pissa
    record.config, record.certificates = config, certificates
    return adapted


def attach(
    model: nn.Module,
    lora_config: LoraConfig,
    initial: Mapping[str, tuple[Tensor, Tensor]],
    *,
    subtract: bool,
    trained: Mapping[str, tuple[Tensor, Tensor]] | None = None,
) -> PeftModel:
    """Wrap a base model by PEFT and give it ready factors: the step that `adapt` and `load` share.

    Args:
        model: the base; its targets' weights are replaced by residuals where `subtract` is set.
        lora_config: the configuration of adapter "default".
        initial: module name -> (A0 (r, in), B0 (out, r)).
        subtract: whether `s·B0·A0` is taken out of the weights and kept as `pissa_init`; else the base stays as it is.
        trained: the factors that "default" gets; None for the initial ones.
    """
    shared = _shared_weights(model, list(initial)) if subtract else {}
    tied_before = _declare_untied(model, shared) if shared else None
    trainable = frozenset(name for name, parameter in model.named_parameters() if parameter.requires_grad)
    adapted = get_peft_model(model, lora_config, adapter_name=TRAINABLE, low_cpu_mem_usage=True)
    if subtract:
        adapted.add_adapter(INITIAL, replace(lora_config, lora_dropout=0.0), low_cpu_mem_usage=True)
    layers = adapter_layers(adapted)
    if set(layers) != set(initial):
        raise PissaError(f"PEFT adapted other modules than asked for: {sorted(set(layers) ^ set(initial))}")
    for wrapper in (adapted, adapted.base_model):
        wrapper.training = model.training
    for module in adapted.modules():
        if isinstance(module, ModulesToSaveWrapper):
            module.train(module.original_module.training)
    for name, (A0, B0) in initial.items():
        layer: Any = layers[name]
        layer.train(base_layer(layer).training)
        set_factors(layer, TRAINABLE, *(trained or initial)[name], trainable=True)
        if subtract:
            set_factors(layer, INITIAL, A0, B0, trainable=False)
            module = base_layer(layer)
            residual = combine(weight_matrix(module), A0, B0, -float(layer.scaling[TRAINABLE]))
            set_weight_matrix(module, residual)
    adapted.pissa = AdaptationRecord(None, {}, shared, tied_before, trainable)  # pyright: ignore[reportArgumentType]
    return adapted


def peft_config(model: nn.Module, targets: list[Target], config: PissaConfig) -> LoraConfig:
    """PEFT's configuration for these targets. It says `init_lora_weights=True`, so that no library that copies or
    reloads the adapter decomposes the residual."""
    default_alpha = _lora_alpha(config, config.rank, config.alpha)
    alphas = {target.name: _lora_alpha(config, target.rank, target.alpha) for target in targets}
    keys = pattern_keys([*alphas])
    return LoraConfig(
        r=config.rank,
        lora_alpha=default_alpha,  # pyright: ignore[reportArgumentType] -- PEFT computes with floats as well
        target_modules=peft_targets(model, [*alphas]),
        rank_pattern={keys[t.name]: t.rank for t in targets if t.rank != config.rank},
        alpha_pattern={keys[name]: alpha for name, alpha in alphas.items() if alpha != default_alpha},
        use_rslora=config.use_rslora,
        lora_dropout=config.dropout,
        fan_in_fan_out=all(isinstance(target.module, Conv1D) for target in targets),
        modules_to_save=list(config.modules_to_save) or None,
        init_lora_weights=True,
        task_type=_task_type(model),
    )


def _lora_alpha(config: PissaConfig, rank: int, alpha: float | None) -> float:
    if alpha is not None:
        return alpha
    return rank**0.5 if config.use_rslora else rank


def _task_type(model: nn.Module) -> str | None:
    name = type(model).__name__
    tables = (
        ("CAUSAL_LM", modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
        ("SEQ_2_SEQ_LM", modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES),
        ("SEQ_CLS", modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES),
        ("TOKEN_CLS", modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES),
    )
    return next((task for task, table in tables if name in table.values()), None)


def _shared_weights(model: nn.Module, names: list[str]) -> dict[str, str]:
    """Targets whose weight another module uses as well -> that module. Their residual becomes a weight of its own."""
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        if weight is not None:
            owners.setdefault(id(weight), []).append(name)
    shared = {}
    for group in owners.values():
        kept = next((name for name in group if name not in names), group[0])
        shared |= {name: kept for name in group if name in names and name != kept}
    return shared


def _declare_untied(model: nn.Module, shared: Mapping[str, str]) -> bool | None:
    """Tell transformers that the weights are no longer tied, so that saving keeps both; returns the old setting."""
    warnings.warn(
        "untied "
        + ", ".join(f"{name} from {kept}" for name, kept in shared.items())
        + ": the residual gets a weight of its own and the shared one stays as it was (restore ties them again)",
        stacklevel=4,
    )
    ties = getattr(model, "all_tied_weights_keys", {})
    for name in shared:
        ties.pop(f"{name}.weight", None)
    model_config: Any = getattr(model, "config", None)
    if not hasattr(model_config, "tie_word_embeddings"):
        return None
    before = model_config.tie_word_embeddings
    model_config.tie_word_embeddings = False
    return before
