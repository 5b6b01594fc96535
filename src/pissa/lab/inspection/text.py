"""The text of an inspection: one part fits the split, the other measures what layers put out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ...calibrate.moments import Moment, second_moments
from ...data.text import calibration_batches
from ...errors import ConfigError, listed
from ...live.layers import LINEAR, TRANSPOSED
from ...live.targets import Target

HELD_OUT_SHARE = 5
"""One window in so many is held out where no other text is given."""


@dataclass(frozen=True)
class Calibration:
    """The text that says which directions matter."""

    fit: Sequence[dict[str, Tensor]]
    """Batches that aware methods are fitted to."""
    held_out: Sequence[dict[str, Tensor]]
    """Batches that the output error is measured on."""
    description: dict[str, Any]
    """What the results say about the text: its files, how many windows, how long they are."""


def read_calibration(
    source: str | Path,
    tokenizer: Any,
    *,
    held_out: str | Path | None = None,
    length: int = 256,
    windows: int = 80,
) -> Calibration:
    """Calibration text, a part of it held out.

    Args:
        source: a .txt file, or rows as .jsonl, .json or .parquet.
        tokenizer: the model's.
        held_out: another such file, measured on; None holds out the last fifth of the windows.
        length: tokens per window.
        windows: in all.

    Raises:
        DataError: a text that cannot be read or is too short.
        ConfigError: fewer than two windows.
    """
    if windows < 2:
        raise ConfigError(f"{windows} calibration windows: give at least 2, one to fit and one to measure on")
    tested = max(1, windows // HELD_OUT_SHARE)
    size = min(4, tested)
    if held_out is None:
        batches = calibration_batches(source, tokenizer, length, windows, batch_size=size)
        split = len(batches) - -(-tested // size)
        fit, rest = batches[:split], batches[split:]
    else:
        fit = calibration_batches(source, tokenizer, length, windows - tested, batch_size=size)
        rest = calibration_batches(held_out, tokenizer, length, tested, batch_size=size)
    count = [sum(len(batch["input_ids"]) for batch in part) for part in (fit, rest)]
    files = {"file": str(source), "held_out_file": str(held_out or source)}
    return Calibration(fit, rest, {**files, "length": length, "windows": count[0], "held_out_windows": count[1]})


def with_moments(
    model: nn.Module, targets: Sequence[Target], calibration: Calibration | None
) -> Iterator[tuple[Target, Tensor | None, Tensor | None]]:
    """(target, moment to fit, held-out moment), both texts side by side; no moments without calibration."""
    if calibration is None:
        yield from ((target, None, None) for target in targets)
        return
    others = [target.name for target in targets if target.kind not in (LINEAR, TRANSPOSED)]
    if others:
        raise ConfigError(f"only linear layers have a second moment of their input; leave out {listed(others)}")
    named = {target.name: target for target in targets}
    pairs: Iterator[tuple[Moment, Moment]] = zip(
        second_moments(model, calibration.fit, named),
        second_moments(model, calibration.held_out, named),
        strict=True,
    )
    for fit, held_out in pairs:
        assert fit.names == held_out.names
        yield from ((named[name], fit.matrix, held_out.matrix) for name in fit.names)
