"""What `from pissa import …` gives is explained to whoever calls it, and each explanation's example runs."""

from __future__ import annotations

import ast
import doctest
import inspect
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import pissa
from pissa.lab.models import cache_directory
from tiny import tiny_llama, tiny_tokenizer

ROOT = Path(__file__).parents[1]
NAMES = [name for name in pissa.__all__ if name != "__version__"]
PROMISED = [
    "truncated_svd",
    "split_weight",
    "Split",
    "Certificate",
    "reduction_ratio",
    "adapt",
    "reference",
    "restore",
    "load",
    "save_residual",
    "export_lora",
    "export_merged",
    "init_checkpoint",
    "verify",
    "PissaConfig",
    "Quantization",
    "quantization_preset",
    "PissaError",
    "train",
    "Recipe",
    "evaluate",
    "compare",
    "second_moments",
]
"""Names whose signatures are a promise."""
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def section(name: str, title: str) -> str:
    """The indented text below a title in a name's docstring; empty where there is none."""
    found = re.search(rf"^{title}:\n((?:    .*\n?|\n)+)", inspect.getdoc(getattr(pissa, name)) or "", re.MULTILINE)
    return found[1] if found else ""


def test_the_promised_names_are_there() -> None:
    assert set(PROMISED) <= set(NAMES)


@pytest.mark.parametrize("name", [name for name in NAMES if not isinstance(getattr(pissa, name), type)])
def test_a_function_says_what_it_takes_gives_and_refuses(name: str) -> None:
    function = getattr(pissa, name)
    signature = inspect.signature(function)
    taken = section(name, "Args")
    assert [p for p in signature.parameters if not re.search(rf"^    (\w+, )*{p}(, \w+)*: ", taken, re.MULTILINE)] == []
    given = signature.return_annotation
    if given != "None":
        assert section(name, "Yields" if str(given).startswith("Iterator") else "Returns")
    assert section(name, "Raises")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a model, rows to learn and problems to solve."""
    place = tmp_path_factory.mktemp("examples")
    tiny_llama(hidden=64).save_pretrained(place / "base")
    tiny_tokenizer().save_pretrained(place / "base")
    rows = [{"question": f"What is {i} + {i}?", "answer": f"It is {2 * i}.\n#### {2 * i}"} for i in range(24)]
    for name in ("rows.jsonl", "problems.jsonl"):
        (place / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return place


@pytest.fixture
def here(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The working directory of an example, with links to what it reads."""
    for path in place.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    yield tmp_path


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", NAMES)
def test_the_example_of_a_name_runs(name: str, here: Path) -> None:
    if name == "smollm2" and not (cache_directory() / "SmolLM2-135M-Instruct").is_dir():
        pytest.skip("the model is not in the cache")
    test = doctest.DocTestParser().get_doctest(section(name, "Example"), {}, name, None, 0)
    shown = f"{name}|{name.lower()} =" if isinstance(getattr(pissa, name), type) else name
    assert any(re.search(rf"\b({shown})", each.source) for each in test.examples), "the example shows something else"
    said: list[str] = []
    result = doctest.DocTestRunner(optionflags=FLAGS).run(test, out=said.append)
    assert result.failed == 0 and result.attempted == len(test.examples), "".join(said)


def imported(source: str) -> Iterator[str]:
    """The modules of pissa from which a piece of Python imports."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "pissa":
            yield str(node.module)
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.partition(".")[0] == "pissa")


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


@pytest.mark.parametrize("path", [*sorted((ROOT / "examples").glob("*.py")), *PAGES], ids=lambda path: path.name)
def test_examples_and_pages_use_the_public_door_alone(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        assert set(imported(text)) <= {"pissa"}
        return
    blocks = re.findall(r"^```(?:python|py)[^\n]*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert {module for block in blocks for module in imported(block)} <= {"pissa"}
    assert re.findall(r"(?:from|import) pissa\.[\w.]+", text) == []


def test_the_page_of_the_api_has_every_public_name() -> None:
    shown = re.findall(r"^::: pissa\.(?:[\w.]+\.)?(\w+)$", (ROOT / "docs" / "api.md").read_text(), re.MULTILINE)
    assert sorted(set(NAMES) - {"PissaError"} - set(shown)) == [] and "errors" in shown
