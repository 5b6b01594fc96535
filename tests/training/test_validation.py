"""The validation loss is what it says, changes nothing, and decides where a run ends and what it leaves."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from killed import in_child, signal_at_step
from small_runs import (
    listing,
    log_of,
    plain_logits,
    plain_model,
    recipe,
    result_tensors,
    rows,
    run,
    scripted,
    write_rows,
)

from pissa import load
from pissa.data.encode import Collator, encode
from pissa.data.rows import examples_from_rows
from pissa.errors import ConfigError, MissingExtraError, TrainingError
from pissa.training.engine import training_arguments
from pissa.training.loss import response_loss
from pissa.training.progress import read_log
from pissa.training.recipe import Recipe
from pissa.training.run import Interrupted
from pissa.training.validation import ValidationRecord, split_off
from tiny import largest_difference, logits_of, same_tensors, tiny_tokenizer


def measured(out: Path) -> dict[int, float]:
    """Step -> validation loss."""
    log = read_log(out / "state" / "validation.jsonl", ValidationRecord)
    assert len({record["step"] for record in log}) == len(log)
    return {record["step"]: record["loss"] for record in log}


@pytest.fixture
def held_out(tmp_path: Path) -> Path:
    """Seven rows in a file, no multiple of any batch."""
    return write_rows(tmp_path / "held_out.jsonl", 7)


@pytest.mark.parametrize("settings", [{}, {"packing": True}, {"placement": "offset"}, {"method": "full"}], ids=str)
def test_the_loss_is_the_mean_over_all_learned_tokens(
    settings: dict[str, Any], base_directory: Path, held_out: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    chosen = recipe(
        eval_data=str(held_out), eval_every=3, save_every=9, max_steps=4, batch_size=2, micro_batch_size=2, **settings
    )
    result = run(base_directory, out, chosen)
    assert measured(out).keys() == {3, 4} and result.results["validation"][-1] == {"step": 4, "loss": measured(out)[4]}
    examples = examples_from_rows(rows(7))
    encoded = encode(examples, tiny_tokenizer(), template="none", max_length=chosen.max_length)
    batch = Collator(0)([encoded[index] for index in range(len(encoded))])
    with torch.no_grad():
        summed, count = response_loss(result.model, result.model.get_output_embeddings(), batch)
    assert measured(out)[4] == pytest.approx(float(summed) / count, rel=1e-5)


def test_measuring_changes_nothing_of_what_is_learned(base_directory: Path, held_out: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"method": "lora", "dropout": 0.3, "max_steps": 4}
    run(base_directory, tmp_path / "without", recipe(**settings))
    run(base_directory, tmp_path / "with", recipe(eval_data=str(held_out), eval_every=1, **settings))
    assert log_of(tmp_path / "with") == log_of(tmp_path / "without")
    assert same_tensors(result_tensors(tmp_path / "with"), result_tensors(tmp_path / "without"))


def test_a_share_is_kept_apart_by_the_seed_and_never_learned() -> None:
    encoded = encode(examples_from_rows(rows(20)), tiny_tokenizer(), template="none", max_length=40)
    learned, apart = split_off(encoded, 0.25, seed=3)
    assert (len(learned), len(apart)) == (15, 5)
    assert sorted([*learned.input_ids, *apart.input_ids]) == sorted(encoded.input_ids)
    assert learned.truncated + apart.truncated == encoded.truncated > 0
    assert split_off(encoded, 0.25, seed=3) == (learned, apart)
    assert split_off(encoded, 0.25, seed=4)[1] != apart
    assert len(split_off(encoded, 1e-9, 0)[1]) == len(split_off(encoded, 0.999, 0)[0]) == 1


LOSSES = {1: 3.0, 2: 2.0, 3: 2.5, 4: 2.6, 5: 1.0, 6: 1.1}
"""The lowest at step 5, but two in a row without a lower one at steps 3 and 4."""


def test_a_run_stops_early_and_is_finished(
    base_directory: Path, held_out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted(monkeypatch, LOSSES)
    out, settings = tmp_path / "run", recipe(eval_data=str(held_out), eval_every=1, save_every=9, early_stopping=2)
    results = run(base_directory, out, settings).results
    assert results["stopped_early"] and len(results["losses"]) == 4 and results["step"] == 4
    assert listing(out / "state") >= {"checkpoint-4"}
    assert run(base_directory, out, settings).model is None
    whole = run(base_directory, tmp_path / "whole", recipe(eval_data=str(held_out), eval_every=1, save_every=9)).results
    assert not whole["stopped_early"] and len(whole["losses"]) == 6


@pytest.mark.parametrize("settings", [{}, {"placement": "offset"}, {"method": "dora"}, {"method": "full"}], ids=str)
def test_what_is_kept_is_the_model_of_the_lowest_loss(
    settings: dict[str, Any],
    base_directory: Path,
    held_out: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scripted(monkeypatch, LOSSES)
    chosen = {"eval_data": str(held_out), "eval_every": 1, "save_every": 9, "early_stopping": 2, **settings}
    out = tmp_path / "run"
    result = run(base_directory, out, recipe(keep_best=True, **chosen))
    assert result.results["best"] == {"step": 2, "loss": 2.0} and result.results["step"] == 2
    card = (out / "README.md").read_text()
    assert "step 2 of 4" in card and "](curves.png)" in card and "| 3 | " in card and "| 2.5000 |" in card
    best, last = (out / "state" / f"checkpoint-{step}" for step in (2, 4))
    assert same_tensors(result_tensors(out), result_tensors(best))
    assert not same_tensors(result_tensors(out), result_tensors(last))
    if settings.get("method") != "full":
        assert largest_difference(plain_logits(base_directory, out), logits_of(result.model)) < 1e-5
        assert torch.equal(logits_of(load(out, str(base_directory)).eval()), logits_of(result.model))
        assert plain_model(base_directory, out) is not None


@pytest.mark.parametrize("step", [2, 3, 4])
def test_a_run_that_was_killed_stops_where_it_would_have_stopped(
    base_directory: Path, held_out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    scripted(monkeypatch, LOSSES)
    settings = recipe(eval_data=str(held_out), eval_every=1, save_every=1, early_stopping=2, keep_best=True)
    run(base_directory, tmp_path / "whole", settings)
    out = tmp_path / "killed"
    assert in_child(lambda: signal_at_step(step, lambda: run(base_directory, out, settings))) == -signal.SIGKILL
    run(base_directory, out, settings)
    assert log_of(out) == log_of(tmp_path / "whole") and measured(out) == measured(tmp_path / "whole")
    assert same_tensors(result_tensors(out), result_tensors(tmp_path / "whole"))
    names = ("best", "step", "stopped_early", "validation")
    ours, theirs = (json.loads((place / "results.json").read_text()) for place in (out, tmp_path / "whole"))
    assert {name: ours[name] for name in names} == {name: theirs[name] for name in names}


def test_a_signal_while_it_measures_is_heard(base_directory: Path, held_out: Path, tmp_path: Path) -> None:
    settings = recipe(eval_data=str(held_out), eval_every=1)
    with pytest.raises(Interrupted, match="checkpoint-3 is saved"):
        signal_at_step(2, lambda: run(base_directory, tmp_path / "run", settings), number=signal.SIGTERM)
    run(base_directory, tmp_path / "run", settings)
    run(base_directory, tmp_path / "whole", settings)
    assert measured(tmp_path / "run") == measured(tmp_path / "whole")


def test_a_validation_loss_that_is_no_number_ends_the_run(
    base_directory: Path, held_out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted(monkeypatch, dict.fromkeys(range(1, 7), float("nan")))
    with pytest.raises(TrainingError, match="diverged at step 2: validation loss is nan"):
        run(base_directory, tmp_path / "run", recipe(eval_data=str(held_out), eval_every=2))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"eval_every": 3}, "eval_every without a validation loss; add eval_fraction"),
        ({"keep_best": True, "early_stopping": 2}, "early_stopping and keep_best without a validation loss"),
        ({"eval_fraction": 0.1, "eval_data": "a"}, "eval_data and eval_fraction both"),
        ({"eval_fraction": 1}, "eval_fraction is 1"),
        ({"report_to": "wandbb"}, "report_to is"),
        ({"attention": "flash_attention2"}, "did you mean flash_attention_2"),
    ],
    ids=str,
)
def test_settings_that_mean_nothing_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Recipe(**settings)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"report_to": "wandb,trackio"}, "report_to trackio needs a package: pip install trackio"),
        ({"liger": True}, "liger needs a package: pip install liger-kernel"),
        ({"attention": "flash_attention_2"}, "pip install flash-attn"),
    ],
    ids=str,
)
def test_a_package_that_is_missing_is_named(
    settings: dict[str, Any], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    for name in ("wandb", "trackio", "liger_kernel", "flash_attn"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingExtraError, match=said):
        training_arguments(recipe(**settings), tmp_path)


def test_the_attention_is_the_one_that_was_asked_for(base_directory: Path, tmp_path: Path) -> None:
    eager, usual = (
        run(base_directory, tmp_path / str(chosen), recipe(attention=chosen, max_steps=2)) for chosen in ("eager", None)
    )
    assert eager.model.config._attn_implementation == "eager" and usual.model.config._attn_implementation == "sdpa"
    assert eager.results["losses"] == pytest.approx(usual.results["losses"], abs=1e-4)
