"""`adapt`: a live model becomes a frozen residual with a trainable adapter.

Every target is split first, which changes nothing; only when all splits are there is the model wrapped by PEFT and its
weights replaced by residuals (with a quantisation, its layers by bitsandbytes' with ready codes). The trainable adapter
is called `default`. Its state at step 0 stays on the model as the frozen, inactive adapter `pissa_init`: residual +
`pissa_init` is the base, so the reference and the export are always at hand, and nothing is ever decomposed again.
In placement "offset" the weights stay, and one adapter holds both (`offset.py`).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from peft import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.models.auto import modeling_auto

from ..calibrate.gradients import weight_gradients
from ..calibrate.moments import Moment
from ..config import PissaConfig, Quantization
from ..decompose.adalora import orthonormal_factors, random_factors
from ..decompose.certificate import Certificate, worst
from ..decompose.dora import magnitudes as row_norms
from ..errors import ConfigError, DataError, PissaError
from ..quantize.formats import Packed
from ..split import Split, Weight, derive_seed, split_each
from .adalora import adalora_config, layer_scale
from .budget import with_planned_ranks
from .conversion import NESTING, settle_names
from .guards import guard
from .identity import base_sample
from .layers import LINEAR, TRANSPOSED, combine_each
from .offset import concatenated, freeze_second_halves, offset_config
from .quantized import (
    bitsandbytes_config,
    declare_quantized,
    keep_unpacked,
    quantized_layer,
    require_bitsandbytes,
)
from .runtime import keep_slow_path, warn_of_peft
from .state import (
    INITIAL,
    TRAINABLE,
    adapter_layers,
    base_layer,
    place_at,
    set_factors,
    set_magnitude,
    set_marks,
)
from .targets import Target, pattern_keys, peft_targets, resolve_targets
from .tokens import fill_tokens

Progress = Callable[[str, int, int], None]
MOMENT_BYTES = 1 << 28
"""Streamed moments held at a time: enough for several weights to be split side by side."""


@dataclass
class AdaptationRecord:
    """What `adapt` did to a model; kept on it as `model.pissa`."""

    config: PissaConfig | None
    """What was asked for; None for a model that was loaded."""
    certificates: dict[str, Certificate]
    """Module name -> certificate of its split."""
    untied: dict[str, str] = field(default_factory=dict)
    """Target whose weight was shared -> the module that keeps the shared weight."""
    ties: dict[str, str] = field(default_factory=dict)
    """The ties among weights that transformers knew of, and that were undone for that."""
    tie_word_embeddings: bool | None = None
    """The base configuration's value, where untying changed it."""
    trainable: frozenset[str] = frozenset()
    """The base's parameters that required a gradient."""
    method: str | None = None
    """Name of the method, where it is known."""
    quantization: Quantization | None = None
    """How the residual was quantised; None where it is not, or where pissa did not do it."""
    quantized: bool = False
    """Whether the residual is in few bits, so that the trained function is `Q + s·B·A`."""
    base: str | None = None
    """Directory or hub id of the base."""
    residual: str | None = None
    """The directory to which the residual was saved, or from which it was loaded."""


