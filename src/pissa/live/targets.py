"""Which modules are adapted, and with which rank and alpha each.

Nothing is skipped silently: a name that matches nothing, a module of a kind that cannot be adapted, a rank that a
weight is too small for, a weight that is not finite: every offender is gathered and one error names them all.
"""

from __future__ import annotations

import math
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import get_pattern_key
from torch import nn

from ..config import PissaConfig
from ..decompose.scale import magnitude
from ..errors import TargetError, WeightError, listed
from .factors import WRAPPED, Layout
from .layers import CONVOLUTION
from .quantized import bits_of, check_quantizable
from .reads import read_elsewhere
from .runtime import holes
from .selection import Target as Target
from .selection import select_weights
from .target_checks import (
    check_carried,
    check_loaded,
    check_parametrized,
    check_patterns,
    check_quantized,
    check_rows,
    check_shapes,
    check_shared,
)
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
    check_carried(model, modules, found, config)
    check_parametrized(found)
    check_shared(model, modules, list(dict.fromkeys(target.module_name for target in found)))
    targets = [_with_rank(target, config) for target in found]
    check_patterns([target.name for target in targets], config)
    check_quantized(targets, config)
    if loaded:
        check_loaded(targets)
    check_shapes(targets, config)
    if loaded:
        targets = _looked_through(targets)
    if loaded and config.use_dora:
        check_rows(targets)
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
