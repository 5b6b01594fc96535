"""What the Markdown pages promise exists: files, make targets, commands with their flags, public names."""

from __future__ import annotations

import ast
import os
import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

import pissa

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]
FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(<?([^)>\s]+)|(?:src|href)=\"([^\"]+)\"")

on_every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def blocks(page: Path, *languages: str) -> list[str]:
    """The fenced code blocks of a page in one of these languages."""
    text = page.read_text(encoding="utf-8")
    return [body for language, body in FENCE.findall(text) if language in languages]


def commands(page: Path) -> list[list[str]]:
    """The command lines in a page's shell blocks, as words, without comments, prompts and variables."""
    found = []
    for block in blocks(page, "sh", "bash", "shell", "console"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line.removeprefix("$ "), comments=True)
            while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                words = words[1:]
            if words:
                found.append(words)
    return found


@cache
def make_targets() -> frozenset[str]:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    names = re.findall(r"^([a-z][a-z-]*):(?!=)", makefile, re.MULTILINE)
    benchmarks = [f"bench-{path.stem}" for path in (ROOT / "benchmarks").glob("*.py")]
    return frozenset(names + benchmarks)


@cache
def help_of(*subcommand: str) -> str:
    result = subprocess.run(
        [sys.executable, "-m", "pissa", *subcommand, "--help"],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "COLUMNS": "200", "TERM": "dumb", "NO_COLOR": "1"},
    )
    assert result.returncode == 0, f"pissa {' '.join(subcommand)} --help failed:\n{result.stderr}"
    return result.stdout


def test_pages_exist() -> None:
    assert [page for page in PAGES if not page.is_file()] == []


@on_every_page
def test_relative_links_resolve(page: Path) -> None:
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    targets = [first or second for first, second in LINK.findall(text)]
    files = [target.partition("#")[0] for target in targets if not re.match(r"[a-z]+:|#", target)]
    assert [file for file in files if not (page.parent / file).exists()] == []


@on_every_page
def test_make_targets_exist(page: Path) -> None:
    inline = re.findall(r"`make ([a-z]+(?:-[a-z]+)*)", page.read_text(encoding="utf-8"))
    in_blocks = [words[1] for words in commands(page) if words[0] == "make" and len(words) > 1]
    assert sorted({*inline, *in_blocks} - make_targets()) == []


@on_every_page
def test_pissa_commands_and_flags_exist(page: Path) -> None:
    for words in commands(page):
        if words[0].rpartition("/")[2] != "pissa" or words[1:2] == [] or words[1].startswith("-"):
            continue
        described = help_of(words[1])
        for word in words[2:]:
            flag = word.partition("=")[0]
            if flag.startswith("--"):
                known = re.search(rf"(?<![\w-]){re.escape(flag)}(?![\w-])", described)
                assert known, f"{page.name}: {shlex.join(words)}"


@on_every_page
def test_python_blocks_compile_and_name_what_pissa_has(page: Path) -> None:
    for block in blocks(page, "python", "py"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module == "pissa":
                missing = [alias.name for alias in node.names if not hasattr(pissa, alias.name)]
                assert missing == [], f"{page.name}: from pissa import {', '.join(missing)}"


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("mkdocstrings")
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    settings = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False, env=settings)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "site" / "api" / "index.html").is_file()
