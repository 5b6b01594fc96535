"""Weights that a model's code reads without calling their layer, found in its source.

    F.linear(x, self.q_proj.weight)        self.dt_proj.weight @ steps        torch.cat([self.decoder.weight.t(), …])

An adapter lives in its layer's forward. Code that takes the layer's weight instead computes with the residual alone,
and the adapter never gets a gradient; PEFT alone is wrong there as well. So such weights are no targets.

Only what can be said for certain is said: reads of the weight's dtype, device or shape do not count, nor code for
initialising or saving, nor branches that this model's own settings rule out. What no source shows (a loop over layers,
getattr) is refused when it happens, see `guarded.py`.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from types import FunctionType
from typing import Any

from torch import nn

from .selection import Target

LIBRARIES = ("torch", "peft", "builtins", "abc", "typing", "accelerate", "bitsandbytes")
"""Packages whose classes read only their own weights, or whose reads are dealt with elsewhere (`runtime.py`)."""
METADATA = {
    *("dtype", "device", "shape", "ndim", "is_meta", "requires_grad", "layout", "itemsize", "is_cuda", "size", "dim"),
    *("numel", "element_size", "is_floating_point", "names", "quant_state"),
}
"""What may be asked of a weight that is not its values."""
LIKE = frozenset({"to", "type_as"})
"""Methods that take another tensor for its dtype and device alone."""
NOT_FORWARD = ("__init__", "init", "_init", "reset", "resize", "load", "save", "from_", "tie", "_tie", "prune", "post_")
"""Beginnings of the names of methods that are not part of a forward."""
UNKNOWN = object()


@dataclass(frozen=True)
class Read:
    """One place in a class's source that takes a parameter of some module."""

    where: str
    """CLASS.METHOD, for messages."""
    of_self: bool
    """Whether the path begins at the module itself; else at something whose type nobody knows."""
    path: tuple[str, ...]
    """Attribute names from there to the parameter, which is the last."""
    conditions: tuple[tuple[ast.expr, bool], ...]
    """The tests around it, and what each must be for it to be reached."""


def read_elsewhere(model: nn.Module, targets: Iterable[Target]) -> dict[str, str]:
    """Targets whose weight other code takes without calling their layer.

    Args:
        model: with or without values.
        targets: without adapters.

    Returns:
        Target's name -> CLASS.METHOD that reads it.
    """
    wanted = {(target.module_name, target.parameter): target.name for target in targets}
    parameters = {parameter for _, parameter in wanted}
    found: dict[str, str] = {}
    for name, module in model.named_modules():
        for read in _reads_of(type(module)):
            if read.path[-1] not in parameters or not _is_reached(read, module):
                continue
            inner = ".".join(read.path[:-1])
            if read.of_self:
                hit = wanted.get((f"{name}.{inner}" if name else inner, read.path[-1]))
                hits = [hit] if hit is not None else []
            else:
                hits = [n for (m, p), n in wanted.items() if p == read.path[-1] and f".{m}".endswith(f".{inner}")]
            found |= {hit: read.where for hit in hits if hit not in found}
    return found


@lru_cache(maxsize=4096)
def _reads_of(cls: type) -> tuple[Read, ...]:
    """All reads in the methods that a class has or inherits, and in the functions of its file that they call."""
    found: list[Read] = []
    overridden: set[str] = set()
    for owner in cls.__mro__:
        if owner.__module__.partition(".")[0] in LIBRARIES:
            continue
        functions = {name: f for name, f in vars(owner).items() if isinstance(f, FunctionType)}
        for name, function in functions.items():
            if name in overridden or name.startswith(NOT_FORWARD):
                continue
            where = f"{owner.__name__}.{name}"
            found += _reads_in(function, where, "self")
            for called in _called_here(inspect.unwrap(function)):
                found += _reads_in(called, f"{where} ({called.__name__})", None)
        overridden |= {name for name, f in functions.items() if "super" not in inspect.unwrap(f).__code__.co_names}
    return tuple(found)


def _called_here(function: FunctionType) -> Iterator[FunctionType]:
    """The plain functions of a function's own file that it names."""
    for name in function.__code__.co_names:
        other = function.__globals__.get(name)
        if isinstance(other, FunctionType) and other.__module__ == function.__module__:
            yield other


