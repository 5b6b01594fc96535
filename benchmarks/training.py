"""What a training step costs: ours against TRL's SFTTrainer with PEFT's LoRA, on the same rows of GSM8K.

    python benchmarks/training.py [--model DIR] [--rows 24] [--rounds 2] [--launcher "taskset -c 1"] [--only NAME,NAME]

    ours            PiSSA in placement "residual", as `pissa train` runs it
    trl, grouped    SFTTrainer with a LoRA, rows grouped by length
    trl             the same without grouping
    padded, packed  ours, all rows in one step, as padded batches or packed into rows of 512 tokens

Rank 16 on all linear layers, 8 rows a step, fp32, one thread, CPU seconds. Every contender takes the same rows twice,
in an epoch that is not counted and one that is, so all compute the same tokens, whatever their batches are. Each runs
in a process of its own, whose peak memory is its own too, and they take turns, round by round. Results are added to
`benchmarks/results/training.json` turn by turn, so that a pass can be made in parts.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import resource
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).with_name("results") / "training.json"
RANK, BATCH, LENGTH = 16, 8, 512
STEPWISE = ("ours", "trl, grouped", "trl")
AT_ONCE = ("padded", "packed")


def rows_of_gsm8k(count: int) -> list[dict[str, str]]:
    """Evenly spread rows of the training split, as Alpaca rows."""
    file = Path(os.environ["PISSA_DATA"]) / "gsm8k" / "train.jsonl.gz"
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    chosen = [rows[number * len(rows) // count] for number in range(count)]
    return [{"instruction": row["question"], "output": row["answer"]} for row in chosen]


def clock() -> Any:
    """A callback that notes the CPU seconds and the loss of each step."""
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.seconds: list[float] = []
            self.losses: list[float] = []

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.started = time.process_time()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.seconds.append(time.process_time() - self.started)

        def on_log(self, _args: Any, _state: Any, _control: Any, logs: Any = None, **__: Any) -> None:
            if logs and "loss" in logs:
                self.losses.append(float(logs["loss"]))

    return Clock()


def run_ours(name: str, model: str, rows: list[dict[str, str]], out: Path, watch: Any) -> None:
    """Two epochs by `pissa train`."""
    from pissa import Recipe, train

    settings: dict[str, Any] = {"batch_size": BATCH, "micro_batch_size": BATCH, "learning_rate": 2e-5}
    if name in AT_ONCE:
        # the second step has the loss of the first; all packs are one step, however many there are
        micro = 1 if name == "packed" else BATCH
        settings = {"batch_size": len(rows), "micro_batch_size": micro, "learning_rate": 1e-12, "packing": micro == 1}
    recipe = Recipe(rank=RANK, dtype="fp32", template="alpaca", max_length=LENGTH, epochs=2, save_every=999, **settings)
    train(model, rows, out, recipe, quiet=True, callbacks=[watch])


def run_trl(name: str, source: str, rows: list[dict[str, str]], out: Path, watch: Any) -> None:
    """Two epochs by SFTTrainer."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    from pissa.data.prompts import prompt_text
    from pissa.data.rows import examples_from_rows

    tokenizer = AutoTokenizer.from_pretrained(source)
    pairs = [
        {"prompt": prompt_text(example, tokenizer, "alpaca"), "completion": example.response}
        for example in examples_from_rows(rows)
    ]
    grouped = {"train_sampling_strategy": "group_by_length"} if name == "trl, grouped" else {}
    settings = SFTConfig(
        output_dir=str(out),
        num_train_epochs=2,
        per_device_train_batch_size=BATCH,
        max_length=LENGTH,
        learning_rate=2e-5,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        **grouped,
    )
    SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(source, dtype="float32"),
        args=settings,
        train_dataset=Dataset.from_list(pairs),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear"),
        callbacks=[watch],
    ).train()


def measure(name: str, model: str, count: int) -> dict[str, Any]:
    """One contender's turn, in this process."""
    import torch

    torch.set_num_threads(1)
    rows, watch = rows_of_gsm8k(count), clock()
    with tempfile.TemporaryDirectory() as folder:
        run = run_trl if name.startswith("trl") else run_ours
        run(name, model, rows, Path(folder) / "run", watch)
    counted = watch.seconds[len(watch.seconds) // 2 :]
    return {
        "contender": name,
        "seconds_per_step": sum(counted) / len(counted),
        "seconds_per_epoch": sum(counted),
        "loss": statistics.mean(watch.losses[len(watch.losses) // 2 :]),
        "peak_GiB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }


def tokens_of(model: str, count: int) -> int:
    """Tokens of all rows, without padding."""
    from transformers import AutoTokenizer

    from pissa.data.encode import encode
    from pissa.data.rows import examples_from_rows

    tokenizer = AutoTokenizer.from_pretrained(model)
    examples = examples_from_rows(rows_of_gsm8k(count))
    return sum(encode(examples, tokenizer, template="alpaca", max_length=LENGTH).lengths)


def summary(turns: list[dict[str, Any]], tokens: int) -> dict[str, Any]:
    """Medians of each contender, and ours against TRL's best."""
    found: dict[str, Any] = {}
    for name in dict.fromkeys(turn["contender"] for turn in turns):
        mine = [turn for turn in turns if turn["contender"] == name]
        figures = {key: statistics.median(turn[key] for turn in mine) for key in mine[0] if key != "contender"}
        found[name] = {**figures, "tokens_per_second": tokens / figures["seconds_per_epoch"], "turns": len(mine)}
    if all(name in found for name in STEPWISE):
        best = min(STEPWISE[1:], key=lambda name: found[name]["seconds_per_epoch"])
        pairs = {"seconds": "seconds_per_epoch", "memory": "peak_GiB"}
        found["ours over trl's best"] = {key: found["ours"][name] / found[best][name] for key, name in pairs.items()}
    return found


def main() -> None:
    """Let the contenders take turns."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--rows", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--launcher", default="", help="words before each turn's command")
    parser.add_argument("--only", default=",".join(name.replace(", ", "-") for name in (*STEPWISE, *AT_ONCE)))
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--turn", help=argparse.SUPPRESS)
    options = parser.parse_args()
    from pissa.lab.models import smollm2

    model = options.model or str(smollm2())
    if options.turn:
        print(json.dumps(measure(options.turn, model, options.rows)))
        return
    from pissa.provenance import hardware, package_versions

    names = [name.replace("trl-", "trl, ") for name in options.only.split(",")]
    settings = {"model": Path(model).name, "rows": options.rows, "rank": RANK, "batch": BATCH, "max_length": LENGTH}
    turns: list[dict[str, Any]] = []
    if options.out.is_file() and (kept := json.loads(options.out.read_text()))["settings"] == settings:
        turns = kept["turns"]
    tokens = tokens_of(model, options.rows)
    for _ in range(options.rounds):
        for name in names:
            command = [sys.executable, __file__, "--turn", name, "--model", model, "--rows", str(options.rows)]
            done = subprocess.run(
                [*shlex.split(options.launcher), *command], stdout=subprocess.PIPE, text=True, check=True
            )
            turns.append(json.loads(done.stdout.splitlines()[-1]))
            print(turns[-1], flush=True)
            document = {"settings": settings, "tokens": tokens, "summary": summary(turns, tokens), "turns": turns}
            document |= {"versions": package_versions(), "hardware": hardware()}
            options.out.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(summary(turns, tokens), indent=2))


if __name__ == "__main__":
    main()
