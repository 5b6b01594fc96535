"""What cannot be adapted, refused by name.

A module of no kind that can be, a shared or computed weight, a rank too large, a weight that is not there: every
offender is gathered, and one error names them all.
"""

from __future__ import annotations

from collections.abc import Mapping

from peft.utils.other import get_pattern_key
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.utils.parametrize import is_parametrized

from ..config import PissaConfig
from ..config.naming import rank_too_large
from ..decompose.components import slots_drawn
from ..errors import ConfigError, TargetError, WeightError, listed
from ..split import STORAGE_DTYPES
from .layers import LINEAR, TRANSPOSED
from .quantized import bits_of
from .runtime import why_not
from .selection import Target as Target


def check_carried(
    model: nn.Module, modules: Mapping[str, nn.Module], targets: list[Target], config: PissaConfig
) -> None:
    """Refuse what PEFT cannot carry, or would compute something else for."""
    wrong = []
    for target in targets:
        reason = why_not(target.module)
        if reason is None and (config.use_dora or config.use_adalora) and target.kind not in (LINEAR, TRANSPOSED):
            reason = f"{'DoRA' if config.use_dora else 'AdaLoRA'} is for linear layers"
        if reason is None and target.kind.bare:
            if target.module is model:
                reason = "PEFT wraps no parameter of the model itself"
            elif config.dropout > 0:
                reason = "PEFT adapts it as a bare parameter, with no dropout inside: set dropout 0"
            elif config.quantization is not None or bits_of(target.module) is not None:
                reason = "PEFT adapts it as a bare parameter, which bitsandbytes' layers do not have"
            elif _owners(modules, target.module._parameters[target.parameter]) > 1:
                reason = "a bare parameter that another module shares"
        if reason is not None:
            wrong.append(f"{target.name} ({type(target.module).__name__}: {reason})")
    if wrong:
        raise TargetError(f"cannot adapt {listed(wrong)}; name them in exclude_modules, or narrow target_modules")
    inner = [t.name for t in targets if isinstance(modules.get(t.name.rpartition(".")[0]), nn.MultiheadAttention)]
    if inner:
        raise TargetError(
            f"cannot adapt {listed(inner)}: nn.MultiheadAttention reads its out_proj's weight without calling it; "
            "name the attention itself, whose in_proj is adapted, or name them in exclude_modules"
        )
    bare, transposed = ([t.name for t in targets if of(t.kind)] for of in (lambda k: k.bare, lambda k: k is TRANSPOSED))
    if bare and transposed:
        raise TargetError(
            f"PEFT cannot adapt bare parameters ({listed(bare)}) beside Conv1D layers ({listed(transposed)}): "
            "leave one or the other out by exclude_modules"
        )


def _owners(modules: Mapping[str, nn.Module], parameter: nn.Parameter | None) -> int:
    return sum(parameter is other for module in modules.values() for other in module._parameters.values())


def check_parametrized(targets: list[Target]) -> None:
    """Refuse layers whose weight is computed anew for each forward, which no residual can replace."""
    computed = [t.name for t in targets if is_parametrized(t.module) or t.module._parameters.get(t.parameter) is None]
    if computed:
        raise TargetError(
            f"cannot adapt {listed(computed)}: the weight is computed by a parametrisation (torch.nn.utils' "
            "parametrize, weight_norm, spectral_norm); remove it first, as with remove_parametrizations or "
            "remove_weight_norm, or name them in exclude_modules"
        )


def check_shared(model: nn.Module, modules: dict[str, nn.Module], names: list[str]) -> None:
    """Refuse a module that goes by several names: PEFT would wrap it under one and leave it bare under the others."""
    if len(modules) == sum(1 for _ in model.named_modules(remove_duplicate=False)):
        return
    known: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        known.setdefault(id(module), []).append(name)
    shared = [" = ".join(known[id(modules[name])]) for name in names if len(known[id(modules[name])]) > 1]
    if shared:
        raise TargetError(
            f"cannot adapt {listed(shared)}: one module under several names; give each name a module of its own "
            "(copy.deepcopy), or name them in exclude_modules"
        )