def adapt(
    model: nn.Module,
    config: PissaConfig,
    *,
    moments: Mapping[str, Tensor] | Iterable[Moment] | None = None,
    batches: Iterable[Mapping[str, Any]] | None = None,
    progress: Progress | None = None,
) -> PeftModel:
    """Turn a model into its residual with a trainable adapter that starts at the principal components.

    Args:
        model: a model without adapters, usually from transformers. It is changed: its target layers are wrapped and
            their weights replaced by residuals. `restore` undoes that.
        config: rank, method, targets, quantisation, placement.
        moments: second moments of the targets' inputs, for a quantisation that minimises output error (and a rank
            budget that counts energy as outputs have it): module name -> (in, in), or `calibrate.second_moments` as it
            streams, so that a few of them are in memory at a time.
        batches: keyword arguments of the model's forward, with labels, from the data that it is to learn: what
            component "scored" chooses by.
        progress: called with (module name, how many are done, how many there are) after each split.

    Returns:
        A PeftModel: adapter "default" trainable and active, everything else frozen; the same function as the model
        given, up to the rounding stated in `model.pissa.certificates`.

    Raises:
        TargetError, ConfigError, WeightError: see `targets.resolve_targets`; the model is then unchanged.
        DataError: a target without a moment where others have one.
        MissingExtraError: a quantisation without bitsandbytes.

    Source: paper, section 3.
    """
    if config.quantization is not None:
        _check_live_format(config.quantization, moments)
    keep_unpacked(model)
    if (batches is not None) != config.needs_gradient:
        raise ConfigError(
            'batches are for component "scored", which chooses by them; leave them out'
            if batches is not None
            else 'component "scored" chooses by your data: pass batches with labels, as the model\'s forward takes them'
        )
    targets = resolve_targets(model, config)
    if config.rank_budget is not None:
        targets = with_planned_ranks(targets, config, moments)
        moments = moments if config.quantization is not None else None
    warn_of_peft(model, {target.name: target.kind for target in targets}, config.dropout)
    factors: dict[str, tuple[Tensor, ...]] = {}
    certificates: dict[str, Certificate] = {}
    packed: dict[str, Packed] = {}
    found = _splits(targets, config, moments) if batches is None else _scored_splits(model, targets, config, batches)
    for done, (target, splits) in enumerate(found, start=1):
        A, B = torch.stack([split.A for split in splits]), torch.stack([split.B for split in splits])
        factors[target.name] = (A, B) if target.is_stack else (A[0], B[0])
        certificates[target.name] = worst([split.certificate for split in splits])
        if splits[0].packed is not None:
            packed[target.name] = splits[0].packed
        if progress is not None:
            progress(target.name, done, len(targets))

    _warn_of_dead(factors)
    if config.use_adalora:
        factors = {
            name: random_factors(A, B, derive_seed(config.seed, name))
            if config.starts_at_zero
            else orthonormal_factors(A, B)
            for name, (A, B) in factors.items()
        }
    attach_placed = attach_offset if config.placement == "offset" and not config.starts_at_zero else attach
    adapted = attach_placed(
        model, peft_config(model, targets, config), factors, subtract=not config.starts_at_zero, packed=packed
    )
    record: Any = adapted.pissa
    record.config, record.certificates, record.quantization = config, certificates, config.quantization
    record.method = config.title
    return adapted


def _warn_of_dead(factors: Mapping[str, tuple[Tensor, ...]]) -> None:
    """Say where both factors are zero: then so are both gradients, for ever."""
    dead = [name for name, (A, B, *_) in factors.items() if not bool((A.any(-1).any(-1) | B.any(-1).any(-1)).all())]
    if dead:
        warnings.warn(
            f"{', '.join(dead)}: the weight is zero, so its adapter starts at zero and cannot learn; give it a "
            "method that starts at random factors, such as lora-kaiming, or leave it out by exclude_modules",
            stacklevel=3,
        )


def _splits(
    targets: list[Target], config: PissaConfig, moments: Mapping[str, Tensor] | Iterable[Moment] | None
) -> Iterator[tuple[Target, list[Split]]]:
    """Every target with the split of its weight, or of each of its experts': in the model's order, or as streamed
    moments arrive."""
    if moments is None:
        yield from _split_group(targets, config, {})
        return
    waiting = {target.name: target for target in targets}
    for group in _groups(moments):
        here = [waiting.pop(name) for name in group if name in waiting]
        yield from _split_group(here, config, group)
    if waiting:
        raise DataError(f"no second moment is given for {', '.join(waiting)}; give one for every target, or none")


def _scored_splits(
    model: nn.Module, targets: list[Target], config: PissaConfig, batches: Iterable[Mapping[str, Any]]
) -> Iterator[tuple[Target, list[Split]]]:
    """The same by the gradients of a loss, of which some are in memory at a time."""
    by_key = {target.weight_key: target for target in targets}
    for gradients in weight_gradients(model, batches, by_key):
        yield from _split_group([by_key[key] for key in gradients], config, {}, gradients)


