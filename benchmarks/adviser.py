"""The learning-rate adviser against swept optima: `learning_rate: auto` for methods, ranks, tasks and two models.

    swept optimum     of the loss on held-out rows after a whole run (AdamW, cosine, warm-up 0.03, clipping at 1): rates
                      a factor √10 apart until the best one has worse ones on both sides, then half as far on both of
                      its sides; the vertex of the parabola in log(rate) through the best of all and its neighbours
    factor            estimate / optimum, or its inverse: at least 1. Met: at most 2

The multiple that the adviser takes of what it finds was chosen on the settings marked "calibration"; the others are the
test. The small model is a LLaMA of 1.1 M parameters that is first pretrained here, on text, problems and instructions.
Every run is kept as it is made; the same command goes on where it stopped.

    python benchmarks/adviser.py --data DATA --work WORK --out benchmarks/results/adviser.json

DATA holds wikitext2/valid.txt.gz, gsm8k/train.jsonl.gz and alpaca/alpaca_en_demo.json.gz.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from pissa.adapted.adapt import adapt
from pissa.checkpoint.disk.write import write_json
from pissa.checkpoint.source.load import load_base, load_tokenizer
from pissa.data.conversation import Example
from pissa.data.encode import Collator, Encoded, encode
from pissa.data.read import read_examples
from pissa.data.rows import examples_from_rows
from pissa.data.text_files import texts_of
from pissa.errors import TrainingError
from pissa.evaluation.loss import held_out_loss
from pissa.lab.demo.arithmetic import make_problems
from pissa.lab.models import smollm2
from pissa.provenance import hardware, package_versions
from pissa.training.loss import response_loss
from pissa.training.rate_adviser import MULTIPLE, advise, probe_data
from pissa.training.rate_search import next_on_grid, vertex
from pissa.training.recipe import Recipe
from pissa.training.run import quieten
from pissa.training.sampler import LengthGroupedBatches
from studies.fit import fit

STEPS, BATCH, LENGTH, TRAIN, HELD_OUT = 16, 4, 128, 400, 64
START = {"small": {"lora": 1e-2, "pissa": 1e-3}, "SmolLM2": {"lora": 2e-3, "pissa": 2e-4}}
"""Where a sweep begins; it ends where the losses say."""


@dataclass(frozen=True)
class Setting:
    """What is trained."""

    model: str
    task: str
    method: str
    rank: int
    steps: int = STEPS
    seeds: int = 1
    held_out: int = HELD_OUT // 2
    calibration: bool = False

    @property
    def name(self) -> str:
        """One line."""
        return f"{self.model}, {self.task}, {self.method} r{self.rank}, {self.steps} steps"

    @property
    def start(self) -> float:
        """Where its sweep begins."""
        family = "lora" if self.method in ("lora", "dora") else "pissa"
        return START[self.model][family]


SETTINGS = (
    Setting("small", "arithmetic", "lora", 4, seeds=2, held_out=HELD_OUT, calibration=True),
    Setting("small", "arithmetic", "lora", 16, seeds=2, held_out=HELD_OUT, calibration=True),
    Setting("small", "arithmetic", "pissa", 4, seeds=2, held_out=HELD_OUT, calibration=True),
    Setting("small", "arithmetic", "pissa", 16),
    *(
        Setting("small", task, method, rank)
        for task in ("gsm8k", "alpaca")
        for method in ("lora", "pissa")
        for rank in (4, 16)
    ),
    Setting("small", "gsm8k", "dora", 8),
    Setting("small", "gsm8k", "full", 16),
    Setting("small", "alpaca", "pissa", 64),
    Setting("SmolLM2", "arithmetic", "lora", 16, steps=12, held_out=16),
    Setting("SmolLM2", "arithmetic", "pissa", 16, steps=12, held_out=16),
    Setting("small", "gsm8k", "lora", 16, steps=64),
    Setting("small", "gsm8k", "pissa", 16, steps=64),
)


class Trial:
    """A setting's model and data; every run begins at the same weights."""

    def __init__(self, setting: Setting, data: Path, work: Path) -> None:
        path = small_model(data, work) if setting.model == "small" else smollm2()
        self.setting = setting
        self.tokenizer = load_tokenizer(str(path))
        train, held_out = task_rows(setting.task, data)
        self.held_out = held_out[: setting.held_out]
        self.encoded: Encoded = encode(train, self.tokenizer, template="none", max_length=LENGTH)
        self.recipe = Recipe(method=setting.method, rank=setting.rank, batch_size=BATCH, micro_batch_size=BATCH)  # pyright: ignore[reportArgumentType]
        base = load_base(str(path), dtype=torch.float32)
        self.model: Any = adapt(base, self.recipe.pissa_config()) if self.recipe.adapts else base.requires_grad_(True)
        self.model.train()
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.start = [p.detach().clone() for p in self.trained]

    def estimate(self) -> dict[str, Any]:
        """What `learning_rate: auto` finds."""
        return asdict(
            advise(self.model, probe_data(self.encoded, self.recipe, self.tokenizer.pad_token_id), self.recipe)
        )

    def run(self, rate: float) -> float:
        """The loss on held-out rows after a run, the mean over seeds; infinite where one diverged."""
        return statistics.fmean(self._run(rate, seed) for seed in range(self.setting.seeds))

    def _run(self, rate: float, seed: int) -> float:
        head = self.model.get_output_embeddings()

        def loss(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
            summed, count = response_loss(model, head, batch)
            return summed / max(count, 1)

        with torch.no_grad():
            for parameter, value in zip(self.trained, self.start, strict=True):
                parameter.copy_(value)
        try:
            fit(self.model, self._batches(seed), loss, learning_rate=rate, steps=self.setting.steps)
            found = held_out_loss(self.model, self.tokenizer, self.held_out, template="none", max_length=LENGTH).mean
        except TrainingError:
            return math.inf
        finally:
            with torch.no_grad():
                for parameter, value in zip(self.trained, self.start, strict=True):
                    parameter.copy_(value)
        return found if math.isfinite(found) else math.inf

    def _batches(self, seed: int) -> Iterator[dict[str, torch.Tensor]]:
        order = list(LengthGroupedBatches(self.encoded.lengths, BATCH, seed))
        for start in range(0, len(order) - BATCH + 1, BATCH):
            yield Collator(self.tokenizer.pad_token_id)([self.encoded[i] for i in order[start : start + BATCH]])


def task_rows(task: str, data: Path) -> tuple[list[Example], list[Example]]:
    """Rows to learn from, and others."""
    if task == "arithmetic":
        train, held_out = make_problems(0, TRAIN, HELD_OUT)
        return examples_from_rows(train), examples_from_rows(held_out)
    files = {"gsm8k": "gsm8k/train.jsonl.gz", "alpaca": "alpaca/alpaca_en_demo.json.gz"}
    rows = read_examples(data / files[task])[: TRAIN + HELD_OUT]
    return rows[:TRAIN], rows[TRAIN:]


def small_model(data: Path, work: Path) -> Path:
    """A small LLaMA, pretrained once on text that no task's rows are part of."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE
    from tokenizers.trainers import BpeTrainer
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    out = work / "small"
    if (out / "config.json").is_file():
        return out
    texts = [text for text in texts_of(str(data / "wikitext2/valid.txt.gz")) if len(text) > 80]
    rows = [*read_examples(data / "gsm8k/train.jsonl.gz")[2000:5000]]
    rows += read_examples(data / "alpaca/alpaca_en_demo.json.gz")[500:]
    texts += [f"{row.messages[0].content}\n{row.response}" for row in rows]
    core = Tokenizer(BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    core.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    special = ["<pad>", "<bos>", "<eos>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        texts, BpeTrainer(vocab_size=1024, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token=special[0], bos_token=special[1], eos_token=special[2]
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1024, hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=512, tie_word_embeddings=False, pad_token_id=0, bos_token_id=1,
        eos_token_id=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    random.Random(0).shuffle(texts)
    ids = torch.tensor([token for text in texts for token in [*tokenizer(text)["input_ids"], 2]])
    blocks = ids[: len(ids) // 128 * 128].view(-1, 128)
    draw = torch.Generator().manual_seed(0)
    batches = (blocks[torch.randint(0, len(blocks), (12,), generator=draw)] for _ in range(400))
    fit(model, batches, lambda net, batch: net(input_ids=batch, labels=batch).loss, learning_rate=3e-3, steps=400)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return out


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = ["| setting | part | swept optimum | estimate | factor | met |", "|---|---|---|---|---|---|"]
    for row in rows:
        part = "calibration" if row["setting"]["calibration"] else "test"
        lines.append(
            f"| {row['name']} | {part} | {row['optimum']:.2g} | {row['estimate']['learning_rate']:.2g} | "
            f"{row['factor']:.2f} | {'yes' if row['factor'] <= 2 else '**no**'} |"
        )
    return "\n".join(lines)


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """How many estimates are within a factor 2, by part."""
    parts = {"test": [r for r in rows if not r["setting"]["calibration"]]}
    parts["calibration"] = [r for r in rows if r["setting"]["calibration"]]
    return {
        part: {
            "settings": len(found),
            "within_factor_2": sum(row["factor"] <= 2 for row in found),
            "median_factor": statistics.median(row["factor"] for row in found) if found else None,
        }
        for part, found in parts.items()
    }


def main() -> None:
    """Every setting that is not there yet, then the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True, help="for the small model and finished runs")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", default="", help="settings whose name holds this")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    quieten()
    arguments.work.mkdir(parents=True, exist_ok=True)
    cells_file = arguments.work / "cells.json"
    cells: dict[str, Any] = json.loads(cells_file.read_text()) if cells_file.is_file() else {}
    for setting in SETTINGS:
        if arguments.only not in setting.name:
            continue
        cell = cells.setdefault(setting.name, {"tried": {}})
        trial = None
        while True:
            tried = {float(rate): loss if loss is not None else math.inf for rate, loss in cell["tried"].items()}
            rate = next_on_grid(tried, setting.start)
            if rate is None and "estimate" in cell:
                break
            trial = trial or Trial(setting, arguments.data, arguments.work)
            if "estimate" not in cell:
                cell["estimate"] = trial.estimate()
            if rate is not None:
                loss = trial.run(rate)
                cell["tried"][f"{rate:g}"] = loss if math.isfinite(loss) else None
            write_json(cells_file, cells)
        write_results(arguments.out, cells)
        print(setting.name, vertex(tried), cell["estimate"]["learning_rate"], flush=True)


