"""What a study is, and how one is run: a claim in, one JSON document and one figure out.

A study measures a grid of cells (a method, a rank, a seed, …). Every finished cell is kept as a file of its own, so
that a study that was stopped goes on where it was, and a wider grid measures only what is new.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

from rich.progress import Progress

from pissa import __version__
from pissa.checkpoint.disk.resumable import differences
from pissa.checkpoint.disk.write import explained, output_files, write_json
from pissa.errors import CheckpointError, ConfigError, DataError, Interrupted, OutputError
from pissa.outside.documents import read_document
from pissa.provenance import hardware, package_versions, sha256_of_document

from .layout import laid_out, rounded

Scale = Literal["quick", "default", "full"]
SCALES: tuple[Scale, ...] = get_args(Scale)
Verdict = Literal["holds", "holds in part", "does not hold here"]
VERDICTS: tuple[Verdict, ...] = get_args(Verdict)
CELLS = "cells"
T = TypeVar("T")


@dataclass(frozen=True)
class Settings:
    """How a study is run.

    Raises:
        ConfigError: a scale that does not exist, or no seeds.
    """

    out: Path
    """Where NAME.json and NAME.png go; finished cells lie in `cells/`, training runs under way in `runs/`."""
    scale: Scale = "default"
    """quick: seconds, decides nothing; default: minutes on a reduced grid; full: the paper's grid."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """The seeds of whatever is drawn at random; `Study.seeds` gives those of a study."""
    model: str | None = None
    """A directory or hub id in the place of the study's own model."""
    data: Path | None = None
    """The folder of data sets; None for $PISSA_DATA."""
    allow_code_execution: bool = False
    """Let code that the models wrote run on this machine, where a study scores any (nlg)."""
    progress: Progress | None = field(default=None, compare=False)
    """A bar to move."""
    earlier: list[float] = field(default_factory=list, compare=False, repr=False)
    """Seconds of the cells that were found finished."""

    def __post_init__(self) -> None:
        if self.scale not in SCALES:
            raise ConfigError(f"scale is {self.scale!r}; allowed: {', '.join(SCALES)}")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ConfigError(f"seeds are {list(self.seeds)}; give at least one, each once")

    def pick(self, *, quick: T, default: T, full: T) -> T:
        """The value of this scale."""
        return {"quick": quick, "default": default, "full": full}[self.scale]

    def data_set(self, name: str) -> Path:
        """The directory of a data set.

        Raises:
            DataError: it is not there.
        """
        root = self.data or (Path(os.environ["PISSA_DATA"]) if os.environ.get("PISSA_DATA") else None)
        if root is None:
            raise DataError(f"this study needs {name}: set PISSA_DATA to the folder that holds {name}/")
        if not (root / name).is_dir():
            raise DataError(f"this study needs {name}, and {root} has no folder of that name; set PISSA_DATA")
        return root / name

    def has_data_set(self, name: str) -> bool:
        """Whether `data_set` would find it."""
        try:
            return self.data_set(name).is_dir()
        except DataError:
            return False

    def grid(
        self, study: str, keys: Sequence[Mapping[str, Any]], measure: Callable[..., dict[str, Any]]
    ) -> list[dict[str, Any]]:
        """Measure every cell of a grid, or take it from where an earlier pass left it.

        Args:
            study: the study's name.
            keys: one mapping a cell, of all that decides its result (beside the model): JSON's own kinds.
            measure: called with a key's entries by name; returns JSON's own kinds.

        Returns:
            For each key, in order, its entries and those that were measured.
        """
        rows = []
        task = None if self.progress is None else self.progress.add_task(study, total=len(keys), note="")
        for key in keys:
            if self.progress is not None and task is not None:
                self.progress.update(task, note=" ".join(str(value) for value in key.values())[:60])
            rows.append({**key, **self._cell(study, key, measure)})
            if self.progress is not None and task is not None:
                self.progress.update(task, advance=1)
        return rows

    def _cell(self, study: str, key: Mapping[str, Any], measure: Callable[..., dict[str, Any]]) -> dict[str, Any]:
        scale = {} if self.scale == "default" else {"scale": self.scale}
        identity = {"study": study, "model": self.model, "version": __version__, **scale, **key}
        digest = sha256_of_document(identity)[:16]
        path = self.out / CELLS / f"{study}-{digest}.json"
        found = _read_cell(path, identity)
        if found is not None:
            self.earlier.append(found["seconds"])
            return found["values"]
        start = time.perf_counter()
        values = plain(measure(**key))
        with explained(self.out):
            path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"cell": identity, "seconds": time.perf_counter() - start, "values": values})
        return values


