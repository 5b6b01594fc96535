"""Whether decompositions have become faster or slower: two checkouts of this project, turn by turn.

    python benchmarks/before_after.py BEFORE_SRC [--model DIR] [--rank 64] [--repeats 5]

BEFORE_SRC is the `src` folder of another checkout; the other side is the one that this script lies in. Each side is a
process of its own, and they take turns, so that load and clock rates strike both alike. Times are CPU seconds of one
thread over the linears of a model (every N-th) and a few made matrices. Writes `benchmarks/results/before_after.json`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
WORKER = """
import json, sys, time
from pathlib import Path
import torch
from safetensors.torch import load_file
from pissa import truncated_svd
torch.set_num_threads(1)
model, rank, every = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
classes = {}
if model:
    seen = {}
    for name, W in load_file(Path(model) / "model.safetensors").items():
        if ".layers." in name and W.ndim == 2:
            seen.setdefault(f"{W.shape[0]}x{W.shape[1]}", []).append(W.float())
    classes = {name: weights[::every] for name, weights in seen.items()}
generator = torch.Generator().manual_seed(0)
for m, n in ((2048, 2048), (2752, 1024)):
    left, right = (torch.linalg.qr(torch.randn(k, n, generator=generator))[0] for k in (m, n))
    classes[f"made {m}x{n}"] = [(left * (torch.arange(1, n + 1) + n / 16) ** -0.6) @ right.mT]
for line in sys.stdin:
    seconds = {}
    for name, weights in classes.items():
        start = time.process_time()
        for W in weights:
            truncated_svd(W, min(rank, *W.shape))
        seconds[name] = time.process_time() - start
    print(json.dumps(seconds), flush=True)
"""


def worker(source: Path, arguments: list[str]) -> subprocess.Popen[str]:
    """A process that imports the package from a checkout and times a pass for each line it is sent."""
    environment = os.environ | {"PYTHONPATH": str(source), "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    command = [sys.executable, "-c", WORKER, *arguments]
    return subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def one_pass(process: subprocess.Popen[str]) -> dict[str, float]:
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write("go\n")
    process.stdin.flush()
    return json.loads(process.stdout.readline())


def main() -> None:
    parser = argparse.ArgumentParser(description="Time two checkouts of this project in turns.")
    parser.add_argument("before", type=Path)
    parser.add_argument("--model", default="")
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--every", type=int, default=5, help="time every N-th matrix of each shape")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "before_after.json")
    options = parser.parse_args()
    load = os.getloadavg()
    arguments = [options.model, str(options.rank), str(options.every)]
    sides = {"before": worker(options.before, arguments), "after": worker(HERE.parent / "src", arguments)}
    times: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
    for repeat in range(options.repeats + 1):
        for name in list(sides)[:: 1 if repeat % 2 else -1]:
            found = one_pass(sides[name])
            # the first pass warms up
            times[name] += [found] if repeat else []
    for process in sides.values():
        process.communicate()
    rows: list[dict[str, Any]] = []
    for label in times["before"][0]:
        ratios = [b[label] / a[label] for b, a in zip(times["before"], times["after"], strict=True)]
        rows.append(
            {
                "class": label,
                "before": statistics.median(found[label] for found in times["before"]),
                "after": statistics.median(found[label] for found in times["after"]),
                "ratio": statistics.median(ratios),
            }
        )
        print(json.dumps(rows[-1]), flush=True)
    document = {
        "benchmark": "before_after",
        "rank": options.rank,
        "repeats": options.repeats,
        "machine": platform.machine(),
        "threads": 1,
        "load_at_start": load,
        "load_at_end": os.getloadavg(),
        "rows": rows,
        "times": times,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
