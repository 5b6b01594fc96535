"""Invariants of the study of GLUE."""

from __future__ import annotations

import gzip
import itertools
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
from passes import Quick
from torch.nn.functional import cross_entropy, mse_loss

from pissa.errors import TrainingError
from studies import glue
from studies.encoder_task import (
    VALIDATION,
    Inputs,
    batches,
    cut,
    glue_rows,
    length,
    outputs,
    predict,
    prepare,
    prepared,
    tiny_encoder,
)
from studies.fit import Diverged, Fit
from studies.glue_files import GLUE, GlueRow
from studies.study import Settings

RUN: dict[str, Any] = {"method": "pissa", "seed": 0, "steps": 2, "batch": 4, "blocks": None, "rate": 1e-3}


@pytest.mark.parametrize("method", glue.METHODS)
def test_every_glue_method_starts_as_the_base_and_trains_its_part(method: str) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tokenizer, model = tiny_encoder(2)
    ids = torch.tensor(tokenizer("some words")["input_ids"])[None]
    everything = sum(p.numel() for p in model.parameters())
    model.eval()
    with torch.no_grad():
        before = model(input_ids=ids).logits
        prepared = prepare(model, method, seed=0).eval()
        assert torch.allclose(prepared(input_ids=ids).logits, before, atol=1e-5)
    trained = {name for name, p in prepared.named_parameters() if p.requires_grad}
    assert any("classifier" in name for name in trained) and any("pooler" in name for name in trained)
    count = sum(p.numel() for p in prepared.parameters() if p.requires_grad)
    assert (count == everything) == (method == "full")
    if method == "bitfit":
        assert all(name.endswith("bias") or "classifier" in name or "pooler" in name for name in trained)


def test_the_grid_is_complete(quick: Quick) -> None:
    document = quick("glue")
    results = document["results"]
    wanted = {(t, m, s) for t in ("SST-2", "STS-B") for m in glue.METHODS for s in document["settings"]["seeds"]}
    assert {(row["task"], row["method"], row["seed"]) for row in results["runs"]} == wanted
    assert all(row["rate"] == results["search"][row["task"]]["best"][row["method"]] for row in results["runs"])
    assert all(row["failed"] is None for row in results["runs"])
    assert len(results["parts"]) == len(glue.METHODS) - 1


def test_every_method_has_a_grid_of_one_factor() -> None:
    for rates in glue.RATES.values():
        assert len(rates) == 3
        assert [b / a for a, b in itertools.pairwise(rates)] == pytest.approx([3, 3], rel=0.15)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """STS-B of 600 training and 700 development rows, each with its place as its text."""
    (tmp_path / "glue" / "STS-B").mkdir(parents=True)
    for split, count in (("train", 600), ("dev", 700)):
        lines = ["sentence1\tsentence2\tscore", *(f"{split}{i}\tb\t{i % 5}" for i in range(count))]
        path = tmp_path / "glue" / "STS-B" / f"{split}.tsv.gz"
        path.write_bytes(gzip.compress("\n".join(lines).encode()))
    return tmp_path


def test_rows_are_parted_and_sampled(data: Path) -> None:
    train, validation, dev = glue_rows(Settings(data, data=data), "STS-B")
    names = [{row.texts[0] for row in part} for part in (train, validation, dev)]
    assert [len(part) for part in names] == [600 - VALIDATION, VALIDATION, 512]
    assert names[0] | names[1] == {f"train{i}" for i in range(600)}
    assert statistics.fmean(int(name.removeprefix("dev")) for name in names[2]) == pytest.approx(349.5, abs=30)
    again = glue_rows(Settings(data, data=data), "STS-B")
    assert again == (train, validation, dev)
    assert len(glue_rows(Settings(data, "full", data=data), "STS-B")[2]) == 700


def test_batches_are_full_and_of_similar_length() -> None:
    rows = [GlueRow(("a" * (1 + i % 40), "b"), float(i % 5)) for i in range(402)]
    tokenizer, _ = tiny_encoder(1)
    stream = batches(rows, Inputs(tokenizer, GLUE["STS-B"]), 4, seed=3)
    padding = []
    for _ in range(100):
        batch = next(stream)
        assert batch["labels"].shape == (4,) and float(batch["labels"].max()) <= 1
        padding.append(1 - float(batch["attention_mask"].float().mean()))
    assert statistics.fmean(padding) < 0.1


