"""Proofs in real clients: minutes to hours, environments of their own, so only `make test-clients` runs them.

Each test leaves a record of what it measured; at the end of the session the records are put into docs/clients.json, and
docs/clients.md is written from that.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import client_page
import environments
import pytest
import subjects

HERE = Path(__file__).parent
WORK = environments.ROOT / "work"


def _subjects() -> Path:
    """Where adapters and references lie that this state of the package made; others' are removed."""
    files = sorted([*(HERE.parents[1] / "src").rglob("*.py"), HERE / "subjects.py"])
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:16]
    for other in WORK.glob("subjects-*"):
        if other.name != f"subjects-{digest}":
            shutil.rmtree(other, ignore_errors=True)
    return WORK / f"subjects-{digest}"


ALL: list[str] = []
"""The tests of this folder, asked for or not."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Take the tests of this folder out unless they are asked for by their mark, whatever else is asked for."""
    ALL.extend(item.name for item in items if HERE in item.path.parents)
    if "clients" in (config.option.markexpr or "").replace("not clients", ""):
        return
    mine = [item for item in items if HERE in item.path.parents]
    if mine:
        config.hook.pytest_deselected(items=mine)
        items[:] = [item for item in items if item not in mine]


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Write the page from every record that there is."""
    if any(HERE in item.path.parents for item in session.items):
        client_page.update(WORK / "records", ALL)


@pytest.fixture(scope="session")
def tiny() -> subjects.Subject:
    """Tiny variants of everything."""
    return subjects.tiny_variants(_subjects() / "tiny")


@pytest.fixture(scope="session")
def smollm2() -> subjects.Subject:
    """SmolLM2, trained for a few steps."""
    return subjects.smollm2_run(_subjects() / "smollm2")


@pytest.fixture(scope="session")
def expected() -> Callable[[subjects.Subject, str | None], dict[str, Any]]:
    """What transformers and PEFT of the project's own environment make of a subject's variant (None: of the base)."""

    def made(subject: subjects.Subject, variant: str | None) -> dict[str, Any]:
        place = _subjects() / "expected" / f"{subject.name} {variant or 'base'}.json"
        if not place.exists():
            adapter = None if variant is None else subject.adapters[variant]
            subjects.save(place, subjects.expected(subject.base, adapter))
        return subjects.read(place)

    return made


@pytest.fixture
def record(request: pytest.FixtureRequest) -> Iterator[client_page.Record]:
    """What a test measures; a client that cannot be installed makes it a skip, with the reason in the record."""
    environment = request.module.ENVIRONMENT if not hasattr(request, "param") else request.param
    found = client_page.Record(environment.name, request.node.name)
    started = time.monotonic()
    try:
        environments.interpreter(environment)
        found.versions = environments.versions(environment)
    except environments.Unavailable as reason:
        found.skipped = str(reason)
        found.write(WORK / "records")
        pytest.skip(str(reason))
    yield found
    found.seconds, found.load = time.monotonic() - started, os.getloadavg()[0]
    found.write(WORK / "records")
