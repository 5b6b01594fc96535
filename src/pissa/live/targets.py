"""Which modules are adapted, and with which rank and alpha each.

Nothing is skipped silently: a name that matches nothing, a module of a kind that cannot be adapted, a rank that a
weight is too small for, a weight that is not finite: every offender is gathered and one error names them all.
"""

from __future__ import annotations

import difflib
import math
import re
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import get_pattern_key
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from ..config import PissaConfig
from ..decompose.scale import magnitude
from ..errors import ConfigError, TargetError, WeightError
from ..split import STORAGE_DTYPES
from .layers import is_linear, matrix_shape, weight_matrix
from .quantized import bits_of, check_quantizable

CLASSIFICATION_HEADS = ("classifier", "score")


@dataclass(frozen=True)
class Target:
    """One module that gets an adapter."""

    name: str
    """Its full name in the model."""
    module: nn.Module
    rank: int
    alpha: float | None
    """None: scale 1."""


def resolve_targets(model: nn.Module, config: PissaConfig, *, loaded: bool = True) -> list[Target]:
    """Find the modules that the configuration asks for and check that each can be adapted.

    Args:
        model: a model without adapters.
        config: target_modules, exclude_modules, ranks and alphas.
        loaded: whether the weights are there; those on the meta device are checked for their shapes alone.

    Returns:
        The targets in the model's order, at least one.

    Raises:
        TargetError: nothing matches, or something that matches cannot be adapted: it is no linear layer, its weight is
            computed by a parametrisation, or it goes by several names.
        ConfigError: a rank above the smaller side of a target, or a pattern that matches no target.
        WeightError: a target's weight is quantised (outside placement "offset"), not loaded, or holds NaN or Inf.
    """
    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise TargetError(
            "the model already carries adapters, and its weights may be residuals: call pissa.restore (or PEFT's "
            "unload) first, or load the base again"
        )
    modules = dict(model.named_modules())
    names = _select(model, modules, config)
    unsupported = [f"{name} ({type(modules[name]).__name__})" for name in names if not is_linear(modules[name])]
    attention = [name for name in names if isinstance(modules.get(name.rpartition(".")[0]), nn.MultiheadAttention)]
    if unsupported or attention:
        raise TargetError(
            f"cannot adapt {_listed([*unsupported, *attention])}: only nn.Linear and Conv1D layers that are called as "
            "modules can be; name them in exclude_modules, or narrow target_modules"
        )
    _check_parametrized(modules, names)
    _check_shared(model, modules, names)
    targets = [_with_rank(name, modules[name], config) for name in names]
    _check_patterns(names, config)
    _check_quantized(targets, config)
    _check_weights(targets, loaded)
    if config.quantization is not None:
        bits = 8 if config.quantization.format == "int8" else 4
        check_quantizable(model, {t.name: t.module for t in targets}, bits, config.quantization.block_size)
    return targets


def _check_parametrized(modules: dict[str, nn.Module], names: list[str]) -> None:
    """Refuse layers whose weight is computed anew for each forward, which no residual can replace."""
    computed = [name for name in names if is_parametrized(modules[name]) or _has_old_hook(modules[name])]
    if computed:
        raise TargetError(
            f"cannot adapt {_listed(computed)}: the weight is computed by a parametrisation (torch.nn.utils' "
            "parametrize, weight_norm, spectral_norm); remove it first, as with remove_parametrizations or "
            "remove_weight_norm, or name them in exclude_modules"
        )


def _has_old_hook(module: nn.Module) -> bool:
    """Whether the weight is set by a hook of the older `torch.nn.utils.weight_norm` kind, and so is no parameter."""
    return module._parameters.get("weight") is None


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
            f"cannot adapt {_listed(shared)}: one module under several names; give each name a module of its own "
            "(copy.deepcopy), or name them in exclude_modules"
        )


def matches(name: str, patterns: str | Iterable[str]) -> bool:
    """Whether a module's name is meant: a string is one regular expression for whole names, a list holds names or
    name endings."""
    if isinstance(patterns, str):
        return re.fullmatch(patterns, name) is not None
    return any(name == pattern or name.endswith(f".{pattern}") for pattern in patterns)


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


def _select(model: nn.Module, modules: dict[str, nn.Module], config: PissaConfig) -> list[str]:
    saved = _saved_in_full(modules, config.modules_to_save)
    if config.exclude_modules:
        _check_all_matched([*modules], modules, config.exclude_modules, "exclude_modules: ")
    if config.target_modules == "all-linear":
        heads = _output_heads(model, modules)
        chosen = [name for name, module in modules.items() if is_linear(module) and name not in heads]
        chosen = [name for name in chosen if not _lies_in(name, saved)]
        _warn_of_experts(modules, config, saved)
    else:
        chosen = [name for name in modules if name and matches(name, config.target_modules)]
        _check_all_matched(chosen, modules, config.target_modules)
    left = [name for name in chosen if not (config.exclude_modules and matches(name, config.exclude_modules))]
    both = [name for name in left if _lies_in(name, saved)]
    if both:
        raise TargetError(
            f"{_listed(both)}: target and modules_to_save at once; take them from one of the two, or exclude_modules"
        )
    if not left:
        raise TargetError(
            f"no module matches target_modules={config.target_modules!r}"
            + (f" once exclude_modules={config.exclude_modules!r} is taken away" if chosen else "")
            + f"; the model's linear layers end in: {', '.join(_linear_endings(modules)) or 'it has none'}"
        )
    return left


