"""Truncated SVD of weight matrices: pissa against every rival, turn by turn in one process.

    python benchmarks/svd.py [--quick] [--smollm DIR] [--minilm DIR] [--sections accuracy,matrices,model,rate]

Writes `svd.json` (versions, hardware, load, every time and loss) and `svd.png` (time against captured-energy loss,
log-log, a panel for each class of matrices) into benchmarks/results/. The oracle is LAPACK's singular values in fp64.

    accuracy   the default on every linear of both models, seeds 0 to 4: certified and true loss
    matrices   time and loss of pissa, torch, scikit-learn and scipy for each class
    model      all linears of SmolLM2 at r = 64, with the residual, against PEFT's initialisation
    rate       products with W: their share of the machine's own rate on the same shapes, and where the rest goes

Model directories hold `model.safetensors`; by default they are looked for in `.cache/`, and what is absent is skipped
with a message. Needs the `dev` and `report` extras, scikit-learn and scipy.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from svd_sections.data import classes_of, large_matrices, linears
from svd_sections.figure import draw
from svd_sections.matrices import measure_accuracy, measure_matrices
from svd_sections.model import measure_model
from svd_sections.rate import measure_rate

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    parser = argparse.ArgumentParser(description="Benchmark of pissa's truncated SVD against its rivals.")
    parser.add_argument("--quick", action="store_true", help="small matrices, two repetitions: a check that it runs")
    parser.add_argument("--smollm", type=Path, default=ROOT / ".cache" / "SmolLM2-135M-Instruct")
    parser.add_argument("--minilm", type=Path, default=ROOT / ".cache" / "all-minilm-l6-v2")
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent / "results")
    parser.add_argument("--sections", default="accuracy,matrices,model,rate")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--slow-repeats", type=int, default=5, help="repetitions of the exact and the scipy solvers")
    parser.add_argument("--every", type=int, default=1, help="time every N-th layer of the models")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rank", type=int, default=64, help="rank for the models' linears; 128 for the large matrices")
    parser.add_argument(
        "--clock",
        choices=("wall", "cpu"),
        default="wall",
        help="of the section `matrices`; cpu is one thread's time, for a machine that other jobs share (--threads 1)",
    )
    parser.add_argument("--classes", default="", help="regular expression: only these classes of matrices")
    parser.add_argument("--rivals", default="", help="regular expression: only these rivals")
    args = parser.parse_args()
    if args.quick:
        args.repeats, args.slow_repeats, args.every = 2, 1, 10
    torch.set_num_threads(args.threads)
    warnings.filterwarnings("ignore")

    sections = args.sections.split(",")
    smollm, minilm = linears(args.smollm, "SmolLM2-135M"), linears(args.minilm, "all-MiniLM-L6-v2")
    large = large_matrices(smollm, 8 if args.quick else 1) if {"matrices", "rate"} & set(sections) else {}
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "svd.json"
    report: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    report["environment"] = environment(args.threads)
    report["settings"] = {
        "repeats": args.repeats,
        "slow_repeats": args.slow_repeats,
        "every": args.every,
        "clock": args.clock,
    }
    if "accuracy" in sections:
        models = {"smollm": smollm, "minilm": minilm}
        if args.every > 1:
            models = {k: dict(list(v.items())[:: args.every]) for k, v in models.items()}
        report["accuracy"] = measure_accuracy(models, 64, 2 if args.quick else 5)
        save(report, path)
    if "matrices" in sections:
        classes = classes_of(smollm, minilm, args.every, args.classes)
        classes |= {name: [pair] for name, pair in large.items() if re.search(args.classes, name)}
        rank = dict.fromkeys(large, 16 if args.quick else 128)
        clock = time.thread_time if args.clock == "cpu" else time.perf_counter
        rows = measure_matrices(
            classes, lambda label: rank.get(label, int(args.rank)), args.repeats, args.slow_repeats, args.rivals, clock
        )
        measured = {(row["class"], row["rival"]) for row in rows}
        kept = [row for row in report.get("matrices", []) if (row["class"], row["rival"]) not in measured]
        report["matrices"] = kept + rows
        draw(report["matrices"], args.out / "svd.png")
        save(report, path)
    if "rate" in sections:
        report["rate"] = [measure_rate(k, W, 16 if args.quick else 128, args.repeats) for k, (W, _) in large.items()]
    if "model" in sections and smollm:
        report["model"] = measure_model(args.smollm, 64, args.repeats, args.slow_repeats)
    report["environment"]["load_at_end"] = os.getloadavg()
    save(report, path)


def save(report: dict[str, Any], path: Path) -> None:
    """After every section, so that a run that is interrupted keeps what it has measured."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(report, indent=1) + "\n")
    partial.replace(path)


def environment(threads: int) -> dict[str, Any]:
    import peft
    import scipy
    import sklearn

    cpu = Path("/proc/cpuinfo")
    lines = cpu.read_text().splitlines() if cpu.exists() else []
    model = next((line.split(":")[1].strip() for line in lines if "model name" in line), "unknown")
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "scipy": scipy.__version__,
        "scikit-learn": sklearn.__version__,
        "peft": peft.__version__,
        "cpu": model,
        "threads": threads,
        "load_at_start": os.getloadavg(),
    }


if __name__ == "__main__":
    main()
