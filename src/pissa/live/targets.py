"""Which modules are adapted, and with which rank and alpha each.

Nothing is skipped silently: a name that matches nothing, a module of a kind that cannot be adapted, a rank that a
weight is too small for, a weight that is not finite: every offender is gathered and one error names them all.
"""

from __future__ import annotations

import math
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import get_pattern_key
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.utils.parametrize import is_parametrized

from ..config import PissaConfig
from ..decompose.components import slots_drawn
from ..decompose.scale import magnitude
from ..errors import ConfigError, TargetError, WeightError
from ..split import STORAGE_DTYPES
from .factors import WRAPPED, Layout
from .layers import CONVOLUTION, LINEAR, TRANSPOSED
from .quantized import bits_of, check_quantizable
from .reads import read_elsewhere
from .runtime import holes, why_not
from .selection import Target as Target
from .selection import listed, select_weights
from .trial import forbidden_by_peft


def resolve_targets(model: nn.Module, config: PissaConfig, *, loaded: bool = True) -> list[Target]:
    """Find the weights that the configuration asks for and check that each can be adapted.

    Args:
        model: a model without adapters.
        config: target_modules, exclude_modules, ranks and alphas.
        loaded: whether the weights are there; those on the meta device are checked for their shapes alone.

    Returns:
        The targets in the model's order, at least one.

    Raises:
        TargetError: nothing matches, or something that matches cannot be adapted: it is of no kind that can be, PEFT's
            layer for it would compute something else, its weight is computed by a parametrisation, or it goes by
            several names.
        ConfigError: a rank above the smaller side of a target, or a pattern that matches no target.
        WeightError: a target's weight is quantised (outside placement "offset"), not loaded, or holds NaN or Inf.
    """
    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise TargetError(
            "the model already carries adapters, and its weights may be residuals: call pissa.restore (or PEFT's "
            "unload) first, or load the base again"
        )
    modules = dict(model.named_modules())
    found = _called_ones(model, select_weights(model, modules, config), config)
    _check_carried(model, modules, found, config)
    _check_parametrized(found)
    _check_shared(model, modules, list(dict.fromkeys(target.module_name for target in found)))
    targets = [_with_rank(target, config) for target in found]
    _check_patterns([target.name for target in targets], config)
    _check_quantized(targets, config)
    if loaded:
        _check_loaded(targets)
    _check_shapes(targets, config)
    if loaded:
        targets = _looked_through(targets)
    if loaded and config.use_dora:
        _check_rows(targets)
    if config.quantization is not None:
        check_quantizable(model, {t.name: t.module for t in targets}, config.quantization)
    return targets


def layouts_of(targets: Sequence[Target]) -> dict[str, Layout]:
    """How PEFT will store each target's adapter, by name; no live layers are needed.

    Args:
        targets: in the model's order.
    """
    around = Counter(target.module_name for target in targets)
    layouts = {}
    for target in targets:
        around[target.module_name] -= 1  # the last parameter of a module is wrapped last, and so outermost
        place, path = target.place, target.module_name + WRAPPED * around[target.module_name]
        dilation = holes(place.module) if place.kind is CONVOLUTION else ()
        layouts[target.name] = Layout(path, place.kind, place.shape, dilation)
    return layouts


def _called_ones(model: nn.Module, targets: list[Target], config: PissaConfig) -> list[Target]:
    """Only targets whose adapter would do something: whose layer is called wherever its weight is used.

    What "all-linear" finds beside these is left out with a warning; what is named is refused.
    """
    wrong = {name: f"{name} (read by {where} without a call)" for name, where in read_elsewhere(model, targets).items()}
    forbidden = forbidden_by_peft(model, [t.name for t in targets if not t.kind.bare])
    wrong |= {name: f"{name} ({reason})" for name, reason in forbidden.items()}
    if not wrong:
        return targets
    what = f"{listed([*wrong.values()])}: an adapter there would be passed by"
    left = [target for target in targets if target.name not in wrong]
    endings = ", ".join(sorted({name.rpartition(".")[2] for name in wrong}))
    if config.target_modules != "all-linear" or not left:
        raise TargetError(f"cannot adapt {what}; name {endings} in exclude_modules, or narrow target_modules")
    warnings.warn(f"not adapted: {what} (exclude_modules with {endings} silences this)", stacklevel=4)
    return left


