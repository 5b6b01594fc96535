"""Processes killed at random moments, again and again: what they leave behind is continued to the same result.

    PYTHONPATH=src:tests python tests/random_kills.py [--kills N] [--seconds N] [--seed N] [--only NAMES]

Each trial gives one command to `pissa` in a fresh directory, in forks of this process, which has imported everything
already: most of them die by SIGKILL at a random moment, the last one goes on to the end. What lies there then is that
of a run nobody disturbed, file by file, or the command says in one line why it does not go on. Not compared is what two
undisturbed runs differ in as well: times, and what is computed from them.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import pissa.checkpoint.stream.init
import pissa.export
import pissa.lab.comparison.run
import pissa.training.run
import pissa.training.trainer  # noqa: F401  (what a command imports later is imported in every fork)
from pissa.cli.main import run as command_line
from tiny import tiny_llama, tiny_tokenizer

MOST_KILLS = 5
"""Of one trial, before it may go on to its end."""
CLOCK = ("second", "per_second", "memory", "created", "time", "load_average", "trainer_state.json")
"""Parts of the names of fields that a clock or the machine writes; the last is what is said of a file with times."""
Kept = dict[str, Any]


@dataclass
class Tally:
    """What came of the trials of one command."""

    trials: int = 0
    kills: int = 0
    same: int = 0
    refused: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)


def commands(work: Path) -> dict[str, list[str]]:
    """A command of each kind, into `work/out`; what they read is made on the way."""
    base, rows, out = work / "base", work / "rows.jsonl", str(work / "out")
    tiny_llama().save_pretrained(base)
    tiny_tokenizer().save_pretrained(base)
    AutoModelForCausalLM.from_pretrained(base)
    AutoTokenizer.from_pretrained(base)
    rows.write_text(
        "".join(json.dumps({"question": f"Add {i} and {2 * i}.", "answer": f"It is {3 * i}"}) + "\n" for i in range(40))
    )
    usual = ["--rank", "2", "--batch-size", "2", "--micro-batch-size", "2", "--dtype", "fp32", "--template", "none"]
    learning = [*usual, "--max-length", "64"]
    train = ["train", str(base), "--data", str(rows), *learning, "--max-steps", "6", "--save-every", "1"]
    train += ["--learning-rate", "1e-3"]
    assert in_fork([*train, "--out", str(work / "run")])[0] == 0
    compare = ["compare", "--model", str(base), "--data", str(rows), *learning, "--methods", "lora,pissa"]
    compare += ["--steps", "2", "--seeds", "1", "--lrs", "1e-3", "--no-report"]
    return {
        "init": ["init", str(base), out, "--rank", "2"],
        "train": [*train, "--out", out],
        "export": ["export", str(work / "run"), out],
        "merge": ["export", str(work / "run"), out, "--merged"],
        "compare": [*compare, "--out", out],
    }


def in_fork(arguments: Sequence[str], kill_after: float | None = None) -> tuple[int, str]:
    """The exit code of `pissa` with these arguments, negative for a signal, and what it said on stderr."""
    with tempfile.TemporaryFile() as said:
        child = os.fork()
        if child == 0:
            _become(arguments, said.fileno())
        start, status = time.monotonic(), None
        while status is None:
            ended, found = os.waitpid(child, os.WNOHANG)
            if ended:
                status = found
            elif kill_after is not None and time.monotonic() - start > kill_after:
                with suppress(ProcessLookupError):  # it is not yet a group of its own
                    os.killpg(child, signal.SIGKILL)
                os.kill(child, signal.SIGKILL)
                status = os.waitpid(child, 0)[1]
            else:
                time.sleep(0.001)
        said.seek(0)
        return os.waitstatus_to_exitcode(status), said.read().decode(errors="replace")


def _become(arguments: Sequence[str], stderr: int) -> None:
    """Be the command; never returns."""
    code = 1
    try:
        os.setsid()
        os.dup2(os.open(os.devnull, os.O_RDWR), 1)
        os.dup2(stderr, 2)
        sys.stdout, sys.stderr = (io.TextIOWrapper(io.FileIO(n, "w", closefd=False)) for n in (1, 2))
        try:
            command_line([*arguments])
            code = 0
        except SystemExit as stopped:
            code = stopped.code if isinstance(stopped.code, int) else 0 if stopped.code is None else 1
        sys.stderr.flush()
    finally:
        os._exit(code)


def contents(directory: Path) -> Kept:
    """Relative name -> what is in a file; of JSON, its values without what a clock wrote."""
    found: Kept = {}
    for path in sorted(directory.rglob("*")):
        if path.is_file():
            found[str(path.relative_to(directory))] = _content(path)
    return found


def _content(path: Path) -> Any:
    data = path.read_bytes()
    if path.suffix in (".json", ".jsonl"):
        try:
            documents = (
                [json.loads(line) for line in data.splitlines()] if path.suffix == ".jsonl" else [json.loads(data)]
            )
        except ValueError:
            return data
        return [dict(_leaves(document)) for document in documents]
    return data


def _leaves(value: Any, where: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict | list):
        for key, each in value.items() if isinstance(value, dict) else enumerate(value):
            if not (isinstance(key, str) and any(part in key for part in CLOCK)):
                yield from _leaves(each, f"{where}.{key}")
    else:
        yield where, value


def differences(left: Kept, right: Kept) -> set[str]:
    """The places at which two directories differ: files, and values in JSON files."""
    found = {name for name in left.keys() ^ right.keys()}
    for name in left.keys() & right.keys():
        a, b = left[name], right[name]
        if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
            for x, y in zip(a, b, strict=True):
                keys = x.keys() | y.keys()
                found |= {f"{name}: {key}" for key in keys if repr(x.get(key)) != repr(y.get(key))}
        elif a != b:
            found.add(name)
    return found


@dataclass(frozen=True)
class Known:
    """What a command that nobody disturbs does."""

    contents: Kept
    loose: set[str]
    """The places in which two such runs differ."""
    seconds: float


def undisturbed(arguments: Sequence[str], out: Path) -> Known:
    """Run a command twice."""
    seen: list[Kept] = []
    for _ in range(2):
        shutil.rmtree(out, ignore_errors=True)
        start = time.monotonic()
        code, said = in_fork(arguments)
        assert code == 0, said
        seconds = time.monotonic() - start
        seen.append(contents(out))
    return Known(seen[0], differences(*seen), seconds)


def trial(arguments: Sequence[str], out: Path, known: Known, rng: random.Random, tally: Tally) -> None:
    """Kill a command a few times, let it go on, and say in the tally what came of it."""
    shutil.rmtree(out, ignore_errors=True)
    tally.trials += 1
    for _ in range(rng.randint(1, MOST_KILLS)):
        code, said = in_fork(arguments, rng.uniform(0.0, 1.1 * known.seconds))
        if code != -signal.SIGKILL:  # it was quicker
            break
        tally.kills += 1
    else:
        code, said = in_fork(arguments)
    if code != 0:
        (tally.refused if _is_clear(code, said) else tally.wrong).append(f"exit code {code}: {said.strip()[-300:]}")
        return
    apart = differences(contents(out), known.contents) - known.loose
    if apart:
        tally.wrong.append(f"other than undisturbed: {sorted(apart)[:5]}")
    else:
        tally.same += 1


def _is_clear(code: int, said: str) -> bool:
    return code == 2 and "Traceback" not in said and any(line.startswith("pissa: ") for line in said.splitlines())


def kill_often(
    work: Path, *, kills: int, seconds: float, seed: int, only: Sequence[str] = (), say: Callable[[str], object] = print
) -> dict[str, Tally]:
    """Kill commands until there were so many kills, or so many seconds have passed.

    Args:
        work: an empty directory.
        kills: over all commands together.
        seconds: after which no new trial begins.
        seed: of the moments.
        only: commands; empty for all.
        say: told after each trial that went wrong.
    """
    end, rng = time.monotonic() + seconds, random.Random(seed)
    chosen = {name: given for name, given in commands(work).items() if not only or name in only}
    out = work / "out"
    known = {name: undisturbed(given, out) for name, given in chosen.items()}
    tallies = {name: Tally() for name in chosen}
    while sum(tally.kills for tally in tallies.values()) < kills and time.monotonic() < end:
        # the command that has been killed least, counted in its own length, comes next
        name = min(tallies, key=lambda name: tallies[name].kills * known[name].seconds ** 0.5)
        before = len(tallies[name].wrong)
        trial(chosen[name], out, known[name], rng, tallies[name])
        for wrong in tallies[name].wrong[before:]:
            say(f"{name}: {wrong}")
    return tallies


def main() -> None:
    parser = argparse.ArgumentParser(description="Kill commands at random moments and compare what they leave.")
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--seconds", type=float, default=240.0, help="after which no new trial begins")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as work:
        only = [name for name in options.only.split(",") if name]
        tallies = kill_often(Path(work), kills=options.kills, seconds=options.seconds, seed=options.seed, only=only)
    for name, tally in tallies.items():
        reasons = Counter(reason[:200] for reason in tally.refused).most_common(3)
        print(
            f"{name}: {tally.trials} trials, {tally.kills} kills, {tally.same} same, {len(tally.wrong)} wrong, ", end=""
        )
        print(f"{len(tally.refused)} refused: {reasons}")
    sys.exit(any(tally.wrong for tally in tallies.values()))


if __name__ == "__main__":
    main()
