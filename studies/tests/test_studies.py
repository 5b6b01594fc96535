"""Every study's quick pass: the files it writes, and that it goes on from what is finished."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from passes import Quick

from studies import registry
from studies.registry import NAMES, find_study, study_names
from studies.study import SCALES, VERDICTS

KEYS = {"verdict", "study", "claim", "figures", "results", "settings", "seconds", "versions", "hardware"}
FRAME = {"__init__", "study", "registry", "page"}


@pytest.mark.parametrize("name", study_names())
def test_a_quick_pass_writes_its_document_and_figure(name: str, quick: Quick) -> None:
    document = dict(quick(name))
    out = Path(document.pop("out"))
    written = (out / f"{name}.json").read_text(encoding="utf-8")
    assert json.loads(written) == document
    assert written.splitlines()[1].strip().startswith('"verdict"')
    assert document.keys() == KEYS
    assert document["study"] == name
    assert document["verdict"] in VERDICTS
    assert document["claim"] and document["figures"] and document["results"]
    assert document["settings"]["scale"] == SCALES[0]
    assert document["settings"]["seeds"] == [0, 100 if name == "vision" else 1]
    measured = {row["seed"] for row in document["results"].get("runs", []) if "seed" in row}
    assert measured <= set(document["settings"]["seeds"])
    assert str(out) not in written
    assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_every_study_is_listed_under_its_own_name() -> None:
    directory = Path(registry.__file__).parent
    files = {path.stem for path in directory.glob("*.py") if "\nSTUDY = " in path.read_text(encoding="utf-8")}
    assert files == {name.replace("-", "_") for name in study_names()}
    for name in study_names():
        study = find_study(name)
        assert study.name == name
        assert 0 < study.minutes <= 30
        assert "\n" not in study.claim and "(" in study.claim
    assert len(set(NAMES)) == 18
