"""What `pissa init` needs, in memory and in time, against model size.

    python benchmarks/init.py DIRECTORY... [--rank 16] [--scratch PLACE]

Each DIRECTORY holds a checkpoint (benchmarks/make_checkpoint.py makes them). For each one, in processes of their own:

init    `pissa init`: wall time, and peak resident memory as the kernel counts it (VmHWM), pages of files included
svd     the SVD engine alone: `truncated_svd` of the same matrices at the same rank and number of threads, in fp32,
        each on one thread as `pissa init` does; reading is not counted
copy    a plain copy of the checkpoint's bytes, flushed to the disk

and the ratio init / (svd + copy). Before each, the checkpoint's pages are dropped from the system's cache. Writes
benchmarks/results/init.json and init.png. OMP_NUM_THREADS says how many threads there are.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
POLL = 0.05

# Nothing heavy is imported here: a child begins with its parent's peak memory.
SVD = """
import json, sys, time
from concurrent.futures import ThreadPoolExecutor
import torch
from pissa.checkpoint.source.reader import open_source
from pissa.decompose.svd import truncated_svd

directory, rank = sys.argv[1], int(sys.argv[2])
threads = torch.get_num_threads()
pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))
seconds, largest = 0.0, 0.0
with open_source(directory) as source:
    names = [n for n, e in source.entries.items() if ".layers." in n and len(e.shape) == 2]
    names.sort(key=lambda name: -source.entries[name].nbytes)
    for first in range(0, len(names), threads):
        group = [source.read(name) for name in names[first : first + threads]]
        start = time.perf_counter()
        found = list(pool.map(lambda W: truncated_svd(W.float(), rank)[3], group))
        seconds += time.perf_counter() - start
        largest = max([largest, *(certificate.captured_energy_loss for certificate in found)])
print(json.dumps({"seconds": seconds, "matrices": len(names), "largest_loss": largest, "threads": threads}))
"""
FACTS = """
import json
from pissa.checkpoint.manifest import hardware, package_versions
print(json.dumps({"hardware": hardware(), "versions": package_versions()}))
"""


def main() -> None:
    """Read the arguments, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directories", nargs="+", type=Path)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--scratch", type=Path, default=None, help="Where outputs go. [a temporary directory]")
    parser.add_argument("--out", type=Path, default=RESULTS / "init.json")
    arguments = parser.parse_args()
    rows = []
    for directory in arguments.directories:
        rows.append(measure(directory, arguments.rank, arguments.scratch))
        print(json.dumps(rows[-1]), flush=True)
        document = {"rank": arguments.rank, "rows": rows, **child(FACTS)}
        arguments.out.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    draw(rows, arguments.out.with_suffix(".png"))


def measure(directory: Path, rank: int, scratch: Path | None) -> dict[str, Any]:
    """One checkpoint's row."""
    size = sum(file.stat().st_size for file in directory.iterdir())
    with tempfile.TemporaryDirectory(dir=scratch) as place:
        drop_cache(directory)
        copy = copy_seconds(directory, Path(place) / "copy")
        shutil.rmtree(Path(place) / "copy")
        drop_cache(directory)
        init = run_init(directory, Path(place) / "out", rank)
    drop_cache(directory)
    svd = child(SVD, str(directory), str(rank))
    engine = svd["seconds"] + copy
    return {
        "checkpoint": directory.name,
        "bytes": size,
        "init_seconds": init["wall"],
        "peak_bytes": init["peak"],
        "svd_seconds": svd["seconds"],
        "copy_seconds": copy,
        "ratio": init["wall"] / engine,
        "threads": svd["threads"],
        "matrices": svd["matrices"],
        "largest_loss_init": init["largest_captured_energy_loss"],
        "largest_loss_svd": svd["largest_loss"],
    }


def run_init(directory: Path, out: Path, rank: int) -> dict[str, Any]:
    """The command, with its peak memory."""
    command = [sys.executable, "-m", "pissa", "init", str(directory), str(out), "--rank", str(rank), "--json"]
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    peak = 0
    while process.poll() is None:
        peak = max(peak, high_water_mark(process.pid))
        time.sleep(POLL)
    wall = time.perf_counter() - start
    assert process.stdout is not None
    if process.returncode:
        raise SystemExit(f"pissa init ended with {process.returncode}")
    return {**json.loads(process.stdout.read()), "wall": wall, "peak": peak}


def high_water_mark(process: int) -> int:
    """A process's largest resident memory so far, in bytes; 0 when it has ended."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), 0)


def copy_seconds(source: Path, target: Path) -> float:
    """How long a plain copy takes, until it is on the disk."""
    start = time.perf_counter()
    target.mkdir()
    for file in sorted(source.iterdir()):
        shutil.copyfile(file, target / file.name)
        with (target / file.name).open("rb") as stream:
            os.fsync(stream.fileno())
    return time.perf_counter() - start


def drop_cache(directory: Path) -> None:
    """Let the system forget a directory's files, so that they are read from the disk."""
    for file in directory.iterdir():
        with file.open("rb") as stream:
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def child(code: str, *arguments: str) -> dict[str, Any]:
    """What a fresh process prints."""
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Memory and time against size."""
    from matplotlib.figure import Figure

    rows = sorted(rows, key=lambda row: row["bytes"])
    sizes = [row["bytes"] / 1e9 for row in rows]
    figure = Figure(figsize=(10, 4.2), dpi=150, layout="constrained")
    memory, seconds = figure.subplots(1, 2)
    memory.plot(sizes, [row["peak_bytes"] / 2**30 for row in rows], "o-", color="#d1495b", label="pissa init")
    memory.plot(sizes, [size * 1e9 / 2**30 for size in sizes], "--", color="#8d99ae", label="the model itself")
    memory.set(xlabel="checkpoint, GB", ylabel="peak resident memory, GiB", ylim=(0, None))
    engine = [row["svd_seconds"] + row["copy_seconds"] for row in rows]
    seconds.plot(sizes, [row["init_seconds"] for row in rows], "o-", color="#d1495b", label="pissa init")
    seconds.plot(sizes, engine, "s--", color="#2e86ab", label="its SVDs alone + a plain copy")
    seconds.set(xlabel="checkpoint, GB", ylabel="seconds", ylim=(0, None))
    for panel in (memory, seconds):
        panel.grid(alpha=0.25)
        panel.legend(frameon=False)
        panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


if __name__ == "__main__":
    main()
