"""Writes docs/peers.md: every failure, run here. `python tests/peers/page.py` after a dependency or pissa moved."""

from __future__ import annotations

import importlib
import re
import sys
import tempfile
import warnings
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "peers.md"
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT / "tests"))

from observed import FAILURES, Failure, Seen  # noqa: E402

for _module in ("starting", "layer_kinds", "converting"):
    importlib.import_module(_module)

HEAD = """# What fails elsewhere, run here

Each row was run by `python tests/peers/page.py`, first with the peer, then with pissa; `tests/peers` asserts both sides
of it at every test run. Percentages are relative output errors against the base, or against the trained model, on a
tiny random model: whether they are zero is what matters. The authors' row follows what their script does step by step;
everything else calls the peer itself. Versions: {versions}.

| failure | peer | what it does | pissa |
|---|---|---|---|
"""
TAIL = """
Not run here, because it is other people's training code: LLaMA-Factory converts only at the end of a run and refuses
quantised bases; ms-swift converts at every save; axolotl passes PEFT's option through and keeps no initial adapter;
unsloth rejects PiSSA. TRL's trainers do run here, in `tests/training/test_trl.py`. With pissa a run's directory is
itself the LoRA for the base, at any checkpoint.
"""


def row(failure: Failure, seen: Seen) -> str:
    """A line of the table."""
    return f"| {failure.title} | {failure.peer} | {seen.peer} | {seen.ours} |"


def without_numbers(text: str) -> str:
    """A row as it is on every machine."""
    return re.sub(r"\d[\d.e+-]*", "N", text)


def written_rows() -> dict[str, str]:
    """Title -> line, as the page has them."""
    lines = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| ")][1:]
    return {line.split(" | ")[0].removeprefix("| "): line for line in lines}


def main() -> None:
    """Run everything and write the page."""
    rows = []
    for failure in FAILURES:
        with tempfile.TemporaryDirectory() as scratch, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            rows.append(row(failure, failure.run(Path(scratch))))
        print(rows[-1])
    versions = ", ".join(f"{name} {version(name)}" for name in ("peft", "transformers", "torch", "bitsandbytes"))
    PAGE.write_text(HEAD.format(versions=versions) + "\n".join(rows) + "\n" + TAIL, encoding="utf-8")


if __name__ == "__main__":
    main()
