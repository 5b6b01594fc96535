"""Runs of a second: rows, a recipe, and what tests compare of two runs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from pissa.cli.main import run as run_command_line
from pissa.training.recipe import Recipe
from pissa.training.run import RunResult, train
from pissa.training.trainer import RunTrainer
from tiny import logits_of

Row = dict[str, Any]


def rows(count: int = 20) -> list[Row]:
    """Alpaca rows of different lengths."""
    return [
        {"instruction": f"Add {i} and {2 * i}.", "output": "step " * (i * 7 % 11) + f"The answer is: {3 * i}"}
        for i in range(count)
    ]


def write_rows(path: Path, count: int = 20) -> Path:
    """The rows as a .jsonl file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows(count)), encoding="utf-8")
    return path


def recipe(**settings: Any) -> Recipe:
    """Six steps that visibly move the tiny model."""
    usual: dict[str, Any] = {
        "rank": 4,
        "learning_rate": 5e-3,
        "batch_size": 4,
        "micro_batch_size": 4,
        "max_steps": 6,
        "save_every": 2,
        "dtype": "fp32",
        "template": "none",
    }
    return Recipe(**{**usual, **settings})


def run(base: Path, out: Path, settings: Recipe, data: Any = None) -> RunResult:
    """Train without a bar."""
    return train(str(base), rows() if data is None else data, out, settings, quiet=True)


def flags(settings: Mapping[str, Any]) -> list[str]:
    """Settings as command-line flags."""
    return [text for name, value in settings.items() for text in (f"--{name.replace('_', '-')}", str(value))]


def arguments(base: Path, data: Path, out: Path, settings: Recipe) -> list[str]:
    """Those of `pissa` that train with these settings."""
    usual = Recipe()
    given = {
        name: value
        for name, value in settings.as_dict().items()
        if value != getattr(usual, name) and not isinstance(value, bool)
    }
    where = ["train", str(base), "--data", str(data), "--out", str(out)]
    return [*where, *flags(given)]


def command(base: Path, data: Path, out: Path, settings: Recipe) -> list[str]:
    """`pissa train` with these settings, as a command."""
    return [sys.executable, "-W", "ignore", "-m", "pissa", *arguments(base, data, out, settings)]


def in_process(given: Sequence[str], capsys: pytest.CaptureFixture[str]) -> subprocess.CompletedProcess[str]:
    """What `pissa` with these arguments says and exits with, run in the test's own process."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        run_command_line([*given])
    said = capsys.readouterr()
    return subprocess.CompletedProcess(given, int(stopped.value.code or 0), said.out, said.err)


def finish(arguments: Sequence[str], **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command to its end; one that does not come is killed with all its children."""
    with subprocess.Popen(
        arguments,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            out, err = process.communicate(timeout=180)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    return subprocess.CompletedProcess(arguments, process.returncode, out, err)


def scripted(monkeypatch: pytest.MonkeyPatch, losses: dict[int, float]) -> None:
    """Let the validation loss at each step be what a test needs it to be."""
    measure = RunTrainer.evaluation_loop

    def pretend(self: RunTrainer, *arguments: Any, **options: Any) -> Any:
        output = measure(self, *arguments, **options)
        output.metrics["eval_loss"] = losses[self.state.global_step]
        return output

    monkeypatch.setattr(RunTrainer, "evaluation_loop", pretend)


def listing(directory: Path) -> set[str]:
    """The names in a directory."""
    return {path.name for path in directory.iterdir()}


def log_of(out: Path) -> list[dict[str, float]]:
    """The run's log without what depends on the clock."""
    lines = (out / "state" / "log.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    return [{key: value for key, value in record.items() if key != "tokens_per_second"} for record in records]


def result_tensors(out: Path) -> dict[str, Tensor]:
    """What a run wrote: its LoRA, or its model."""
    lora = out / "adapter_model.safetensors"
    return load_file(lora if lora.is_file() else out / "model.safetensors")


def plain_model(base: Path, adapter: Path) -> nn.Module:
    """The adapter on the untouched base, through PEFT alone."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return PeftModel.from_pretrained(model, str(adapter)).eval()


def plain_logits(base: Path, adapter: Path) -> Tensor:
    """Logits of the adapter on the untouched base, through PEFT alone."""
    return logits_of(plain_model(base, adapter))