def _check_carried(
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


def _check_parametrized(targets: list[Target]) -> None:
    """Refuse layers whose weight is computed anew for each forward, which no residual can replace."""
    computed = [t.name for t in targets if is_parametrized(t.module) or t.module._parameters.get(t.parameter) is None]
    if computed:
        raise TargetError(
            f"cannot adapt {listed(computed)}: the weight is computed by a parametrisation (torch.nn.utils' "
            "parametrize, weight_norm, spectral_norm); remove it first, as with remove_parametrizations or "
            "remove_weight_norm, or name them in exclude_modules"
        )


def _check_shared(model: nn.Module, modules: dict[str, nn.Module], names: list[str]) -> None:
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


def peft_targets(model: nn.Module, names: list[str]) -> list[str] | str:
    """`target_modules` by which PEFT finds these modules and no others: their names, or, where another module's name
    ends in one of them, a regular expression."""
    wanted = set(names)
    others = (name for name, _ in model.named_modules() if name not in wanted)
    if any(ending in wanted for name in others for ending in _proper_endings(name)):
        return "|".join(re.escape(name) for name in names)
    return names


def pattern_keys(names: Iterable[str]) -> dict[str, str]:
    """Target -> the key of `rank_pattern` and `alpha_pattern` by which PEFT finds this target and no other."""
    names = list(names)
    endings = {ending for name in names for ending in _proper_endings(name)}
    return {name: f"^{name}" if name in endings else name for name in names}


def _proper_endings(name: str) -> Iterable[str]:
    while "." in name:
        name = name.partition(".")[2]
        yield name


def _with_rank(target: Target, config: PissaConfig) -> Target:
    name = target.name
    rank = config.rank_pattern.get(get_pattern_key(list(config.rank_pattern), name), config.rank)
    alpha = config.alpha_pattern.get(get_pattern_key(list(config.alpha_pattern), name), config.alpha)
    if config.rank_budget is not None:
        rank = max(1, min(rank, *target.place.matrix_shape[-2:]))
    return replace(target, rank=rank, alpha=alpha)


def _check_patterns(names: list[str], config: PissaConfig) -> None:
    unused = [
        f"{field}[{key!r}]"
        for field, pattern in (("rank_pattern", config.rank_pattern), ("alpha_pattern", config.alpha_pattern))
        for key in pattern
        if not any(get_pattern_key([key], name) == key for name in names)
    ]
    if unused:
        raise ConfigError(f"{listed(unused)} matches no target; the targets are {listed(names)}")


def _check_quantized(targets: list[Target], config: PissaConfig) -> None:
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


def _check_shapes(targets: list[Target], config: PissaConfig) -> None:
    low = []
    for target in targets:
        shape = target.place.matrix_shape[-2:]
        if 0 < min(shape) < target.rank:
            low.append(f"{target.name} {shape}: {target.rank} > {min(shape)}")
    if low:
        raise ConfigError(f"rank exceeds the smaller side of {listed(low)}; lower rank, or set rank_pattern for these")
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


def _check_loaded(targets: list[Target]) -> None:
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


def _looked_through(targets: list[Target]) -> list[Target]:
    """The targets with the largest magnitude of each matrix; NaN and Inf are refused."""
    found, bad = [], []
    for target in targets:
        # bitsandbytes holds finite values only, and takes time to show them
        if bits_of(target.module) is None:
            matrices = target.place.matrices()
            each = tuple(magnitude(W) for W in (matrices if matrices.ndim == 3 else matrices[None]))
            target = replace(target, largest=each)
            bad += [] if all(map(math.isfinite, each)) else [target.name]
        found.append(target)
    if bad:
        raise WeightError(f"NaN or Inf in the weight of {listed(bad)}: repair or reload the checkpoint")
    return found


def _check_rows(targets: list[Target]) -> None:
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