def _groups(moments: Mapping[str, Tensor] | Iterable[Moment]) -> Iterator[Mapping[str, Tensor]]:
    """Moments by module name, as many at a time as fit into MOMENT_BYTES, at least those of one input."""
    if isinstance(moments, Mapping):
        yield moments  # pyright: ignore[reportReturnType]
        return
    group: dict[str, Tensor] = {}
    size = 0
    for moment in moments:
        group |= dict.fromkeys(moment.names, moment.matrix)
        size += moment.matrix.nbytes
        if size >= MOMENT_BYTES:
            yield group
            group, size = {}, 0
    yield group


def _split_group(
    targets: list[Target],
    config: PissaConfig,
    moments: Mapping[str, Tensor],
    gradients: Mapping[str, Tensor] | None = None,
) -> Iterator[tuple[Target, list[Split]]]:
    weights = [
        weights_of(
            target,
            target.place.matrices(),
            config,
            moments.get(target.name),
            target.kind.matrices(gradients[target.weight_key]) if gradients is not None else None,
        )
        for target in targets
    ]
    splits = split_each([weight for group in weights for weight in group])
    return ((target, [next(splits) for _ in group]) for target, group in zip(targets, weights, strict=True))


def weights_of(
    target: Target,
    matrices: Tensor,
    config: PissaConfig,
    moment: Tensor | None = None,
    gradient: Tensor | None = None,
) -> list[Weight]:
    """What `split_each` takes for one target: its weight, or those of its experts, each with a name of its own.

    Args:
        matrices: (…, out, in), as `Kind.matrices` gives them.
        moment: (in, in) second moment of the input.
        gradient: of the loss, in the shape of the matrices.
    """
    own = config.for_module(target.rank, target.alpha)
    if matrices.ndim == 2:
        return [Weight(matrices, own, target.weight_key, moment, gradient)]
    each = gradient if gradient is not None else [None] * len(matrices)
    return [
        Weight(matrix, own, f"{target.weight_key}.{i}", moment, of)
        for i, (matrix, of) in enumerate(zip(matrices, each, strict=True))
    ]


def attach_offset(
    model: nn.Module,
    lora_config: LoraConfig,
    initial: Mapping[str, tuple[Tensor, ...]],
    *,
    trained: Mapping[str, tuple[Tensor, ...]] | None = None,
    magnitudes: Mapping[str, Tensor] | None = None,
    **_: Any,
) -> PeftModel:
    """`attach` for placement "offset": the base is left alone and the initial factors are the adapter's second half.

    Args:
        lora_config: of rank r; the adapter gets twice the rank at the same scale.
    """
    factors = concatenated(trained or initial, initial)
    adapted = attach(model, offset_config(lora_config), factors, subtract=False, magnitudes=magnitudes)
    freeze_second_halves(adapted)
    return adapted


def attach(
    model: nn.Module,
    lora_config: LoraConfig,
    initial: Mapping[str, tuple[Tensor, ...]],
    *,
    subtract: bool,
    trained: Mapping[str, tuple[Tensor, ...]] | None = None,
    magnitudes: Mapping[str, Tensor] | None = None,
    packed: Mapping[str, Packed] | None = None,
    ready: bool = False,
) -> PeftModel:
    """Wrap a base model by PEFT and give it ready factors: the step that `adapt` and `load` share.

    Args:
        model: the base; its targets' weights are replaced by residuals where `subtract` is set.
        lora_config: the configuration of adapter "default".
        initial: name of what is adapted -> (A0 (…, r, in), B0 (…, out, r)), for AdaLoRA with E0 (r,) as the third.
        subtract: whether `s·B0·A0` is taken out of the weights and kept as `pissa_init`; else the base stays as it is.
        trained: the factors that "default" gets; None for the initial ones.
        magnitudes: those that it gets where it is a DoRA adapter; None for the norms of the weights' rows.
        packed: quantised residuals that take the weights' place, one for each target or none at all.
        ready: whether the weights are residuals already, as loaded.

    Whatever fails, the model is given back as it was.
    """
    with _undone_on_failure(model):
        return _attach(model, lora_config, initial, subtract, trained, magnitudes, packed, ready)


