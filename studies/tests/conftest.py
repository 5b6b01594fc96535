"""Every study once, in its quick pass, for all tests of the session, however many processes they run in."""

from __future__ import annotations

import json
import os
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from passes import Quick

from studies.registry import find_study
from studies.study import Settings, run_study


@pytest.fixture(scope="session")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Quick:
    """Name -> what NAME.json holds after a quick pass; `quick(name)["results"]` is for the study's own tests."""
    own = tmp_path_factory.getbasetemp()
    # the temporary directory of a process of pytest-xdist lies in that of the session
    shared: Path = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "studies"
    shared.mkdir(exist_ok=True)

    @cache
    def run(name: str) -> dict[str, Any]:
        study, out = find_study(name), shared / name
        with FileLock(f"{out}.lock"):
            if not (out / f"{name}.json").is_file():
                run_study(study, Settings(out, "quick", study.seeds("quick")))
        return {**json.loads((out / f"{name}.json").read_text(encoding="utf-8")), "out": str(out)}

    return run