@pytest.mark.parametrize("name", ["SST-2", "STS-B"])
def test_answers_are_in_the_order_of_the_rows(name: str) -> None:
    task = GLUE[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tokenizer, model = tiny_encoder(task.classes)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(10)  # as it is made, its answers are nearly equal
    rows = [GlueRow(("word" * (1 + i * 7 % 5),) * len(task.texts), 1.0) for i in range(40)]
    inputs = Inputs(tokenizer, task)
    found = outputs(model, inputs, rows)
    for place in (0, 1, 17, 39):
        alone = outputs(model, inputs, [rows[place]])
        assert torch.allclose(found[place], alone[0], atol=1e-5)
    assert len({round(float(value), 3) for value in found[:, 0]}) == 5
    expected = found[:, 0] if task.classes == 1 else found.argmax(-1)
    assert predict(model, inputs, rows) == expected.float().tolist()
    assert length(rows[1]) == 12 * len(task.texts)


def test_an_encoder_that_is_cut_is_the_same_function() -> None:
    task = GLUE["STS-B"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tokenizer, model = tiny_encoder(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(10)
    rows = [GlueRow(("word" * (1 + i % 3), "ab"), float(i % 5)) for i in range(40)]
    whole = Inputs(tokenizer, task)
    before = outputs(model, whole, rows)
    count = sum(p.numel() for p in model.parameters())
    lower, upper = cut(model, 1)
    inputs = Inputs(tokenizer, task, lower)
    for _ in range(2):
        assert torch.allclose(outputs(upper, inputs, rows), before, atol=1e-5)
    assert len(inputs.kept) == len(set(rows)) < len(rows)
    assert torch.equal(inputs(rows)["labels"], whole(rows)["labels"])
    assert not any(p.requires_grad for p in lower.parameters()) and all(p.requires_grad for p in upper.parameters())
    assert sum(p.numel() for part in (lower, upper) for p in part.parameters()) == count
    assert float(before.std()) > 1e-2


@pytest.mark.parametrize("name", ["SST-2", "STS-B"])
def test_a_search_has_the_mean_loss_of_its_rows(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    settings, task = Settings(tmp_path, "quick"), GLUE[name]
    monkeypatch.setattr(glue, "fit", lambda *_, **__: Fit([1.0], [1.0]))
    found = glue._search_run(settings, name, **RUN)["held_out_loss"]
    inputs, model = prepared(settings, task, "pissa", None, 0)
    _, rows, _ = glue_rows(settings, name)
    one = [outputs(model, inputs, [row])[0] for row in rows]
    losses = [
        mse_loss(scores[0], torch.tensor(row.label / 5))
        if task.classes == 1
        else cross_entropy(scores[None], torch.tensor([int(row.label)]))
        for scores, row in zip(one, rows, strict=True)
    ]
    assert found == pytest.approx(statistics.fmean(map(float, losses)), rel=1e-4)
    monkeypatch.setattr(glue, "outputs", lambda *_: torch.full((len(rows), task.classes), float("nan")))
    with pytest.raises(TrainingError, match="lower the learning rate"):
        glue._search_run(settings, name, **RUN)


def test_a_run_repeats_with_its_dropout(tmp_path: Path) -> None:
    settings = Settings(tmp_path, "quick")
    first, again = (glue._measure(settings, "SST-2", **RUN) for _ in range(2))
    assert first == again
    assert first["losses"] != glue._measure(settings, "SST-2", **{**RUN, "seed": 1})["losses"]


def test_training_that_fails_is_a_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def diverging(*_: Any, **__: Any) -> None:
        raise Diverged("loss nan in step 2", Fit([2.0], [7.0]))

    monkeypatch.setattr(glue, "fit", diverging)
    row = glue._measure(Settings(tmp_path, "quick"), "STS-B", **RUN)
    assert row["scores"] == {"pearson": 0, "spearman": 0}
    assert (row["failed"], row["losses"]) == ("loss nan in step 2", [2.0])