def check_patterns(names: list[str], config: PissaConfig) -> None:
    """Refuse keys of rank_pattern and alpha_pattern that match no target."""
    unused = [
        f"{field}[{key!r}]"
        for field, pattern in (("rank_pattern", config.rank_pattern), ("alpha_pattern", config.alpha_pattern))
        for key in pattern
        if not any(get_pattern_key([key], name) == key for name in names)
    ]
    if unused:
        raise ConfigError(f"{listed(unused)} matches no target; the targets are {listed(names)}")


def check_quantized(targets: list[Target], config: PissaConfig) -> None:
    """Refuse a base in 4 or 8 bits where its weights would have to change."""
    already = [f"{t.name} ({bits_of(t.module)} bit)" for t in targets if bits_of(t.module) is not None]
    if not already or config.placement == "offset" or (config.starts_at_zero and config.quantization is None):
        return
    remedy = (
        "load the base unquantised"
        if config.quantization is not None
        else 'set placement="offset" (--placement offset), which leaves the base as it is, or load it unquantised'
    )
    raise WeightError(f"cannot split {listed(already)}: already quantised; {remedy}")


def check_shapes(targets: list[Target], config: PissaConfig) -> None:
    """Refuse ranks above the smaller side of a weight, and what a method cannot take from a weight of that size."""
    low = []
    for target in targets:
        shape = target.place.matrix_shape[-2:]
        if 0 < min(shape) < target.rank:
            low.append((target.name, shape, target.rank))
    if low:
        raise ConfigError(rank_too_large(low))
    if config.method == "random-pissa":
        _check_residual_triplets(targets, config.random_fraction)


def _check_residual_triplets(targets: list[Target], fraction: float) -> None:
    """Refuse to draw more triplets beyond the largest than there are."""
    few = []
    for target in targets:
        shape = target.place.matrix_shape[-2:]
        drawn, beyond = slots_drawn(target.rank, fraction), min(shape) - target.rank
        if drawn > max(beyond, 0):
            few.append(f"{target.name} {shape}: {drawn} of {beyond}")
    if few:
        raise ConfigError(
            f"random_fraction {fraction:g} draws more triplets beyond the largest than there are in {listed(few)}; "
            "lower random_fraction, or set rank_pattern for these"
        )


def check_loaded(targets: list[Target]) -> None:
    """Refuse weights that are not whole in fp32, bf16 or fp16: on the meta device, sharded, or of another dtype."""
    unready = []
    for target in targets:
        weight = target.place.weight
        whole = weight.dtype in STORAGE_DTYPES and not weight.is_meta and weight.numel() > 0 and weight.ndim > 1
        whole = whole and not isinstance(weight, DTensor)
        if bits_of(target.module) is None and not whole:
            unready.append(f"{target.name} ({weight.dtype}, {'meta' if weight.is_meta else tuple(weight.shape)})")
    if unready:
        raise WeightError(
            f"cannot split {listed(unready)}: weights must be loaded whole in float32, bfloat16 or float16 "
            "(adapt a model before fully_shard or deepspeed.initialize, or shard what `pissa init` made of it; a base "
            "that is quantised by other means than bitsandbytes cannot be split)"
        )


def check_rows(targets: list[Target]) -> None:
    """Refuse rows of zeros, which DoRA would divide by, and weights whose norms PEFT cannot take."""
    eight = [t.name for t in targets if bits_of(t.module) == 8]
    if eight:
        raise WeightError(
            f"PEFT has no DoRA of 8-bit layers ({listed(eight)}); load the base in 4 bits, or unquantised"
        )
    empty = [t.name for t in targets if not bool(t.place.matrices().any(dim=-1).all())]
    if empty:
        raise WeightError(
            f"DoRA divides each output's weights by their norm, and some are zero in {listed(empty)}: name these in "
            "exclude_modules, or train without use_dora"
        )
