"""The small language models: they load as any checkpoint does, have learned something, and are made once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pissa.checkpoint.source.load import load_base, load_tokenizer
from pissa.data.rows import examples_from_rows
from pissa.errors import ConfigError
from pissa.evaluation.loss import held_out_loss
from pissa.lab.demo.arithmetic import make_problems
from pissa.lab.demo.problem_templates import TRAINED, UNSEEN
from studies.small_lm import FAMILIES, RARE, problems, random_model, small_lm


def test_pretraining_learns_and_is_done_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PISSA_CACHE", str(tmp_path))
    directory = small_lm("llama", hidden=64, layers=1, steps=16)
    held_out = examples_from_rows(make_problems(0, 0, 6)[1])
    tokenizer = load_tokenizer(str(directory))
    after = held_out_loss(load_base(directory, dtype=torch.float32), tokenizer, held_out).mean
    before = held_out_loss(random_model("llama", 64, 1), tokenizer, held_out).mean
    assert after < before - 1
    text = "3 + 45 = 48, naïve?"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert sum(token in "0123456789" for token in tokenizer.convert_ids_to_tokens(ids)) == 5
    written = directory.stat().st_mtime_ns
    assert small_lm("llama", hidden=64, layers=1, steps=16) == directory
    assert directory.stat().st_mtime_ns == written
    assert [path.name for path in tmp_path.iterdir()] == [directory.name]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_a_model_that_computes(family: str) -> None:
    model = random_model(family, 64, 1)
    assert model.config.model_type == family
    assert torch.isfinite(model(input_ids=torch.arange(5)[None]).logits).all()
    assert sum(parameter.numel() for parameter in model.parameters()) < 300_000


def test_an_unknown_family_is_refused() -> None:
    with pytest.raises(ConfigError, match="there are llama"):
        small_lm("lstm")


def test_what_is_adapted_to_is_rare_in_pretraining_and_not_repeated() -> None:
    before, after = problems()
    rare = {template.name for template in UNSEEN}
    assert {row["template"] for row in after} == rare
    assert sum(row["template"] in rare for row in before) == RARE
    assert {row["template"] for row in before} == rare | {template.name for template in TRAINED}
    assert not {row["instruction"] for row in before} & {row["instruction"] for row in after}
    assert problems() == (before, after)
