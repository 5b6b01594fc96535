"""`python -m benchmarks.gpu`: the whole pass, its JSON, and a short table."""

from __future__ import annotations

import argparse
import signal
import sys
from dataclasses import replace
from pathlib import Path

import torch

from .orchestrate import ROOT, read, run_pass
from .page import PAGE, RESULTS, page, table
from .provenance import provenance
from .sizes import FULL, TINY
from .stages import BUDGET, STAGES


def main(arguments: list[str] | None = None) -> int:
    """Run the pass; the exit code is 0 where every stage was done or skipped."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description="One prepared pass over a GPU.")
    parser.add_argument("--out", type=Path, default=RESULTS.parent, help="folder for gpu.json and gpu.md")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, which a CPU can do as well")
    parser.add_argument("--seconds", type=float, default=BUDGET, help="for all stages together [%(default).0f]")
    parser.add_argument("--only", nargs="+", choices=[stage.name for stage in STAGES], help="these stages alone")
    parser.add_argument("--page", action="store_true", help="only write docs/gpu.md anew from the results")
    options = parser.parse_args(arguments)
    if options.page:
        PAGE.write_text(page(read(RESULTS)), encoding="utf-8")
        return 0
    if options.device == "cpu" and not options.tiny:
        parser.error("there is no CUDA device here; --tiny runs the same code on a CPU")
    if options.tiny and options.out.resolve() == RESULTS.parent:
        parser.error(
            "a tiny pass says nothing about a GPU, so it is not kept with the results; name another folder: --out"
        )
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the stage that runs is ended as well
    sizes = TINY if options.tiny else FULL
    stages = [
        replace(stage, limit=sizes.patience * stage.limit)
        for stage in STAGES
        if options.only is None or stage.name in options.only
    ]
    budget = sizes.patience * options.seconds
    options.out.mkdir(parents=True, exist_ok=True)
    out = options.out.resolve() / RESULTS.name
    begin = {"sizes": sizes.name, **provenance(options.device)}
    document = run_pass(stages, out, begin, sizes=sizes.name, device=options.device, budget=budget)
    text = table(document)
    out.with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)
    if out == RESULTS:
        PAGE.write_text(page(document), encoding="utf-8")
        print(f"written: {PAGE.relative_to(ROOT)}")
    return 0 if all(stage["status"] in ("done", "skipped") for stage in document["stages"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
