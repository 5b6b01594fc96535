"""The frame of the studies: cells, documents, the page and the command."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pissa.errors import ConfigError, DataError, Interrupted, OutputError
from studies import page as pages
from studies.__main__ import run as run_studies
from studies.figures import new_figure
from studies.interval import mean_interval, paired_difference
from studies.page import rows, section, summary, write_page
from studies.study import Outcome, Settings, Study, run_study

CALLS: list[int] = []


def square(number: int) -> dict[str, Any]:
    CALLS.append(number)
    if number == 13:
        raise KeyboardInterrupt
    return {"square": number * number}


def squares(*numbers: int) -> Study:
    def run(settings: Settings) -> Outcome:
        rows = settings.grid("squares", [{"number": number} for number in numbers], square)
        return Outcome({"rows": rows}, "does not hold here", f"{len(rows)} squares | of {settings.seeds}")

    def draw(results: Mapping[str, Any]) -> Any:
        figure, [panel] = new_figure()
        panel.plot([row["square"] for row in results["rows"]])
        return figure

    return Study("squares", "squares are small (nowhere, table 0)", run, draw, minutes=1)


@pytest.fixture(autouse=True)
def no_calls() -> None:
    CALLS.clear()


def test_finished_cells_are_measured_once(tmp_path: Path) -> None:
    settings = Settings(tmp_path / "new" / "out")
    first = run_study(squares(1, 2), settings)
    assert first["results"]["rows"] == [{"number": 1, "square": 1}, {"number": 2, "square": 4}]
    assert run_study(squares(2, 3), settings)["results"]["rows"][1] == {"number": 3, "square": 9}
    assert CALLS == [1, 2, 3]
    run_study(squares(2), Settings(tmp_path / "new" / "out", model="another"))
    assert CALLS == [1, 2, 3, 2]
    for cell in (tmp_path / "new" / "out" / "cells").iterdir():
        cell.write_text(cell.read_text(encoding="utf-8")[:-20], encoding="utf-8")
    run_study(squares(1), settings)
    assert CALLS == [1, 2, 3, 2, 1]
    assert {path.name for path in settings.out.iterdir()} == {"cells", "squares.json", "squares.png"}


def test_a_stopped_study_keeps_its_cells_and_writes_no_result(tmp_path: Path) -> None:
    with pytest.raises(Interrupted, match="goes on from the finished cells"):
        run_study(squares(5, 13, 6), Settings(tmp_path))
    assert {path.name for path in tmp_path.iterdir()} == {"cells"}
    run_study(squares(5, 6), Settings(tmp_path))
    assert CALLS == [5, 13, 6]


def test_the_seconds_of_earlier_passes_are_counted(tmp_path: Path) -> None:
    run_study(squares(1), Settings(tmp_path))
    [cell] = (tmp_path / "cells").iterdir()
    document = json.loads(cell.read_text(encoding="utf-8"))
    cell.write_text(json.dumps({**document, "seconds": 1000}), encoding="utf-8")
    assert 1000 < run_study(squares(1), Settings(tmp_path))["seconds"] < 1100


def test_numbers_that_are_not_finite_are_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        Settings(tmp_path).grid("nan", [{"number": 1}], lambda number: {"value": float("nan")})
    assert list(tmp_path.iterdir()) == []


def test_missing_data_is_one_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PISSA_DATA", raising=False)
    with pytest.raises(DataError, match="set PISSA_DATA to the folder that holds mnist/"):
        Settings(tmp_path).data_set("mnist")
    assert not Settings(tmp_path).has_data_set("mnist")
    (tmp_path / "mnist").mkdir()
    assert Settings(tmp_path, data=tmp_path).data_set("mnist") == tmp_path / "mnist"
    with pytest.raises(DataError, match="no folder of that name"):
        Settings(tmp_path, data=tmp_path).data_set("glue")


def test_a_study_has_seeds_of_its_own() -> None:
    study = replace(squares(1), seed_count=6, seed_step=100)
    assert study.seeds("quick") == (0, 100)
    assert study.seeds("default") == study.seeds("full") == (0, 100, 200, 300, 400, 500)
    assert study.seeds("default", 1) == (0,)
    assert (squares(1).seeds("default"), squares(1).seeds("full")) == ((0, 1, 2), (0, 1, 2, 3, 4))


@pytest.mark.parametrize("wrong", [{"scale": "huge"}, {"seeds": ()}, {"seeds": (1, 1)}])
def test_wrong_settings_are_refused(wrong: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        Settings(tmp_path, **wrong)


def test_an_output_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OutputError, match="is a file"):
        run_study(squares(1), Settings(tmp_path / "file"))
    assert CALLS == []


def test_the_page_has_a_row_for_every_study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "study_names", lambda: ["squares", "cubes"])
    monkeypatch.setattr(pages, "find_study", {"squares": squares(1), "cubes": CUBES}.get)
    with pytest.raises(DataError, match="holds no study's result"):
        write_page(tmp_path)
    run_study(squares(1), Settings(tmp_path, "quick"))
    with pytest.raises(DataError, match="a quick pass decides nothing"):
        write_page(tmp_path)
    run_study(squares(1), Settings(tmp_path))
    text = write_page(tmp_path).read_text(encoding="utf-8")
    assert "1 of 2 claims measured: 1 does not hold here." in text
    [ours] = [line for line in text.splitlines() if "[JSON](squares.json)" in line]
    assert "1 squares \\| of (0, 1, 2)" in ours and ours.endswith("| **does not hold here** |")
    [missing] = [line for line in text.splitlines() if "cubes" in line]
    assert missing.endswith("| not run yet |")
    _, _, section = text.partition("\n## squares\n")
    assert section.startswith("\n**does not hold here** (intervals over 3 seeds, 0 minutes).")
    assert "![squares](squares.png)" in section


def test_verdicts_are_counted_in_sentences() -> None:
    verdicts = ["holds in part", "holds", "holds in part", "does not hold here", "does not hold here"]
    assert summary([{"verdict": v} for v in verdicts]) == "1 holds, 2 hold in part, 2 do not hold here"


def test_a_row_says_how_many_parts_were_shown_and_a_section_which() -> None:
    parts = {str(i): mean_interval([x, 1.1 * x, 0.9 * x]).as_dict() for i, x in enumerate((1.0, 2.0, -1.0))}
    parts["one seed"] = mean_interval([5.0]).as_dict()
    study = squares(1)
    document = {"verdict": "holds in part", "claim": "c", "figures": "f", "results": {"parts": parts}}
    [row] = rows([study], {"squares": document})
    assert row.endswith("| f | **holds in part**: shown in 2 of 4 parts, the opposite in 1, undecided in 1 |")
    about = {"study": "squares", "seconds": 90, "settings": {"seeds": [0], "model": "a model"}}
    lines = section(study, {**document, **about}).splitlines()
    assert "(intervals over 1 seed, 2 minutes, a model)." in lines[2]
    assert [line for line in lines if line.startswith("| 2 |")] == ["| 2 | -1.00 ± 0.25 | the opposite |"]
    assert "| one seed | 5 | undecided |" in lines


def test_a_claim_that_nothing_decides_is_not_said_to_fail() -> None:
    def document(*values: list[float]) -> dict[str, Any]:
        parts = {str(place): mean_interval(each).as_dict() for place, each in enumerate(values)}
        return {"verdict": "does not hold here", "claim": "c", "figures": "f", "results": {"parts": parts}}

    undecided, against = document([1.0, -1.0], [5.0]), document([1.0, -1.0], [-1.0, -1.1])
    [row] = rows([squares(1)], {"squares": undecided})
    assert row.endswith("| **not decided here**: undecided in 2 of 2 parts |")
    [row] = rows([squares(1)], {"squares": against})
    assert row.endswith("| **does not hold here**: shown in 0 of 2 parts, the opposite in 1, undecided in 1 |")
    assert summary([undecided, against, undecided]) == "1 does not hold here, 2 not decided here"


CUBES = Study("cubes", "cubes are smaller (nowhere, table 1)", squares(1).run, squares(1).draw, minutes=1)


def test_an_interval_is_the_textbook_one() -> None:
    # Student (1908): extra hours of sleep of ten patients, mean 1.58, s 1.2300; t(0.975, 9) = 2.262157
    sleep = [1.2, 2.4, 1.3, 1.3, 0.0, 1.0, 1.8, 0.8, 4.6, 1.4]
    found = mean_interval(sleep)
    assert found.mean == pytest.approx(1.58)
    assert (found.low, found.high) == pytest.approx((0.700114, 2.459886), abs=1e-5)
    assert found.above_zero and not found.below_zero
    assert str(found) == "1.58 ± 0.88"
    assert paired_difference([1.0, 2.0], [3.0, 4.0]).below_zero
    alone = mean_interval([2.0])
    assert (alone.low, alone.high, alone.above_zero, str(alone)) == (None, None, False, "2")
    with pytest.raises(ConfigError):
        mean_interval([])
    with pytest.raises(ConfigError):
        paired_difference([1.0], [1.0, 2.0])


def answer(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[Any, str, str]:
    with pytest.raises(SystemExit) as stopped:
        run_studies([*arguments])
    out, err = capsys.readouterr()
    return stopped.value.code, out, err


def test_the_command_lists_runs_and_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = answer(capsys, "--list", "--json")
    assert code == 0
    assert "spectra" in [study["name"] for study in json.loads(out)["studies"]]
    code, out, _ = answer(capsys, "spectra", "--quick", "--seeds", "1", "--out", str(tmp_path), "--json")
    assert (code, json.loads(out)["settings"]["seeds"]) == (0, [0])
    assert json.loads(out) == json.loads((tmp_path / "spectra.json").read_text(encoding="utf-8"))
    for wrong, why in (
        (["spektra"], "no study is called 'spektra'; there are"),
        (["spectra", "--quick", "--full"], "exclude each other"),
        (["spectra", "--list"], "give one of"),
        ([], "give one of"),
        (["spectra", "--seeds", "0"], "give at least one"),
        (["--page", str(tmp_path)], "a quick pass decides nothing"),
    ):
        code, out, err = answer(capsys, *wrong)
        assert (code, out) == (2, "")
        assert why in err and len(err.splitlines()) == 1


def test_passes_of_different_scale_share_no_cells(tmp_path: Path) -> None:
    for scale in ("quick", "default", "full", "default"):
        run_study(squares(4), Settings(tmp_path, scale))
    assert CALLS == [4, 4, 4]
