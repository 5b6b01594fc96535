"""Every study once, in its quick pass, for all tests of the session."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from passes import Quick

from studies.registry import find_study
from studies.study import Settings, run_study


@pytest.fixture(scope="session")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Quick:
    """Name -> what NAME.json holds after a quick pass; `quick(name)["results"]` is for the study's own tests."""
    out: Path = tmp_path_factory.mktemp("studies")
    documents: dict[str, dict[str, Any]] = {}

    def run(name: str) -> dict[str, Any]:
        if name not in documents:
            study = find_study(name)
            documents[name] = run_study(study, Settings(out, "quick", study.seeds("quick")))
            documents[name]["out"] = str(out)
        return documents[name]

    return run
