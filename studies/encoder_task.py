"""What the study of GLUE trains: rows, an encoder with a classifier, nine ways to train it, and what it answers."""

from __future__ import annotations

import copy
import itertools
import random
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from pissa.adapted.adapt import adapt
from pissa.checkpoint.source.no_foreign_code import through_transformers
from pissa.config import PissaConfig
from pissa.lab.load import load_any_tokenizer
from pissa.lab.models import cache_directory
from pissa.training.sampler import LengthGroupedBatches

from .bottleneck import add_bottlenecks
from .glue_files import GLUE, GlueRow, GlueTask, read_glue
from .search import SEARCH_SEED
from .study import Settings

VALIDATION = 256
"""Training rows that a search validates on and no run learns from."""
TRAINING, SCORED = 2048, 512
"""A default pass learns so many rows of each task, and scores so many development rows, at most."""
ADAPTED = r".*\.(query|key|value)(_proj)?"
HEAD = ("classifier", "pooler")
RANK = 8
MINILM = "all-minilm-l6-v2"
MINILM_ID = "sentence-transformers/all-MiniLM-L6-v2"


class Inputs:
    """Rows as a model's inputs: tokens, or the hidden states that frozen lower blocks make of them, computed once."""

    def __init__(self, tokenizer: Any, task: GlueTask, lower: Any = None) -> None:
        self.tokenizer, self.task, self.lower = tokenizer, task, lower
        self.kept: dict[GlueRow, Tensor] = {}

    def __call__(self, rows: Sequence[GlueRow]) -> dict[str, Tensor]:
        """What the model takes, with `labels`: of STS-B in [0, 1]."""
        kind = torch.float32 if self.task.classes == 1 else torch.int64
        labels = torch.tensor([row.label / self.task.most for row in rows], dtype=kind)
        if self.lower is None:
            return {**self._tokens(rows), "labels": labels}
        self._keep([row for row in dict.fromkeys(rows) if row not in self.kept])
        states = [self.kept[row] for row in rows]
        mask = pad_sequence([torch.ones(len(each), dtype=torch.int64) for each in states], batch_first=True)
        return {"inputs_embeds": pad_sequence(states, batch_first=True), "attention_mask": mask, "labels": labels}

    @torch.no_grad()
    def _keep(self, rows: Sequence[GlueRow]) -> None:
        if rows:
            tokens = self._tokens(rows)
            found = self.lower(**tokens).last_hidden_state
            for row, states, mask in zip(rows, found, tokens["attention_mask"], strict=True):
                self.kept[row] = states[mask.bool()]

    def _tokens(self, rows: Sequence[GlueRow]) -> dict[str, Tensor]:
        texts = [list(column) for column in zip(*(row.texts for row in rows), strict=True)]
        return dict(self.tokenizer(*texts, padding=True, truncation=True, max_length=128, return_tensors="pt"))


class Given(nn.Module):
    """Stands in the place of the embeddings and lets hidden states pass."""

    def forward(self, inputs_embeds: Tensor, **_: Any) -> Tensor:
        return inputs_embeds


def cut(model: Any, blocks: int) -> tuple[Any, Any]:
    """Split an encoder with a classifier in two: what is below its last blocks, frozen, and the rest, which takes the
    first one's hidden states as `inputs_embeds`. The model is used up."""
    lower = copy.copy(model.base_model)
    lower._modules = dict(lower._modules)
    lower.encoder = copy.copy(lower.encoder)
    lower.encoder._modules = dict(lower.encoder._modules)
    layers = model.base_model.encoder.layer
    lower.encoder.layer, lower.pooler = layers[:-blocks], None
    model.base_model.encoder.layer, model.base_model.embeddings = layers[-blocks:], Given()
    return lower.eval().requires_grad_(False), model


def prepared(settings: Settings, task: GlueTask, method: str, blocks: int | None, seed: int) -> tuple[Inputs, Any]:
    """How rows become inputs, and a classifier that is ready to be trained where it is trained.

    Args:
        settings: of the study.
        task: gives the head its size.
        method: how to train.
        blocks: how many of the last blocks are trained; those below are frozen. None for all.
        seed: of the head and whatever else is drawn.
    """
    inputs, model = encoder_above(settings, task, blocks, seed)
    model = prepare(model, method, seed)
    return inputs, model.cuda() if torch.cuda.is_available() else model


