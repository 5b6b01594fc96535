"""A comparison's report: nothing is loaded, nothing is left out, nothing that a user named becomes markup."""

from __future__ import annotations

import copy
import html
import itertools
import math
import re
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from comparison_results import make_results

from pissa.colours import DARK, LIGHT
from pissa.errors import DataError, MissingExtraError, OutputError
from pissa.lab.comparison.curves import band, during, running_mean, steps_to_loss
from pissa.lab.comparison.page import page_of
from pissa.lab.comparison.report import as_html, as_markdown, write_report
from pissa.lab.comparison.table import costs_of, quality_of
from pissa.lab.style import LOOKS, looks_of
from pissa.training.recipe import TRAINING_METHODS

HOSTILE = '<script>alert("x")</script>'
METHODS = ("lora", "qpissa", HOSTILE, "a|b `c` $\\frac{1$ [l](javascript:x) &amp;")
NO_FIGURES = {section: [] for section in ("differences", "curves", "rates", "null")}
LOADING = ("src", "srcset", "data", "poster", "background", "action", "formaction")


class Reader(HTMLParser):
    """Collects what a browser would act on."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.headings: list[str] = []
        self.text = ""
        self.heading = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.heading = tag in ("h1", "h2")
        self.attributes += attrs
        if self.heading:
            self.headings.append("")

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.heading:
            self.headings[-1] += data

    def handle_endtag(self, tag: str) -> None:
        self.heading = False


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a report with hostile names everywhere."""
    results = make_results(*METHODS)
    results["task"]["name"] = HOSTILE
    results["settings"]["model"] = f"/models/{HOSTILE}"
    results["command"] = f"pissa compare --methods '{HOSTILE}' ```` </pre>"
    results["hardware"]["device"] = HOSTILE
    results["versions"][HOSTILE] = HOSTILE
    directory = tmp_path_factory.mktemp("report")
    write_report(results, directory)
    return directory


@pytest.fixture(scope="module")
def page(report: Path) -> Reader:
    """Its HTML, as read by a parser."""
    reader = Reader()
    reader.feed((report / "report.html").read_text(encoding="utf-8"))
    return reader


def test_page_loads_nothing(report: Path, page: Reader) -> None:
    assert not {"link", "script", "img", "iframe", "object", "embed", "base", "form", "image"} & set(page.tags)
    assert not [name for name, _ in page.attributes if name in LOADING or name.startswith("on")]
    targets = [value or "" for name, value in page.attributes if name in ("href", "xlink:href")]
    assert all(target.startswith("#") for target in targets)
    text = (report / "report.html").read_text(encoding="utf-8")
    assert "@import" not in text
    assert all(url.startswith("url(#") for url in re.findall(r"url\([^)]*", text))
    assert {address for address in re.findall(r"https?://[^\"'\s<]+", text)} <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }


def test_page_shows_what_was_measured_in_order(page: Reader) -> None:
    assert page.headings[1:] == [
        "Results",
        "Costs",
        "Differences and how sure they are",
        "While they train",
        "Learning rates",
        "The null arm",
        "Quantisation errors",
        "How it was measured",
    ]
    assert page.text.index("is better than") < page.text.index("Costs")


def test_names_stay_names(page: Reader) -> None:
    for method in METHODS:
        assert page.text.count(method) >= 4, method
    assert page.text.count(HOSTILE) >= 8
    assert "````" in page.text


def test_page_knows_dark_and_narrow_windows(report: Path) -> None:
    text = (report / "report.html").read_text(encoding="utf-8")
    assert "prefers-color-scheme: dark" in text
    assert 'name="viewport"' in text
    # what is wider than a phone scrolls by itself, so that the page does not
    assert len(re.findall(r"<table", text)) == len(re.findall(r'<div class="scroll"[^>]*>\s*<table', text)) >= 2
    assert re.search(r"\.scroll \{[^}]*overflow-x: auto", text)
    assert re.search(r"max-width: 520px[^@]*figure \{ overflow-x: auto; \} figure svg \{ min-width: 460px; \}", text)
    for light, dark in zip(LIGHT, DARK, strict=True):
        assert (text.count(light), text.count(dark)) == (1, 1), "a colour outside of the variables"