@dataclass(frozen=True)
class Outcome:
    """What a study found."""

    results: dict[str, Any]
    """All that was measured, in JSON's own kinds; the figure is drawn from it alone."""
    verdict: Verdict
    """Whether the claim held."""
    figures: str
    """Our numbers, in one line."""


@dataclass(frozen=True)
class Study:
    """A claim and the experiment that tests it."""

    name: str
    """As the command line takes it."""
    claim: str
    """One sentence, with the figure or table that it comes from."""
    run: Callable[[Settings], Outcome]
    """The experiment."""
    draw: Callable[[Mapping[str, Any]], Any]
    """Results -> a matplotlib Figure."""
    minutes: float
    """How long the default pass takes on two cores."""
    seed_count: int = 3
    """Seeds of the default pass."""
    seed_step: int = 1
    """Between two seeds; the first is 0."""
    intervals_over: str | None = None
    """What its intervals are taken over; None for seeds."""

    def seeds(self, scale: Scale, count: int | None = None) -> tuple[int, ...]:
        """The seeds of a pass.

        Args:
            scale: of the pass; a quick one has 2 seeds, a full one 5 or more.
            count: how many instead.
        """
        if count is None:
            count = {"quick": 2, "default": self.seed_count, "full": max(5, self.seed_count)}[scale]
        return tuple(range(0, count * self.seed_step, self.seed_step))


def run_study(study: Study, settings: Settings) -> dict[str, Any]:
    """Run a study and write NAME.json and NAME.png.

    Args:
        study: what to run.
        settings: where and at what scale.

    Returns:
        What NAME.json holds: `verdict`, `study`, `claim`, `figures`, `results` (rounded, see `layout.py`), `settings`,
        `seconds`, `versions`, `hardware`.

    Raises:
        PissaError: data or an extra is missing, the model cannot be used, or `out` cannot be written.
        Interrupted: it was stopped; finished cells are kept.
    """
    if settings.out.exists() and not settings.out.is_dir():
        raise OutputError(f"{settings.out} is a file; name a directory with --out")
    settings.earlier.clear()
    start = time.perf_counter()
    try:
        outcome = study.run(settings)
    except KeyboardInterrupt:
        raise Interrupted(
            f"stopped; the same command goes on from the finished cells in {settings.out / CELLS}"
        ) from None
    assert outcome.verdict in VERDICTS
    assert "\n" not in outcome.figures
    document = {
        "verdict": outcome.verdict,
        "study": study.name,
        "claim": study.claim,
        "figures": outcome.figures,
        "results": rounded(plain(outcome.results)),
        "settings": {
            "scale": settings.scale,
            "seeds": list(settings.seeds),
            "model": None if settings.model is None else model_name(settings.model),
        },
        "seconds": time.perf_counter() - start + sum(settings.earlier),
        "versions": package_versions(),
        "hardware": hardware(),
    }
    with output_files(settings.out, last=f"{study.name}.json") as partial:
        study.draw(document["results"]).savefig(partial / f"{study.name}.png")
        (partial / f"{study.name}.json").write_text(laid_out(document) + "\n", encoding="utf-8")
    return document


@dataclass(frozen=True)
class StudyDocument:
    """What NAME.json holds, as far as pages and figures rely on it."""

    study: str
    claim: str
    figures: str
    verdict: str
    settings: dict[str, Any]
    results: dict[str, Any]


@dataclass(frozen=True)
class CellDocument:
    """What a finished cell's file holds."""

    cell: dict[str, Any]
    """All that decides its result."""
    seconds: float
    values: dict[str, Any]


def read_result(path: Path) -> dict[str, Any]:
    """A study's JSON document.

    Raises:
        DataError: it cannot be read or is something else.
    """
    remedy = f"{path} is not a study's result: run the study again"
    return read_document(path, StudyDocument, error=DataError, remedy=remedy)


def model_name(source: str) -> str:
    """What to call a model in results: the last part of a directory's name, a hub id as it is."""
    return Path(source).resolve().name if Path(source).is_dir() else source


def plain(value: Any) -> Any:
    """The same in JSON's own kinds, so that what is kept and what is returned are equal.

    Raises:
        ValueError: a number that is not finite, which JSON cannot say.
    """
    return json.loads(json.dumps(value, allow_nan=False))


def _read_cell(path: Path, identity: Mapping[str, Any]) -> dict[str, Any] | None:
    """A finished cell; None where there is none, or one that is damaged or another's."""
    try:
        found = read_document(path, CellDocument)
    except CheckpointError:
        return None
    return found if not list(differences(found["cell"], plain(identity))) else None
