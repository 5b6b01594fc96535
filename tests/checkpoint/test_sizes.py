"""Sizes in config.json that are not those of the tensors are refused in one line, before they cost memory or time."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import T5Config, T5ForConditionalGeneration

from families import FAMILIES
from pissa.checkpoint.source.load import load_base
from pissa.checkpoint.source.reader import open_source
from pissa.checkpoint.source.skeleton import build
from pissa.errors import PissaError
from pissa.outside.limits import bounded
from tiny import tiny_gpt2, tiny_llama

MEMORY, SECONDS = 2 << 30, 30
VALUES = [0, -1, 1.5, True, 10**5, 10**7, 10**9, 10**12, 2**62, 2**64, -(10**6), 1e30]


T5 = T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
MAKES: dict[str, Callable[[], Any]] = {
    "llama": tiny_llama,
    "gpt2": tiny_gpt2,
    "t5": lambda: T5ForConditionalGeneration(T5),
    **{name: FAMILIES[name].make for name in ("mixtral", "deepseek-moe", "deberta-v3")},
}


@pytest.fixture(scope="module", params=[*MAKES])
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model's directory."""
    path = tmp_path_factory.mktemp(request.param)
    MAKES[request.param]().save_pretrained(path)
    return path


def sizes(settings: dict[str, Any], where: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The places of all numbers in a configuration, and of lists of them."""
    for key, value in settings.items():
        if isinstance(value, dict):
            yield from sizes(value, (*where, key))
        elif {type(each) for each in (value if isinstance(value, list) else [value])} <= {int, float}:
            yield (*where, key)


def changed(settings: dict[str, Any], place: tuple[str, ...], value: Any) -> dict[str, Any]:
    """A configuration with another number, or a list of it, at a place."""
    key, *rest = place
    old = settings[key]
    new = changed(old, tuple(rest), value) if rest else [value] * len(old) if isinstance(old, list) else value
    return {**settings, key: new}


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_size_costs_more_than_the_tensors(saved: Path, data: st.DataObject) -> None:
    file = saved / "config.json"
    before = file.read_text()
    place = data.draw(st.sampled_from([*sizes(json.loads(before))]))
    value = data.draw(st.sampled_from(VALUES))
    start = time.monotonic()
    try:
        file.write_text(json.dumps(changed(json.loads(before), place, value)))
        with bounded(4 * SECONDS, MEMORY):
            load_base(saved, kind=json.loads(before)["architectures"][0])
            with open_source(saved) as source:
                build(source)
    except PissaError as error:
        assert "\n" not in str(error)
    finally:
        file.write_text(before)
    assert time.monotonic() - start < 4 * SECONDS


def test_a_pickle_is_no_way_round(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path)
    torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    settings = json.loads((tmp_path / "config.json").read_text())
    for field in ("vocab_size", "intermediate_size", "num_hidden_layers"):
        (tmp_path / "config.json").write_text(json.dumps({**settings, field: 10**8}))
        with pytest.raises(PissaError) as caught, bounded(4 * SECONDS, MEMORY):
            load_base(tmp_path)
        assert "\n" not in str(caught.value)