def test_svg_identifiers_are_unique_within_the_page(page: Reader) -> None:
    names = [value for name, value in page.attributes if name == "id"]
    assert len(names) == len(set(names)) > 5


def test_markdown_shows_every_picture_and_nothing_else_is_written(report: Path) -> None:
    text = (report / "report.md").read_text(encoding="utf-8")
    pictures = re.findall(r"\]\(([\w-]+\.png)\)", text)
    assert sorted(path.name for path in report.iterdir()) == sorted([*pictures, "report.html", "report.md"])
    assert {"loss.png", "gradient-norm.png", "learning-rates.png", "null-accuracy.png"} <= set(pictures)
    assert all((report / name).read_bytes().startswith(b"\x89PNG") for name in pictures)


def test_markdown_has_no_markup_of_the_users(report: Path) -> None:
    text = (report / "report.md").read_text(encoding="utf-8")
    outside = re.sub(r"`{5}\n.*?\n`{5}\n", "", text, flags=re.DOTALL)
    assert outside != text, "the command's fence is longer than the one in it"
    assert "<script" not in outside.replace("\\<script", "")
    assert not re.search(r"(?<!\\)\]\(javascript", outside)
    for table in re.findall(r"(?:^\|.*\|\n)+", text, flags=re.MULTILINE):
        assert len({len(re.findall(r"(?<!\\)\|", row)) for row in table.splitlines()}) == 1


def test_page_and_markdown_say_the_same() -> None:
    found = replace(page_of(make_results("lora", "pissa", null=False)), figures=NO_FIGURES)
    sentences = [found.verdict, *(s for finding in found.findings for s in finding.sentences)]
    text = html.unescape(as_html(found))
    markdown = re.sub(r"\\(.)", r"\1", as_markdown(found))
    for sentence in sentences:
        assert sentence in text
        assert " ".join(sentence.split()) in markdown


def test_table_has_every_method_with_its_figures() -> None:
    results = make_results("lora", "pissa", null=False)
    table = quality_of(results)
    assert [name for name, _ in table.rows] == ["base, before", "lora", "pissa"]
    cells = dict(zip(table.heads, table.rows[2][1], strict=True))
    runs = results["methods"]["pissa"]["runs"]
    solved = [sum(run["test_correct"]) / len(run["test_correct"]) for run in runs]
    assert cells["accuracy"].text == f"{20 * sum(solved):.1f} %"
    assert float(cells["test loss"].text) == pytest.approx(sum(run["test_loss"] for run in runs) / 5, abs=1e-4)
    low, high = (float(bound) for bound in cells["test loss"].detail.split(" – "))
    assert low < float(cells["test loss"].text) < high
    assert cells["perplexity of other text"].detail.startswith("+")
    assert 0 < float(cells["steps to lora’s loss"].text) < 60
    assert costs_of(results).rows[1][1][-1].text == "9.77 M"


def test_columns_without_a_figure_are_left_out() -> None:
    table = quality_of(make_results("lora", "pissa", accuracy=False, forgetting=False, null=False))
    assert table.heads == ["learning rate", "seeds", "test loss", "steps to lora’s loss"]


