"""Which weights a configuration names: the candidates of a model, and those of them that are meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import nn
from transformers.models.auto import modeling_auto

from ..config import PissaConfig
from ..config.naming import matches, nothing_matches
from ..decompose.svd import TruncatedSVD
from ..errors import TargetError, listed
from .conversion import is_rewritten
from .layers import ATTENTION, LINEAR, PARAMETER, Kind, Place, is_linear, kind_of, kind_of_parameter

EXPERTS_NAME = "experts"
"""What transformers calls the module that holds a layer's experts."""
CLASSIFICATION_HEADS = ("classifier", "score")


@dataclass(frozen=True)
class Target:
    """One weight that gets an adapter."""

    name: str
    """The full name of its module in the model; of a bare parameter, unless that is called "weight", its own."""
    module: nn.Module
    """That holds the weight."""
    kind: Kind
    parameter: str
    """The weight's name in the module."""
    rank: int = 0
    alpha: float | None = None
    """None: scale 1."""
    largest: tuple[float, ...] | None = None
    """The largest magnitude in each of its matrices, once they have been looked through for NaN and Inf."""
    svds: tuple[TruncatedSVD, ...] | None = None
    """Of each of its matrices (with a quantisation, of what the format leaves over), where a budget has needed them."""

    @property
    def place(self) -> Place:
        """Where the weight lies."""
        return Place(self.module, self.kind, self.parameter)

    @property
    def is_stack(self) -> bool:
        """Whether the weight is a stack of matrices, one for each expert."""
        return len(self.place.shape) == 3 and self.kind.bare

    @property
    def module_name(self) -> str:
        """The full name of the module that holds the weight."""
        return self.name.rpartition(".")[0] if self.is_named_parameter else self.name

    @property
    def weight_key(self) -> str:
        """The weight's name in the model's state dict."""
        return self.place.key(self.name)

    @property
    def peft_name(self) -> str:
        """What PEFT matches patterns with."""
        return self.weight_key if self.kind.bare else self.name

    @property
    def is_named_parameter(self) -> bool:
        """Whether the name is the parameter's, not the module's."""
        return self.kind.bare and self.parameter != "weight"


def select_weights(model: nn.Module, modules: dict[str, nn.Module], config: PissaConfig) -> list[Target]:
    """The weights that a configuration asks for, in the model's order, without ranks.

    Raises:
        TargetError: a name that matches nothing, or what matches is of no kind that can be adapted.
    """
    saved = _saved_in_full(modules, config.modules_to_save)
    candidates = _candidates(modules)
    names = dict.fromkeys([*modules, *candidates])
    if config.exclude_modules:
        _check_all_matched([*names], modules, config.exclude_modules, "exclude_modules")
    if config.target_modules == "all-linear":
        chosen = [name for name in _all_linear(model, modules, candidates) if not _lies_in(name, saved)]
    else:
        chosen = [name for name in names if name and matches(name, config.target_modules)]
        _check_all_matched(chosen, modules, config.target_modules)
    found = _expanded(chosen, modules, candidates)
    left = [t for t in found if not (config.exclude_modules and _excluded(t, config.exclude_modules))]
    unsupported = [f"{t.name} ({type(t.module).__name__})" for t in left if t.name not in candidates]
    if unsupported:
        raise TargetError(
            f"cannot adapt {listed(unsupported)}: only linear layers, Conv1D, embeddings, convolutions, "
            "nn.MultiheadAttention and parameters of 2 or 3 dimensions can be; name them in exclude_modules, or narrow "
            "target_modules"
        )
    both = [target.name for target in left if _lies_in(target.name, saved)]
    if both:
        raise TargetError(
            f"{listed(both)}: target and modules_to_save at once; take them from one of the two, or exclude_modules"
        )
    left = [replace(t, kind=PARAMETER) if t.kind is LINEAR and is_rewritten(model, t.name) else t for t in left]
    if not left:
        raise TargetError(
            f"no module matches target_modules={config.target_modules!r}"
            + (f" once exclude_modules={config.exclude_modules!r} is taken away" if chosen else "")
            + f"; the model's linear layers end in: {', '.join(_linear_endings(modules)) or 'it has none'}"
        )
    return left