def encoder_above(settings: Settings, task: GlueTask, blocks: int | None, seed: int) -> tuple[Inputs, Any]:
    """As `prepared`, of a classifier that no method has been put on."""
    tokenizer, model = encoder(settings, task, seed)
    if blocks is None:
        return Inputs(tokenizer, task), model
    return _inputs(settings.model, task.name, blocks), cut(model, blocks)[1]


@lru_cache(maxsize=3)
def _inputs(source: str | None, task: str, blocks: int) -> Inputs:
    tokenizer, model = _pretrained(source, GLUE[task], seed=0)
    return Inputs(tokenizer, GLUE[task], cut(model, blocks)[0])


def is_head(name: str) -> bool:
    """Whether a parameter is of the classifier or the pooler, which every method trains in full."""
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
        if is_head(name):
            parameter.requires_grad_(True)
    return model


def predict(model: Any, inputs: Inputs, rows: Sequence[GlueRow]) -> list[float]:
    """Classes, or values, in evaluation mode."""
    found = outputs(model, inputs, rows)
    return (found[:, 0] if inputs.task.classes == 1 else found.argmax(-1)).float().tolist()


@torch.no_grad()
def outputs(model: Any, inputs: Inputs, rows: Sequence[GlueRow]) -> Tensor:
    """(n, classes) fp32 on the CPU, in evaluation mode."""
    model.eval()
    order = sorted(range(len(rows)), key=lambda place: length(rows[place]))
    found = []
    for start in range(0, len(order), 32):
        batch = inputs([rows[place] for place in order[start : start + 32]])
        batch.pop("labels")
        found.append(model(**{name: value.to(model.device) for name, value in batch.items()}).logits.float().cpu())
    return torch.cat(found)[torch.tensor(order).argsort()]


def batches(rows: Sequence[GlueRow], inputs: Inputs, size: int, seed: int) -> Iterator[dict[str, Tensor]]:
    """Full batches of rows of similar length, for ever."""
    order = LengthGroupedBatches([length(row) for row in rows], size, seed)
    for epoch in itertools.count():
        order.set_epoch(epoch)
        places = list(order)
        for start in range(0, len(places) - size + 1, size):
            yield inputs([rows[place] for place in places[start : start + size]])


def length(row: GlueRow) -> int:
    """Characters of a row's texts."""
    return sum(map(len, row.texts))


def encoder(settings: Settings, task: GlueTask, seed: int) -> tuple[Any, Any]:
    """Tokenizer and classifier with a random head of this seed; a tiny random encoder in a quick pass."""
    if settings.scale == "quick" and settings.model is None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return tiny_encoder(task.classes)
    return _pretrained(settings.model, task, seed)


def _pretrained(model: str | None, task: GlueTask, seed: int) -> tuple[Any, Any]:
    at_hand = cache_directory() / MINILM
    source = model or (str(at_hand) if at_hand.is_dir() else MINILM_ID)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        found = through_transformers(
            "AutoModelForSequenceClassification", source, "an encoder", num_labels=task.classes, dtype=torch.float32
        )
    return _tokenizer(source), found


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


def glue_rows(settings: Settings, task: str) -> tuple[list[GlueRow], list[GlueRow], list[GlueRow]]:
    """Rows to learn, to validate on and to score; a few words in a quick pass, which needs no file."""
    if settings.scale != "quick":
        train, validation, dev = _read(task, settings.data_set("glue"))
        learnt, scored = settings.pick(quick=(8, 8), default=(TRAINING, SCORED), full=(len(train), len(dev)))
        return train[:learnt], validation, sampled(dev, scored)
    words = ["good", "bad", "fine", "poor"]
    columns = len(GLUE[task].texts)
    rows = [GlueRow((words[i % 4],) * columns, float(i % 2)) for i in range(16)]
    return rows, rows[:8], rows[:8]


@lru_cache(maxsize=3)
def _read(task: str, directory: Any) -> tuple[list[GlueRow], list[GlueRow], list[GlueRow]]:
    """Training rows without those to validate on, those, and the development rows."""
    rows = read_glue(GLUE[task], directory)
    order = random.Random(SEARCH_SEED).sample(range(len(rows)), len(rows))
    held_out = [rows[place] for place in order[:VALIDATION]]
    return [rows[place] for place in order[VALIDATION:]], held_out, read_glue(GLUE[task], directory, "dev")


def sampled(rows: Sequence[GlueRow], count: int) -> list[GlueRow]:
    """So many rows, always the same: STS-B has its development rows sorted by their source."""
    return random.Random(0).sample(list(rows), min(count, len(rows)))