@lru_cache(maxsize=16384)
def _reads_in(function: FunctionType, where: str, own: str | None) -> tuple[Read, ...]:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(function))))
    except (OSError, TypeError, SyntaxError):  # written at a prompt, made by exec, or no Python
        return ()
    around = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    reads = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute) or not isinstance(node.ctx, ast.Load):
            continue
        root, path = _path(node)
        if root is None or len(path) < 2 or _is_metadata(node, around, tree):
            continue
        reads.append(Read(where, root == own, path, tuple(_conditions(node, around))))
    return tuple(reads)


def _path(node: ast.expr) -> tuple[str | None, tuple[str, ...]]:
    """The name that a chain of attributes begins with, and their names; None where it begins with something else."""
    names: list[str] = []
    while isinstance(node, ast.Attribute):
        names.append(node.attr)
        node = node.value
    return (node.id if isinstance(node, ast.Name) else None), tuple(reversed(names))


def _is_metadata(node: ast.expr, around: dict[ast.AST, ast.AST], tree: ast.AST) -> bool:
    """Whether only what a tensor is like is asked, not its values."""
    outer = around.get(node)
    if isinstance(outer, ast.Attribute):
        # the longer chain is looked at by itself where it ends in a parameter's name
        return outer.attr in METADATA
    if isinstance(outer, ast.Call) and node in outer.args:
        function = outer.func
        if isinstance(function, ast.Name):
            return function.id in ("isinstance", "hasattr", "type", "id", "getattr")
        return isinstance(function, ast.Attribute) and function.attr in LIKE
    if isinstance(outer, ast.Compare):
        return all(isinstance(op, ast.Is | ast.IsNot) for op in outer.ops)
    if isinstance(outer, ast.Assign) and len(outer.targets) == 1 and isinstance(outer.targets[0], ast.Name):
        name = outer.targets[0].id
        uses = [n for n in ast.walk(tree) if isinstance(n, ast.Name) and n.id == name and isinstance(n.ctx, ast.Load)]
        return all(_is_metadata(use, around, tree) for use in uses)
    return False


def _conditions(node: ast.AST, around: dict[ast.AST, ast.AST]) -> Iterator[tuple[ast.expr, bool]]:
    while (outer := around.get(node)) is not None:
        if isinstance(outer, ast.If | ast.IfExp) and node is not outer.test:
            body = outer.body if isinstance(outer.body, list) else [outer.body]
            yield outer.test, node in body
        node = outer


def _is_reached(read: Read, module: nn.Module) -> bool:
    """Whether the module's own settings leave the tests around a read as they must be."""
    if not read.of_self:
        return True
    return all(
        value is UNKNOWN or bool(value) == must for test, must in read.conditions for value in [_value(test, module)]
    )


def _value(test: ast.expr, module: nn.Module) -> Any:
    """A test's value by the module's settings alone; UNKNOWN where anything else has a part in it."""
    if isinstance(test, ast.Constant):
        return test.value
    if isinstance(test, ast.Attribute):
        root, path = _path(test)
        if root != "self" or path[-1] == "training":
            return UNKNOWN
        found: Any = module
        for name in path:
            found = getattr(found, name, UNKNOWN)
        return found if isinstance(found, bool | int | float | str) or found is None else UNKNOWN
    if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        value = _value(test.operand, module)
        return value if value is UNKNOWN else not value
    if isinstance(test, ast.BoolOp):
        ends = isinstance(test.op, ast.Or)  # what decides by itself
        values = [_value(part, module) for part in test.values]
        if any(value is not UNKNOWN and bool(value) == ends for value in values):
            return ends
        return UNKNOWN if any(value is UNKNOWN for value in values) else not ends
    if isinstance(test, ast.Compare) and len(test.ops) == 1:
        left, right = _value(test.left, module), _value(test.comparators[0], module)
        if left is UNKNOWN or right is UNKNOWN:
            return UNKNOWN
        return _compared(test.ops[0], left, right)
    return UNKNOWN


def _compared(op: ast.cmpop, left: Any, right: Any) -> Any:
    try:
        match op:
            case ast.Gt():
                return left > right
            case ast.GtE():
                return left >= right
            case ast.Lt():
                return left < right
            case ast.LtE():
                return left <= right
            case ast.Eq() | ast.Is():
                return left == right
            case ast.NotEq() | ast.IsNot():
                return left != right
    except TypeError:
        pass
    return UNKNOWN
