"""The pass over a GPU: no stage stops another, its JSON is whole at any time, and all of it runs on a CPU in tiny."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.gpu import child, orchestrate  # noqa: E402
from benchmarks.gpu.__main__ import main  # noqa: E402
from benchmarks.gpu.orchestrate import ended, read, run_pass  # noqa: E402
from benchmarks.gpu.page import BODIES, PAGE, RESULTS, page, table  # noqa: E402
from benchmarks.gpu.sizes import FULL, TINY  # noqa: E402
from benchmarks.gpu.stages import BUDGET, STAGES, Stage  # noqa: E402

BEGIN: dict[str, Any] = {"sizes": "tiny"}
HEAD = "import os, signal, subprocess, sys, time\nfrom benchmarks.gpu.context import Skipped\n"
ENDINGS = {
    "fine": ("context.record(figure=1)", "done", None),
    "raises": (
        "context.record(figure=1)\n    raise ValueError('no such thing')",
        "failed",
        "ValueError: no such thing",
    ),
    "skipped": ("raise Skipped('no package')", "skipped", "no package"),
    "memory": (
        "import torch\n    context.record(figure=1)\n"
        "    raise torch.OutOfMemoryError('CUDA out of memory. Tried 9 GiB\\nmore')",
        "out of memory",
        "OutOfMemoryError: CUDA out of memory. Tried 9 GiB",
    ),
    "killed": ("context.record(figure=1)\n    os.kill(os.getpid(), signal.SIGKILL)", "killed", "by SIGKILL"),
    "exits": ("os._exit(3)", "failed", "exit code 3"),
    "nan": ("context.record(figure=float('nan'), other=[float('inf')])", "done", None),
    "hangs": ("context.record(figure=1)\n    time.sleep(600)", "timed out", None),
    "broken": (None, "failed", "ModuleNotFoundError: No module named 'stage_broken'"),
}


@pytest.fixture
def stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Stage]:
    """Makes a stage whose `run` is this code."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))

    def make(name: str, code: str | None, limit: float = 300) -> Stage:
        if code is not None:
            (tmp_path / f"stage_{name}.py").write_text(f"{HEAD}\ndef run(context):\n    {code}\n")
        return Stage(name, f"Stage {name}", f"stage_{name}", limit)

    return make


def passed(stages: list[Stage], out: Path, **options: Any) -> dict[str, Any]:
    """A pass of these stages on the CPU, as it was written."""
    run_pass(stages, out, BEGIN, sizes="tiny", device="cpu", progress=lambda line: None, **options)
    return json.loads(out.read_text())


@pytest.fixture
def hanging(stage: Any, tmp_path: Path) -> float:
    """Seconds after which a stage that hangs is ended: several times what one takes to begin and record a figure."""
    document = passed([stage("first", "context.record(figure=1)", 300)], tmp_path / "first.json", budget=300)
    return 4 * document["stages"]["first"]["seconds"] + 2


def test_no_way_to_end_stops_the_stages_after_it(stage: Any, tmp_path: Path, hanging: float) -> None:
    stages = [stage(name, code, hanging if name == "hangs" else 300) for name, (code, _, _) in ENDINGS.items()]
    document = passed([*stages, stage("last", "context.record(figure=1)", 300)], tmp_path / "out.json", budget=3000)
    found = {name: (each["status"], each["message"]) for name, each in document["stages"].items()}
    expected = {name: (status, message) for name, (_, status, message) in ENDINGS.items()}
    expected["hangs"] = ("timed out", f"ended after its {hanging:.0f} s")
    assert found == {**expected, "last": ("done", None)}
    for name in ("raises", "memory", "killed", "hangs"):
        assert document["stages"][name]["figures"] == {"figure": 1}, name
    assert document["stages"]["nan"]["figures"] == {"figure": "nan", "other": ["inf"]}
    assert "ValueError: no such thing" in document["stages"]["raises"]["output"][-1]
    assert all(each["seconds"] > 0 for each in document["stages"].values())