def _expanded(chosen: list[str], modules: Mapping[str, nn.Module], candidates: Mapping[str, Target]) -> list[Target]:
    """The targets of these names: a module without a kind of its own stands for its parameters of three dimensions."""
    found: dict[str, Target] = {}
    for name in chosen:
        if name in candidates:
            found[name] = candidates[name]
            continue
        inside = [t for t in candidates.values() if t.module_name == name and t.place.weight.ndim == 3]
        for target in inside or [Target(name, modules[name], LINEAR, "weight")]:
            found[target.name] = target
    return list(found.values())


def _excluded(target: Target, patterns: str | Iterable[str]) -> bool:
    return matches(target.name, patterns) or matches(target.module_name, patterns)


def _all_linear(model: nn.Module, modules: dict[str, nn.Module], candidates: Mapping[str, Target]) -> Iterable[str]:
    """Linear layers, attentions and fused experts; not the output head, and not what chooses among experts."""
    heads = _output_heads(model, modules)
    for name, target in candidates.items():
        parent = name.rpartition(".")[0]
        if target.kind.bare:
            if target.is_stack and _inside(target.module_name, EXPERTS_NAME):
                yield name
        elif target.kind is ATTENTION or (
            is_linear(target.module)
            and name not in heads
            and not isinstance(modules.get(parent), nn.MultiheadAttention)
            and not _chooses(target, modules.get(f"{parent}.{EXPERTS_NAME}".removeprefix(".")))
        ):
            yield name


def _chooses(target: Target, experts: nn.Module | None) -> bool:
    """Whether a linear layer beside experts is their router: one output for each, or one for a shared expert."""
    if experts is None:
        return False
    stacks = [p.shape[0] for p in experts._parameters.values() if p is not None and p.ndim == 3]
    count = stacks[0] if stacks else len(experts._modules)
    return target.place.matrix_shape[0] in (1, count)


def _output_heads(model: nn.Module, modules: dict[str, nn.Module]) -> set[str]:
    """The output projection of a language model, or the head of a classifier: "all-linear" leaves them alone."""
    get_output = getattr(model, "get_output_embeddings", None)
    head = get_output() if callable(get_output) else None
    heads = {name for name, module in modules.items() if head is not None and module is head}
    if not heads:
        heads = {name for name in modules if any(_inside(name, head) for head in CLASSIFICATION_HEADS)}
    # PEFT trains in full what ends so in a classifier, DistilBERT's pre_classifier too
    whole = {name for name in modules if name.endswith(CLASSIFICATION_HEADS)} if _is_classifier(model) else set()
    return heads | {name for name in modules if _lies_in(name, whole)}


def _is_classifier(model: nn.Module) -> bool:
    return task_type(model) in ("SEQ_CLS", "TOKEN_CLS")


def task_type(model: nn.Module) -> str | None:
    """PEFT's name of what a model of this class is for; None where it has none."""
    name = type(model).__name__
    tables = (
        ("CAUSAL_LM", modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
        ("SEQ_2_SEQ_LM", modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES),
        ("SEQ_CLS", modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES),
        ("TOKEN_CLS", modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES),
    )
    return next((task for task, table in tables if name in table.values()), None)


def _saved_in_full(modules: dict[str, nn.Module], wanted: Sequence[str]) -> set[str]:
    """The modules that PEFT takes for `modules_to_save`: all whose name ends in one of these strings."""
    missing = [key for key in wanted if not any(name.endswith(key) for name in modules if name)]
    if missing:
        endings = {name.rpartition(".")[2] for name in modules if name}
        close = [c for key in missing for c in difflib.get_close_matches(key.rpartition(".")[2], endings, n=3)]
        raise TargetError(
            f"modules_to_save: no module's name ends in {listed([repr(key) for key in missing])}; "
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
        raise TargetError(nothing_matches(missing, _linear_endings(modules), where))


def _linear_endings(modules: dict[str, nn.Module]) -> list[str]:
    return sorted({name.rpartition(".")[2] for name, module in modules.items() if name and is_linear(module)})


def _candidates(modules: Mapping[str, nn.Module]) -> dict[str, Target]:
    """All weights of a model that could be adapted, by name, in its order."""
    found = {}
    for name, module in modules.items():
        kind = kind_of(module)
        if kind is not None:
            found[name] = Target(name, module, kind, kind.parameter)
            continue
        for key, parameter in module._parameters.items():
            kind = kind_of_parameter(module, parameter.shape) if parameter is not None else None
            if kind is not None and parameter is not None and parameter.is_floating_point():
                own = ".".join(part for part in (name, "" if key == "weight" else key) if part)
                found[own] = Target(own, module, kind, key)
    return found
