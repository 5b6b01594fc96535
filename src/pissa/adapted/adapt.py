"""`adapt`: a live model becomes a frozen residual with a trainable adapter.

Every target is split first, which changes nothing; only when all splits are there is the model wrapped by PEFT and its
weights replaced by residuals (with a quantisation, its layers by bitsandbytes' with ready codes). The trainable adapter
is called `default`. Its state at step 0 stays on the model as the frozen, inactive adapter `pissa_init`: residual +
`pissa_init` is the base, so the reference and the export are always at hand, and nothing is ever decomposed again.
In placement "offset" the weights stay, and one adapter holds both (`offset.py`).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from ..calibrate.moments import Moment, second_moments
from ..config import PissaConfig, Quantization
from ..decompose.adalora import orthonormal_factors, random_factors
from ..decompose.certificate import Certificate, worst
from ..errors import ConfigError, listed
from ..live.attach import attach, attach_offset
from ..live.budget import with_planned_ranks
from ..live.peft_config import peft_config
from ..live.quantized import keep_unpacked, require_bitsandbytes
from ..live.record import Record
from ..live.runtime import warn_of_peft
from ..live.splits import scored_splits, splits_of
from ..live.targets import resolve_targets
from ..live.tokens import check_tokens
from ..live.trial import check_by_peft
from ..quantize.formats import Packed
from ..split import derive_seed
from ..stages import stage
from .guards import guard

Progress = Callable[[str, int, int], None]


@stage("splitting weights")
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
        batches: keyword arguments of the model's forward, from the data that it is to learn: what a quantisation is
            fitted to, by the second moments taken on them, and, with labels, what component "scored" chooses by.
        progress: called with (module name, how many are done, how many there are) after each split.

    Returns:
        A PeftModel: adapter "default" trainable and active, everything else frozen; the same function as the model
        given, up to the rounding stated in `model.pissa.certificates`.

    Raises:
        TargetError, ConfigError, WeightError: a target, a rank or a token that does not fit the model, or a weight that
            cannot be decomposed, each by name; the model is then unchanged.
        DataError: a target without a moment where others have one.
        MissingExtraError: a quantisation without bitsandbytes.

    Example:
        >>> from transformers import AutoModelForCausalLM
        >>> from pissa import PissaConfig, adapt
        >>> model = adapt(AutoModelForCausalLM.from_pretrained("base"), PissaConfig(rank=8))
        >>> sorted(model.peft_config)  # "pissa_init" is the adapter as it starts, kept for ever
        ['default', 'pissa_init']

    Source: paper, section 3.
    """
    _check_data(config, moments, batches)
    if config.quantization is not None:
        _check_live_format(config.quantization)
    keep_unpacked(model)
    targets = resolve_targets(model, config)
    check_tokens(model, config.trainable_token_indices, [target.name for target in targets])
    if batches is not None and config.quantization is not None:
        moments = second_moments(model, batches, [target.name for target in targets])
        if config.rank_budget is not None:  # which looks at all of them before the first split
            moments = {name: moment.matrix for moment in moments for name in moment.names}
    if config.rank_budget is not None:
        targets = with_planned_ranks(targets, config, moments)
        moments = moments if config.quantization is not None else None
    lora_config = peft_config(model, targets, config)
    check_by_peft(model, lora_config)
    warn_of_peft(model, {target.name: target.kind for target in targets}, config.dropout)
    factors: dict[str, tuple[Tensor, ...]] = {}
    certificates: dict[str, Certificate] = {}
    packed: dict[str, Packed] = {}
    if batches is not None and config.needs_gradient:
        found = scored_splits(model, targets, config, batches)
    else:
        found = splits_of(targets, config, moments)
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
    record = Record(config, certificates, config.title, config.quantization)
    attach_placed = attach_offset if config.placement == "offset" and not config.starts_at_zero else attach
    adapted = attach_placed(model, lora_config, factors, record, subtract=not config.starts_at_zero, packed=packed)
    guard(adapted)
    return adapted


def _warn_of_dead(factors: Mapping[str, tuple[Tensor, ...]]) -> None:
    """Say where both factors are zero: then so are both gradients, for ever."""
    dead = [name for name, (A, B, *_) in factors.items() if not bool((A.any(-1).any(-1) | B.any(-1).any(-1)).all())]
    if dead:
        warnings.warn(
            f"{listed(dead)}: the weight is zero, so its adapter starts at zero and cannot learn; give it a "
            "method that starts at random factors, such as lora-kaiming, or leave it out by exclude_modules",
            stacklevel=3,
        )


def _check_data(config: PissaConfig, moments: object, batches: object) -> None:
    """Refuse data that nothing would use, and settings that need data where there is none.

    Raises:
        ConfigError: with the way out.
    """
    quantization = config.quantization
    if config.needs_gradient and batches is None:
        raise ConfigError(
            'component "scored" chooses by your data: pass batches with labels, as the model\'s forward takes them'
        )
    if batches is not None and quantization is None and not config.needs_gradient:
        raise ConfigError('batches are for a quantisation and for component "scored"; leave them out')
    if batches is not None and moments is not None:
        raise ConfigError("moments and batches both say what the layers see; pass one of them")
    if quantization is None:
        return
    if batches is not None and not quantization.is_fitted:
        raise ConfigError("rounding to the nearest value fits nothing to data; leave batches out")
    if quantization.calibration is not None and moments is None and batches is None:
        raise ConfigError(
            f"calibration {quantization.calibration!r} says which text to fit to; pass it as batches, or the second "
            "moments that were taken on it as moments, or leave calibration out"
        )


def _check_live_format(quantization: Quantization) -> None:
    """Refuse a quantisation that live layers cannot carry out.

    Raises:
        ConfigError, MissingExtraError: with the way out.
    """
    if quantization.format == "nvfp4":
        raise ConfigError("no live layer holds NVFP4; use format nf4, int8 or gptq, or split_weight for single weights")
    if quantization.format != "gptq":
        require_bitsandbytes()