def test_what_a_stage_has_started_ends_with_it(stage: Any, tmp_path: Path, hanging: float) -> None:
    beat = tmp_path / "beat"
    loop = f"import time\\nwhile True:\\n open({str(beat)!r}, 'a').write('x')\\n time.sleep(0.05)"
    code = f'subprocess.Popen([sys.executable, "-c", """{loop}"""])\n    time.sleep(600)'
    document = passed([stage("parent", code, hanging)], tmp_path / "out.json")
    assert document["stages"]["parent"]["status"] == "timed out"
    size = beat.stat().st_size
    assert size > 0
    time.sleep(0.5)
    assert beat.stat().st_size == size


def test_the_json_is_whole_at_any_time(stage: Any, tmp_path: Path) -> None:
    out, done = tmp_path / "out.json", threading.Event()
    seen: list[dict[str, str]] = []

    def watch() -> None:
        while not done.is_set():
            if out.exists():
                seen.append({name: each["status"] for name, each in json.loads(out.read_text())["stages"].items()})
            time.sleep(0.002)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        passed([stage(name, ENDINGS[name][0]) for name in ("fine", "killed")], out)
    finally:
        done.set()
        watcher.join()
    assert {"fine": "not reached", "killed": "not reached"} in seen
    assert {"fine": "done", "killed": "not reached"} in seen