def _warn_of_experts(modules: dict[str, nn.Module], config: PissaConfig, saved: set[str]) -> None:
    """Say which expert matrices "all-linear" leaves out: transformers fuses those of a layer into one 3-D parameter."""
    fused = [
        f"{name}.{key}"
        for name, module in modules.items()
        if not (config.exclude_modules and matches(name, config.exclude_modules)) and not _lies_in(name, saved)
        for key, parameter in module._parameters.items()
        if parameter is not None and parameter.ndim == 3 and _inside(name, "experts")
    ]
    if fused:
        warnings.warn(
            f'target_modules="all-linear" gives no adapter to {_listed(fused, 20)}: experts fused into one 3-D '
            "parameter are no linear layers, and are left frozen as they are; name their modules in exclude_modules "
            "to say that this is meant",
            stacklevel=5,
        )


def _output_heads(model: nn.Module, modules: dict[str, nn.Module]) -> set[str]:
    """The output projection of a language model, or the head of a classifier: "all-linear" leaves them alone."""
    get_output = getattr(model, "get_output_embeddings", None)
    head = get_output() if callable(get_output) else None
    heads = {name for name, module in modules.items() if head is not None and module is head}
    if not heads:
        heads = {name for name in modules if any(_inside(name, head) for head in CLASSIFICATION_HEADS)}
    return heads


def _saved_in_full(modules: dict[str, nn.Module], wanted: Sequence[str]) -> set[str]:
    """The modules that PEFT takes for `modules_to_save`: all whose name ends in one of these strings."""
    missing = [key for key in wanted if not any(name.endswith(key) for name in modules if name)]
    if missing:
        endings = {name.rpartition(".")[2] for name in modules if name}
        close = [c for key in missing for c in difflib.get_close_matches(key.rpartition(".")[2], endings, n=3)]
        raise TargetError(
            f"modules_to_save: no module's name ends in {_listed([repr(key) for key in missing])}; "
            f"closest names: {', '.join(dict.fromkeys(close)) or 'none'}"
        )
    return {name for name in modules if name and any(name.endswith(key) for key in wanted)}


def _lies_in(name: str, ancestors: set[str]) -> bool:
    return any(name == ancestor or name.startswith(f"{ancestor}.") for ancestor in ancestors)


def _inside(name: str, ancestor: str) -> bool:
    return f".{ancestor}." in f".{name}."


def _check_all_matched(
    chosen: list[str], modules: dict[str, nn.Module], patterns: str | Sequence[str], where: str = ""
) -> None:
    wanted = [patterns] if isinstance(patterns, str) else list(patterns)
    missing = [p for p in wanted if not any(matches(name, p if isinstance(patterns, str) else [p]) for name in chosen)]
    if missing:
        endings = _linear_endings(modules)
        close = [c for p in missing for c in difflib.get_close_matches(p.rpartition(".")[2], endings, n=3, cutoff=0.4)]
        raise TargetError(
            f"{where}no module matches {_listed([repr(p) for p in missing])}; closest names: "
            f"{', '.join(dict.fromkeys(close)) or ', '.join(endings) or 'none, the model has no linear layer'}"
        )


def _linear_endings(modules: dict[str, nn.Module]) -> list[str]:
    return sorted({name.rpartition(".")[2] for name, module in modules.items() if name and is_linear(module)})


def _with_rank(name: str, module: nn.Module, config: PissaConfig) -> Target:
    rank = config.rank_pattern.get(get_pattern_key(list(config.rank_pattern), name), config.rank)
    alpha = config.alpha_pattern.get(get_pattern_key(list(config.alpha_pattern), name), config.alpha)
    return Target(name, module, rank, alpha)


def _check_patterns(names: list[str], config: PissaConfig) -> None:
    unused = [
        f"{field}[{key!r}]"
        for field, pattern in (("rank_pattern", config.rank_pattern), ("alpha_pattern", config.alpha_pattern))
        for key in pattern
        if not any(get_pattern_key([key], name) == key for name in names)
    ]
    if unused:
        raise ConfigError(f"{_listed(unused)} matches no target; the targets are {_listed(names)}")


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
    raise WeightError(f"cannot split {_listed(already)}: already quantised; {remedy}")


def _check_weights(targets: list[Target], loaded: bool) -> None:
    unready, low, bad = [], [], []
    for target in targets:
        if bits_of(target.module) is not None:
            # bitsandbytes holds finite values only, and takes time to show them
            if target.rank > min(matrix_shape(target.module)):
                shape = matrix_shape(target.module)
                low.append(f"{target.name} {shape}: {target.rank} > {min(shape)}")
            continue
        weight = weight_matrix(target.module)
        absent = weight.is_meta and loaded
        if weight.dtype not in STORAGE_DTYPES or absent or weight.numel() == 0 or weight.ndim != 2:
            unready.append(f"{target.name} ({weight.dtype}, {'meta' if weight.is_meta else tuple(weight.shape)})")
        elif target.rank > min(weight.shape):
            low.append(f"{target.name} {tuple(weight.shape)}: {target.rank} > {min(weight.shape)}")
        elif loaded and not math.isfinite(magnitude(weight)):
            bad.append(target.name)
    if unready:
        raise WeightError(
            f"cannot split {_listed(unready)}: weights must be loaded whole in float32, bfloat16 or float16 "
            "(a base that is sharded, or quantised by other means than bitsandbytes, cannot be split)"
        )
    if low:
        raise ConfigError(f"rank exceeds the smaller side of {_listed(low)}; lower rank, or set rank_pattern for these")
    if bad:
        raise WeightError(f"NaN or Inf in the weight of {_listed(bad)}: repair or reload the checkpoint")


def _listed(items: Sequence[str], most: int = 300) -> str:
    """All the items in one line; a very long list is cut with the count of the rest."""
    rest = len(items) - most
    return ", ".join(items[:most]) + (f" and {rest} more" if rest > 0 else "")