def test_what_is_unfinished_is_said_and_the_rest_is_shown() -> None:
    results = make_results("lora", "pissa", "dora", "full", null=False)
    results["settings"]["plan"]["null"] = True
    methods = results["methods"]
    methods["pissa"]["runs"] = methods["pissa"]["runs"][:3]
    methods["dora"] |= {"runs": [], "trials": [], "learning_rate": None}
    methods["full"] |= {"runs": [], "learning_rate": None}
    for trial in methods["full"]["trials"]:
        trial |= {"status": "diverged", "validation_loss": None}
    methods["lora"]["runs"][4] |= {"status": "diverged", "test_losses": None, "test_correct": None, "losses": [1.0]}
    methods["lora"]["on_edge"] = True
    found = page_of(results)
    said = " ".join(found.cautions)
    assert "pissa has 3 of 5 runs" in said
    assert "dora has 0 of 5 runs" in said
    assert "full: every run of its search diverged" in said
    assert "lora: 1 of 5 runs diverged" in said
    assert "lora: its learning rate lies on the edge" in said
    assert "the null arm has not run yet" in said
    assert [(finding.left, finding.right) for finding in found.findings] == [("pissa", "lora")]
    assert dict(found.quality.rows)["lora"][1].text == "4 of 5"
    text = as_html(replace(found, figures=NO_FIGURES))
    assert all(name in text for name in methods)


def test_a_comparison_that_has_only_begun_has_a_report(tmp_path: Path) -> None:
    results = make_results("lora", "pissa", null=False)
    results["base"] = None
    for method in results["methods"].values():
        method |= {"runs": [], "trials": [], "learning_rate": None, "on_edge": False}
    written = write_report(results, tmp_path / "new")
    assert "Nothing to compare yet" in written.read_text(encoding="utf-8")
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["report.html", "report.md"]


def test_one_learning_rate_for_all_is_said_to_show_less() -> None:
    results = make_results("lora", "pissa", null=False)
    results["settings"]["plan"]["rates"] = [2e-4]
    for method in results["methods"].values():
        method["trials"] = []
    found = page_of(results)
    assert any("not which is better at its own" in caution for caution in found.cautions)
    assert found.figures["rates"] == []
    assert "none was searched" in found.measured[0]


def test_single_seeds_give_figures_but_no_verdict() -> None:
    found = page_of(make_results("lora", "pissa", seeds=1))
    assert found.verdict.startswith("No verdict yet")
    assert {finding.tone for finding in found.findings} == {"few"}
    assert found.figures["differences"] == []
    assert "nan" not in as_html(replace(found, figures=NO_FIGURES))


def test_null_arm_is_reported_with_its_rate() -> None:
    found = page_of(make_results("lora", "pissa"))
    share = re.search(r"called a difference in \d+: ([\d.]+) %", found.null[0])
    assert share is not None
    assert float(share[1]) <= 5
    assert "at most 5 %, as promised" in found.null[0]


def test_no_reference_but_the_first_method_where_there_is_no_lora() -> None:
    found = page_of(make_results("dora", "pissa", null=False))
    assert [(finding.left, finding.right) for finding in found.findings] == [("pissa", "dora")]
    assert "steps to dora’s loss" in found.quality.heads


