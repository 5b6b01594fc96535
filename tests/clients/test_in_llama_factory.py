"""LLaMA-Factory trains on from a run of ours, and trains what `pissa init` has split; its result is exported for the
base."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from client_page import Record
from environments import LLAMA_FACTORY, interpreter
from peft import PeftModel
from subjects import ROWS, Subject, greedy, prompts, scored, split_checkpoint
from transformers import AutoModelForCausalLM

from pissa import export_lora

pytestmark = pytest.mark.clients
ENVIRONMENT = LLAMA_FACTORY
BOUND = 1e-4
"""Rounding in fp32."""
STEPS = 3


def trained(place: Path, model: Path, adapter: Path) -> tuple[Path, list[float]]:
    """A few steps of LLaMA-Factory's on an adapter; its directory and the losses."""
    data, out = place / "data", place / "factory"
    data.mkdir()
    (data / "rows.json").write_text(json.dumps([{**row, "input": ""} for row in ROWS]))
    (data / "dataset_info.json").write_text(json.dumps({"rows": {"file_name": "rows.json"}}))
    settings: dict[str, Any] = {
        "model_name_or_path": str(model), "adapter_name_or_path": str(adapter), "stage": "sft", "do_train": True,
        "finetuning_type": "lora", "dataset": "rows", "dataset_dir": str(data), "template": "default",
        "output_dir": str(out), "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1,
        "max_steps": STEPS, "learning_rate": 1e-3, "lr_scheduler_type": "constant", "logging_steps": 1,
        "use_cpu": True, "report_to": "none", "overwrite_cache": True, "cutoff_len": 128, "seed": 0,
        "preprocessing_num_workers": 1, "dataloader_num_workers": 0, "create_new_adapter": False,
    }  # fmt: skip
    (place / "train.yaml").write_text(json.dumps(settings))  # JSON is YAML, and its own reader of .json fails
    program = interpreter(LLAMA_FACTORY).parent / "llamafactory-cli"
    environment = {**os.environ, "DISABLE_VERSION_CHECK": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [program, "train", place / "train.yaml"], capture_output=True, text=True, timeout=3000, check=False,
        env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    log = [json.loads(line) for line in (out / "trainer_log.jsonl").read_text().splitlines()]
    return out, [line["loss"] for line in log if "loss" in line]


def loaded(base: Path, adapter: Path) -> Any:
    """A base with an adapter, by transformers and PEFT."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return PeftModel.from_pretrained(model, str(adapter)).eval()


def described(losses: list[float]) -> str:
    """A run's losses for people."""
    return f"losses {', '.join(f'{loss:.3f}' for loss in losses)}"


def apart(found: dict[str, Any], other: dict[str, Any]) -> float:
    """The largest difference of a log-probability."""
    return float((torch.tensor(found["logprobs"]) - torch.tensor(other["logprobs"])).abs().max())


def test_it_continues_a_run(record: Record, tiny: Subject, tmp_path: Path) -> None:
    run = tiny.adapters["plain"]
    out, losses = trained(tmp_path, tiny.base, run)
    reference = greedy(loaded(tiny.base, out), prompts(tiny.base))
    moved = scored(loaded(tiny.base, run), reference)
    moves = f"a log-probability moved by {apart(moved, reference):.2g}"
    learned = len(losses) == STEPS and losses[-1] < losses[0] and apart(moved, reference) > 10 * BOUND
    record.note("continues our run", tiny.name, f"{described(losses)}; {moves}", learned)
    export_lora(out, tmp_path / "lora")
    found = scored(loaded(tiny.base, tmp_path / "lora"), reference)
    record.compare("pissa export of what it trained on", tiny.name, found, reference, bound=BOUND, base=moved)


def test_it_trains_what_pissa_init_split(record: Record, tiny: Subject, tmp_path: Path) -> None:
    split = split_checkpoint(tiny.base, tmp_path)
    out, losses = trained(tmp_path, split, split / "pissa_init")
    reference = greedy(loaded(split, out), prompts(tiny.base))
    learned = len(losses) == STEPS and losses[-1] < losses[0]
    record.note("trains on pissa init's output", tiny.name, described(losses), learned)
    export_lora(out, tmp_path / "lora", base=split)
    found = scored(loaded(tiny.base, tmp_path / "lora"), reference)
    base = scored(AutoModelForCausalLM.from_pretrained(tiny.base).eval(), reference)
    record.compare(
        "its adapter as a LoRA for the base (pissa export --base SPLIT)",
        tiny.name,
        found,
        reference,
        bound=BOUND,
        base=base,
    )