def write_results(out: Path, cells: dict[str, Any]) -> None:
    """The JSON, and the table beside it, from all settings that are done."""
    rows = []
    for setting in SETTINGS:
        cell = cells.get(setting.name, {})
        tried = {float(rate): loss if loss is not None else math.inf for rate, loss in cell.get("tried", {}).items()}
        if "estimate" not in cell or next_on_grid(tried, setting.start) is not None:
            continue
        # the multiple may change, and what it multiplies does not
        estimate = {**cell["estimate"], "learning_rate": float(f"{MULTIPLE * cell['estimate']['best_probe']:.2g}")}
        best = vertex(tried)
        factor = max(estimate["learning_rate"] / best, best / estimate["learning_rate"])
        rows.append(
            {
                "name": setting.name,
                "setting": asdict(setting),
                "optimum": best,
                "estimate": estimate,
                "factor": factor,
                "tried": cell["tried"],
            }
        )
    about = {"steps": STEPS, "batch": BATCH, "max_length": LENGTH, "train_rows": TRAIN, "held_out_rows": HELD_OUT}
    document = {
        "command": "python benchmarks/adviser.py --data DATA --work WORK --out benchmarks/results/adviser.json",
        "multiple": MULTIPLE,
        **about,
        "summary": summary(rows),
        "rows": rows,
        "versions": package_versions(),
        "hardware": hardware(),
    }
    write_json(out, document)
    out.with_suffix(".md").write_text(f"{table(rows)}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
