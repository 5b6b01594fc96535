"""Understanding tasks of GLUE with nine ways to fine-tune an encoder: the paper's table 3 in small.

All methods train the head (and the pooler) in full and have rank 8 on query, key and value, or as many parameters in
bottlenecks. The encoder is all-MiniLM-L6-v2, by default its first two blocks; `--model microsoft/deberta-v3-base` is
the paper's. Each method has a learning rate usual for a run so short.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ...checkpoint.hub import first_line
from ...config import PissaConfig
from ...errors import CheckpointError
from ...evaluate.glue import GLUE, GlueRow, GlueTask, read_glue, score
from ...live.apply import adapt
from ..bottleneck import add_bottlenecks
from ..figures import colour_of, new_figure
from ..fit import fit
from ..interval import mean_interval, paired_difference
from ..load import load_any_tokenizer
from ..models import cache_directory
from .judge import by_seed, sentence, verdict_of
from .study import Outcome, Settings, Study

NAME = "glue"
RATES = {
    "full": 2e-4,
    "bitfit": 5e-3,
    "houlsby": 2e-3,
    "pfeiffer": 2e-3,
    "lora-gaussian": 2e-3,
    "lora-kaiming": 2e-3,
    "dora": 2e-3,
    "adalora": 5e-3,
    "pissa": 1e-3,
}
"""Method -> its learning rate for a short run."""
METHODS = tuple(RATES)
ADAPTED = r".*\.(query|key|value)(_proj)?"
HEAD = ("classifier", "pooler")
RANK = 8
BLOCKS = 2
MINILM = "all-minilm-l6-v2"
MINILM_ID = "sentence-transformers/all-MiniLM-L6-v2"


def run(settings: Settings) -> Outcome:
    """Every method on every task with every seed."""
    names = ["SST-2", "STS-B"] if settings.scale == "quick" else list(GLUE)
    steps = settings.pick(quick=2, default=25, full=2000)
    batch = settings.pick(quick=4, default=16, full=32)
    blocks = settings.pick(quick=2, default=BLOCKS, full=None) if settings.model is None else None
    keys = [
        {"task": task, "method": method, "seed": seed, "steps": steps, "batch": batch, "blocks": blocks}
        for task in names
        for method in METHODS
        for seed in settings.seeds
    ]
    rows = settings.grid(NAME, keys, lambda **key: _measure(settings, **key))
    table = {
        task: {
            method: {
                metric: mean_interval(
                    by_seed(rows, lambda row, m=metric: row["scores"][m], task=task, method=method)
                ).as_dict()
                for metric in GLUE[task].metrics
            }
            for method in METHODS
        }
        for task in names
    }
    average = {method: by_seed(rows, _first, method=method) for method in METHODS}
    parts = {
        f"PiSSA − {other}": paired_difference(average["pissa"], average[other]) for other in METHODS if other != "pissa"
    }
    results = {
        "runs": rows,
        "table": table,
        "average": {method: mean_interval(values).as_dict() for method, values in average.items()},
        "parts": {name: part.as_dict() for name, part in parts.items()},
        "learning_rates": RATES,
    }
    figures = (
        f"mean of {', '.join(f'{task} {GLUE[task].metrics[0]}' for task in names)} after {steps} steps: "
        + ", ".join(f"{method} {entry['mean']:.3f}" for method, entry in results["average"].items())
        + f"; {sentence(parts)}"
    )
    return Outcome(results, verdict_of(parts), figures)


def _first(row: Mapping[str, Any]) -> float:
    return row["scores"][GLUE[row["task"]].metrics[0]]


def _measure(
    settings: Settings, task: str, method: str, seed: int, steps: int, batch: int, blocks: int | None
) -> dict[str, Any]:
    """Train one model and score it on the development set, or on its first rows."""
    chosen = GLUE[task]
    tokenizer, model = encoder(settings, chosen, blocks, seed)
    train, test = _rows(settings, task)
    prepared = prepare(model, method, seed)
    if torch.cuda.is_available():
        prepared.cuda()
    trained = sum(p.numel() for name, p in prepared.named_parameters() if p.requires_grad and not _is_head(name))
    seen = fit(
        prepared.train(),
        _batches(train, tokenizer, chosen, batch, seed),
        lambda model, inputs: model(**inputs).loss,
        learning_rate=RATES[method],
        steps=steps,
        schedule="linear",
    )
    test = test[: settings.pick(quick=8, default=200, full=len(test))]
    return {
        "scores": score(chosen, predict(prepared, tokenizer, chosen, test), [row.label for row in test]),
        "losses": seen.losses,
        "first_grad_norm": seen.grad_norms[0],
        "trained_parameters": trained,
    }


def _is_head(name: str) -> bool:
    return any(part in name for part in HEAD)


def prepare(model: Any, method: str, seed: int) -> Any:
    """A classifier with what a method trains set to be trained; the head always is."""
    if method == "full":
        return model.requires_grad_(True)
    if method in ("houlsby", "pfeiffer"):
        add_bottlenecks(model, method, RANK, seed)  # pyright: ignore[reportArgumentType]
    elif method == "bitfit":
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.endswith("bias"))
    else:
        config = PissaConfig(
            rank=RANK,
            method="pissa" if method == "pissa" else "lora-gaussian" if method == "lora-gaussian" else "lora-kaiming",
            use_dora=method == "dora",
            use_adalora=method == "adalora",
            target_modules=ADAPTED,
            modules_to_save=tuple(name for name in HEAD if any(n.endswith(name) for n, _ in model.named_modules())),
            seed=seed,
        )
        return adapt(model, config)
    for name, parameter in model.named_parameters():
        if _is_head(name):
            parameter.requires_grad_(True)
    return model


@torch.no_grad()
def predict(model: Any, tokenizer: Any, task: GlueTask, rows: Sequence[GlueRow]) -> list[float]:
    """Classes, or values, in evaluation mode."""
    model.eval()
    found: list[float] = []
    order = sorted(range(len(rows)), key=lambda place: sum(map(len, rows[place].texts)))
    for start in range(0, len(order), 32):
        part = [rows[place] for place in order[start : start + 32]]
        inputs = _inputs(part, tokenizer, task)
        inputs.pop("labels")
        scores = model(**{name: value.to(model.device) for name, value in inputs.items()}).logits.float().cpu()
        found += (scores[:, 0] if task.classes == 1 else scores.argmax(-1)).tolist()
    by_place = dict(zip(order, found, strict=True))
    return [float(by_place[place]) for place in range(len(rows))]


def _batches(
    rows: Sequence[GlueRow], tokenizer: Any, task: GlueTask, size: int, seed: int
) -> Iterator[dict[str, Tensor]]:
    draw = random.Random(seed)
    while True:
        order = sorted(range(len(rows)), key=lambda _: draw.random())
        for start in range(0, len(order) - size + 1, size):
            yield _inputs([rows[place] for place in order[start : start + size]], tokenizer, task)


def _inputs(rows: Sequence[GlueRow], tokenizer: Any, task: GlueTask) -> dict[str, Tensor]:
    texts = [list(column) for column in zip(*(row.texts for row in rows), strict=True)]
    found = dict(tokenizer(*texts, padding=True, truncation=True, max_length=128, return_tensors="pt"))
    kind = torch.float32 if task.classes == 1 else torch.int64
    return {**found, "labels": torch.tensor([row.label / task.most for row in rows], dtype=kind)}


def encoder(settings: Settings, task: GlueTask, blocks: int | None, seed: int) -> tuple[Any, Any]:
    """Tokenizer and classifier with a random head of this seed; a tiny random encoder in a quick pass."""
    from transformers import AutoModelForSequenceClassification

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if settings.scale == "quick" and settings.model is None:
            return tiny_encoder(task.classes)
        at_hand = cache_directory() / MINILM
        source = settings.model or (str(at_hand) if at_hand.is_dir() else MINILM_ID)
        shorter = {} if blocks is None else {"num_hidden_layers": blocks}
        try:
            model = AutoModelForSequenceClassification.from_pretrained(
                source, num_labels=task.classes, dtype=torch.float32, **shorter
            )
        except (OSError, ValueError) as error:
            raise CheckpointError(f"cannot load an encoder from {source}: {first_line(error)}") from error
    return _tokenizer(source), model


@lru_cache(maxsize=1)
def _tokenizer(source: str) -> Any:
    return load_any_tokenizer(source)


def tiny_encoder(classes: int) -> tuple[Any, Any]:
    """A random BERT over letters."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

    words = ["[PAD]", "[UNK]", *"abcdefghijklmnopqrstuvwxyz"]
    core = Tokenizer(models.WordLevel({word: place for place, word in enumerate(words)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="[PAD]", unk_token="[UNK]")
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=128,
    )
    config.num_labels = classes
    return tokenizer, BertForSequenceClassification(config)


@lru_cache(maxsize=3)
def _read(task: str, directory: Any) -> tuple[list[GlueRow], list[GlueRow]]:
    return read_glue(GLUE[task], directory), read_glue(GLUE[task], directory, "dev")


def _rows(settings: Settings, task: str) -> tuple[list[GlueRow], list[GlueRow]]:
    """Training and development rows; a few letters in a quick pass, which needs no file."""
    if settings.scale != "quick":
        return _read(task, settings.data_set("glue"))
    words = ["good", "bad", "fine", "poor"]
    columns = len(GLUE[task].texts)
    rows = [GlueRow((words[i % 4],) * columns, float(i % 2)) for i in range(16)]
    return rows, rows[:8]


def draw(results: Mapping[str, Any]) -> Any:
    """Every task's first metric by method, its seeds as dots, and the mean over tasks."""
    tasks = list(results["table"])
    figure, panels = new_figure(1, len(tasks) + 1, width=3.6)
    entries = [{m: e[GLUE[task].metrics[0]] for m, e in results["table"][task].items()} for task in tasks]
    titles = [f"{task}: {GLUE[task].metrics[0]}" for task in tasks]
    for panel, table, title in zip(panels, [*entries, results["average"]], [*titles, "mean"], strict=True):
        for place, method in enumerate(METHODS):
            colour = colour_of("lora" if method == "lora-kaiming" else method, place)
            panel.barh(place, table[method]["mean"], color=colour)
            panel.plot(table[method]["values"], [place] * len(table[method]["values"]), "k.", markersize=4)
        panel.set_yticks(range(len(METHODS)), METHODS)
        panel.invert_yaxis()
        low = min(min(entry["values"]) for entry in table.values())
        panel.set_xlim(left=max(low - 0.05, 0) if low > 0 else None)
        panel.set_title(title)
    return figure


STUDY = Study(
    NAME,
    "On GLUE PiSSA beats full fine-tuning, BitFit, bottleneck adapters, LoRA, DoRA and AdaLoRA (PiSSA, table 3)",
    run,
    draw,
    minutes=7,
)
