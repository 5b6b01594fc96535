"""Every way that PEFT and transformers have to load an export gives the trained function, in the oldest release and in
the newest."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from client_page import Record, largest
from environments import PEFT_NEWEST, PEFT_OLDEST, Environment, interpreter
from subjects import PLAIN_PEFT, Subject, read, save

pytestmark = pytest.mark.clients
INSIDE = Path(__file__).parent / "inside" / "peft_loading.py"
BOUND = 1e-4
"""Rounding in fp32, 1e-7 of logits of 10 to 40, over all layers; measured is a tenth of this."""
NATIVE = "transformers load_adapter"
WRONG_NATIVELY = {
    PEFT_OLDEST: {
        "dora": "a DoRA's magnitudes",
        "embedding-and-head": "an embedding's adapter",
        "tokens": "trained rows",
        "in-full": "layers that were trained in full",
    },
    PEFT_NEWEST: {"dora": "a DoRA's magnitudes"},
}
"""What transformers' own load_adapter leaves out, whoever wrote the adapter."""
NOT_SWAPPABLE = ("dora", "tokens", "in-full", "embedding-and-head")
"""PEFT refuses them in a mixed batch, or holds one of their kind at a time."""
BASE = "__base__"
ENVIRONMENTS = pytest.mark.parametrize(
    ("record", "environment"),
    [(e, e) for e in (PEFT_OLDEST, PEFT_NEWEST)],
    indirect=["record"],
    ids=["oldest", "newest"],
)
Expected = Callable[[Subject, str | None], dict[str, Any]]


def loaded(environment: Environment, place: Path, subject: Subject, names: list[str], expected: Expected) -> Any:
    """What the environment's PEFT computes from a subject's adapters."""
    reference = {name: expected(subject, name) for name in names} | {BASE: expected(subject, None)}
    job = {
        "base": str(subject.base),
        "adapters": {name: str(subject.adapters[name]) for name in names},
        "reference": reference,
        "swappable": [name for name in names if name not in NOT_SWAPPABLE],
    }
    done = subprocess.run(
        [interpreter(environment), "-W", "ignore", INSIDE, save(place / "job.json", job), place / "out.json"],
        capture_output=True, text=True, timeout=3000, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return read(place / "out.json"), reference


@ENVIRONMENTS
@pytest.mark.parametrize("size", ["tiny", "smollm2"])
def test_every_way_to_load_gives_the_trained_function(
    record: Record, environment: Environment, size: str, request: Any, tmp_path: Path, expected: Expected
) -> None:
    subject: Subject = request.getfixturevalue(size)
    names = [name for name in subject.adapters if name not in PLAIN_PEFT]
    found, reference = loaded(environment, tmp_path, subject, names, expected)
    wrong = []
    for way, by_name in found.items():
        for name, values in by_name.items():
            if way == NATIVE and name in WRONG_NATIVELY[environment]:
                off = largest(values, reference[name])
                said = f"off by {off:.2g}: it leaves {WRONG_NATIVELY[environment][name]} out, whoever wrote them"
                record.note(f"{way}, known to be wrong", f"{subject.name}, {name}", said, off > 100 * BOUND)
                continue
            wanted = reference[BASE if way == "disable_adapter" or name == BASE else name]
            base = reference[BASE] if wanted is not reference[BASE] else None
            if way == "mixed batch":
                wanted = {key: wanted[key][:1] for key in ("tokens", "logprobs")}
                base = {key: base[key][:1] for key in ("tokens", "logprobs")} if base is not None else None
            try:
                record.compare(way, f"{subject.name}, {name.strip('_')}", values, wanted, bound=BOUND, base=base)
            except AssertionError as error:
                wrong.append(str(error))
    assert not wrong, wrong