def test_a_pass_keeps_to_its_budget(stage: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(orchestrate, "SHORTEST", 1.0)
    stages = [stage("hangs", ENDINGS["hangs"][0], 100), stage("late", "context.record(figure=1)", 100)]
    document = passed(stages, tmp_path / "out.json", budget=2)
    assert document["stages"]["hangs"]["status"] == "timed out"
    assert document["stages"]["hangs"]["message"] == "ended after its 2 s"
    assert document["stages"]["late"]["status"] == "not reached"
    assert "of the pass's 2 s were left" in document["stages"]["late"]["message"]


def test_a_part_without_memory_stops_no_other_part(stage: Any, tmp_path: Path) -> None:
    code = (
        "import torch\n    def no_memory():\n        raise torch.OutOfMemoryError('too large')\n"
        "    def absent():\n        raise Skipped('no package')\n"
        "    context.attempt('a', no_memory)\n    context.attempt('b', absent)\n    context.attempt('c', lambda: 3)"
    )
    document = passed([stage("parts", code)], tmp_path / "out.json")
    assert document["stages"]["parts"]["status"] == "done"
    assert document["stages"]["parts"]["figures"] == {
        "a": {"out_of_memory": "OutOfMemoryError: too large"},
        "b": {"skipped": "no package"},
        "c": 3,
    }


def test_the_limits_fit_into_the_budget() -> None:
    assert sum(stage.limit for stage in STAGES) <= BUDGET <= 480
    assert {stage.name for stage in STAGES} == BODIES.keys()


def test_the_full_sizes_are_those_of_the_models_they_are_named_for() -> None:
    assert sum(count for _, _, count in FULL.matrices) == 224
    assert {tuple(sorted(shape[:2])) for shape in FULL.matrices} == {(4096, 4096), (4096, 11008)}
    assert FULL.rows * FULL.length == 4096
    assert TINY.trained.hidden % 64 == 0  # NF4's blocks


class Forked:
    """A stage in a copy of this process, which has imported what it needs; otherwise as `subprocess.Popen`."""

    def __init__(self, command: list[str], *, stdout: IO[bytes], stderr: IO[bytes], **_: Any) -> None:
        self.code: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            os.setsid()
            os.dup2(stdout.fileno(), 1)
            os.dup2(stderr.fileno(), 2)
            os._exit(child.main(*command[command.index("benchmarks.gpu.child") + 1 :]))

    def wait(self, timeout: float = math.inf) -> int:
        end = time.monotonic() + timeout
        while self.code is None:
            ended, status = os.waitpid(self.pid, os.WNOHANG)
            if ended:
                self.code = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > end:
                raise subprocess.TimeoutExpired("stage", timeout)
            else:
                time.sleep(0.02)
        return self.code


def test_the_tiny_pass_runs_every_stage_on_a_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(orchestrate.subprocess, "Popen", Forked)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    code = main(["--tiny", "--device", "cpu", "--out", str(tmp_path)])
    said = capsys.readouterr().out
    assert code == 0, (tmp_path / "gpu.json").read_text()
    document = json.loads((tmp_path / "gpu.json").read_text())
    stages = document["stages"]
    assert {stage["status"] for stage in stages.values()} <= {"done", "skipped"}
    assert document["versions"]["torch"] and document["hardware"]["processor"] and document["began"]
    stations = [found for stops in stages["function"]["figures"].values() for found in stops.values()]
    assert sum(isinstance(found, dict) and found["ok"] for found in stations) == 25
    methods = stages["decompositions"]["figures"]["methods"]
    assert all(method["seconds"] > 0 for method in methods.values())
    assert all(method.get("largest_certified_loss", 0) <= 1e-3 for method in methods.values())
    assert stages["properties"]["figures"]["held"] > 20
    for name in ("training", "quantised"):
        for found in stages[name]["figures"].values():
            if isinstance(found, dict) and "skipped" not in found:
                assert found["tokens_per_second"] > 0 and found["peak_gib"] > 0
    assert stages["initialisation"]["figures"]["pissa.adapt"]["largest_certified_loss"] <= 1e-3
    text = (tmp_path / "gpu.md").read_text()
    assert text == table(document) and text in said
    assert all(f"### {stage['title']}" in text for stage in stages.values() if stage["figures"])


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_command_of_make_gpu_runs_the_tiny_pass(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", "--tiny", "--device", "cpu", "--out", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=1100,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "gpu.md").read_text() in done.stdout


def test_a_pass_that_would_say_nothing_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, said in (([], "no CUDA device"), (["--tiny"], "name another folder")):
        with pytest.raises(SystemExit) as ended:
            main(["--device", "cpu", *arguments])
        assert ended.value.code == 2 and said in capsys.readouterr().err


def test_a_stage_that_was_cut_short_has_its_place_in_the_table() -> None:
    gpu = {"name": "a GPU", "memory_gib": 79.1, "driver": "580"}
    known = {"rank": 16, "layers": 32, "tokens": 4096, "parameters_in_products": 7e9, "bf16_flops": 8e14}
    cut = {
        "function": {"float32, residual": {"out_of_memory": "OutOfMemoryError: 9 GiB"}},
        "decompositions": {
            **known,
            "linears": 224,
            "aim": {"seconds": 2.0, "loss": 1e-3},
            "methods": {"ours": {"seconds": None, "shapes": {"4096×4096": {"out_of_memory": "9 GiB"}}}},
        },
        "training": {**known, "PiSSA, without checkpointing": {"out_of_memory": "OutOfMemoryError: 9 GiB | more"}},
        "initialisation": known,
        "properties": {"held": 1, "of": 28, "failed": {"first": "AssertionError"}, "skipped": {}, "seconds": {}},
        "quantised": {},
    }
    stages = {stage.name: ended(stage, "timed out", "ended after its 45 s", 45, cut[stage.name]) for stage in STAGES}
    document = {
        "sizes": "full",
        "began": "2026-01-01T00:00:00",
        "seconds": 480.0,
        "versions": {"torch": "2.11"},
        "missing": ["trl"],
        "hardware": {"processor": "a CPU", "gpu": gpu},
        "stages": stages,
    }
    text = table(document)
    assert "a GPU, 79.1 GiB, driver 580; a CPU. torch 2.11." in text and "Not installed: trl." in text
    assert text.count("timed out: ended after its 45 s") == len(STAGES)
    assert "out of memory: OutOfMemoryError: 9 GiB \\| more" in text
    assert "failed: first: AssertionError" in text


def test_the_page_is_what_the_last_results_say() -> None:
    document = read(RESULTS)
    assert PAGE.read_text(encoding="utf-8") == page(document)
    assert document is None or (document["sizes"] == "full" and document["hardware"]["gpu"])