@contextmanager
def _undone_on_failure(model: nn.Module) -> Iterator[None]:
    """Put modules, parameters and flags back as they were if the block raises; references are kept, no copies."""
    runtime: Any = model
    held = [(m, dict(m._modules), dict(m._parameters), m.training) for m in model.modules()]
    trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    attributes = dict(model.__dict__)
    ties = dict(getattr(model, "all_tied_weights_keys", {}))
    settings = getattr(model, "config", None)
    before = dict(vars(settings)) if isinstance(settings, PreTrainedConfig) else None
    try:
        yield
    except BaseException:
        for name in set(model.__dict__) - set(attributes):
            del model.__dict__[name]
        model.__dict__.update(attributes)
        for module, children, parameters, training in held:
            module._modules.clear()
            module._modules.update(children)
            module._parameters.clear()
            module._parameters.update(parameters)
            module.training = training
        for parameter, flag in trainable:
            parameter.requires_grad_(flag)
        if ties:
            runtime.all_tied_weights_keys.update(ties)
        if before is not None:
            vars(settings).clear()
            vars(settings).update(before)
        raise


def _attach(
    model: nn.Module,
    lora_config: LoraConfig,
    initial: Mapping[str, tuple[Tensor, ...]],
    subtract: bool,
    trained: Mapping[str, tuple[Tensor, ...]] | None,
    magnitudes: Mapping[str, Tensor] | None,
    packed: Mapping[str, Packed] | None,
    ready: bool,
) -> PeftModel:
    shared = _shared_weights(model, list(initial)) if (subtract or packed) and not ready else {}
    ties, tied_before = _declare_untied(model, shared) if shared else ({}, None)
    trainable = frozenset(name for name, parameter in model.named_parameters() if parameter.requires_grad)
    base = getattr(model, "name_or_path", None) or None
    if not ready and (sample := base_sample(model, initial)) is not None:
        set_marks(lora_config, base=sample)
    if packed:
        _quantize_layers(model, packed)
        set_marks(lora_config, residual="int8" if getattr(model, "is_loaded_in_8bit", False) else "nf4")
    with warnings.catch_warnings():
        # PEFT looks for the keys among modules alone, though it finds those of bare parameters as well
        warnings.filterwarnings("ignore", "The following (rank|alpha)_pattern keys did not match", RuntimeWarning)
        adapted = get_peft_model(model, lora_config, adapter_name=TRAINABLE, low_cpu_mem_usage=True)
        if subtract:
            adapted.add_adapter(INITIAL, _initial_config(lora_config), low_cpu_mem_usage=True)
    settle_names(adapted)
    fill_tokens(adapted)
    layers = adapter_layers(adapted)
    if set(layers) != set(initial):
        raise PissaError(f"PEFT adapted other modules than asked for: {sorted(set(layers) ^ set(initial))}")
    for wrapper in (adapted, adapted.base_model):
        wrapper.training = model.training
    for module in adapted.modules():
        if isinstance(module, ModulesToSaveWrapper):
            module.train(module.original_module.training)
    for name, factors in initial.items():
        layer: Any = layers[name]
        layer.train(base_layer(layer).training)
        place = place_at(layer)
        set_factors(layer, TRAINABLE, *(trained or initial)[name], trainable=True)
        if lora_config.use_dora:
            m = magnitudes[name] if magnitudes is not None else row_norms(place.matrices())
            set_magnitude(layer, TRAINABLE, m, trainable=True)
        if subtract:
            set_factors(layer, INITIAL, *factors, trainable=False)
        if subtract and not packed and not ready:
            A0, B0, *E0 = factors
            B0 = B0 * E0[0] if E0 else B0
            place.put(combine_each(place.matrices(), A0, B0, -layer_scale(layer, TRAINABLE)))
    keep_slow_path(adapted)
    adapted.pissa = AdaptationRecord(  # pyright: ignore[reportArgumentType]
        None, {}, shared, ties, tied_before, trainable, quantized=bool(packed), base=base
    )
    guard(adapted)
    return adapted


