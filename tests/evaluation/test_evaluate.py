"""An evaluation's directory: what it holds, that it goes on, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from pissa import PissaConfig, adapt, export_lora
from pissa.checkpoint.stream.init import init_checkpoint
from pissa.errors import CheckpointError, ConfigError, Interrupted, OutputError
from pissa.evaluation.load import load_subject
from pissa.evaluation.run import evaluate
from pissa.evaluation.task import EvaluationOptions
from pissa.evaluation.tasks import generative
from pissa.training.recipe import Recipe
from pissa.training.run import train
from tiny import logits_of, tiny_llama, tiny_tokenizer

SMALL = EvaluationOptions(batch_size=2, max_new_tokens=4, template="alpaca")


@pytest.fixture
def model(tmp_path: Path) -> str:
    directory = tmp_path / "model"
    tiny_llama().save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return str(directory)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"question": f"{i} + 1?", "answer": f"#### {i + 1}"}) + "\n" for i in range(6)))
    return path


def test_results_samples_and_settings_are_kept(model: str, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    results = evaluate(model, "gsm8k", data, out, SMALL)
    assert sorted(path.name for path in out.iterdir()) == ["eval.json", "results.json", "samples.jsonl"]
    assert json.loads((out / "results.json").read_text()) == results
    samples = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    assert [sample["index"] for sample in samples] == list(range(6))
    assert results["count"] == 6 and results["value"] == 0.0 and results["interval"][0] == 0.0
    assert "cut at 4 tokens" in results["notes"][0]
    assert evaluate(model, "gsm8k", data, out, SMALL) == results
    assert evaluate(model, "gsm8k", data, None, SMALL)["value"] == 0.0


def test_an_interrupted_evaluation_goes_on_to_the_same_files(
    model: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    expected = evaluate(model, "gsm8k", data, whole, SMALL)
    plain = generative.GenerativeTask._sample

    def failing(self: Any, index: int, *rest: Any) -> dict[str, Any]:
        if index == 1:
            raise KeyboardInterrupt
        return plain(self, index, *rest)

    monkeypatch.setattr(generative.GenerativeTask, "_sample", failing)
    with pytest.raises(Interrupted, match=r"samples are in .*parts.samples.jsonl: the same command goes on"):
        evaluate(model, "gsm8k", data, parts, SMALL)
    monkeypatch.undo()
    assert not (parts / "results.json").exists()
    found = evaluate(model, "gsm8k", data, parts, SMALL)
    assert (parts / "samples.jsonl").read_bytes() == (whole / "samples.jsonl").read_bytes()
    assert {**found, "hardware": 0} == {**expected, "hardware": 0}


def test_another_evaluation_is_refused(model: str, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    evaluate(model, "gsm8k", data, out, SMALL)
    with pytest.raises(OutputError, match=r"another evaluation \(limit: None then, 2 now"):
        evaluate(
            model, "gsm8k", data, out, EvaluationOptions(limit=2, batch_size=2, max_new_tokens=4, template="alpaca")
        )
    tiny_llama(seed=1).save_pretrained(model)
    for _ in ("finished", "not finished"):
        with pytest.raises(OutputError, match="model changed since"):
            evaluate(model, "gsm8k", data, out, SMALL)
        (out / "results.json").unlink(missing_ok=True)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("")
    with pytest.raises(OutputError, match="not an evaluation"):
        evaluate(model, "gsm8k", data, tmp_path / "full", SMALL)
    with pytest.raises(ConfigError, match="gsm8k has no use for window"):
        evaluate(model, "gsm8k", data, None, EvaluationOptions(window=4))


def test_weights_that_are_not_finite_give_no_figure(model: str, data: Path, tmp_path: Path) -> None:
    broken = tiny_llama()
    with torch.no_grad():
        broken.lm_head.weight[0, 0] = float("nan")
    broken.save_pretrained(model)
    with pytest.raises(CheckpointError, match="not finite"):
        evaluate(model, "perplexity", data, tmp_path / "out")
    assert not (tmp_path / "out" / "results.json").exists()


def test_models_runs_exports_and_splits_are_all_subjects(model: str, data: Path, tmp_path: Path) -> None:
    recipe = Recipe(
        rank=2, batch_size=4, micro_batch_size=4, max_steps=2, learning_rate=1e-2, dtype="fp32", template="none"
    )
    run = train(model, str(data), tmp_path / "run", recipe, quiet=True)
    trained = logits_of(run.model)
    export_lora(tmp_path / "run", tmp_path / "lora")
    init_checkpoint(model, tmp_path / "split", PissaConfig(rank=2))
    checkpoint = next((tmp_path / "run" / "state").glob("checkpoint-*"))
    for place, expected, template in (
        (model, logits_of(tiny_llama()), None),
        (tmp_path / "run", trained, "none"),
        (checkpoint, trained, "none"),
        (tmp_path / "lora", trained, "none"),
        (tmp_path / "split", logits_of(tiny_llama()), None),
    ):
        subject = load_subject(place)
        assert torch.allclose(logits_of(subject.model), expected, atol=1e-4), place
        assert not subject.model.training and subject.template == template
        assert subject.tokenizer("a")["input_ids"] == tiny_tokenizer()("a")["input_ids"]


def test_a_model_saved_in_full_is_a_subject_with_its_template(model: str, data: Path, tmp_path: Path) -> None:
    recipe = Recipe(method="full", batch_size=4, micro_batch_size=4, max_steps=1, dtype="fp32", template="none")
    run = train(model, str(data), tmp_path / "run", recipe, quiet=True)
    subject = load_subject(tmp_path / "run")
    assert torch.allclose(logits_of(subject.model), logits_of(run.model), atol=1e-5)
    assert subject.template == "none"


def test_what_holds_no_model_is_named(tmp_path: Path, model: str) -> None:
    with pytest.raises(CheckpointError, match=r"neither a model .* nor an adapter"):
        load_subject(tmp_path)
    (tmp_path / "run" / "state").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="a run that has not finished"):
        load_subject(tmp_path / "run")
    with pytest.raises(CheckpointError, match="whole model, so it has no base"):
        load_subject(model, base=model)
    with pytest.raises(CheckpointError, match="does not exist"):
        load_subject(tmp_path / "none" / "such")


def test_what_peft_saved_is_a_subject(model: str, tmp_path: Path) -> None:
    adapted = adapt(tiny_llama(), PissaConfig(rank=2))
    adapted.save_pretrained(str(tmp_path / "saved"))
    subject = load_subject(tmp_path / "saved", base=model)
    assert torch.allclose(logits_of(subject.model), logits_of(tiny_llama()), atol=1e-4)