def test_what_are_no_results_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="results without methods, task"):
        write_report({"runs": []}, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_report_replaces_the_older_one_and_a_file_is_refused(tmp_path: Path) -> None:
    results = make_results("lora", "pissa", seeds=1, null=False)
    for method in results["methods"].values():
        method |= {"runs": [], "trials": []}
    write_report(results, tmp_path)
    changed = copy.deepcopy(results)
    changed["task"]["name"] = "another task"
    assert "another task" in write_report(changed, tmp_path).read_text(encoding="utf-8")
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot be written"):
        write_report(results, tmp_path / "file")


@pytest.mark.parametrize("absent", ["jinja2", "matplotlib"])
def test_a_missing_extra_is_named(absent: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = page_of(make_results("lora", "pissa", seeds=1, null=False))
    monkeypatch.setitem(sys.modules, absent, None)
    with pytest.raises(MissingExtraError, match=re.escape("pip install 'pissa[report]'")):
        as_html(found)


def test_steps_to_a_loss_are_counted_by_the_mean_of_ten() -> None:
    losses = [2.0] * 10 + [1.0] * 20
    assert steps_to_loss(losses, 1.5) == 15
    assert steps_to_loss(losses, 1.0) == 20
    assert steps_to_loss(losses, 0.9) is None
    assert steps_to_loss([], 1.0) is None


def test_bands_are_the_mean_and_the_range_over_finished_seeds() -> None:
    runs = [{"status": "done", "losses": [float(value)] * 48} for value in (1, 2, 6)]
    runs.append({"status": "diverged", "losses": [math.inf] * 3})
    found = band(runs, "losses")
    assert found is not None
    assert (found.steps[0], found.steps[-1], len(found.middle)) == (2, 48, 47)
    assert (found.low[0], found.middle[0], found.high[0]) == (1, 3, 6)
    assert running_mean([1, 2, 3, 4], 2) == [1.5, 2.5, 3.5]
    assert band(runs[3:], "losses") is None


def test_measurements_during_training_begin_at_the_base() -> None:
    runs = [{"status": "done", "during": [{"step": 5, "loss": loss, "accuracy": None}]} for loss in (1.0, 2.0)]
    found = during(runs, "loss", start=3.0)
    assert found is not None
    assert (found.steps, found.middle, found.low) == ([0, 5], [3.0, 1.5], [3.0, 1.0])
    assert during(runs, "accuracy") is None


def test_every_method_has_a_look_of_its_own() -> None:
    assert set(LOOKS) == set(TRAINING_METHODS), "a method without a colour"
    names = [name for name in LOOKS if name != "lora-kaiming"]  # another name of lora
    looks = looks_of([*names, "something new", HOSTILE])
    assert len({(look.slot, look.dashes, look.marker) for look in looks.values()}) == len(looks)
    assert looks_of(["pissa"])["pissa"] == looks["pissa"]


@pytest.mark.parametrize(("colours", "ground"), [(LIGHT, "#ffffff"), (DARK, "#12161b")], ids=["light", "dark"])
def test_lines_stand_out_from_the_page(colours: tuple[str, ...], ground: str) -> None:
    """A contrast of 3 to 1, which WCAG 2.2 asks of graphics."""
    for colour in colours:
        darker, lighter = sorted((luminance(colour), luminance(ground)))
        assert (lighter + 0.05) / (darker + 0.05) >= 3, colour


# Machado, Oliveira and Fernandes (IEEE TVCG 15, 2009), severity 1, on linear red, green and blue.
COLOUR_VISION = {
    "usual": [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
    "no red": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "no green": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "no blue": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}
OKLAB_LMS = [
    [0.41222147, 0.53633254, 0.05144599],
    [0.21190350, 0.68069955, 0.10739696],
    [0.08830246, 0.28171884, 0.62997870],
]
OKLAB = [
    [0.21045426, 0.79361779, -0.00407205],
    [1.97799850, -2.42859221, 0.45059371],
    [0.02590404, 0.78277177, -0.80867577],
]


@pytest.mark.parametrize("seen", COLOUR_VISION)
@pytest.mark.parametrize("colours", [LIGHT, DARK], ids=["light", "dark"])
def test_colours_are_told_apart_with_any_colour_vision(colours: tuple[str, ...], seen: str) -> None:
    """Distances in Oklab, in which black and white are 1 apart."""
    linear = np.clip([np.array(COLOUR_VISION[seen]) @ linear_of(colour) for colour in colours], 0, 1)
    points = np.cbrt(linear @ np.array(OKLAB_LMS).T) @ np.array(OKLAB).T
    assert min(np.linalg.norm(a - b) for a, b in itertools.combinations(points, 2)) > 0.1


def luminance(colour: str) -> float:
    """Relative, as WCAG has it."""
    return float(np.dot([0.2126, 0.7152, 0.0722], linear_of(colour)))


def linear_of(colour: str) -> np.ndarray:
    """Linear red, green and blue of #rrggbb."""
    channels = np.array([int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)])
    return np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