def _initial_config(lora_config: LoraConfig) -> LoraConfig:
    """The configuration of `pissa_init`: without dropout, and without DoRA, for it is the base's weight as it is."""
    changes: dict[str, Any] = {"lora_dropout": 0.0, "use_dora": False}
    if isinstance(lora_config, AdaLoraConfig):
        changes["inference_mode"] = True  # PEFT allows one trainable AdaLoRA adapter
    return replace(lora_config, **changes)


def _check_live_format(quantization: Quantization, moments: object) -> None:
    """Refuse a quantisation that live layers cannot carry out.

    Raises:
        ConfigError, MissingExtraError: with the way out.
    """
    if quantization.format == "gptq":
        raise ConfigError(
            "no live layer holds GPTQ's format; use format nf4 or int8, or split_weight for single weights"
        )
    if quantization.calibration is not None and moments is None:
        raise ConfigError(
            f"calibration {quantization.calibration!r} says which text to take second moments from; pass them as "
            "moments, or leave calibration out"
        )
    require_bitsandbytes()


def _quantize_layers(model: nn.Module, packed: Mapping[str, Packed]) -> None:
    """Put bitsandbytes' layers with these weights in the place of the model's own."""
    first = next(iter(packed.values()))
    description = bitsandbytes_config(model, packed, first, first.dtype)
    for name, weight in packed.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, quantized_layer(model.get_submodule(name), weight))
    declare_quantized(model, 8 if description.load_in_8bit else 4, description)


def peft_config(model: nn.Module, targets: list[Target], config: PissaConfig) -> LoraConfig:
    """PEFT's configuration for these targets. It says `init_lora_weights=True`, so that no library that copies or
    reloads the adapter decomposes the residual."""
    default_alpha = _lora_alpha(config, config.rank, config.alpha)
    alphas = {target.peft_name: _lora_alpha(config, target.rank, target.alpha) for target in targets}
    keys = pattern_keys([*alphas])
    linear = [t.kind for t in targets if t.kind in (LINEAR, TRANSPOSED)]
    parameters = [t.weight_key for t in targets if t.kind.bare]
    result = LoraConfig(
        r=config.rank,
        lora_alpha=default_alpha,  # pyright: ignore[reportArgumentType] -- PEFT computes with floats as well
        target_modules=peft_targets(model, [t.name for t in targets if not t.kind.bare]),
        target_parameters=parameters or None,
        rank_pattern={keys[t.peft_name]: t.rank for t in targets if t.rank != config.rank},
        alpha_pattern={keys[name]: alpha for name, alpha in alphas.items() if alpha != default_alpha},
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
        lora_dropout=config.dropout,
        fan_in_fan_out=config.quantization is None and set(linear) == {TRANSPOSED},
        modules_to_save=list(config.modules_to_save) or None,
        trainable_token_indices=_token_indices(config),
        init_lora_weights=True,
        task_type=_task_type(model),
    )
    if parameters:
        set_marks(result, **{NESTING: parameters})
    return adalora_config(result, config.orthogonality) if config.use_adalora else result


def _token_indices(config: PissaConfig) -> list[int] | dict[str, list[int]] | None:
    tokens = config.trainable_token_indices
    if isinstance(tokens, Mapping):
        return {module: list(ids) for module, ids in tokens.items()} or None
    return list(tokens) or None


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


def _declare_untied(model: nn.Module, shared: Mapping[str, str]) -> tuple[dict[str, str], bool | None]:
    """Tell transformers that the weights are no longer tied, so that saving keeps both; returns the old ties and
    setting."""
    warnings.warn(
        "untied "
        + ", ".join(f"{name} from {kept}" for name, kept in shared.items())
        + ": the residual gets a weight of its own and the shared one stays as it was (restore ties them again)",
        stacklevel=5,
    )
    known: dict[str, str] = getattr(model, "all_tied_weights_keys", {})
    undone = dict(known)  # one setting ties all there is, and it has to go
    known.clear()
    model_config: Any = getattr(model, "config", None)
    if not hasattr(model_config, "tie_word_embeddings"):
        return undone, None
    before = model_config.tie_word_embeddings
    model_config.tie_word_embeddings = False
    return undone, before
